"""Linears and attention of few rows on a CUDA device, against cuBLAS and torch's attention; prints markdown.

    python -m tests.benchmarks.bench_decode

Llama-3-8B's shapes in bfloat16. A gate is against cuBLAS with the merged weight, followed by our kernel of the rest.
Each kernel is timed inside a replayed CUDA graph over weights, or caches, that rotate, so that they come from memory
and not from the L2 cache.
"""

from __future__ import annotations

import platform
import sys

import torch
import torch.nn.functional as F

from graph_capture import KernelCompiler, OpNode, SubGraph
from graph_capture.codegen import CompiledKernel
from graph_capture.codegen.spec.linear import ALONE_ROWS
from graph_capture.ir.values import TensorMeta
from graph_capture.passes import create_swiglu_pattern
from tests.benchmarks.bench_gpu import WORKING_SET, in_graph

LINEARS = {  # columns, inner, whether two of them gate each other
    "k or v": (1024, 4096, False),
    "o": (4096, 4096, False),
    "q, k, v": (6144, 4096, False),
    "gate, up": (14336, 4096, True),
    "down": (4096, 14336, False),
    "lm_head": (128256, 4096, False),
}
PLAIN = SubGraph((OpNode("linear", ("x", "w"), ("y",)),), ("x", "w"), ("y",))
GATED = SubGraph(
    (
        OpNode("linear", ("x", "w"), ("gate",)),
        OpNode("linear", ("x", "v"), ("up",)),
        OpNode("silu", ("gate",), ("act",)),
        OpNode("mul", ("act", "up"), ("y",)),
    ),
    ("x", "w", "v"),
    ("y",),
)
KV_HEADS, GROUP, WIDTH = 8, 4, 128


def kernel_of(graph: SubGraph, inputs: list[torch.Tensor]) -> CompiledKernel:
    """The kernel of `graph` for these inputs."""
    metas = [TensorMeta.of(tensor) for tensor in inputs]
    dtypes, shapes, strides = ([getattr(m, field) for m in metas] for field in ("dtype", "shape", "stride"))
    return KernelCompiler("ninetoothed").compile(graph, dtypes, shapes, strides)


def best_of(graph: SubGraph, sets: list[list[torch.Tensor]]) -> float:
    """Seconds of the kernel of `graph`, over these sets of inputs; of its candidates the fastest."""
    kernel = kernel_of(graph, sets[0])
    outputs = kernel.spec.allocate(sets[0])
    ways = kernel.candidates((*sets[0], *outputs))
    return min(in_graph([way.prepare(tensors, outputs) for tensors in sets]) for way in ways)


def bench_linear(name: str, rows: int) -> str:
    """One row of the linears' table."""
    columns, inner, gated = LINEARS[name]
    x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    height = columns * (2 if gated else 1)
    copies = max(1, min(16, WORKING_SET // (2 * height * inner)))
    weights = [torch.randn(height, inner, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    sets = [[x, *weight.chunk(2)] if gated else [x, weight] for weight in weights]

    merged = x.new_empty(rows, height)
    halves = list(merged.chunk(2, -1))
    gate = kernel_of(create_swiglu_pattern(), halves) if gated else None

    def library(weight: torch.Tensor) -> None:
        torch.mm(x, weight.t(), out=merged)
        if gate is not None:
            gate(*halves)

    ours = best_of(GATED if gated else PLAIN, sets)
    theirs = in_graph([lambda w=w: library(w) for w in weights])
    return f"| {name} | {rows} | {ours * 1e6:.1f} | {theirs / ours:.2f} | {weights[0].nbytes / ours / 1e12:.2f} |"


def bench_attention(length: int, valid: int) -> str:
    """One row of attention's table: one query on a static cache of `length` places, of which `valid` are filled."""
    query = torch.randn(1, KV_HEADS * GROUP, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
    copies = max(2, WORKING_SET // (4 * KV_HEADS * length * WIDTH))
    caches = [torch.randn(2, 1, KV_HEADS, length, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    mask = (torch.arange(length, device="cuda") < valid)[None, None, None]
    graph = SubGraph(
        (OpNode("scaled_dot_product_attention", ("q", "k", "v", "m"), ("y",), (("enable_gqa", True),)),),
        ("q", "k", "v", "m"),
        ("y",),
    )
    ours = best_of(graph, [[query, *cache, mask] for cache in caches])
    grouped = in_graph([lambda c=c: F.scaled_dot_product_attention(query, *c, mask, enable_gqa=True) for c in caches])
    folded = query.view(1, KV_HEADS, GROUP, WIDTH)  # as transformers calls it
    as_rows = in_graph([lambda c=c: F.scaled_dot_product_attention(folded, *c, mask) for c in caches])
    return f"| {length} | {valid} | {ours * 1e6:.1f} | {grouped / ours:.2f} | {as_rows / ours:.2f} |"


def main() -> int:
    """Print the tables."""
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 1
    import triton

    device = torch.cuda.get_device_name()
    print(f"{device}; torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}\n")
    print("| linear | rows | us | torch / ours | weights, TB/s |")
    print("| --- | --- | --- | --- | --- |")
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for name in LINEARS if rows <= ALONE_ROWS else ["gate, up"]:
            print(bench_linear(name, rows), flush=True)
            torch.cuda.empty_cache()
    print("\n| cache | filled | us | sdpa / ours | sdpa, groups as rows / ours |")
    print("| --- | --- | --- | --- | --- |")
    for length in (2048, 8192):
        for valid in (100, 1000, length):
            print(bench_attention(length, valid), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
