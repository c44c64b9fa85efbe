"""Fused kernels and whole replays on a CUDA device, side by side in one run; prints markdown.

    python -m tests.benchmarks.bench_gpu

Each kernel is timed inside a replayed CUDA graph, over inputs that rotate, so that they come from memory and not from
the L2 cache; medians over repeats. "of copy" is the bytes that the op must move, over its time, against a
device-to-device copy of a large tensor in the same run. The last table times whole forwards as a user calls them, with
Python's cost of launching included.
"""

from __future__ import annotations

import functools
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, KernelCompiler, OpNode, SubGraph, fuse, record
from graph_capture.passes import create_add_rms_norm_pattern, create_geglu_pattern, create_swiglu_pattern

WORKING_SET = 512 * 2**20  # bytes of inputs to rotate over, several times the L2
MERGED = "SwiGLU, one projection"  # its gate and up are halves of one tensor
WIDTH, KEYS = 128, 8  # of RoPE: elements of a head, heads of the key
SHAPES = ((1, 4096), (16, 4096), (512, 4096), (4096, 4096), (4096, 14336))


def in_graph(calls: Iterable[Callable[[], Any]], repeats: int = 20) -> float:
    """Median seconds of one call, all calls being captured in one CUDA graph.

    Results are kept, so that each call writes into memory of its own: what is written again and again stays in the L2.
    """
    calls = list(calls)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    seconds = timed(graph.replay, repeats) / len(calls)
    del kept
    return seconds


def timed(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median seconds of a call on the device's clock, after a warm-up."""
    samples = []
    for index in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if index >= 3:
            samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source))


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The recorded ops of SwiGLU."""
    return F.silu(gate) * up


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The recorded ops of GEGLU."""
    return F.gelu(gate) * up


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add+RMSNorm as Hugging Face's models spell it."""
    total = x + residual
    hidden = total.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
    return total, weight * hidden.to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """LayerNorm."""
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Softmax of rows."""
    return F.softmax(x, -1)


def rope(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    """RoPE of query and key as Hugging Face's models spell it."""
    halves = [tensor.chunk(2, dim=-1) for tensor in (query, key)]
    turned = [torch.cat((-second, first), dim=-1) for first, second in halves]
    return [tensor * cos + other * sin for tensor, other in zip((query, key), turned, strict=True)]


@dataclass(frozen=True)
class Case:
    """A kernel to time.

    Attributes:
        operands: "m" for a matrix, "v" for a vector over its columns, "q" for heads of 128 elements, as many as fill
            the columns but 8, "k" for those 8, "t" for a table of these.
        by_hand: launches the hand-written kernel on inputs, outputs, rows and columns; None where there is none.
    """

    name: str
    graph: SubGraph
    eager: Callable[..., Any]
    operands: str
    by_hand: Callable[[list[torch.Tensor], list[torch.Tensor], int, int], Any] | None = None
    shapes: Sequence[tuple[int, int]] = SHAPES

    def inputs(self, rows: int, columns: int) -> list[torch.Tensor]:
        """Random inputs in bfloat16."""
        if self.name == MERGED:
            return list(torch.randn((rows, 2 * columns), device="cuda", dtype=torch.bfloat16).chunk(2, dim=-1))
        shapes = {"m": (rows, columns), "v": (columns,), "t": (1, 1, rows, WIDTH)}
        shapes |= {"q": (1, rows, columns // WIDTH - KEYS, WIDTH), "k": (1, rows, KEYS, WIDTH)}
        made = [torch.randn(shapes[operand], device="cuda", dtype=torch.bfloat16) for operand in self.operands]
        return [t.transpose(1, 2) if o in "qk" else t for o, t in zip(self.operands, made, strict=True)]


def cases() -> list[Case]:
    """What is timed."""
    from tests.benchmarks import triton_references as hand

    def by_rows(kernel: Any, *constants: float) -> Callable[..., Any]:
        def launch(inputs: list[torch.Tensor], outputs: list[torch.Tensor], rows: int, columns: int) -> None:
            block = 1 << (columns - 1).bit_length()
            kernel[(rows,)](*inputs, *outputs, *constants, COLUMNS=columns, BLOCK=block, num_warps=8)

        return launch

    def flat(inputs: list[torch.Tensor], outputs: list[torch.Tensor], rows: int, columns: int) -> None:
        count = rows * columns
        hand.swiglu[(-(-count // 2048),)](*inputs, *outputs, count, BLOCK=2048, num_warps=4)

    def by_token(inputs: list[torch.Tensor], outputs: list[torch.Tensor], rows: int, columns: int) -> None:
        sizes = {"HEADS": columns // WIDTH - KEYS, "GROUPS": KEYS, "HALF": WIDTH // 2}
        hand.rope[(rows,)](*inputs, *outputs, **sizes, num_warps=4)

    turns = (OpNode("rope", ("q", "cos", "sin"), ("x",)), OpNode("rope", ("k", "cos", "sin"), ("y",)))
    heads = SubGraph(turns, ("q", "k", "cos", "sin"), ("x", "y"))
    norm = SubGraph((OpNode("layer_norm", ("x", "w", "b"), ("y",)),), ("x", "w", "b"), ("y",))
    weights = SubGraph((OpNode("softmax", ("x",), ("y",), {"dim": -1}),), ("x",), ("y",))
    return [
        Case("SwiGLU", create_swiglu_pattern(), swiglu, "mm", flat),
        Case(MERGED, create_swiglu_pattern(), swiglu, "mm"),
        Case("GEGLU", create_geglu_pattern(), geglu, "mm"),
        Case("Add+RMSNorm", create_add_rms_norm_pattern(), add_rms_norm, "mmv", by_rows(hand.add_rms_norm, 1e-6)),
        Case("LayerNorm", norm, layer_norm, "mvv", by_rows(hand.layer_norm, 1e-5)),
        Case("softmax", weights, softmax, "m", by_rows(hand.softmax)),
        Case("RoPE", heads, rope, "qktt", by_token, tuple((rows, 40 * WIDTH) for rows in (1, 16, 512, 4096))),
    ]


def bench_kernel(case: Case, rows: int, columns: int, copy: float) -> str:
    """One row of the kernels' table."""
    first = case.inputs(rows, columns)
    sets = [first] + [case.inputs(rows, columns) for _ in range(min(63, WORKING_SET // sum(t.nbytes for t in first)))]
    kernel = KernelCompiler().compile(
        case.graph, [t.dtype for t in first], [t.shape for t in first], [t.stride() for t in first]
    )
    torch.compiler.reset()  # its limit of recompilations would count all shapes together
    compiled = torch.compile(case.eager, dynamic=False)
    outputs = kernel.spec.allocate(first)
    moved = sum(t.nbytes for t in (*first, *outputs))
    t_eager = in_graph([lambda s=s: case.eager(*s) for s in sets])
    t_compiled = in_graph([lambda s=s: compiled(*s) for s in sets])
    ways = kernel.candidates((*first, *outputs))  # as a decision by measurement takes the fastest
    times = [in_graph([each.prepare(s, each.spec.allocate(s)) for s in sets]) for each in ways]
    t_fused = min(times)
    hand = ""
    if case.by_hand is not None:
        calls = [functools.partial(case.by_hand, s, kernel.spec.allocate(s), rows, columns) for s in sets]
        hand = f"{in_graph(calls) / t_fused:.2f}"
    return (
        f"| {case.name} | {rows} x {columns} | {t_fused * 1e6:.2f} | {t_eager / t_fused:.2f} | "
        f"{t_compiled / t_fused:.2f} | {hand} | {moved / t_fused / copy:.2f} | "
        f"{times.index(t_fused)} of {len(times)} | {times[0] / t_fused:.2f} |"
    )


def bench_model(layers: int, hidden: int, intermediate: int, length: int) -> str:
    """One row of the models' table: a Llama's forward in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        vocab_size=32000,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    ids = torch.randint(0, 32000, (1, length), device="cuda")

    def eager() -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    with torch.no_grad():
        with record(input_ids=ids) as recording:
            recording.output(eager())
        graph = recording.graph
        fused = fuse(graph, FusionConfig())
        compiled = torch.compile(lambda ids: model(input_ids=ids, use_cache=False).logits, dynamic=False)
        t_eager, t_unfused = timed(eager), timed(lambda: graph.run(input_ids=ids))
        t_fused, t_compiled = timed(lambda: fused(input_ids=ids)), timed(lambda: compiled(ids))
    used = sum(bool(region.decision) for region in fused.regions)
    return (
        f"| {layers} layers, {hidden} wide, {length} tokens | {t_fused * 1e3:.2f} | {t_eager / t_fused:.2f} | "
        f"{t_unfused / t_fused:.2f} | {t_compiled / t_fused:.2f} | {used} of {len(fused.regions)} |"
    )


def main() -> int:
    """Print the tables."""
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 1
    import ninetoothed  # noqa: F401
    import triton

    device = torch.cuda.get_device_name()
    print(f"{device}; torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}\n")
    copy = copy_bandwidth()
    print(f"Copy bandwidth (read and written): {copy / 1e12:.2f} TB/s. Kernels in bfloat16:\n")
    columns = (
        "kernel | shape | us | eager / ours | torch.compile / ours | by hand / ours | of copy | choice | first / it"
    )
    print(f"| {columns} |")
    print("| --- " * len(columns.split(" | ")) + "|")
    for case in cases():
        for shape in case.shapes:
            print(bench_kernel(case, *shape, copy), flush=True)
    print("\nWhole forwards (prefill, no cache), bfloat16, called from Python:\n")
    print("| Llama | fused, ms | eager / fused | unfused replay / fused | torch.compile / fused | regions used |")
    print("| --- | --- | --- | --- | --- | --- |")
    for sizes in ((4, 1024, 2816, 16), (8, 4096, 14336, 1), (8, 4096, 14336, 512), (8, 4096, 14336, 2048)):
        print(bench_model(*sizes), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
