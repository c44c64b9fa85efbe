"""Processes that compile kernels side by side: `aot_worker`, one for each core, kept for the jobs to come."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("aot_worker.py")
_IGNORED = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER")  # of the environment


class Worker:
    """One process. It ends with its input: when it is closed, or when this process ends however it does."""

    def __init__(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in _IGNORED}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        self.alive = True

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one job; ``{"error": text}`` where it fails, or the process does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            self.close()
            return {"error": f"the compiling process ended with {self._process.returncode}"}
        return json.loads(line)

    def idle(self) -> bool:
        """Whether it still waits for jobs: it gives up after a while."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it."""
        self.alive = False
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Pool:
    """Workers, as many as there are cores, started when there is work for them."""

    def __init__(self, size: int | None = None) -> None:
        self.size = size or _cores()
        self._idle: list[Worker] = []
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def run(self, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The answers to `jobs`, in their order; ``{"error": text}`` where one fails."""
        if not jobs:
            return []
        with ThreadPoolExecutor(min(self.size, len(jobs))) as threads:
            return list(threads.map(self._ask, jobs))

    def _ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        worker = self._take()
        answer = worker.ask(job)
        if worker.alive:
            with self._lock:
                self._idle.append(worker)
        return answer

    def _take(self) -> Worker:
        with self._lock:
            if self._owner != os.getpid():  # in a forked child: the processes are its parent's
                self._idle, self._owner = [], os.getpid()
            while self._idle:
                worker = self._idle.pop()
                if worker.idle():
                    return worker
                worker.close()
        return Worker()

    def close(self) -> None:
        """End the workers that wait."""
        with self._lock:
            workers, self._idle = self._idle, []
        if self._owner == os.getpid():
            for worker in workers:
                worker.close()


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


POOL = Pool()
atexit.register(POOL.close)
