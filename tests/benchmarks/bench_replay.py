"""Whole forwards of Llama, called from Python: eager, torch.compile, unfused and fused replay, side by side in one run.

    python -m tests.benchmarks.bench_replay [--quick] [--plot FILE.png]

Prints markdown. Steady state: medians, all sides in turns, a burst of calls each. Cold start: from the plain model to
the first result; ours records, fuses, compiles and decides; neither has caches on disk. Memory: of intermediate
values, as planned and as eager holds them; on CUDA the peak over a call that the allocator reports. On CUDA also the
device's own time for a fused replay, Python being ahead of it, against the sum of its kernels' times. `bench_start`
measures warm starts.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from graph_capture import FusionConfig, fuse, record

SIZES = {"tiny": (2, 64, 128), "small": (4, 256, 1024), "medium": (4, 1024, 4096)}  # layers, hidden size, vocabulary
LENGTH = 128  # of the prefill, and half of the cache
BURST, WARM = 10, 2  # calls of one side in a row, and how many of them only warm it up
Step = Callable[[], Any]


@dataclass
class Row:
    """One model, dtype and phase: seconds a call and a cold start of each side, bytes of intermediate values; on CUDA
    the device's seconds for a fused replay, and for its kernels."""

    name: str
    steady: dict[str, float]
    cold: dict[str, float]
    planned: int
    eager: int
    on_device: tuple[float, float] | None = None


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(steps: dict[str, Step], device: str, bursts: int) -> dict[str, float]:
    """Median seconds of a call of each, in bursts: a decode step follows itself, and not another's caches."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(bursts):
        for name, step in steps.items():
            times = [once(step, device) for _ in range(BURST)]
            samples[name] += times[WARM:]
    return {name: statistics.median(times) for name, times in samples.items()}


def once(step: Step, device: str) -> float:
    """Seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def build(size: str, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A Llama with random weights."""
    layers, hidden, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=max(4, hidden // 64),
        num_key_value_heads=max(2, hidden // 128),
        vocab_size=vocabulary,
    )
    return LlamaForCausalLM(config).eval().to(device, dtype)


def bench(size: str, dtype: torch.dtype, phase: str, device: str, bursts: int) -> Row:
    """Measure one row, with no cache of torch.compile's on disk."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        return _bench(size, dtype, phase, device, bursts)


def _bench(size: str, dtype: torch.dtype, phase: str, device: str, bursts: int) -> Row:
    model = build(size, dtype, device)
    length = LENGTH if phase == "prefill" else 1
    ids = torch.randint(0, SIZES[size][2], (1, length), device=device)
    cache = StaticCache(config=model.config, max_cache_len=2 * LENGTH)

    def forward(ids: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        if phase == "prefill":
            return model(input_ids=ids, use_cache=False).logits
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    def from_start(function: Callable[..., Any]) -> Step:
        def step() -> None:
            for layer in cache.layers:  # the position, which each call moves on
                getattr(layer, "cumulative_length", torch.zeros(())).zero_()
            function(ids, cache)

        return step

    made: dict[str, Any] = {}

    def ours() -> None:
        with record(ids, cache) as recording:
            recording.output(forward(ids, cache))
        made["graph"] = recording.graph
        with tempfile.TemporaryDirectory() as folder:
            made["fused"] = fuse(recording.graph, FusionConfig(cache_dir=folder))
        from_start(made["fused"])()

    modes = {"torch.compile": None} | ({"reduce-overhead": "reduce-overhead"} if device == "cuda" else {})
    from_start(forward)()
    cold = {"ours": once(ours, device)}
    steps = {"eager": from_start(forward)}
    for name, mode in modes.items():
        torch.compiler.reset()
        steps[name] = from_start(torch.compile(forward, dynamic=False, mode=mode))
        cold[name] = once(steps[name], device)
    steps["unfused replay"] = from_start(made["graph"].run)
    steps["fused replay"] = from_start(made["fused"])
    steady = in_turns(steps, device, bursts)
    plan = made["fused"].plan
    planned = sum(plan.peak_bytes.values()) if plan else 0
    eager = sum(plan.eager_bytes.values()) if plan else 0
    row = Row(f"{size}, {phase}, {str(dtype).removeprefix('torch.')}", steady, cold, planned, eager)
    if device == "cuda":
        row.planned, row.eager = (peak_memory(steps[name]) for name in ("fused replay", "eager"))
        row.on_device = on_device(steps["fused replay"])
    return row


def on_device(step: Step, calls: int = 20) -> tuple[float, float]:
    """The device's seconds for a call, and the sum of its kernels' and copies' times."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # a tenth of a second: all calls are launched before the first one runs
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    kernels = sum(event.self_device_time_total for event in profiled.key_averages())
    return start.elapsed_time(end) / 1e3 / calls, kernels / 1e6 / calls


def peak_memory(step: Step) -> int:
    """Bytes that a call allocates at most beyond what is held."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def table(rows: list[Row]) -> str:
    """The rows as markdown."""
    sides = list(rows[0].steady)
    lines = [
        f"| Llama | {' | '.join(f'{side}, ms' for side in sides)} | unfused / eager | fused / eager "
        "| fused / torch.compile |",
        "| --- " * (len(sides) + 4) + "|",
    ]
    for row in rows:
        times, eager, unfused = row.steady, row.steady["eager"], row.steady["unfused replay"]
        fused = times["fused replay"]
        cells = [f"{times[side] * 1e3:.2f}" for side in sides]
        cells += [f"{unfused / eager:.2f}", f"{fused / eager:.2f}", f"{fused / times['torch.compile']:.2f}"]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    lines += ["", "| Llama | ours, cold, s | torch.compile, cold, s | ratio | planned, KiB | eager, KiB |"]
    lines.append("| --- " * 6 + "|")
    for row in rows:
        ours, theirs = row.cold["ours"], row.cold["torch.compile"]
        memory = f"{row.planned / 1024:.0f} | {row.eager / 1024:.0f}"
        lines.append(f"| {row.name} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.3f} | {memory} |")
    timed = [(row.name, *row.on_device) for row in rows if row.on_device is not None]
    if timed:
        lines += ["", "| Llama | fused replay on the device, us | its kernels, us | ratio |", "| --- " * 4 + "|"]
    for name, replay, kernels in timed:
        lines.append(f"| {name} | {replay * 1e6:.1f} | {kernels * 1e6:.1f} | {replay / kernels:.2f} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Bars of the steady state, over eager's time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sides = [side for side in rows[0].steady if side != "eager"]
    figure, axes = plt.subplots(figsize=(9, 4))
    for number, side in enumerate(sides):
        places = [index + (number - len(sides) / 2) * 0.8 / len(sides) for index in range(len(rows))]
        axes.bar(places, [row.steady[side] / row.steady["eager"] for row in rows], 0.8 / len(sides), label=side)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row.name for row in rows], rotation=30, ha="right")
    axes.set_ylabel("time, eager = 1")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model in float32 only")
    parser.add_argument("--plot", type=Path, help="where to write bars as PNG")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        f"{device}, {torch.get_num_threads()} threads; torch {torch.__version__}, Python {platform.python_version()}\n"
    )
    sizes = ["small"] if options.quick else list(SIZES)
    dtypes = [torch.float32] if options.quick else [torch.float32, torch.bfloat16]
    with torch.no_grad():
        rows = [
            bench(size, dtype, phase, device, 6 if options.quick else 10)
            for size in sizes
            for dtype in dtypes
            for phase in ("prefill", "decode")
        ]
    print(table(rows))
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
