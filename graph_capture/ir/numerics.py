"""Whether results are right: bit for bit, up to rounding, up to noise, and against float64.

Everything that compares results asks here. Rounding is known beforehand, from the dtype. Noise, where ops are not
deterministic, is measured: the same ops run several times on the same data, and a `Spread` keeps between which values
each element came out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from graph_capture.ir.effects import written_inputs
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.interpreter import Executor

ROUNDINGS = 64  # of a relative L2 distance: what many layers may add up to
SAME = 16  # of each element: what another order of the same sums may make
KERNEL = 4  # of a relative L2 distance: what one kernel may differ by from the ops that it stands for
MULTIPLE = 4  # how many times as far as runs lie apart another one may lie from them
RUNS = 8  # at most of what something does not equal, to learn how much that differs from run to run
STEADY = 3  # and where that many agree, it does not differ
PIECE = 2**24  # elements that are looked at at a time, so that comparing large results takes little memory


def rounding(dtype: torch.dtype) -> float:
    """The relative size of one rounding to `dtype`; 0 for integers."""
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits, signs of zeros included, NaN for NaN."""
    if left.shape != right.shape:
        return False
    if left.is_floating_point() or left.is_complex():
        return torch.equal(_as_bytes(left), _as_bytes(right))
    return _equal(left, right)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def alike(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Bit-equal (NaN equals NaN), or each element equal up to the rounding of sums in another order."""
    if expected.shape != found.shape or expected.dtype != found.dtype or expected.layout != found.layout:
        return False
    if expected.layout != torch.strided or expected.device.type == "meta" or _equal(expected, found):
        return True
    return bool(rounding(expected.dtype)) and Spread(found, copy=False).allows(expected)


class Spread:
    """Between which values each element of one result came out, in several runs on the same data.

    What two runs differ by is noise. Another run (the code's own) may differ by a small multiple of it: of each
    element's own noise, or of the largest in the whole result, absolute or relative to the element, whichever is less.
    Of integers only an element's own counts: each was counted or chosen by itself.

    Args:
        first: the result of the first run.
        copy: it may change before the last use of this.
        roundings: what elements may differ by besides.
    """

    def __init__(self, first: torch.Tensor, copy: bool = True, roundings: float = SAME) -> None:
        self._low = _plain(first).clone() if copy else _plain(first)
        self._high = self._low  # one tensor for as long as all runs agree
        self._roundings = roundings * rounding(first.dtype)
        self._torn = False  # whether some runs gave a NaN where others gave none
        self._noise: tuple[float, float] | None = (0.0, 0.0)

    def add(self, result: torch.Tensor) -> None:
        """Another run's result, of the same shape."""
        found = _plain(result)
        if self._high is self._low:
            if _equal(self._low, found):
                return
            self._high = self._low.clone()
        for low, high, new in _pieces(self._low, self._high, found):
            if new.is_floating_point():
                self._torn |= not torch.equal(low.isnan(), new.isnan())
                torch.fmin(low, new, out=low)
                torch.fmax(high, new, out=high)
            else:
                torch.minimum(low, new, out=low)
                torch.maximum(high, new, out=high)
        self._noise = None

    @property
    def noise(self) -> float:
        """The largest difference between two runs, over all elements."""
        return math.inf if self._torn else self._measured[0]

    def around(self, size: torch.Tensor) -> torch.Tensor:
        """By how much elements of these absolute sizes may differ between two runs, by noise and rounding."""
        absolute, relative = self._measured
        return MULTIPLE * (relative * size).clamp(max=absolute) + self._roundings * size

    @property
    def _measured(self) -> tuple[float, float]:
        """The largest difference, and the largest relative to its element."""
        if self._noise is None:
            absolute = relative = 0.0
            for low, high in _pieces(self._low, self._high):
                apart = _finite(high.double() - low.double())
                size = torch.maximum(low.double().abs(), high.double().abs())
                absolute = max(absolute, float(apart.max()))
                relative = max(relative, float(_finite(apart / size).max()))
            self._noise = absolute, relative
        return self._noise

    def allows(self, result: torch.Tensor) -> bool:
        """Whether `result` may be what another run has computed."""
        return self.excess(result) <= 0

    def excess(self, result: torch.Tensor) -> float:
        """By how much `result` differs from the runs beyond noise and rounding; 0 where it does not, inf where one has
        a NaN or an infinity that the others have not."""
        found = _plain(result)
        if self._high is self._low and _equal(self._low, found):
            return 0.0
        absolute, relative = self._measured
        scale = min(1.0, float(_finite(found.double()).abs().max())) if self._roundings and found.numel() else 0.0
        most = 0.0
        for piece in _pieces(self._low, self._high, found):
            low, high, new = (tensor.double() for tensor in piece)
            if not self._torn and not torch.equal(low.isnan(), new.isnan()):
                return math.inf
            own = high - low  # inf where runs differ by an infinity, NaN where all agree on one
            size = torch.maximum(low.abs(), high.abs())
            noise = torch.maximum(own, (relative * size).clamp(max=absolute)) if self._roundings else own
            beyond = torch.maximum(low - new, new - high)
            allowed = MULTIPLE * noise + self._roundings * (scale + new.abs().clamp(max=torch.finfo(new.dtype).max))
            settled = ~((piece[0] == piece[2]) | (piece[1] == piece[2]) | low.isnan() | new.isnan())
            if not bool(settled.any()):
                continue
            found_excess = (beyond - allowed)[settled]
            found_excess[own[settled] == math.inf] = 0.0
            most = max(most, float(found_excess.nan_to_num(nan=math.inf).max()))
        return most


def apart(graph: SubGraph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs of a graph, with copies of those that it writes: caches, counters."""
    written = {node.inputs[position] for node in graph.nodes for position in written_inputs(node)}
    return [t.clone() if name in written else t for name, t in zip(graph.input_names, inputs, strict=True)]


def in_float64(graph: SubGraph, inputs: Sequence[torch.Tensor], rounds: Collection[str] = ()) -> list[torch.Tensor]:
    """Run a graph with every floating-point value in float64, casts between floats included.

    The casts that make the values `rounds` round first, as they were told.
    """
    nodes = []
    for node in graph.nodes:
        name, given = node.outputs[0] if node.outputs else "", node.inputs
        if name in rounds:
            nodes.append(OpNode(node.op_type, given, (f"{name} rounded",), node.attrs))
            given = (f"{name} rounded",)
        nodes.append(OpNode(node.op_type, given, node.outputs, tuple((k, _widen(v)) for k, v in node.attrs)))
    executor = Executor([(node, None) for node in nodes], graph.input_names, graph.output_names)
    inputs = apart(graph, inputs)
    return executor.run([_widened(tensor) for tensor in inputs])


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _widen(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def distance(tensor: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 distance; inf where one has a NaN or an infinity that the other has not."""
    left, right = tensor.double(), reference.double()
    if not torch.equal(left.isnan(), right.isnan()):
        return float("inf")
    infinite = left.isinf() | right.isinf()
    if not torch.equal(left[infinite], right[infinite]):
        return float("inf")
    keep = ~(infinite | left.isnan())
    difference, norm = (left[keep] - right[keep]).norm().item(), right[keep].norm().item()
    return difference / norm if norm else difference


def close_enough(
    tensor: torch.Tensor, runs: Sequence[torch.Tensor], allowed: float | None = None
) -> tuple[bool, float]:
    """Whether a result agrees with what some runs of the ops that it stands for gave; how far it is from the nearest.

    Floats may differ by `allowed` (a relative L2 distance; default: what one kernel may make) and a small multiple of
    what the runs differ by; integers have to be such as the runs gave.
    """
    first, *more = runs
    if not rounding(first.dtype):
        spread = Spread(first, copy=bool(more))
        for run in more:
            spread.add(run)
        return (True, 0.0) if spread.allows(tensor) else (False, math.inf)
    error = min(distance(tensor, run) for run in runs)
    limit = KERNEL * rounding(first.dtype) if allowed is None else allowed
    return error <= limit + MULTIPLE * max((distance(run, first) for run in more), default=0.0), error


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as a tensor of real ones."""
    if tensor.dtype is torch.complex32:  # few ops take it
        tensor = tensor.to(torch.complex64)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.resolve_neg()
    if tensor.dtype is torch.bool or (tensor.dtype.itemsize == 1 and tensor.is_floating_point()):
        return tensor.to(torch.int16 if tensor.dtype is torch.bool else torch.float32)
    return tensor


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0)


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype is torch.complex32:  # which torch cannot compare
        left, right = left.to(torch.complex64), right.to(torch.complex64)
    return all(torch.equal(*pair) for pair in _pieces(left, right))


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The elements of tensors of one shape, a piece at a time; pieces are views, so that they can be written."""
    if tensors[0].numel() <= PIECE or not all(tensor.is_contiguous() for tensor in tensors):
        if tensors[0].numel():
            yield tensors
        return
    flat = [tensor.view(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), PIECE):
        yield tuple(tensor[start : start + PIECE] for tensor in flat)
