"""How tensors lie over an iteration space: dimensions merged where every operand allows it.

The idea is that of PyTorch's TensorIterator: a broadcast dimension has stride 0, dimensions of size 1 count for
nothing, and neighbours that every operand walks through in one sweep are one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """The sizes of an iteration space, the columns last, and the strides of each operand over it, in elements."""

    sizes: Sizes
    strides: tuple[Sizes, ...]

    @property
    def elements(self) -> int:
        """The points of the space."""
        return math.prod(self.sizes)

    def padded(self, rank: int) -> Geometry:
        """The same space with dimensions of size 1 in front, up to `rank`."""
        missing = [1] * (rank - len(self.sizes)), [0] * (rank - len(self.sizes))
        return Geometry((*missing[0], *self.sizes), tuple((*missing[1], *steps) for steps in self.strides))


def arrange(space: Sizes, shapes: Sequence[Sizes], strides: Sequence[Sizes], *, flat: bool, rows: bool) -> Geometry:
    """How operands of these shapes and strides lie over `space`.

    The last operand (an output) decides the order of the dimensions: its smallest stride comes last.

    Args:
        flat: merge all that can be merged; otherwise the innermost dimension stays as it is.
        rows: the innermost dimension is the space's last, for it is reduced.
    """
    expanded = [_expanded(space, shape, steps) for shape, steps in zip(shapes, strides, strict=True)]
    anchor = expanded[-1]
    last = [len(space) - 1] if rows else []
    order = [dim for dim in range(len(space) - len(last)) if space[dim] != 1]
    order.sort(key=lambda dim: -anchor[dim])  # stable
    order += last
    if not order:
        order, space, expanded = [0], (1,), [[1] for _ in expanded]
    sizes, steps = [space[order[0]]], [[operand[order[0]]] for operand in expanded]
    for place, dim in enumerate(order[1:], 1):
        apart = place == len(order) - 1 and not flat
        joined = not apart and all(
            done[-1] == operand[dim] * space[dim] for done, operand in zip(steps, expanded, strict=True)
        )
        if joined:
            sizes[-1] *= space[dim]
        else:
            sizes.append(space[dim])
        for done, operand in zip(steps, expanded, strict=True):
            done[len(sizes) - 1 :] = [operand[dim]]
    return Geometry(tuple(sizes), tuple(map(tuple, steps)))


def _expanded(space: Sizes, shape: Sizes, strides: Sizes) -> list[int]:
    """The strides of a tensor that is broadcast over `space`."""
    padding = len(space) - len(shape)
    known = zip(shape, strides, space[padding:], strict=True)
    return [0] * padding + [step if size == full else 0 for size, step, full in known]


def order_of(shape: Sizes, strides: Sizes) -> Sizes:
    """The dimensions of a dense tensor from the slowest to the fastest; () if it is contiguous, or not dense."""
    order = sorted(range(len(shape)), key=lambda dim: (-strides[dim], dim))
    expected = 1
    for dim in reversed(order):
        if shape[dim] != 1 and strides[dim] != expected:
            return ()
        expected *= shape[dim]
    moving = [dim for dim in order if shape[dim] != 1]
    return () if moving == sorted(moving) else tuple(order)


def dense_strides(shape: Sizes, order: Sizes = ()) -> Sizes:
    """The strides of a dense tensor whose dimensions lie in this order (contiguous if empty)."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order or range(len(shape))):
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)
