"""Processes that compile kernels side by side, kept for the jobs to come.

One process (`aot_worker`) imports what compiling takes, and forks a worker for each core as there is work for them: on
a machine whose disk is cold, the imports take longer than the kernels.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("aot_worker.py")
_IGNORED = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER")  # of the environment


class Worker:
    """One process, at the other end of `connection`. It ends with that: when it is closed, or when this process ends
    however it does."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rw", encoding="utf-8")
        self.alive = True

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one job; ``{"error": text}`` where it fails, or the process does."""
        line = ""
        with contextlib.suppress(OSError, ValueError):
            self._lines.write(json.dumps(job) + "\n")
            self._lines.flush()
            line = self._lines.readline()
        if not line.endswith("\n"):
            self.close()
            return {"error": "the compiling process ended"}
        return json.loads(line)

    def idle(self) -> bool:
        """Whether it still waits for jobs: it gives up after a while."""
        return not select.select([self._connection], [], [], 0)[0]

    def close(self) -> None:
        """End it."""
        self.alive = False
        with contextlib.suppress(OSError):
            self._lines.close()
        self._connection.close()


class Server:
    """The process that forks workers. It ends, once they have, when it is closed, or when this process ends."""

    def __init__(self) -> None:
        self.settings = _settings()
        environment = {key: value for key, value in os.environ.items() if key not in _IGNORED}
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )

    def fork(self) -> Worker:
        """A new worker; one that answers nothing where the server has failed."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.suppress(OSError):
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        return Worker(ours)

    def usable(self) -> bool:
        """Whether it still waits for requests (it gives up after a while), with the settings of now."""
        return self._process.poll() is None and self.settings == _settings()

    def close(self) -> None:
        """End it."""
        self._control.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Pool:
    """Workers, as many as there are cores, forked when there is work for them."""

    def __init__(self, size: int | None = None) -> None:
        self.size = size or _cores()
        self._idle: list[Worker] = []
        self._server: Server | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Have the imports done in the background: there may be jobs soon."""
        with self._lock, contextlib.suppress(OSError):  # raised again by who has jobs
            self._started()

    def run(self, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The answers to `jobs`, in their order; ``{"error": text}`` where one fails."""
        return list(self.answers(jobs))

    def answers(self, jobs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """What `run` returns, one by one, while the others are worked on."""
        if jobs:
            with ThreadPoolExecutor(min(self.size, len(jobs))) as threads:
                yield from threads.map(self._ask, jobs)

    def _ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        worker = self._take()
        answer = worker.ask(job)
        if worker.alive:
            with self._lock:
                self._idle.append(worker)
        return answer

    def _take(self) -> Worker:
        with self._lock:
            server = self._started()
            while self._idle:
                worker = self._idle.pop()
                if worker.idle():
                    return worker
                worker.close()
            return server.fork()

    def _started(self) -> Server:
        if self._owner != os.getpid():  # in a forked child: the processes are its parent's
            self._idle, self._server, self._owner = [], None, os.getpid()
        if self._server is None or not self._server.usable():
            self._close()
            self._server = Server()
        return self._server

    def close(self) -> None:
        """End the server, and the workers that wait."""
        with self._lock:
            if self._owner == os.getpid():
                self._close()

    def _close(self) -> None:
        workers, self._idle = self._idle, []
        for worker in workers:
            worker.close()
        if self._server is not None:
            self._server.close()
            self._server = None


def _settings() -> dict[str, str]:
    """What the environment tells Triton now, and told it when a server started."""
    return {key: value for key, value in os.environ.items() if key.startswith("TRITON_") and key not in _IGNORED}


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


POOL = Pool()
atexit.register(POOL.close)
