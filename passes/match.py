"""Finding a template in a graph: candidates by op type, then isomorphism on each candidate's neighbourhood alone.

networkx decides how the nodes correspond (VF2); operands and attributes are then bound exactly. The neighbourhood is
what lies within the template's depth above the anchor, so the time is linear in the number of candidates.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graph_capture.passes.pattern import Hole, Template, dataflow
from networkx.algorithms.isomorphism import DiGraphMatcher, categorical_node_match

from graph_capture.graph import OpNode, SubGraph
from graph_capture.ops import op, same_value


@dataclass(frozen=True)
class Match:
    """Where a template occurs.

    Attributes:
        nodes: indices in the graph, ascending.
        bindings: the template's value names -> the graph's.
        holes: captured attribute values.
    """

    nodes: tuple[int, ...]
    bindings: Mapping[str, str]
    holes: Mapping[str, Any]


def candidates(graph: SubGraph, template: Template) -> Iterator[int]:
    """Indices of the nodes that could be the template's anchor."""
    wanted = template.anchor.op_type
    return (index for index, node in enumerate(graph.nodes) if node.op_type == wanted)


def match_at(graph: SubGraph, template: Template, anchor: int, ignore: frozenset[str] = frozenset()) -> Match | None:
    """The template's occurrence that ends in node `anchor`; attributes named in `ignore` may differ."""
    pattern = template.graph
    needed = Counter(node.op_type for node in pattern.nodes)
    near = _neighbourhood(graph, anchor, template.depth, set(needed))
    if needed - Counter(graph.nodes[index].op_type for index in near):
        return None
    last = len(pattern) - 1
    if len(pattern) == 1:
        return _bind(graph, pattern, {0: anchor}, ignore)
    matcher = DiGraphMatcher(
        dataflow(graph, near), template.structure, node_match=categorical_node_match("op_type", None)
    )
    for found in matcher.subgraph_monomorphisms_iter():
        places = {theirs: ours for ours, theirs in found.items()}
        if places[last] == anchor and (match := _bind(graph, pattern, places, ignore)) is not None:
            return match
    return None


def _neighbourhood(graph: SubGraph, anchor: int, depth: int, op_types: set[str]) -> set[int]:
    near, frontier = {anchor}, {anchor}
    for _ in range(depth):
        producers = {graph.producers.get(name, -1) for index in frontier for name in graph.nodes[index].inputs}
        frontier = {i for i in producers - near if i >= 0 and graph.nodes[i].op_type in op_types}
        near |= frontier
    return near


def _bind(graph: SubGraph, pattern: SubGraph, places: Mapping[int, int], ignore: frozenset[str]) -> Match | None:
    """Check attributes and operands under a node correspondence; commutative ops may take theirs in any order."""
    holes: dict[str, Any] = {}
    outputs: dict[str, str] = {}
    for index, place in places.items():
        theirs, ours = pattern.nodes[index], graph.nodes[place]
        if not _attributes_fit(theirs, ours, holes, ignore) or len(theirs.outputs) != len(ours.outputs):
            return None
        outputs.update(zip(theirs.outputs, ours.outputs, strict=True))
    orders = []
    for index, place in sorted(places.items()):
        theirs, ours = pattern.nodes[index], graph.nodes[place]
        if len(theirs.inputs) != len(ours.inputs):
            return None
        swapped = op(ours.op_type).commutative and len(ours.inputs) == 2
        choices = [ours.inputs, ours.inputs[::-1]] if swapped else [ours.inputs]
        orders.append([(theirs.inputs, choice) for choice in choices])
    for chosen in itertools.product(*orders):
        bindings = dict(outputs)
        pairs = (pair for theirs, ours in chosen for pair in zip(theirs, ours, strict=True))
        if all(bindings.setdefault(name, value) == value for name, value in pairs):
            return Match(tuple(sorted(places.values())), bindings, holes)
    return None


def _attributes_fit(theirs: OpNode, ours: OpNode, holes: dict[str, Any], ignore: frozenset[str]) -> bool:
    wanted = {key: value for key, value in theirs.attrs if key not in ignore}
    given = {key: value for key, value in ours.attrs if key not in ignore}
    if wanted.keys() != given.keys():
        return False
    for key, value in wanted.items():
        if isinstance(value, Hole):
            if not same_value(holes.setdefault(value.name, given[key]), given[key]):
                return False
        elif not same_value(value, given[key]):
            return False
    return True
