"""What a rotary kernel computes: the spec, and how the tensors of a call are seen.

A *track* is what happens to one input on its way: RMSNorm of each head, rotation, and then a fresh output or a static
cache, at positions that are read on the device. Everything is seen as [batch, length, heads, width].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graph_capture.codegen.spec.geometry import dense_strides
from graph_capture.codegen.spec.kernel import Operand
from graph_capture.errors import FusionError

Axes = tuple[int, int, int, int]  # where batch, length, heads and width are in a tensor's own dimensions
LENGTH_FIRST: Axes = (0, 1, 2, 3)
HEADS_FIRST: Axes = (0, 2, 1, 3)


@dataclass(frozen=True)
class Norm:
    """RMSNorm over the width; `weight` is the name of an input, or empty."""

    weight: str
    eps: float
    offset: float


@dataclass(frozen=True)
class Track:
    """One input on its way.

    Attributes:
        source: the name of the input, [batch, length, heads, width] in the order of `axes`.
        target: the name of what it is written to: an output, or an input that is a cache.
        target_axes: the order of the target's dimensions; a cache has its slots where an output has its length.
        heads: how many there are; static.
        norm: before the rotation, or None.
        rotates: False for values, which are only moved.
        cached: whether the target is a cache.
    """

    source: str
    axes: Axes
    heads: int
    norm: Norm | None = None
    rotates: bool = False
    target: str = ""
    target_axes: Axes = HEADS_FIRST
    cached: bool = False


@dataclass(frozen=True)
class RotarySpec:
    """Tracks that share their positions and tables.

    Attributes:
        inputs, outputs: in the region's order.
        tracks: what is written, in order.
        width: elements of a head.
        turned: how many of them are rotated, the first ones.
        interleaved: whether neighbours are rotated with each other, rather than halves.
        half_tables: whether a table's row has ``turned / 2`` elements, rather than `turned`.
        cos, sin: names of the tables, [batch or 1, length or 1, 1, ...] in the order of `axes`; with `sin` empty, cos
            is complex.
        axes: the order of the tables' dimensions.
        positions: names of int64 inputs, [length] or scalars, whose sum is the slot of each token; a token whose slot
            is outside the cache is not written.
        wraps: whether negative slots count from the end.
        count: the name of an int64 scalar that `step` is added to afterwards, or empty.
        unbatched: whether there is one sequence only.
        single: whether there is one token only.
        aliases: for each output that is an input written in place, that input's name; else empty.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    tracks: tuple[Track, ...]
    width: int
    turned: int
    interleaved: bool
    half_tables: bool
    cos: str
    sin: str
    axes: Axes
    positions: tuple[str, ...]
    wraps: bool
    count: str
    step: int
    unbatched: bool
    single: bool
    aliases: tuple[str, ...]

    @property
    def half(self) -> int:
        """The elements that are rotated with as many others."""
        return self.turned // 2

    @property
    def rest(self) -> int:
        """The elements of a head that are not rotated."""
        return self.width - self.turned

    def allocate(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Spec.allocate`."""
        given = dict(zip((operand.name for operand in self.inputs), inputs, strict=True))
        tracks = {track.target: track for track in self.tracks}
        outputs = []
        for operand, alias in zip(self.outputs, self.aliases, strict=True):
            if alias:
                outputs.append(given[alias])
                continue
            source = _canonical(given[tracks[operand.name].source], tracks[operand.name].axes)
            shape = [0] * 4
            for place, dim in enumerate(tracks[operand.name].target_axes):
                shape[dim] = source.shape[place]
            strides = dense_strides(tuple(shape), operand.order)
            outputs.append(torch.empty_strided(shape, strides, dtype=operand.dtype, device=source.device))
        return outputs

    def seen(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a call (inputs, then outputs) by name, as [batch, length or slots, heads, width] views.

        Tables are [batch, length, 1, elements], positions [1, length, 1, 1], norms' weights [1, 1, 1, width].

        Raises:
            FusionError: a shape does not fit the kernel.
        """
        names = [operand.name for operand in (*self.inputs, *self.outputs)]
        given = dict(zip(names, tensors, strict=True))
        first = _canonical(given[self.tracks[0].source], self.tracks[0].axes)
        batch, length = first.shape[:2]
        if self.unbatched and batch != 1:
            raise FusionError(f"it is made for one sequence, not for {batch}")
        if self.single and batch * length != 1:
            raise FusionError(f"it is made for one token, not for {batch} x {length}")
        found: dict[str, torch.Tensor] = {}
        for track in self.tracks:
            source = found[track.source] = _canonical(given[track.source], track.axes)
            target = found[track.target] = _canonical(given[track.target], track.target_axes)
            slots = target.shape[1] if track.cached else length
            _expect(track.source, source, (batch, length, track.heads, self.width))
            _expect(track.target, target, (batch, slots, track.heads, self.width))
            if track.norm is not None and track.norm.weight:
                found[track.norm.weight] = given[track.norm.weight].reshape(1, 1, 1, -1)
                _expect(track.norm.weight, found[track.norm.weight], (1, 1, 1, self.width))
        for name in filter(None, (self.cos, self.sin)):
            table = _canonical(given[name], self.axes)
            elements = self.half if self.half_tables else self.turned
            _expect(name, table, (table.shape[0], table.shape[1], 1, elements))
            if table.shape[0] not in (1, batch) or table.shape[1] not in (1, length):
                raise FusionError(f"{name} is {list(table.shape)} for {batch} x {length} tokens")
            found[name] = table.expand(batch, length, -1, -1)
        if self.cos and not self.sin:
            pairs = torch.view_as_real(found[self.cos])
            found[self.cos], found[self.sin] = pairs[..., 0], pairs[..., 1]
        for name in self.positions:
            flat = given[name].reshape(-1)
            _expect(name, flat, (flat.shape[0] if flat.shape[0] == 1 else length,))
            found[name] = flat.expand(length).view(1, length, 1, 1) if length != 1 else flat.view(1, 1, 1, 1)
        if self.count and self.count not in found:
            found[self.count] = given[self.count].reshape(1, 1, 1, 1)
        return found

    def parts(self, view: torch.Tensor) -> list[torch.Tensor]:
        """What is rotated with what: the first elements, the second ones, and the rest, where there is one."""
        if self.interleaved:
            found = [view[..., 0 : self.turned : 2], view[..., 1 : self.turned : 2]]
        else:
            found = [view[..., : self.half], view[..., self.half : self.turned]]
        return [*found, view[..., self.turned :]] if self.rest else found

    def table_parts(self, table: torch.Tensor) -> list[torch.Tensor]:
        """The elements of a table that belong to the first and to the second elements of a head."""
        return [table, table] if self.half_tables else self.parts(table)[:2]


def _canonical(tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
    missing = 4 - tensor.dim()
    tensor = tensor[(None,) * missing] if missing > 0 else tensor
    return tensor.permute(axes)


def _expect(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise FusionError(f"{name} is {list(tensor.shape)} here, expected {list(shape)}")
