"""What a call through `capture` costs before its replay: signature and guards, against torch.compile's, in one run.

    python -m tests.benchmarks.bench_capture

Prints markdown: the best of many calls of Llamas of 2, 12 and 32 layers. torch.compile is given a backend whose graphs
return a result that is there, so that its call is guards and little else.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from graph_capture import FusionConfig, capture
from graph_capture.calls.context import context, transformed
from tests.models import tiny_llama, token_ids

REPEATS, CALLS = 15, 20


def in_turns(functions: list[Callable[[], Any]]) -> list[float]:
    """The least microseconds that a call of each function took, in turns."""
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(REPEATS):
        for function, times in zip(functions, samples, strict=True):
            function()
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            times.append((time.perf_counter() - start) / CALLS * 1e6)
    return [min(times) for times in samples]


def there_already(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """A backend: the result of the first call, at each call."""
    made = module(*inputs)
    return lambda *given: made


def bench(layers: int) -> str:
    """One row of the table."""
    model, ids = tiny_llama(layers), token_ids()

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    fast = capture(model, FusionConfig(enable_fusion=False))
    given = {"input_ids": ids, "use_cache": False}
    compiled = torch.compile(forward, backend=there_already)
    for _ in range(3):
        fast(**given)
        compiled(ids)

    def ours() -> None:
        assert transformed() is None
        assert fast._at_once(context(), (), given) is not None

    mine, theirs = in_turns([ours, lambda: compiled(ids)])
    return f"| {layers} | {len(fast.graphs[0].recorded.guards)} | {mine:.0f} | {theirs:.0f} |"


def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, Python {platform.python_version()}; microseconds a call\n")
    print("| layers | guards | graph_capture | torch.compile |\n| --- | --- | --- | --- |")
    with torch.no_grad():
        for layers in (2, 12, 32):
            print(bench(layers), flush=True)


if __name__ == "__main__":
    main()
