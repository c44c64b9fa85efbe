"""How long it takes to have every kernel of a model for a GPU, cold and from disk; needs no GPU.

    python -m tests.benchmarks.bench_compile [MODEL] [--timed]

The kernels of a decode step and of a prefill of 128 tokens, in bfloat16, compiled for sm_90 as `KernelCompiler.prepare`
does before a graph's regions are decided: in a process for each core, into a cache that is new; then again by a process
that finds them there. With ``--timed`` also the candidates that a decision by measurement times. Each side is a process
of its own; imports, recording and passes are not counted, nor what a compiler does in the background meanwhile. Prints
markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time


def measure(model: str, folder: str, timed: bool) -> dict[str, float]:
    """Seconds that kernels take to be ready in this process, how many there are, and how many were compiled."""
    import torch

    from graph_capture.codegen import KernelCompiler
    from graph_capture.codegen.ninetoothed import aot_worker, host, target

    host.interpreted = target.interpreted = lambda: False  # type: ignore[assignment]
    host.import_triton()
    import triton

    from graph_capture.cache import DiskCache, environment_key
    from graph_capture.cli.kernels import _steps, kernel_for
    from graph_capture.ir.ops import FUSED

    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(aot_worker.NoDevice(90))
    compiled: list[str] = []
    answers = host.POOL.answers

    def counted(jobs):  # type: ignore[no-untyped-def]
        compiled.extend(job["name"] for job in jobs)
        return answers(jobs)

    host.POOL.answers = counted  # type: ignore[method-assign]
    compiler = KernelCompiler(
        "ninetoothed", DiskCache("kernels", folder)
    )  # before anything is recorded, as an engine's
    wanted = {}
    for _, graph in _steps(model, torch.bfloat16, 128, 2048, None):
        for node in graph.nodes:
            if node.op_type.startswith(FUSED):
                body, metas = kernel_for(graph, node)
                wanted[body, metas] = (body, metas, None if timed else 0)
    environment_key()  # of the process, once
    start = time.perf_counter()
    compiler.prepare(list(wanted.values()))
    return {"seconds": time.perf_counter() - start, "regions": len(wanted), "compiled": len(compiled)}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="llama-3-8b")
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.folder:
        print(json.dumps(measure(chosen.model, chosen.folder, chosen.timed)))
        return 0
    print(f"{chosen.model}, sm_90, {os.cpu_count()} cores\n\n| cache | kernels compiled | s |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "filled", "filled"):
            command = [sys.executable, "-m", "tests.benchmarks.bench_compile", chosen.model, "--folder", folder]
            command += ["--timed"] if chosen.timed else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"| {cache} | {found['compiled']} | {found['seconds']:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
