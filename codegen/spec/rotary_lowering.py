"""Rotary embedding of query and key, with what is around it, as one kernel: from a region to its spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from graph_capture.codegen.spec.geometry import order_of
from graph_capture.codegen.spec.kernel import Operand
from graph_capture.codegen.spec.rotary import HEADS_FIRST, LENGTH_FIRST, Axes, Norm, RotarySpec, Track
from graph_capture.errors import FusionError
from graph_capture.ir.binding import arguments
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.values import Arg, TensorMeta

FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
OPS = {
    "rope",
    "rms_norm",
    "add",
    "aten.transpose.int",
    "aten.add_.Tensor",
    "aten.index_copy_.default",
    "aten.index_put_.default",
}


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


def lower(graph: SubGraph, values: Mapping[str, TensorMeta], define: object = None) -> RotarySpec:
    """`graph` as one kernel, given the layout of each of its values; of its ops none has a scalar expression.

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
        if sin and bound.get("interleaved") and bound.get("half_tables"):
            raise FusionError("half tables repeat, and neighbours would be rotated by different angles")
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
        batch, length, heads, width = (value.dims[dim] for dim in axes)
        own = (batch, length, heads, width)
        shape = self.values[value.track.source].shape
        return replace(value.track, axes=own, heads=shape[heads], target=target, target_axes=axes, cached=cached)

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
        elif not tracks and self._ambiguous(table) and self._one_token():
            axes = LENGTH_FIRST
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
            unbatched=next(iter(tokens))[0] == 1,
            single=next(iter(tokens)) == (1, 1),
            aliases=tuple(self.aliases.get(name, "") for name in self.graph.output_names),
        )

    def _complex(self, name: str) -> bool:
        return self.values[name].dtype is torch.complex64

    def _ambiguous(self, table: Sequence[int]) -> bool:
        return table[1] == table[2] == 1

    def _one_token(self) -> bool:
        """Whether the results have one token each, if their length comes before their heads."""
        made = [name for name in self.graph.output_names if name not in self.aliases]
        return all(self.values[name].shape[1] == 1 for name in made)

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
