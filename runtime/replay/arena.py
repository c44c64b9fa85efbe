"""Where in one piece of memory each buffer goes: buffers whose lifetimes do not meet may share bytes.

The problem is NP-hard (Garey & Johnson, 1979, SR2: dynamic storage allocation). `place` is greedy best fit, after
Pisarchyk & Lee, "Efficient Memory Management for Deep Neural Net Inference" (2020), over several orders.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

TRIES = 200  # orders that are tried where the first ones leave a gap to the lower bound,
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


def live_peak(lifetimes: Sequence[Lifetime]) -> int:
    """The most bytes in use at one step: no placement can do with less."""
    return max(_live(lifetimes), default=0)


def place(lifetimes: Sequence[Lifetime], alignment: int = 64) -> Placement:
    """An offset for each lifetime, a multiple of `alignment` bytes; no two that meet in time share a byte."""
    rounded = [life._replace(size=-(-life.size // alignment) * alignment) for life in lifetimes]
    bound = live_peak(rounded)
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
        found = _greedy(rounded, tried)
        if best is None or found.peak < best.peak:
            best, order = found, tried
        if best.peak == bound:
            return best
    assert best is not None
    chance = random.Random(0)  # the same placement in every process
    for _ in range(min(TRIES, WORK // len(rounded))):
        tried = _perturbed(rounded, best, order, chance)
        found = _greedy(rounded, tried)
        if found.peak <= best.peak:
            best, order = found, tried
        if best.peak == bound:
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


def _greedy(lifetimes: Sequence[Lifetime], order: Sequence[int]) -> Placement:
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
        for start, stop in sorted((offsets[other], offsets[other] + lifetimes[other].size) for other in met):
            if start - end >= size and (gap is None or start - end < gap):
                gap, at = start - end, end
            end = max(end, stop)
        offsets[index] = end if at is None else at
        peak = max(peak, offsets[index] + size)
        for step in range(first, last + 1):
            placed_at[step].append(index)
    return Placement(tuple(offsets), peak)


def _live(lifetimes: Sequence[Lifetime]) -> list[int]:
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
