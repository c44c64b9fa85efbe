"""What a call must be beyond its signature: which of its tensors are captured ones, what lies over what in memory.

A recording that writes orders its ops by alias sets. A call whose tensors overlap in memory where the recorded ones did
not, by whatever storage, would have to be ordered in another way, and does not fit.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from graph_capture.ir.graph import SubGraph
from graph_capture.record.entries import equal, text


class Property(NamedTuple):
    """Something of a call's tensor that the recorded code asked for, or that decides what it is.

    Attributes:
        number: which of the call's tensors.
        what: in words.
        read: a tensor -> the property.
        expected: what it was.
    """

    number: int
    what: str
    read: Callable[[torch.Tensor], Any]
    expected: Any


def itself(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as its own property: which object it is."""
    return tensor


def place(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of a tensor's storage, and where in it the tensor begins."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and past its last; (0, 0) where it has none."""
    if tensor.layout != torch.strided or not tensor.numel() or tensor.is_meta:
        return 0, 0
    start = tensor.data_ptr()
    count = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + count * tensor.itemsize


class Fit:
    """Compares a call's tensors with the recorded ones.

    Args:
        properties: what of them must be equal.
        names: their value names.
        captured: the captured tensors.
        graph: the recorded ops.
        written: the inputs of the graph in whose memory it writes.
    """

    def __init__(
        self,
        properties: Sequence[Property],
        names: Sequence[str],
        captured: Mapping[str, torch.Tensor],
        graph: SubGraph,
        written: frozenset[str],
    ) -> None:
        self.properties, self._names, self._captured = tuple(properties), tuple(names), captured
        self._written = written
        self._memory = {name: graph.values[name].storage for name in graph.input_names}
        self._stamp: Any = self
        self._ranges: list[tuple[list[int], list[tuple[int, int, str]]]] = []

    def misfit(self, tensors: Sequence[torch.Tensor], moves: int = 0) -> str | None:
        """Why tensors (one for each name) do not fit, as a sentence; None where they do."""
        for number, what, read, expected in self.properties:
            now = read(tensors[number])
            if not equal(now, expected):
                return f"the {what} of {self._names[number]!r} was {text(expected)} and is now {text(now)}"
        if not self._written or not tensors:
            return None
        if self._stamp != moves:
            self._stamp, self._ranges = moves, [self._sorted(written) for written in (False, True)]
        ranges = [(*extent(tensor), name) for name, tensor in zip(self._names, tensors, strict=True)]
        for index, one in enumerate(ranges):
            for other in (*ranges[:index], *self._near(one)):
                found = self._clash(one, other)
                if found is not None:
                    return found
        return None

    def inside(self) -> str | None:
        """Why the captured tensors among themselves cannot be recorded; None where they can."""
        if not self._written:
            return None
        reached: list[tuple[int, int, str]] = []
        for one in self._sorted(False)[1]:
            reached = [other for other in reached if other[1] > one[0]]
            found = next(filter(None, (self._clash(one, other) for other in reached)), None)
            if found is not None:
                return found
            reached.append(one)
        return None

    def _sorted(self, written: bool) -> tuple[list[int], list[tuple[int, int, str]]]:
        """The extents of captured tensors (of those that are written), by where they begin."""
        names = [name for name in self._captured if name in self._written or not written]
        found = sorted((*extent(self._captured[name]), name) for name in names)
        return [start for start, _, _ in found], found

    def _near(self, one: tuple[int, int, str]) -> Sequence[tuple[int, int, str]]:
        """The captured tensors that could overlap with `one` in a way that matters."""
        starts, found = self._ranges[one[2] not in self._written]
        last = bisect.bisect_left(starts, one[1])
        return [other for other in found[:last] if other[1] > one[0]]

    def _clash(self, one: tuple[int, int, str], other: tuple[int, int, str]) -> str | None:
        overlap = one[0] < other[1] and other[0] < one[1]
        if not overlap or self._memory[one[2]] == self._memory[other[2]] or not {one[2], other[2]} & self._written:
            return None
        return f"{one[2]!r} and {other[2]!r} overlap in memory, and the recorded ones did not"
