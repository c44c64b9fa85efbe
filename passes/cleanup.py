"""Less of the same: what is never used, computed twice, a copy of itself, or the same in every replay.

A value may stand for another only where nobody can tell: its memory is neither written nor returned. Every pass here is
exact, bit for bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from graph_capture.ir.effects import alias_set, is_random, written_inputs
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.layouts import is_contiguous
from graph_capture.ir.ops import EXTERNAL, GUARD, Kind, op
from graph_capture.ir.values import TensorMeta
from graph_capture.passes.writes import forward_writes

MAX_CONSTANT = 2**20  # bytes of a constant that is kept without being asked for


class MemoryUse:
    """Which values' memory a graph writes or returns."""

    def __init__(self, graph: SubGraph) -> None:
        self.graph = graph

    @cached_property
    def written(self) -> frozenset[Any]:
        """Alias sets that are written in place."""
        nodes = self.graph.nodes
        return frozenset(alias_set(self.graph, node.inputs[i]) for node in nodes for i in written_inputs(node))

    @cached_property
    def returned(self) -> frozenset[Any]:
        """Alias sets of the graph's outputs."""
        return frozenset(alias_set(self.graph, name) for name in self.graph.output_names)

    def constant(self, name: str) -> bool:
        """Whether nothing writes the value's memory."""
        return alias_set(self.graph, name) not in self.written

    def private(self, name: str) -> bool:
        """Whether nothing writes the value's memory and nobody gets it."""
        return self.constant(name) and alias_set(self.graph, name) not in self.returned


def is_pure(node: OpNode) -> bool:
    """Whether the op does nothing but compute its results, the same ones each time."""
    return not (
        written_inputs(node)
        or is_random(node)
        or node.op_type == EXTERNAL
        or node.op_type.startswith(GUARD)
        or not node.outputs
    )


def dead_code(graph: SubGraph) -> SubGraph:
    """Without the ops whose results nobody uses."""
    needed = set(graph.output_names)
    kept = []
    for node in reversed(graph.nodes):
        if needed.isdisjoint(node.outputs) and is_pure(node):
            continue
        needed.update(node.inputs)
        kept.append(node)
    return with_nodes(graph, kept[::-1])


def common_subexpressions(graph: SubGraph) -> SubGraph:
    """Equal ops on equal inputs once: masks, position tables and views that every layer makes anew."""
    memory = MemoryUse(graph)
    names: dict[str, str] = {}
    first: dict[tuple[object, ...], OpNode] = {}
    kept = []
    for node in graph.nodes:
        renamed = node.rename(names) if not names.keys().isdisjoint(node.inputs) else node
        kept.append(renamed)
        if not is_pure(node) or not all(map(memory.private, node.outputs)):
            continue
        if not all(map(memory.constant, node.inputs)):
            continue
        earlier = first.setdefault((node.op_type, renamed.inputs, repr(node.attrs)), renamed)
        if earlier is not renamed:
            names.update(zip(node.outputs, earlier.outputs, strict=True))
            kept.pop()
    return with_nodes(graph, kept)


def no_ops(graph: SubGraph) -> SubGraph:
    """Without casts, copies, views and arithmetic that give back what they got."""
    memory = MemoryUse(graph)
    names: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        renamed = node.rename(names) if not names.keys().isdisjoint(node.inputs) else node
        same = _same_as(graph, node) if len(node.outputs) == 1 else None
        if same is not None and node.outputs[0] not in graph.output_names:
            is_view = op(node.op_type).kind is Kind.VIEW
            if is_view or (memory.private(node.outputs[0]) and memory.constant(same)):
                names[node.outputs[0]] = names.get(same, same)
                continue
        kept.append(renamed)
    return with_nodes(graph, kept)


def _same_as(graph: SubGraph, node: OpNode) -> str | None:
    """The input that `node`'s result equals, value by value, with the same layout."""
    if not node.inputs or not all(name in graph.values for name in (*node.inputs, *node.outputs)):
        return None
    out = graph.values[node.outputs[0]]
    if node.op_type == "aten.cat.default":
        filled = [name for name in node.inputs if graph.values[name].numel]
        same = filled[0] if len(filled) == 1 else None
    else:
        same = node.inputs[0] if len(node.inputs) == 1 and _changes_nothing(node, out) else None
    if same is None:
        return None
    given = graph.values[same]
    return same if _looks(given) == _looks(out) else None


def _changes_nothing(node: OpNode, out: TensorMeta) -> bool:
    other = node.attr("other")
    if node.op_type in ("mul", "div", "mul.Scalar", "div.Scalar"):
        return other == 1
    if node.op_type in ("add", "sub", "add.Scalar", "sub.Scalar"):  # -0.0 + 0 is 0.0
        return other == 0 and other is not None and not out.dtype.is_floating_point
    if node.op_type == "aten.slice.Tensor":
        return node.attr("step", 1) == 1
    return node.op_type in _IDENTITIES


# These keep every value where it is, if shape and strides stay.
_IDENTITIES = frozenset(
    {"cast", "repeat_kv"}
    | {f"aten.{name}.default" for name in ("clone", "alias", "detach", "view", "expand", "squeeze")}
)
_RESHAPES = frozenset(
    {f"aten.{name}.default" for name in ("view", "unsqueeze", "squeeze", "_unsafe_view", "alias")}
    | {"aten.squeeze.dim"}
)


def collapse_views(graph: SubGraph) -> SubGraph:
    """A chain of views as one: a reshape of contiguous memory, or, where it ends as it began, none."""
    names: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        renamed = node.rename(names) if not names.keys().isdisjoint(node.inputs) else node
        kept.append(renamed)
        if len(node.outputs) != 1 or op(node.op_type).kind is not Kind.VIEW or node.outputs[0] not in graph.values:
            continue
        out = graph.values[node.outputs[0]]
        chain = list(_chain(graph, node))
        equal = next((name for name, _ in chain if _layout(graph.values[name]) == _layout(out)), None)
        if equal is not None and node.outputs[0] not in graph.output_names:
            names[node.outputs[0]] = names.get(equal, equal)
            kept.pop()
            continue
        if node.op_type == "aten.unsqueeze.default" and _repeated(graph, node.outputs[0]):
            continue  # the two are a repetition
        whole = [name for name, by_reshapes in chain[1:] if by_reshapes and graph.values[name].bits == out.bits]
        reshaped = [name for name in whole if is_contiguous(graph.values[name])]
        if reshaped and is_contiguous(out):
            root = names.get(reshaped[-1], reshaped[-1])
            kept[-1] = replace(node, op_type="aten.view.default", inputs=(root,), attrs=(("size", out.shape),))
    return with_nodes(graph, kept)


def _repeated(graph: SubGraph, name: str) -> bool:
    users = graph.users.get(name, ())
    return bool(users) and all(graph.nodes[user].op_type == "aten.expand.default" for user in users)


def sink_views(graph: SubGraph) -> SubGraph:
    """A norm of regrouped rows as the regrouping of the norm, which leaves the norm next to what made the rows."""
    nodes: list[OpNode] = []
    values = dict(graph.values)
    for node in graph.nodes:
        producer = graph.producers.get(node.inputs[0]) if node.inputs else None
        view = None if producer is None else graph.nodes[producer]
        if node.op_type not in ("layer_norm", "rms_norm") or view is None or not _regroups(graph, view):
            nodes.append(node)
            continue
        name, given = f"{node.outputs[0]}_rows", graph.values[view.inputs[0]]
        values[name] = given._replace(dtype=graph.values[node.outputs[0]].dtype, offset=0, storage=-1)
        nodes.append(replace(node, inputs=(view.inputs[0], *node.inputs[1:]), outputs=(name,)))
        size = graph.values[node.outputs[0]].shape
        nodes.append(replace(node, op_type="aten.view.default", inputs=(name,), attrs=(("size", size),)))
    changed = len(nodes) > len(graph)
    return SubGraph(tuple(nodes), graph.input_names, graph.output_names, values) if changed else graph


def _regroups(graph: SubGraph, view: OpNode) -> bool:
    """Whether `view` changes only how rows are counted."""
    before, after = graph.values.get(view.inputs[0]), graph.values.get(view.outputs[0])
    return (
        view.op_type in _RESHAPES
        and before is not None
        and after is not None
        and min(len(before.shape), len(after.shape)) > 1
        and before.shape[-1] == after.shape[-1]
        and is_contiguous(before)
        and is_contiguous(after)
        and not MemoryUse(graph).written & {alias_set(graph, view.inputs[0])}
    )


def _chain(graph: SubGraph, node: OpNode) -> list[tuple[str, bool]]:
    """The values that `node` is a view of, nearest first, and whether every step from there is a reshape."""
    found = []
    by_reshapes = True
    while op(node.op_type).kind is Kind.VIEW and node.inputs and node.inputs[0] in graph.values:
        by_reshapes = by_reshapes and node.op_type in _RESHAPES
        found.append((node.inputs[0], by_reshapes))
        producer = graph.producers.get(node.inputs[0])
        if producer is None:
            break
        node = graph.nodes[producer]
    return found


def _looks(meta: TensorMeta) -> tuple[object, ...]:
    """All that a reader can tell of a value besides its elements."""
    return meta.shape, meta.stride, meta.dtype, meta.device, meta.bits


def _layout(meta: TensorMeta) -> tuple[object, ...]:
    return *_looks(meta), meta.offset


def split_constants(graph: SubGraph, weights: Collection[str] = ()) -> tuple[SubGraph, SubGraph]:
    """Part a graph into what is the same in every replay, and the rest.

    Args:
        weights: inputs that may be taken as constant. Without any, only what depends on nothing at all is constant
            (position ranges, masks), and values of more than `MAX_CONSTANT` bytes are not kept.

    Returns:
        A graph from weights to constants, and a graph that takes these constants as further inputs.
    """
    memory = MemoryUse(graph)
    known = set(weights)
    constant: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if (
            is_pure(node)
            and all(name in known for name in node.inputs)
            and all(map(memory.private, node.outputs))
            and all(map(memory.constant, node.inputs))
        ):
            known.update(node.outputs)
            constant.add(index)
    needed = {name for index, node in enumerate(graph.nodes) if index not in constant for name in node.inputs}
    from_nothing = _without_inputs(graph, constant)
    for index in sorted(constant, reverse=True):
        node = graph.nodes[index]
        kept = [name for name in node.outputs if name in needed]
        too_large = index in from_nothing and any(graph.values[name].nbytes > MAX_CONSTANT for name in kept)
        if kept and too_large and not weights:
            constant.discard(index)
            needed.update(node.inputs)
    outputs = [name for index in sorted(constant) for name in graph.nodes[index].outputs if name in needed]
    inside = dead_code(
        SubGraph(tuple(graph.nodes[i] for i in sorted(constant)), graph.input_names, tuple(outputs), graph.values)
    )
    used = {name for node in inside.nodes for name in node.inputs}
    inside = replace(inside, input_names=tuple(name for name in graph.input_names if name in used))
    rest = tuple(node for index, node in enumerate(graph.nodes) if index not in constant)
    return inside, SubGraph(rest, (*graph.input_names, *outputs), graph.output_names, graph.values)


def _without_inputs(graph: SubGraph, indices: set[int]) -> set[int]:
    """Those of `indices` that depend on no input of the graph."""
    found: set[int] = set()
    for index in sorted(indices):
        producers = [graph.producers.get(name) for name in graph.nodes[index].inputs]
        if all(producer in found for producer in producers):
            found.add(index)
    return found


def with_nodes(graph: SubGraph, nodes: list[OpNode]) -> SubGraph:
    """`graph` with other nodes; `graph` itself if they are the same."""
    same = len(nodes) == len(graph.nodes) and all(map(operator.is_, nodes, graph.nodes))
    return graph if same else replace(graph, nodes=tuple(nodes))


def arguments(graph: SubGraph) -> SubGraph:
    """One form for each call: dimensions from the end, those of a transpose in order, and no dtype that is implied."""
    values = dict(graph.values)
    nodes = [part for node in graph.nodes for part in _transposes(node, values)]
    whole = graph if len(nodes) == len(graph) else replace(graph, nodes=tuple(nodes), values=values)
    return with_nodes(whole, [_without_implied(whole, _from_the_end(whole, node)) for node in nodes])


def _transposes(node: OpNode, values: dict[str, TensorMeta]) -> tuple[OpNode, ...]:
    """A permutation that swaps two dimensions, or does that after swapping the last two, as one or two transposes."""
    dims = node.attr("dims")
    if node.op_type != "aten.permute.default" or node.inputs[0] not in values or len(dims) < 2:
        return (node,)
    given, rank = values[node.inputs[0]], len(dims)
    order = [dim % rank for dim in dims]
    moved = [place for place, dim in enumerate(order) if place != dim]
    if len(moved) == 2:
        return (_transpose(node, node.inputs[0], node.outputs[0], *moved),)
    before = [*order[:-2], order[-1], order[-2]]  # what the last two dimensions of are swapped at the end
    moved = [place for place, dim in enumerate(before) if place != dim]
    if len(moved) != 2:
        return (node,)
    name = f"{node.outputs[0]}_swapped"
    shape, stride = (tuple(part[dim] for dim in before) for part in (given.shape, given.stride))
    values[name] = given._replace(shape=shape, stride=stride)
    first = _transpose(node, node.inputs[0], name, *moved)
    return first, _transpose(node, name, node.outputs[0], rank - 2, rank - 1)


def _transpose(node: OpNode, given: str, made: str, first: int, second: int) -> OpNode:
    attrs = (("dim0", first), ("dim1", second))
    return replace(node, op_type="aten.transpose.int", inputs=(given,), outputs=(made,), attrs=attrs)


def _without_implied(graph: SubGraph, node: OpNode) -> OpNode:
    if not node.inputs or not node.outputs or not {node.inputs[0], node.outputs[0]} <= graph.values.keys():
        return node
    given = graph.values[node.inputs[0]]
    if op(node.op_type).kind is Kind.ROW and given.dtype.is_floating_point and node.attr("dtype") is given.dtype:
        return replace(node, attrs=tuple(item for item in node.attrs if item[0] != "dtype"))
    if node.op_type != "cast" or len(node.attrs) < 2:
        return node
    implied = {"device": given.device, "layout": torch.strided, "non_blocking": False, "pin_memory": False}
    kept = tuple((name, value) for name, value in node.attrs if implied.get(name, node) != value)
    return replace(node, attrs=kept)


_NAMES_DIMENSIONS = {"dim", "dim0", "dim1", "dims"}


def _from_the_end(graph: SubGraph, node: OpNode) -> OpNode:
    given = {name: value for name, value in node.attrs if name in _NAMES_DIMENSIONS}
    if not given or not node.inputs or node.inputs[0] not in graph.values or not node.outputs:
        return node
    if op(node.op_type).kind is not Kind.ROW and node.op_type not in _BY_DIMENSION:
        return node
    rank = len(graph.values[node.inputs[0]].shape) + (node.op_type in ("aten.unsqueeze.default", "aten.stack.default"))

    def negative(dim: Any) -> Any:
        if isinstance(dim, tuple):
            return tuple(map(negative, dim))
        return dim - rank if type(dim) is int and dim >= 0 else dim

    found = {name: negative(value) for name, value in given.items()}
    if "dim0" in found and "dim1" in found:
        found["dim0"], found["dim1"] = sorted((found["dim0"], found["dim1"]))
    if found == given:
        return node
    return replace(node, attrs=tuple((dict(node.attrs) | found).items()))


_BY_DIMENSION = frozenset(
    {
        "aten.cat.default",
        "aten.stack.default",
        "aten.max.dim",
        "aten.slice.Tensor",
        "aten.split.Tensor",
        "aten.unbind.int",
        "aten.unsqueeze.default",
        "aten.transpose.int",
        "aten.index_copy_.default",
        "aten.index_copy.default",
        "aten.var.correction",
    }
)


CLEAN_UP: dict[str, Callable[[SubGraph], SubGraph]] = {
    "writes": forward_writes,
    "arguments": arguments,
    "no_ops": no_ops,
    "views": lambda graph: sink_views(collapse_views(graph)),
    "common_subexpressions": common_subexpressions,
    "dead_code": dead_code,
}


def clean_up(graph: SubGraph) -> SubGraph:
    """All of the clean-up passes, in order."""
    for apply in CLEAN_UP.values():
        graph = apply(graph)
    return graph
