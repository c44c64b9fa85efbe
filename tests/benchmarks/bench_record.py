"""What recording costs: a decode step of a 2-layer Llama through a static cache, eager against recorded, in one run.

    python -m tests.benchmarks.bench_record

Prints markdown: medians in turns after a warm-up. "verified", the default, adds the replay that checks the recording.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from graph_capture import record

REPEATS = 15


def in_turns(functions: list[Callable[[], Any]]) -> list[float]:
    """Median seconds of each function."""
    samples: list[list[float]] = [[] for _ in functions]
    for index in range(REPEATS + 3):
        for function, times in zip(functions, samples, strict=True):
            start = time.perf_counter()
            function()
            if index >= 3:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in samples]


def bench(width: int) -> str:
    """One row of the table."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=2,
        num_attention_heads=max(4, width // 64),
        num_key_value_heads=max(2, width // 256),
        vocab_size=32000,
    )
    model = LlamaForCausalLM(config).eval()
    cache = StaticCache(config=config, max_cache_len=256)
    token = torch.zeros(1, 1, dtype=torch.int64)

    def step() -> torch.Tensor:
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits

    def recorded(verify: bool) -> Callable[[], None]:
        def run() -> None:
            with record(token, verify=verify) as recording:
                recording.output(step())

        return run

    with torch.no_grad():
        step()
        eager, unverified, verified = in_turns([step, recorded(False), recorded(True)])
    return f"| {width} | {unverified / eager:.1f} | {verified / eager:.1f} | {(unverified - eager) * 1e3:.0f} |"


def main() -> None:
    """Print the table."""
    print(f"{torch.get_num_threads()} threads; torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| width | recorded / eager | recorded and verified / eager | recording adds, ms |")
    print("| --- | --- | --- | --- |")
    for width in (64, 256, 1024, 2048):
        print(bench(width), flush=True)


if __name__ == "__main__":
    main()
