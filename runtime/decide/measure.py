"""Timing several ways of doing the same thing, side by side, as they will run in a replay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graph_capture.ir.values import TensorMeta
from graph_capture.log import log

SAMPLE = 0.001  # seconds of one sample: many calls of a short function
REPEATS = 5  # samples of each side, at most:
PLAIN = 1.05  # what is so many times faster, and by more than samples differ, needs no more
LIMIT = 0.05  # seconds for all samples of all sides: slower functions get fewer,
FEWEST = 3  # but not fewer than these,
PATIENCE = 0.2  # unless one call of each takes so many seconds: then two; one, if a single call does


def compare(functions: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Seconds a call of each: the least of several samples taken in turns, for what disturbs one only adds to it.

    On CUDA they run inside replayed CUDA graphs, where all can be captured. One that is slow on its own (a kernel
    in Triton's interpreter) is called only a few times.
    """
    sides = [_Side(function, device) for function in functions]
    if device.type == "cuda":
        graphs = [_captured(side, device) for side in sides]
        if None not in graphs:
            for side, graph in zip(sides, graphs, strict=True):
                assert graph is not None
                side.replays(graph)
    cost = sum(side.once * side.calls for side in sides)
    rounds = max(FEWEST, min(REPEATS, int(LIMIT / cost)))
    if cost > PATIENCE:
        rounds = int(all(side.once <= PATIENCE for side in sides))
    for _ in range(rounds):
        for side in sides:
            side.samples.append(side.sample())
        if _is_plain(sides):
            break
    return [min(side.samples, default=side.once) for side in sides]


def _is_plain(sides: Sequence[_Side]) -> bool:
    """Whether it is clear which of the sides is the fastest."""
    least = sorted(min(side.samples) for side in sides)
    return least[1] > least[0] * max(PLAIN, *(side.spread**2 for side in sides))


class _Side:
    """One of the functions.

    Attributes:
        once: seconds of one call, roughly.
        calls: how many calls make a sample.
        samples: seconds a call.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self.function, self._device = function, device
        self._runs = 1  # of `function` in one sample
        self.calls = 1
        first = self.sample()
        compiles = device.type == "cuda"  # at the first call; only an interpreted kernel is slow for good
        slow = first > min(LIMIT, PATIENCE) and not compiles
        calls = [first] if slow else [first, self.sample()]
        self.once = max(min(calls), 1e-7)
        self._runs = self.calls = max(1, min(1000, int(SAMPLE / self.once)))
        self.samples: list[float] = calls if self.calls == 1 else []

    @property
    def spread(self) -> float:
        """How many times longer than the shortest sample the next one is."""
        least = sorted(self.samples)[:2]
        return least[1] / least[0] if len(least) == 2 else math.inf

    def replays(self, graph: torch.cuda.CUDAGraph) -> None:
        """From now on a sample is one replay of `graph`, which holds `calls` calls."""
        self.function, self._runs, self.samples = graph.replay, 1, []
        self.sample()

    def sample(self) -> float:
        """Seconds a call."""
        function = self.function
        if self._device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with torch.cuda.device(self._device):
                begin.record()
                for _ in range(self._runs):
                    function()
                end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / self.calls
        start = time.perf_counter()
        for _ in range(self._runs):
            function()
        return (time.perf_counter() - start) / self.calls


def _captured(side: _Side, device: torch.device) -> torch.cuda.CUDAGraph | None:
    """A CUDA graph of as many calls as make a sample; None where something in them cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(side.calls):
                side.function()
    except RuntimeError as error:
        log.debug("measured without a CUDA graph: %s", error)
        torch.cuda.synchronize(device)
        return None
    return graph


def example_inputs(names: Sequence[str], values: Mapping[str, TensorMeta], seed: int = 0) -> list[torch.Tensor]:
    """Tensors with the layouts that `values` gives `names`: noise, true, and zeros for integers, which may be indices.

    The global random generator is left alone.
    """
    tensors = []
    for index, name in enumerate(names):
        meta = values[name]
        extent = 1 + sum((size - 1) * stride for size, stride in zip(meta.shape, meta.stride, strict=True) if size > 0)
        if meta.dtype.is_floating_point or meta.dtype.is_complex:
            generator = torch.Generator(meta.device).manual_seed(seed + index)
            flat = torch.randn(extent, generator=generator, device=meta.device, dtype=torch.float32).to(meta.dtype)
        else:
            flat = torch.full((extent,), meta.dtype is torch.bool, device=meta.device, dtype=meta.dtype)
        tensors.append(flat.as_strided(meta.shape, meta.stride))
    return tensors
