"""Fused kernels on the CPU against eager, torch.compile, and the bandwidth measured in the same run.

    python -m tests.benchmarks.bench_cpu_kernels [--no-compile]

Prints Markdown. Every kernel writes into tensors that are there already, as a plan has it; the others make new ones,
as they do in a model. Times are medians over rounds, in turns. "of bandwidth" is the bytes that must be read and
written over the time, as a part of what a sum over as many bytes reads in the same round: from memory, or from a
cache where they fit.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from graph_capture import KernelCompiler, record

SIZES = [(1, 2816), (16, 4096), (256, 4096), (4096, 4096)]
DTYPES = [torch.bfloat16, torch.float32]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return total, F.rms_norm(total, (total.shape[-1],), weight, 1e-6)


def softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x * 0.125, -1)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


FUNCTIONS: dict[Callable[..., Any], str] = {swiglu: "ff", add_rms_norm: "ffw", softmax: "f", geglu: "ff"}


def tensors(shapes: str, rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """``f``: full, ``w``: one row."""
    return [torch.randn((rows, columns) if kind == "f" else (columns,)).to(dtype) for kind in shapes]


def in_turns(functions: list[Callable[[], Any]], rounds: int = 12) -> list[list[float]]:
    """Seconds a call of each, for each round, in which they take turns."""
    calls = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        calls.append(max(1, int(0.02 / (time.perf_counter() - start + 1e-7))))
    found = []
    for _ in range(rounds):
        found.append([])
        for count, function in zip(calls, functions, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                function()
            found[-1].append((time.perf_counter() - start) / count)
    return found


def reading(nbytes: int) -> list[Callable[[], Any]]:
    """Two ways to read so many bytes, as a sum of rows: a kernel of ours, and torch's."""
    rows = torch.ones(max(1, nbytes // 4096), 1024)
    with record(rows) as recording:
        recording.output(rows.sum(-1))
    kernel = KernelCompiler("c").compile(recording.graph.subgraph, [rows.dtype], [rows.shape])
    outputs = kernel.spec.allocate([rows])
    launch = kernel.prepare([rows], outputs)  # by address: who calls it keeps the tensors
    return [lambda held=(rows, outputs): launch(), functools.partial(rows.sum, -1)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    compiler = KernelCompiler("c")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; times in microseconds\n")
    print("| kernel | dtype | size | ours | torch.compile | eager | ours / compile | of bandwidth |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for function, shapes in FUNCTIONS.items():
        for dtype in DTYPES:
            torch._dynamo.reset()
            compiled = torch.compile(function, dynamic=False)
            for rows, columns in SIZES:
                inputs = tensors(shapes, rows, columns, dtype)
                with torch.no_grad(), record(*inputs) as recording:
                    recording.output(function(*inputs))
                graph = recording.graph.subgraph
                kernel = compiler.compile(graph, [t.dtype for t in inputs], [t.shape for t in inputs])
                outputs = kernel.spec.allocate(inputs)
                launch = kernel.prepare(inputs, outputs)
                nbytes = sum(t.nbytes for t in (*inputs, *outputs))
                sides = [launch, *reading(nbytes), functools.partial(function, *inputs)]
                if not options.no_compile:
                    sides.append(functools.partial(compiled, *inputs))
                with torch.no_grad():
                    times = in_turns(sides)
                ours, _, _, eager, *rest = (statistics.median(side) for side in zip(*times, strict=True))
                theirs = rest[0] if rest else float("nan")
                part = statistics.median(min(each[1:3]) / each[0] for each in times)  # the bus is others' as well
                print(
                    f"| {function.__name__} | {str(dtype)[6:]} | {rows} x {columns} | {ours * 1e6:.1f} | "
                    f"{theirs * 1e6:.1f} | {eager * 1e6:.1f} | {ours / theirs:.2f} | {part:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
