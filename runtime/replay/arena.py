"""Where in one piece of memory each buffer goes: buffers whose lifetimes do not meet may share bytes.

The problem is NP-hard (Garey & Johnson, 1979, SR2: dynamic storage allocation). `place` is greedy best fit, after
Pisarchyk & Lee, "Efficient Memory Management for Deep Neural Net Inference" (2020), over several orders.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

TRIES = 200  # orders that are tried where the first ones leave a gap to the lower bound,
GAPS = 1.1  # times as large as one block would be, an arena of several starts anew
WORK = 10_000  # and how many buffers are placed for that


class Lifetime(NamedTuple):
    """A buffer of `size` bytes that is in use from step `first` to step `last`, both included."""

    size: int
    first: int
    last: int


class Placement(NamedTuple):
    """An offset in bytes for each lifetime, and the bytes that they take together."""

    offsets: tuple[int, ...]
    peak: int


class Arena:
    """Memory of one device, in blocks, for it grows while others lie in it.

    Args:
        emptied: has everybody leave it, so that it can be one block again.

    Attributes:
        walls: where the blocks end, from the beginning of the first on.
    """

    def __init__(self, device: torch.device, emptied: Callable[[], None] | None = None) -> None:
        self.walls: list[int] = []
        self._emptied = emptied
        self._blocks: list[torch.Tensor] = []
        self._device = device

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.walls[-1] if self.walls else 0

    def place(self, lifetimes: Sequence[Lifetime], alignment: int) -> Placement:
        """Places in it for buffers; it grows where it has to.

        Blocks that came one by one have gaps. Where they would make it much larger than one block, it starts anew.
        """
        placed = place(lifetimes, alignment, self.walls)
        if self.walls and self._emptied is not None and placed.peak > self.nbytes:
            alone = place(lifetimes, alignment)
            if placed.peak > GAPS * alone.peak:
                self._emptied()
                self._blocks, self.walls, placed = [], [], alone
        self.grow(placed.peak)
        return placed

    def grow(self, size: int) -> None:
        """Have at least `size` bytes."""
        if size > self.nbytes:
            self._blocks.append(torch.empty(size - self.nbytes, dtype=torch.uint8, device=self._device))
            self.walls.append(size)

    def at(self, offset: int) -> tuple[torch.Tensor, int]:
        """The block that byte `offset` lies in, and which of its bytes that is."""
        number = bisect_right(self.walls, offset)
        if number == len(self._blocks):  # of a buffer without bytes
            return torch.empty(0, dtype=torch.uint8, device=self._device), 0
        return self._blocks[number], offset - (self.walls[number - 1] if number else 0)


def live_peak(lifetimes: Sequence[Lifetime]) -> int:
    """The most bytes in use at one step: no placement can do with less."""
    return max(live_bytes(lifetimes), default=0)


def place(lifetimes: Sequence[Lifetime], alignment: int = 64, walls: Sequence[int] = ()) -> Placement:
    """An offset for each lifetime, a multiple of `alignment` bytes; no two that meet in time share a byte.

    No buffer lies on both sides of one of the `walls` (offsets in order, multiples of `alignment`): they end the blocks
    of an arena. What lies before the last of them is there already, and costs nothing.
    """
    rounded = [life._replace(size=-(-life.size // alignment) * alignment) for life in lifetimes]
    there = walls[-1] if walls else 0
    bound = max(live_peak(rounded), there)
    indices = range(len(rounded))
    orders: tuple[Callable[[int], tuple[int, ...]], ...] = (
        lambda i: (-rounded[i].size, rounded[i].first),
        lambda i: (-rounded[i].size * (rounded[i].last - rounded[i].first + 1), rounded[i].first),
        lambda i: (rounded[i].first, -rounded[i].size),
        lambda i: (rounded[i].first - rounded[i].last, -rounded[i].size),
    )
    best: Placement | None = None
    order: list[int] = []
    for key in orders:
        tried = sorted(indices, key=key)
        found = _greedy(rounded, tried, walls)
        if best is None or found.peak < best.peak:
            best, order = found, tried
        if best.peak <= bound:
            return best
    assert best is not None
    chance = random.Random(0)  # the same placement in every process
    for _ in range(min(TRIES, WORK // len(rounded))):
        tried = _perturbed(rounded, best, order, chance)
        found = _greedy(rounded, tried, walls)
        if found.peak <= best.peak:
            best, order = found, tried
        if best.peak <= bound:
            break
    return best


def _perturbed(
    lifetimes: Sequence[Lifetime], best: Placement, order: Sequence[int], chance: random.Random
) -> list[int]:
    """`order`, with those that reach the peak moved to the front, for they came too late; or one buffer moved ahead."""
    top = [i for i in order if best.offsets[i] + lifetimes[i].size == best.peak]
    if chance.random() < 0.5:
        return [*top, *(i for i in order if i not in top)]
    moved = chance.choice(top) if chance.random() < 0.75 else chance.choice(order)
    rest = [i for i in order if i != moved]
    rest.insert(chance.randint(0, order.index(moved)), moved)
    return rest


def _greedy(lifetimes: Sequence[Lifetime], order: Sequence[int], walls: Sequence[int] = ()) -> Placement:
    """Each buffer, in `order`, into the smallest gap that holds it."""
    offsets = [0] * len(lifetimes)
    steps = max((life.last for life in lifetimes), default=-1) + 1
    placed_at: list[list[int]] = [[] for _ in range(steps)]  # by the steps at which a buffer lives
    peak = 0
    for index in order:
        size, first, last = lifetimes[index]
        if size == 0:
            continue
        met = {other for step in range(first, last + 1) for other in placed_at[step]}
        end, gap, at = 0, None, None
        taken = [(offsets[other], offsets[other] + lifetimes[other].size) for other in met]
        for start, stop in sorted([*taken, *((wall, wall) for wall in walls)]):
            if start - end >= size and (gap is None or start - end < gap):
                gap, at = start - end, end
            end = max(end, stop)
        offsets[index] = end if at is None else at
        peak = max(peak, offsets[index] + size)
        for step in range(first, last + 1):
            placed_at[step].append(index)
    return Placement(tuple(offsets), peak)


def live_bytes(lifetimes: Sequence[Lifetime]) -> list[int]:
    """Bytes in use at each step."""
    steps = max((life.last for life in lifetimes), default=-1) + 1
    change = [0] * (steps + 1)
    for size, first, last in lifetimes:
        change[first] += size
        change[last + 1] -= size
    total, found = 0, []
    for delta in change[:-1]:
        total += delta
        found.append(total)
    return found
