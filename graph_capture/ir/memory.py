"""State that a run changes and that can be put back: storages and random generators."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from graph_capture.ir.binding import arguments
from graph_capture.ir.graph import OpNode
from graph_capture.ir.values import Arg

SMALL = 2**20  # bytes of a storage that is copied whole


class RandomState:
    """The state of torch's global generators (CPU; CUDA's current device once it was used)."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState) or not torch.equal(self._cpu, other._cpu):
            return False
        return self._cuda is None or other._cuda is None or torch.equal(self._cuda, other._cuda)


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's whole storage as bytes, sharing it."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


@dataclass(frozen=True)
class WrittenPart:
    """A part of a storage that an op writes: a view, or the places along one of its dimensions that an index says."""

    view: torch.Tensor
    dim: int = 0
    index: torch.Tensor | None = None

    @classmethod
    def written(cls, node: OpNode, tensors: Sequence[torch.Tensor], position: int) -> WrittenPart:
        """What a node writes of its input at `position`, at most."""
        view = tensors[position]
        if node.op_type in _BY_INDEX and position == 0:
            given = arguments(node)
            index = given.get("index")
            if isinstance(index, Arg) and isinstance(given.get("dim"), int):
                return cls(_plain(view), given["dim"], tensors[index.index].clone())
        return cls(_plain(view))

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        if self.index is None or not self.view.dim():
            return self.view.nbytes
        return self.view.nbytes // max(1, self.view.shape[self.dim]) * self.index.numel()

    def read(self) -> torch.Tensor:
        """A copy of what is there."""
        return self.view.clone() if self.index is None else self.view.index_select(self.dim, self.index)

    def write(self, values: torch.Tensor) -> None:
        """Put what was read there."""
        if self.index is None:
            self.view.copy_(values)
        else:
            self.view.index_copy_(self.dim, self.index, values)

    def on(self, memory: torch.Tensor) -> WrittenPart:
        """The same part of another storage."""
        moved = torch.empty(0, dtype=self.view.dtype, device=self.view.device)
        moved.set_(memory.untyped_storage(), self.view.storage_offset(), self.view.shape, self.view.stride())
        return WrittenPart(moved, self.dim, self.index)

    def covers(self, other: WrittenPart) -> bool:
        """Whether it is a view, and `other` the same one."""
        mine, theirs = ((p.view.data_ptr(), p.view.shape, p.view.stride(), p.view.dtype) for p in (self, other))
        return self.index is None and mine == theirs


_BY_INDEX = frozenset(
    f"aten.index_{name}" for name in ("copy_.default", "add_.default", "fill_.int_Scalar", "fill_.int_Tensor")
)


class Written:
    """A storage that ops write: as it was before, what they write of it, or, where that is much, all of it.

    Args:
        memory: its bytes.
        dtype: of the numbers in it.
    """

    def __init__(self, memory: torch.Tensor, dtype: torch.dtype) -> None:
        self.whole = False
        self._memory, self._dtype = memory, dtype
        self._parts: list[WrittenPart] = []
        self._before: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(values.nbytes for values in self._before)

    def before(self, part: WrittenPart) -> None:
        """An op is about to write `part`."""
        if self.whole or any(known.covers(part) for known in self._parts):
            return
        if self._memory.numel() > max(SMALL, 2 * (self.nbytes + part.nbytes)):
            self._parts.append(part)
            self._before.append(part.read())
            return
        image = self._memory.clone()
        for known, values in zip(reversed(self._parts), reversed(self._before), strict=True):
            known.on(image).write(values)
        self.whole, self._parts, self._before = True, [WrittenPart(self._memory)], [image]

    def restore(self) -> None:
        """Put it back as it was."""
        for part, values in zip(reversed(self._parts), reversed(self._before), strict=True):
            part.write(values)

    def read(self) -> list[torch.Tensor]:
        """Copies of what was written, as it is."""
        return [part.read() for part in self._parts]

    def write(self, values: Sequence[torch.Tensor]) -> None:
        """Put what `read` gave there."""
        for part, found in zip(self._parts, values, strict=True):
            part.write(found)

    def numbers(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What `read` gave, as the numbers that they are."""
        if not self.whole:
            return list(values)
        size = self._dtype.itemsize
        return [image[: image.numel() // size * size].view(self._dtype) for image in values]


def _plain(view: torch.Tensor) -> torch.Tensor:
    """The same memory, whatever its bits mean."""
    empty = torch.empty(0, dtype=view.dtype, device=view.device)
    return empty.set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


_collecting = threading.Lock()
_uncollected: list[bool] = []  # for each that is inside: whether garbage was collected before the first


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected in the process until all that are inside, in whatever threads, have left."""
    with _collecting:
        _uncollected.append(_uncollected[0] if _uncollected else gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _collecting:
            if _uncollected.pop() and not _uncollected:
                gc.enable()
