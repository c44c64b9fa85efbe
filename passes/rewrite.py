"""Contracting sets of nodes into one node each, where that keeps every order.

A set is convex if no path leaves it and comes back, over data and order edges alike. Sets that are convex one by one
can still form a cycle together; then the later ones are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from graph_capture.ir.binding import flatten_outputs, prepare
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import Kind, op
from graph_capture.ir.values import Source, TensorMeta
from graph_capture.passes.flow import CyclicGroupsError, Dependencies


@dataclass(frozen=True)
class Contraction:
    """Nodes (ascending indices) and the node that takes their place."""

    nodes: tuple[int, ...]
    node: OpNode


def contract(
    graph: SubGraph, contractions: Sequence[Contraction], dependencies: Dependencies | None = None
) -> tuple[SubGraph, list[Contraction]]:
    """Replace each set by its node; sets must be disjoint and convex.

    Returns:
        The rewritten graph, in a topological order as close to the old one as can be, and the contractions that were
        dropped because they would have made a cycle with the others.
    """
    dependencies = dependencies or Dependencies(graph)
    kept, dropped = list(contractions), list[Contraction]()
    while True:
        try:
            order = dependencies.order([item.nodes for item in kept])
            break
        except CyclicGroupsError as cycle:
            latest = max(number for number, item in enumerate(kept) if item.nodes[-1] in cycle.nodes)
            dropped.append(kept.pop(latest))
    made = {item.nodes[-1]: item.node for item in kept}
    return replace(graph, nodes=tuple(made.get(index, graph.nodes[index]) for index in order)), dropped


def inline(graph: SubGraph, wanted: Callable[[OpNode], bool]) -> SubGraph:
    """`graph` with the nodes that are `wanted` taken apart into those that they replaced, and so on."""

    def apart(node: OpNode) -> Iterator[OpNode]:
        if not node.origin or not wanted(node):
            yield node
            return
        for replaced in node.origin:
            yield from apart(replaced)

    nodes = [part for node in graph.nodes for part in apart(node)]
    return replace(graph, nodes=tuple(nodes)) if len(nodes) > len(graph) else graph


def values_of(nodes: Iterable[OpNode], values: Mapping[str, TensorMeta]) -> dict[str, TensorMeta]:
    """Those of `values` that `nodes`, or what they replaced, read or make; all of a graph's would be copied often."""
    pending, found = [*nodes], dict[str, TensorMeta]()
    while pending:
        node = pending.pop()
        found.update((name, values[name]) for name in (*node.inputs, *node.outputs) if name in values)
        pending += node.origin
    return found


def live_outputs(graph: SubGraph, nodes: Iterable[int]) -> list[str]:
    """The values made by `nodes` that are read elsewhere or returned, in order."""
    inside = set(nodes)
    returned = set(graph.output_names)
    return [
        name
        for index in sorted(inside)
        for name in graph.nodes[index].outputs
        if name in returned or any(user not in inside for user in graph.users.get(name, ()))
    ]


def unviewable(graph: SubGraph, name: str, instead: torch.Tensor) -> str | None:
    """A view of value `name` that would fail if it were laid out as `instead` (a meta tensor), or None."""
    made = {name: instead}
    pending = [name]
    while pending:
        for user in graph.users.get(pending.pop(), ()):
            node = graph.nodes[user]
            if op(node.op_type).kind is not Kind.VIEW or any(other not in made for other in node.inputs):
                continue
            try:
                results = flatten_outputs(prepare(node)([made[other] for other in node.inputs]))
                if node.op_type.startswith("aten.as_strided"):  # it looks past them
                    raise RuntimeError
            except RuntimeError:
                where = f" ({node.source.module})" if node.source and node.source.module else ""
                return f"{node.op_type}{where} needs other strides"
            made.update(zip(node.outputs, results, strict=True))
            pending.extend(node.outputs)
    return None


def common_source(nodes: Sequence[OpNode]) -> Source | None:
    """The last node's line, under the module path that all share."""
    sources = [node.source for node in nodes if node.source is not None]
    if not sources:
        return None
    paths = [source.module.split(".") for source in sources]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return Source(".".join(shared), sources[-1].file, sources[-1].line)


def body_of(
    graph: SubGraph, nodes: Iterable[int], outputs: Sequence[str], rounded: Collection[str] = ()
) -> tuple[SubGraph, tuple[str, ...]]:
    """`nodes` as a graph over canonical names (x0, v0, ...), equal for equal regions; and the values of its inputs.

    Those of `outputs` that are `rounded` go through a cast to their own dtype: a kernel then rounds as `nodes` do.
    """
    indices = sorted(nodes)
    made = {name for index in indices for name in graph.nodes[index].outputs}
    inputs = dict.fromkeys(name for index in indices for name in graph.nodes[index].inputs if name not in made)
    names = {name: f"x{number}" for number, name in enumerate(inputs)}
    for index in indices:
        for name in graph.nodes[index].outputs:
            names[name] = f"v{len(names) - len(inputs)}"
    inner = [_bare(graph.nodes[index].rename(names)) for index in indices]
    values = {names[name]: graph.values[name] for name in names if name in graph.values}
    results = {name: names[name] for name in outputs}
    for name in rounded:
        results[name] = f"v{len(made) + len(inner) - len(indices)}"
        dtype = graph.values[name].dtype
        inner.append(OpNode("cast", (names[name],), (results[name],), (("dtype", dtype),)))
        values[results[name]] = graph.values[name]
    body = SubGraph(tuple(inner), tuple(names[name] for name in inputs), tuple(results[n] for n in outputs), values)
    return body, tuple(inputs)


def _bare(node: OpNode) -> OpNode:
    return OpNode(node.op_type, node.inputs, node.outputs, node.attrs)
