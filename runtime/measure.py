"""Timing two ways of doing the same thing, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graph_capture.graph import TensorMeta

BUDGET = 0.005  # seconds of timed work for each side
REPEATS = 5


def compare(fallback: Callable[[], Any], fused: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Median seconds a call of each, measured in turns after a warm-up.

    A side that is slow on its own (a kernel in Triton's interpreter) is called only a few times.
    """
    functions = (fallback, fused)
    calls = []
    for function in functions:
        _time(function, 1, device)
        once = max(_time(function, 1, device), 1e-7)
        calls.append(max(1, min(1000, int(BUDGET / REPEATS / once))))
    repeats = REPEATS if calls[1] > 1 else 1
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for side, function in enumerate(functions):
            samples[side].append(_time(function, calls[side], device))
    return statistics.median(samples[0]), statistics.median(samples[1])


def _time(function: Callable[[], Any], calls: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronize(device)
    return (time.perf_counter() - start) / calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def example_inputs(names: Sequence[str], values: Mapping[str, TensorMeta], seed: int = 0) -> list[torch.Tensor]:
    """Tensors with the layouts that `values` gives `names`, filled with noise; the global RNG is left alone."""
    tensors = []
    for index, name in enumerate(names):
        meta = values[name]
        extent = 1 + sum((size - 1) * stride for size, stride in zip(meta.shape, meta.stride, strict=True) if size > 0)
        generator = torch.Generator(meta.device).manual_seed(seed + index)
        if meta.dtype.is_floating_point or meta.dtype.is_complex:
            flat = torch.randn(extent, generator=generator, device=meta.device, dtype=torch.float32).to(meta.dtype)
        else:
            flat = torch.randint(0, 2, (extent,), generator=generator, device=meta.device).to(meta.dtype)
        tensors.append(flat.as_strided(meta.shape, meta.stride))
    return tensors
