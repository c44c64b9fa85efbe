"""Rotary embedding of query and key, with what is around it, as one kernel, before any target.

A *track* is what happens to one input on its way: RMSNorm of each head, rotation, and then a fresh output or a static
cache, at positions that are read on the device. Everything is seen as [batch, length, heads, width].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from graph_capture.codegen.geometry import dense_strides, order_of
from graph_capture.codegen.spec import Operand

from graph_capture.errors import FusionError
from graph_capture.graph import Arg, OpNode, SubGraph, TensorMeta
from graph_capture.ops import arguments

Axes = tuple[int, int, int, int]  # where batch, length, heads and width are in a tensor's own dimensions
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
LENGTH_FIRST: Axes = (0, 1, 2, 3)
HEADS_FIRST: Axes = (0, 2, 1, 3)
OPS = {
    "rope",
    "rms_norm",
    "add",
    "aten.transpose.int",
    "aten.add_.Tensor",
    "aten.index_copy_.default",
    "aten.index_put_.default",
}


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


# --- from a region


def claims(graph: SubGraph) -> bool:
    """Whether this lowering is for `graph`: it rotates."""
    return any(node.op_type == "rope" for node in graph.nodes)


def check_ops(graph: SubGraph) -> None:
    """Look at the ops alone.

    Raises:
        FusionError: one of them has no place in such a kernel.
    """
    for node in graph.nodes:
        if node.op_type not in OPS:
            raise FusionError(f"{node.op_type} has no place beside a rotary embedding")


def lower(graph: SubGraph, values: Mapping[str, TensorMeta]) -> RotarySpec:
    """`graph` as one kernel, given the layout of each of its values.

    Raises:
        FusionError: it cannot be one kernel; the message says why.
    """
    reader = _Reader(graph, values)
    for node in graph.nodes:
        reader.read(node)
    return reader.spec()


def _named(value: Any, node: OpNode) -> Any:
    """An argument, with the names of inputs in the place of what stands for them."""
    if isinstance(value, tuple):
        return tuple(_named(item, node) for item in value)
    return node.inputs[value.index] if isinstance(value, Arg) else value


@dataclass
class _Value:
    """A value on its way: a track, and which of the track's dimensions each of its own is."""

    track: Track
    dims: tuple[int, ...] = (0, 1, 2, 3)


class _Reader:
    """Collects tracks from the nodes of a region."""

    def __init__(self, graph: SubGraph, values: Mapping[str, TensorMeta]) -> None:
        self.graph, self.values = graph, values
        self.found: dict[str, _Value] = {}
        self.sums: dict[str, tuple[str, ...]] = {name: (name,) for name in graph.input_names}
        self.aliases: dict[str, str] = {}
        self.writes: list[tuple[Track, tuple[str, ...]]] = []
        self.rope: tuple[Any, ...] | None = None
        self.count, self.step, self.wraps = "", 0, False

    def value(self, name: str) -> _Value:
        """What is known of a value that a head's width runs through."""
        if name not in self.found:
            meta = self.values[name]
            if name not in self.graph.input_names or len(meta.shape) != 4 or meta.dtype not in FLOATS:
                raise FusionError(f"{name} {meta} is no query, key or value of four dimensions")
            self.found[name] = _Value(Track(name, LENGTH_FIRST, 0))
        return self.found[name]

    def read(self, node: OpNode) -> None:
        """One node."""
        bound = {name: _named(value, node) for name, value in arguments(node).items()}
        output = node.outputs[0]
        if node.op_type == "aten.transpose.int":
            before = self.value(bound["self"])
            dims = list(before.dims)
            first, second = bound["dim0"] % 4, bound["dim1"] % 4
            dims[first], dims[second] = dims[second], dims[first]
            self.found[output] = replace(before, dims=tuple(dims))
        elif node.op_type == "rms_norm":
            before = self.value(bound["input"])
            if before.track.norm is not None or before.track.rotates or before.dims[3] != 3:
                raise FusionError(f"a norm of {bound['input']} comes too late")
            eps = bound.get("eps")
            dtype = self.values[bound["input"]].dtype
            eps = torch.finfo(dtype).eps if eps is None else float(eps)
            norm = Norm(bound.get("weight") or "", eps, float(bound.get("offset") or 0.0))
            self.found[output] = replace(before, track=replace(before.track, norm=norm))
        elif node.op_type == "rope":
            self._rope(bound, output)
        elif node.op_type == "add":
            if "alpha" in bound and bound["alpha"] != 1:
                raise FusionError("positions are scaled")
            terms = [self.sums.get(bound[name], ()) for name in ("self", "other") if isinstance(bound[name], str)]
            integers = all(self.values[term].dtype is torch.int64 for each in terms for term in each)
            if len(terms) != 2 or not all(terms) or not integers:
                raise FusionError(f"{output} is no sum of positions")
            self.sums[output] = (*terms[0], *terms[1])
        elif node.op_type == "aten.add_.Tensor":
            self._counted(node, bound)
        else:
            self._written(node, bound)

    def _rope(self, bound: Mapping[str, Any], output: str) -> None:
        before = self.value(bound["input"])
        sin = bound.get("sin") or ""
        call = (bound["cos"], sin, bool(bound.get("interleaved")), bool(bound.get("half_tables")))
        if before.track.rotates or before.dims[3] != 3:
            raise FusionError(f"{bound['input']} is rotated again")
        if self.rope is not None and self.rope[:4] != call:
            raise FusionError("query and key are rotated by other tables, or in another way")
        self.rope = call
        if (self.values[call[0]].dtype.is_complex) == bool(sin):
            raise FusionError(f"{call[0]} is {self.values[call[0]]}")
        self.found[output] = replace(before, track=replace(before.track, rotates=True))

    def _counted(self, node: OpNode, bound: Mapping[str, Any]) -> None:
        name, amount = bound["self"], bound["other"]
        fits = name in self.graph.input_names and self.values[name].numel == 1 and type(amount) is int
        if not fits or self.count or self.values[name].dtype is not torch.int64 or bound.get("alpha", 1) != 1:
            raise FusionError(f"{node.op_type} of {name} is no counter")
        self.count, self.step = name, amount
        self.aliases[node.outputs[0]] = name

    def _written(self, node: OpNode, bound: Mapping[str, Any]) -> None:
        cache = bound["self"]
        if node.op_type == "aten.index_copy_.default":
            index, source, dim = bound["index"], bound["source"], bound["dim"] % 4
        else:
            index, source, dim = self._index_put(bound), bound["values"], 2
            self.wraps = True
        before = self.value(source)
        slots = self.sums.get(index, ())
        if cache not in self.graph.input_names or cache in self.aliases.values() or len(self.values[cache].shape) != 4:
            raise FusionError(f"{cache} is no cache")
        if dim not in (1, 2) or not slots or self.values[index].dtype is not torch.int64:
            raise FusionError(f"{cache} is written over another dimension, or by no sum of positions")
        if self.values[cache].dtype is not self.values[source].dtype:
            raise FusionError(f"{cache} is {self.values[cache]}, its new rows are {self.values[source]}")
        axes = LENGTH_FIRST if dim == 1 else HEADS_FIRST
        self.writes.append((self._track(before, axes, cache, cached=True), slots))
        self.aliases[node.outputs[0]] = cache

    def _index_put(self, bound: Mapping[str, Any]) -> str:
        indices = bound["indices"]
        names = [name for name in indices if name is not None]
        if bound.get("accumulate") or len(names) != 1 or len(indices) != 3 or indices[2] is None:
            raise FusionError("the cache is written in another way than by positions")
        return names[0]

    def _track(self, value: _Value, axes: Axes, target: str, cached: bool) -> Track:
        """The track that ends in `target`, whose dimensions are in the order of `axes`."""
        own = tuple(value.dims[dim] for dim in axes)
        shape = self.values[value.track.source].shape
        return replace(value.track, axes=own, heads=shape[own[2]], target=target, target_axes=axes, cached=cached)

    def spec(self) -> RotarySpec:
        """The finished description."""
        assert self.rope is not None
        cos, sin, interleaved, half_tables = self.rope
        table = (1,) * (4 - len(self.values[cos].shape)) + self.values[cos].shape
        axes = self._axes(table)
        tracks = [track for track, _ in self.writes]
        if len({slots for _, slots in self.writes}) > 1:
            raise FusionError("the caches are written at different positions")
        if any(track.target_axes != axes for track in tracks) and self._ambiguous(table):
            axes = tracks[0].target_axes
        for name in self.graph.output_names:
            if name in self.aliases:
                continue
            if name not in self.found or name in self.graph.input_names:
                raise FusionError(f"{name} leaves the region and is no track of it")
            tracks.append(self._track(self.found[name], axes, name, cached=False))
        if any(track.target_axes != axes for track in tracks):
            raise FusionError("the tables broadcast over another dimension than the heads'")
        widths = {self.values[track.source].shape[3] for track in tracks}
        tokens = {tuple(self.values[track.source].shape[dim] for dim in track.axes[:2]) for track in tracks}
        if len(widths) != 1 or len(tokens) != 1 or not any(track.rotates for track in tracks):
            raise FusionError("query, key and value differ in width or in length")
        turned = table[3] * (2 if half_tables else 1)
        names = {operand for node in self.graph.nodes for operand in node.inputs}
        if any(self.values[name].dtype not in FLOATS for name in (cos, sin) if name and not self._complex(name)):
            raise FusionError(f"{cos} is {self.values[cos]}")
        positions = self.writes[0][1] if self.writes else ()
        if self.count and self.count not in positions:
            raise FusionError(f"{self.count} counts something else")
        if not names >= set(self.graph.input_names):
            raise FusionError("an input is not used")
        return RotarySpec(
            tuple(self._operand(name) for name in self.graph.input_names),
            tuple(self._operand(name) for name in self.graph.output_names),
            tuple(tracks),
            width=next(iter(widths)),
            turned=turned,
            interleaved=interleaved,
            half_tables=half_tables,
            cos=cos,
            sin=sin,
            axes=axes,
            positions=positions,
            wraps=self.wraps,
            count=self.count,
            step=self.step,
            single=next(iter(tokens)) == (1, 1),
            aliases=tuple(self.aliases.get(name, "") for name in self.graph.output_names),
        )

    def _complex(self, name: str) -> bool:
        return self.values[name].dtype is torch.complex64

    def _ambiguous(self, table: Sequence[int]) -> bool:
        return table[1] == table[2] == 1

    def _axes(self, table: Sequence[int]) -> Axes:
        """Where the heads are: the dimension that the tables do not have."""
        if table[1] == 1:
            return HEADS_FIRST
        if table[2] == 1:
            return LENGTH_FIRST
        raise FusionError(f"the tables differ from head to head: {list(table)}")

    def _operand(self, name: str) -> Operand:
        meta = self.values[name]
        fresh = name not in self.graph.input_names and name not in self.aliases
        return Operand(name, meta.dtype, order=order_of(meta.shape, meta.stride) if fresh else ())
