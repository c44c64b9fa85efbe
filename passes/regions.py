"""Which nodes become one kernel: the named patterns first, then whatever pointwise chains are left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from graph_capture.passes.match import candidates, match_at
from graph_capture.passes.pattern import DEFAULT, Pattern
from graph_capture.passes.rewrite import (
    Contraction,
    Dependencies,
    body_of,
    common_source,
    contract,
    exposed,
    recorded_nodes,
)

from graph_capture.graph import OpNode, SubGraph
from graph_capture.ops import FUSED, Kind, is_random, op, written_inputs

Supports = Callable[[SubGraph], "str | None"]
WINDOW = 256  # nodes that a grown region may span, so that its convexity is a local question


@dataclass(frozen=True)
class Receipt:
    """What a rule looked at: places where it could apply, where it did, and why not elsewhere (reason -> count)."""

    rule: str
    candidates: int
    matches: int
    refusals: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class FusionPlan:
    """The rewritten graph, each region one ``fused.`` node, and a receipt for each rule."""

    graph: SubGraph
    receipts: tuple[Receipt, ...]


def find_regions(
    graph: SubGraph,
    *,
    supports: Supports,
    patterns: Iterable[Pattern] | None = None,
    max_nodes: int = 64,
    min_nodes: int = 2,
) -> FusionPlan:
    """Find the regions of `graph` and contract each into one node.

    A fused node holds the region in its attribute ``body`` (a `SubGraph` over canonical names); its ``origin`` are the
    recorded nodes.

    Args:
        supports: why a region cannot be a kernel, or None if it can.
        patterns: tried in order; the registered ones unless given.
        max_nodes, min_nodes: bounds on the recorded ops of a region.
    """
    receipts = []
    bounds = (min_nodes, max_nodes)
    for item in DEFAULT if patterns is None else patterns:
        graph, receipt = _apply_pattern(graph, item, supports, bounds)
        receipts.append(receipt)
    graph, receipt = _grow_pointwise(graph, supports, bounds)
    return FusionPlan(graph, (*receipts, receipt))


class _Finder:
    """Collects disjoint regions of one rule, and the reasons against the others."""

    def __init__(self, graph: SubGraph, rule: str, supports: Supports, bounds: tuple[int, int]) -> None:
        self.graph, self.rule, self.supports, self.bounds = graph, rule, supports, bounds
        self.dependencies = Dependencies(graph)
        self.taken: set[int] = set()
        self.found: list[Contraction] = []
        self.refusals: Counter[str] = Counter()

    def offer(self, nodes: tuple[int, ...]) -> None:
        """Take `nodes` as a region, or note why not."""
        reason = self._reason(nodes)
        if reason is not None:
            self.refusals[reason] += 1
            return
        outputs = exposed(self.graph, nodes)
        body, inputs = body_of(self.graph, nodes, outputs)
        reason = self.supports(body)
        if reason is not None:
            self.refusals[reason] += 1
            return
        members = [self.graph.nodes[index] for index in nodes]
        node = OpNode(
            FUSED + self.rule,
            inputs,
            tuple(outputs),
            (("body", body),),
            source=common_source(members),
            origin=recorded_nodes(self.graph, nodes),
        )
        self.found.append(Contraction(nodes, node))
        self.taken.update(nodes)

    def _reason(self, nodes: tuple[int, ...]) -> str | None:
        if self.taken & set(nodes):
            return "overlaps another region"
        if not exposed(self.graph, nodes):
            return "its result is never used"
        size = len(recorded_nodes(self.graph, nodes))
        low, high = self.bounds
        if not low <= size <= high:
            return f"{size} ops are {'fewer than ' + str(low) if size < low else 'more than ' + str(high)}"
        return self.dependencies.blocked(nodes)

    def finish(self, seen: int) -> tuple[SubGraph, Receipt]:
        """The rewritten graph and the receipt."""
        graph = self.graph
        if self.found:
            graph, dropped = contract(graph, self.found, self.dependencies)
            if dropped:
                self.refusals["would have created a cycle with other regions"] += len(dropped)
            matches = len(self.found) - len(dropped)
        else:
            matches = 0
        return graph, Receipt(self.rule, seen, matches, tuple(sorted(self.refusals.items())))


def _apply_pattern(
    graph: SubGraph, item: Pattern, supports: Supports, bounds: tuple[int, int]
) -> tuple[SubGraph, Receipt]:
    finder, seen = _Finder(graph, item.name, supports, bounds), 0
    for template in item.templates:
        for anchor in candidates(graph, template):
            match = match_at(graph, template, anchor)
            if match is not None:
                seen += 1
                finder.offer(match.nodes)
    return finder.finish(seen)


def _grow_pointwise(graph: SubGraph, supports: Supports, bounds: tuple[int, int]) -> tuple[SubGraph, Receipt]:
    """Greedily, in order: a pointwise node joins the region of one of its producers, if shapes and order allow."""
    finder = _Finder(graph, "pointwise", supports, bounds)
    groups: dict[int, list[int]] = {}  # node -> the group that it is in
    for index, node in enumerate(graph.nodes):
        if not _growable(graph, node) or supports(body_of(graph, (index,), node.outputs)[0]) is not None:
            continue
        groups[index] = [index]
        for name in node.inputs:
            group = groups.get(graph.producers.get(name, -1))
            if group is None or group is groups[index]:
                continue
            merged = sorted({*group, *groups[index]})
            if _joins(graph, finder, merged, name, node, bounds[1]):
                for member in merged:
                    groups[member] = merged
    distinct = {id(group): group for group in groups.values() if len(group) > 1}
    for group in distinct.values():
        finder.offer(tuple(group))
    return finder.finish(len(distinct))


def _growable(graph: SubGraph, node: OpNode) -> bool:
    return (
        op(node.op_type).kind is Kind.POINTWISE
        and len(node.outputs) == 1
        and node.outputs[0] in graph.values
        and not written_inputs(node)
        and not is_random(node)
    )


def _joins(graph: SubGraph, finder: _Finder, merged: list[int], name: str, node: OpNode, max_nodes: int) -> bool:
    same_shape = graph.values[name].shape == graph.values[node.outputs[0]].shape
    if not same_shape or merged[-1] - merged[0] > WINDOW or len(recorded_nodes(graph, merged)) > max_nodes:
        return False
    if finder.dependencies.detour(merged) is not None:
        return False
    return finder.supports(body_of(graph, merged, exposed(graph, merged))[0]) is None
