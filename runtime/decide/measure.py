"""Timing several ways of doing the same thing, side by side, as they will run in a replay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graph_capture.ir.values import TensorMeta
from graph_capture.log import log

try:
    import resource
except ImportError:  # where there is none, spreads alone say how sure a time is
    resource = None  # type: ignore[assignment]

SAMPLE = 0.001  # seconds of one sample: many calls of a short function
REPEATS = 5  # samples of each side, at most,
RESTLESS = 12  # and while others run in their places
PLAIN = 1.05  # what is so many times faster, and by more than samples differ, needs no more
LIMIT = 0.05  # seconds for all samples of all sides: slower functions get fewer,
FEWEST = 3  # but not fewer than these,
PATIENCE = 0.2  # unless one call of each takes so many seconds: then two; one, if a single call does
STEADY = 1.25  # how many times longer than the shortest sample the next may be, for a time to be sure


class Timing(float):
    """Seconds a call: the least of the samples of one function.

    Attributes:
        spread: how many times longer than the shortest sample the next one was.
        disturbed: whether something else ran in our place during every sample: the least may be far too long.
    """

    spread = 1.0
    disturbed = False

    @classmethod
    def of(cls, seconds: float, spread: float, disturbed: bool) -> Timing:
        """A time and how sure it is."""
        made = cls(seconds)
        made.spread, made.disturbed = spread, disturbed
        return made


def is_doubtful(timings: Sequence[float]) -> bool:
    """Whether another measurement might call another side the faster: all samples of one were disturbed, or they differ
    by more than the sides do."""
    least = sorted(timings)
    spread = spread_of(timings)
    close = spread > STEADY and least[1] <= least[0] * spread**2
    return close or any(getattr(timing, "disturbed", False) for timing in timings)


def spread_of(timings: Sequence[float]) -> float:
    """How far samples of one of the sides lie apart, at most."""
    return max(getattr(timing, "spread", 1.0) for timing in timings)


def compare(functions: Sequence[Callable[[], Any]], device: torch.device) -> list[Timing]:
    """The time of each: the least of several samples taken in turns, for what disturbs one only adds to it.

    Where the system has let others run during all of a side's samples there are more of them. On CUDA they run inside
    replayed CUDA graphs, where all can be captured. One that is slow on its own (a kernel in Triton's interpreter) is
    called only a few times.
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
    most = rounds if cost > LIMIT else RESTLESS
    for done in range(most):
        if done >= rounds and not any(side.disturbed for side in sides):
            break
        for side in sides:
            side.add()
        if _is_plain(sides) and not any(side.disturbed for side in sides):
            break
    return [side.timing for side in sides]


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
        self._clean: bool | None = None  # whether a sample was; None before one was looked at
        first = self.sample()
        compiles = device.type == "cuda"  # at the first call; only an interpreted kernel is slow for good
        slow = first > min(LIMIT, PATIENCE) and not compiles
        calls = [first] if slow else [first, self.sample()]
        self.once = max(min(calls), 1e-7)
        self._runs = self.calls = _calls(self.once)
        self.samples: list[float] = calls if self.calls == 1 else []

    @property
    def spread(self) -> float:
        """How many times longer than the shortest sample the next one is."""
        least = sorted(self.samples)[:2]
        return least[1] / least[0] if len(least) == 2 else math.inf

    @property
    def disturbed(self) -> bool:
        """Whether the system has let others run during each sample."""
        return self._clean is False

    @property
    def timing(self) -> Timing:
        """What is known by now."""
        spread = self.spread if len(self.samples) > 1 else 1.0  # a slow function is called once
        return Timing.of(min(self.samples, default=self.once), spread, self.disturbed)

    def add(self) -> None:
        """Take one more sample. If a call turns out far shorter than the first ones were, samples get more calls."""
        before = _switches()
        taken = self.sample()
        self._clean = bool(self._clean) or self._device.type != "cpu" or _switches() == before
        self.samples.append(taken)
        if self._device.type == "cpu" and taken * 4 < self.once:
            self.once = max(taken, 1e-7)
            self._runs = self.calls = _calls(self.once)

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


def _calls(once: float) -> int:
    return max(1, min(1000, int(SAMPLE / once)))


def _switches() -> int:
    """How often the system has let others run in the place of this process's threads."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


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


NOISE = 2**20  # numbers that are drawn; what is larger repeats them


def example_inputs(
    names: Sequence[str],
    values: Mapping[str, TensorMeta],
    seed: int = 0,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Tensors with the layouts that `values` gives `names`: noise, true, and zeros for integers, which may be indices.

    The global random generator is left alone.

    Args:
        weights: large ones stand for themselves; only parameters, which no op writes.
    """
    tensors = []
    for index, name in enumerate(names):
        meta = values[name]
        weight = (weights or {}).get(name)
        if isinstance(weight, torch.nn.Parameter) and weight.numel() > NOISE:
            tensors.append(weight.detach())
            continue
        extent = 1 + sum((size - 1) * stride for size, stride in zip(meta.shape, meta.stride, strict=True) if size > 0)
        if meta.dtype.is_floating_point or meta.dtype.is_complex:
            generator = torch.Generator(meta.device).manual_seed(seed + index)
            noise = torch.randn(min(extent, NOISE), generator=generator, device=meta.device).to(meta.dtype)
            flat = noise.new_empty(extent)
            for piece in flat.split(NOISE):  # the same again: weights may be large
                piece.copy_(noise[: piece.numel()])
        else:
            flat = torch.full((extent,), meta.dtype is torch.bool, device=meta.device, dtype=meta.dtype)
        tensors.append(flat.as_strided(meta.shape, meta.stride))
    return tensors
