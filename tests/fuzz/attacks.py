"""``python -m tests.fuzz.attacks``: processes that are killed, a full disk, eight processes, threads, many replays."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, capture
from graph_capture.cache import VARIABLE

WORK = """
import torch, torch.nn.functional as F
from graph_capture import FusionConfig, capture
torch.manual_seed(0)
x = torch.randn(33, 64)
for number in range({count}):
    f = lambda x: F.silu(x * (number + {first})) + x.softmax(-1)
    fast = capture(f, FusionConfig(profile="static"))
    with torch.no_grad():
        assert all(torch.allclose(fast(x), f(x), atol=1e-5) for _ in range(3))
print("done", flush=True)
"""


def _start(folder: str, first: int = 1, count: int = 3, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORK.format(first=first, count=count)]
    if limit:  # no file may grow beyond so many blocks: what a full disk looks like
        command = ["bash", "-c", f'ulimit -f {limit}; trap "" XFSZ; exec "$@"', "-", *command]
    surroundings = {**os.environ, VARIABLE: folder, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=surroundings, **pipes)  # type: ignore[call-overload,no-any-return]


def _ends_well(process: subprocess.Popen[str]) -> bool:
    output, errors = process.communicate(timeout=300)
    if "done" not in output:
        print(errors[-2000:])
    return process.returncode == 0 and "done" in output


def killed(folder: str, times: int) -> str:
    """Processes that are killed while they fill a cache; then one that uses it."""
    chance = random.Random(0)
    for number in range(times):
        process = _start(folder, first=number % 4)
        time.sleep(chance.uniform(1.0, 6.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return f"{times} processes killed, the next one right: {_ends_well(_start(folder))}"


def full(folder: str) -> str:
    """A process whose files may not grow."""
    return f"a disk without room, right: {_ends_well(_start(folder, limit=8))}"


def eight(folder: str) -> str:
    """Eight processes that fill one cache at once."""
    processes = [_start(folder, first=number // 2) for number in range(8)]
    return f"8 processes, right: {sum(map(_ends_well, processes))}"


def replays(count: int) -> str:
    """One plan, many times: its results, and the memory that it takes."""
    x = torch.randn(33, 64)

    def function(x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * x + x.sort().values

    fast = capture(function, FusionConfig(profile="static"))
    with torch.no_grad():
        want = function(x)
        for _ in range(1000):
            fast(x)
        before = _resident()
        wrong = sum(not torch.allclose(fast(x), want, atol=1e-5) for _ in range(count))
    return f"{count} replays, {wrong} wrong, {(_resident() - before) / 2**20:.1f} MB more memory"


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads(count: int, each: int) -> str:
    """One captured function in several threads."""
    fast = capture(lambda x: F.silu(x) * x + 1, FusionConfig(profile="static"))
    wrong = [0] * count

    def work(number: int) -> None:
        x = torch.full((8, 16), number / 10)
        want = F.silu(x) * x + 1
        with torch.no_grad():
            wrong[number] = sum(not torch.allclose(fast(x), want) for _ in range(each))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return f"{count} threads of {each} replays, {sum(wrong)} wrong"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        print(killed(f"{place}/killed", 12), flush=True)
        print(full(f"{place}/full"), flush=True)
        print(eight(f"{place}/eight"), flush=True)
    print(threads(8, 2000), flush=True)
    print(replays(200_000), flush=True)
