"""Which nodes become one kernel: named patterns, then whatever chains of pointwise and row ops are left.

All candidates are looked at on the same graph. Where two overlap, the one that saves more bytes of memory traffic is
taken; equal ones in the order of the patterns, then of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from graph_capture.ir.effects import is_random, written_inputs
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.layouts import is_contiguous
from graph_capture.ir.ops import FUSED, Kind, op
from graph_capture.passes.decode import SMALL, decode_regions, small_ops
from graph_capture.passes.flow import Dependencies
from graph_capture.passes.match import Matcher
from graph_capture.passes.pattern import Pattern
from graph_capture.passes.receipts import Receipt, Tally
from graph_capture.passes.region_bodies import is_composed, is_library, region_body, saved_bytes, stands_alone
from graph_capture.passes.registry import DEFAULT
from graph_capture.passes.rewrite import (
    Contraction,
    common_source,
    contract,
    inline,
    live_outputs,
    unviewable,
)
from graph_capture.passes.rounding import shown

Supports = Callable[[SubGraph], "str | None"]
WINDOW = 256  # nodes that a grown region may span, so that its convexity is a local question
SEEDS = frozenset({"bias_relu", "bias_gelu", "bias_gelu_tanh", "bias_silu", "scaled_residual"})  # may grow into more
GROWN = ("pointwise", "row", "library")  # rules of the regions that no pattern names


@dataclass(frozen=True)
class FusionPlan:
    """The rewritten graph, each region one ``fused.`` node, and a receipt for each rule."""

    graph: SubGraph
    receipts: tuple[Receipt, ...]


@dataclass(frozen=True)
class _Candidate:
    rule: str
    nodes: tuple[int, ...]
    saved: int
    order: int


def find_regions(
    graph: SubGraph,
    *,
    supports: Supports,
    patterns: Iterable[Pattern] | None = None,
    max_nodes: int = 64,
    min_nodes: int = 2,
    off: Collection[str] = (),
    matcher: Matcher | None = None,
    told: Collection[str] = (),
) -> FusionPlan:
    """Find the regions of `graph` and contract each into one node.

    A fused node holds the region in its attribute ``body`` (a `SubGraph` over canonical names); its ``origin`` are the
    nodes that it replaces.

    Args:
        supports: why a region cannot be a kernel, or None if it can.
        patterns: what to look for; the registered ones unless given.
        max_nodes, min_nodes: bounds on the recorded ops of a region.
        off: rules to leave out.
        matcher: `graph`'s, if there is one.
        told: results of which somebody else can tell how often they were rounded.
    """
    told = shown(graph, told)
    named = _Finder(matcher or Matcher(Dependencies(graph)), supports, (min_nodes, max_nodes), told)
    named.grows = GROWN[0] not in off
    named.match([item for item in (DEFAULT if patterns is None else patterns) if item.name not in off])
    named.match_decode(off)
    named.take_offered()
    graph, receipts = named.finish()
    graph = inline(graph, is_composed)
    rest = _Finder(Matcher(Dependencies(graph)), supports, (min_nodes, max_nodes), told)
    rest.grow(off, named.seeds)
    graph, others = rest.finish()
    return FusionPlan(graph, (*receipts, *others))


class _Finder:
    """Collects disjoint regions, and the reasons against the others."""

    def __init__(self, matcher: Matcher, supports: Supports, bounds: tuple[int, int], shown: Collection[str]) -> None:
        graph = matcher.graph
        self.graph, self._supports, self.bounds = graph, supports, bounds
        self.dependencies = matcher.dependencies
        self.matcher = matcher
        self.owner: dict[int, str] = {}  # node -> the rule that took it
        self.found: list[tuple[str, Contraction]] = []
        self.tallies: dict[str, Tally] = {}
        self.shown = shown
        self.grows = False  # pointwise regions are left to be grown
        self.seeds: dict[tuple[str, ...], str] = {}  # what such a region makes -> the rule that found it
        self._known: dict[tuple[object, ...], str | None] = {}
        self._offered: dict[tuple[int, ...], _Candidate] = {}

    def tally(self, rule: str) -> Tally:
        return self.tallies.setdefault(rule, Tally(rule))

    # --- patterns

    def match(self, patterns: Sequence[Pattern]) -> None:
        """Find the patterns' matches."""
        for order, item in enumerate(patterns):
            tally = self.tally(item.name)
            settled: set[int] = set()
            for match in self.matcher.occurrences(item, tally, settled):
                if match.nodes in self._offered:
                    continue
                settled.add(match.anchor)
                tally.seen += 1
                reason = self.reason(match.nodes, compound=item.compound)
                if reason is not None:
                    tally.refuse(self.graph, match.nodes, reason)
                    continue
                saved = saved_bytes(self.graph, match.nodes)
                self._offered[match.nodes] = _Candidate(item.name, match.nodes, saved, order)

    def match_decode(self, off: Collection[str]) -> None:
        """Find the linears and attentions of few rows."""
        for rule, nodes, against in decode_regions(self.graph, self._no_kernel, self.bounds[1]):
            if rule in off:
                continue
            tally = self.tally(rule)
            tally.seen += 1
            if against is not None:
                tally.refuse(self.graph, nodes, against)
            else:
                order = len(self.tallies)
                candidate = _Candidate(rule, nodes, saved_bytes(self.graph, nodes), order)
                self._offered.setdefault(nodes, candidate)

    def take_offered(self) -> None:
        """Take what was found, what saves most first."""
        for candidate in sorted(self._offered.values(), key=lambda c: (-c.saved, c.order, c.nodes)):
            self.offer(candidate.rule, candidate.nodes)

    def offer(self, rule: str, nodes: Sequence[int], kind: str | None = None) -> None:
        """Take `nodes` as a region of this kind (default: the rule's name), unless one of them is taken."""
        owner = next((self.owner[index] for index in nodes if index in self.owner), None)
        if owner is not None:
            self.tally(rule).refuse(self.graph, nodes, f"overlaps {owner}, which saves more")
            return
        graph = self.graph
        members = tuple(graph.nodes[index] for index in nodes)
        self.owner.update(dict.fromkeys(nodes, rule))
        if (
            self.grows
            and rule in SEEDS
            and all(op(node.op_type).kind is Kind.POINTWISE and self._growable(node) for node in members)
        ):
            self.seeds[_made(members)] = rule
            return
        outputs = live_outputs(graph, nodes)
        body, inputs = self._body(nodes, outputs)
        node = OpNode(
            FUSED + (kind or rule), inputs, tuple(outputs), (("body", body),), common_source(members), members
        )
        self.found.append((rule, Contraction(tuple(nodes), node)))

    def reason(self, nodes: Sequence[int], compound: bool = False) -> str | None:
        """Why `nodes` cannot be a region."""
        graph = self.graph
        outputs = live_outputs(graph, nodes)
        if not outputs and not any(written_inputs(graph.nodes[index]) for index in nodes):
            return "its result is never used"
        size, low, high = self._size(nodes), self._least(nodes), self.bounds[1]
        if not low <= size <= high:
            return f"{size} ops are {'fewer than ' + str(low) if size < low else 'more than ' + str(high)}"
        blocked = self.dependencies.blocked(nodes)
        if blocked is not None or compound or any(is_library(graph.nodes[index]) for index in nodes):
            return blocked
        return self._no_kernel(nodes)

    def _size(self, nodes: Sequence[int]) -> int:
        return sum(len(self.graph.nodes[index].recorded) for index in nodes)

    def _least(self, nodes: Sequence[int]) -> int:
        """Of how many recorded ops a region of these must be."""
        first = self.graph.nodes[nodes[0]]
        row = op(first.op_type).kind is Kind.ROW
        return 1 if len(nodes) == 1 and row and stands_alone(self.graph, first) else self.bounds[0]

    def _no_kernel(self, nodes: Sequence[int]) -> str | None:
        """Why `nodes` cannot be a kernel, however few they are."""
        outputs = live_outputs(self.graph, nodes)
        if not outputs:
            return "its result is never used"
        return (
            self.dependencies.blocked(nodes)
            or self.unsupported(nodes, outputs)
            or next(filter(None, map(self._unviewable, outputs)), None)
        )

    def _unviewable(self, name: str) -> str | None:
        """The view of a result that fails where it is contiguous, as kernels leave it."""
        meta = self.graph.values[name]
        return None if is_contiguous(meta) else unviewable(self.graph, name, torch.empty(meta.shape, device="meta"))

    def unsupported(self, nodes: Sequence[int], outputs: Sequence[str]) -> str | None:
        """Why codegen cannot make a kernel of `nodes`; asked once for what is alike."""
        body, inputs = self._body(nodes, outputs)
        key = (body, *(self.graph.values[name]._replace(offset=0, storage=-1) for name in inputs))
        if key not in self._known:
            self._known[key] = self._supports(body)
        return self._known[key]

    def _body(self, nodes: Sequence[int], outputs: Sequence[str]) -> tuple[SubGraph, tuple[str, ...]]:
        """See `region_body`."""
        members = tuple(self.graph.nodes[index] for index in nodes)
        return region_body(members, outputs, self.graph.values, self.shown)

    # --- growing

    def grow(self, off: Collection[str], seeds: Mapping[tuple[str, ...], str]) -> None:
        """Merge what is left along the values whose traffic that saves, the largest first.

        Args:
            off: rules to leave out.
            seeds: regions that patterns name and that may grow, by what they make.
        """
        graph = self.graph
        self.seeds.update(seeds)
        groups = {
            index: [index]
            for index, node in enumerate(graph.nodes)
            if index not in self.owner and self._growable(node) and self.unsupported([index], node.outputs) is None
        }
        for names in seeds:
            seed = sorted(graph.producers[name] for name in names)
            groups.update(dict.fromkeys(seed, seed))
        near = {name for index in groups for name in (*graph.nodes[index].inputs, *graph.nodes[index].outputs)}
        edges = [edge for name in graph.values if name in near for edge in self._edges(name, groups)]
        edges.sort(key=lambda edge: (-graph.values[edge[0]].nbytes, edge[1:]))
        refused: dict[tuple[int, int], str] = {}
        merged = True
        while merged:  # what was not convex may become so once its middle has joined
            merged = False
            for name, first, second in edges:
                left, right = groups[first], groups[second]
                if left is right:
                    continue
                union = sorted({*left, *right})
                reason = self._apart(name, union)
                if reason is None:
                    groups.update(dict.fromkeys(union, union))
                    merged = True
                else:
                    refused[first, second] = reason
        for rule in GROWN:
            self.tally(rule)
        for (first, second), reason in refused.items():
            if groups[first] is not groups[second]:
                tally = self.tally("pointwise")
                tally.seen += 1
                tally.refuse(graph, [first, second], reason)
        for group in {id(group): group for group in groups.values()}.values():
            self._take_grown(group, off)
        for index in small_ops(graph) if SMALL not in off else ():
            if index not in self.owner and not is_library(graph.nodes[index]) and self._no_kernel([index]) is None:
                self.tally(SMALL).seen += 1
                self.offer(SMALL, [index])
        for index, node in enumerate(graph.nodes):
            if index not in self.owner and is_library(node) and "library" not in off:
                self._take("library", [index], node.op_type)

    def _edges(self, name: str, groups: Collection[int]) -> list[tuple[str, int, int]]:
        """Pairs that share a value: its producer with each reader, and each reader with the next."""
        users = [user for user in self.graph.users.get(name, ()) if user in groups]
        producer = self.graph.producers.get(name, -1)
        pairs = [(name, producer, user) for user in users] if producer in groups else []
        if producer not in groups and len(self.graph.values[name].shape) > 1:
            pairs += [(name, first, second) for first, second in pairwise(users)]
        return pairs

    def _apart(self, name: str, union: Sequence[int]) -> str | None:
        graph = self.graph
        shapes = {self._space(graph.nodes[index]) for index in union}
        if len(shapes) > 1:
            return "their iteration spaces differ"
        if union[-1] - union[0] > WINDOW:
            return f"they are more than {WINDOW} ops apart"
        size = self._size(union)
        if size > self.bounds[1]:
            return f"{size} ops are more than {self.bounds[1]}"
        return self.dependencies.blocked(union) or self.unsupported(union, live_outputs(graph, union))

    def _space(self, node: OpNode) -> tuple[int, ...]:
        """The shape that an op iterates over: of a reduction its input's."""
        name = node.inputs[0] if op(node.op_type).kind is Kind.ROW else node.outputs[0]
        return self.graph.values[name].shape

    def _growable(self, node: OpNode) -> bool:
        return (
            op(node.op_type).kind in (Kind.POINTWISE, Kind.ROW)
            and len(node.outputs) == 1
            and node.outputs[0] in self.graph.values
            and not written_inputs(node)
            and not is_random(node)
        )

    def _take_grown(self, group: list[int], off: Collection[str]) -> None:
        nodes = [self.graph.nodes[index] for index in group]
        if _made(nodes) in self.seeds:
            self.offer(self.seeds[_made(nodes)], group)
            return
        if len(group) == 1 and self._size(group) < self._least(group):
            return
        rule = "pointwise" if all(op(node.op_type).kind is Kind.POINTWISE for node in nodes) else "row"
        made = {name for node in nodes for name in node.outputs}
        for names, named in self.seeds.items():
            if made.issuperset(names):
                seed = [self.graph.producers[name] for name in names]
                if rule in off:
                    self.offer(named, seed)
                else:
                    self.tally(named).refuse(self.graph, seed, f"it is part of a larger {rule} region")
        if rule not in off:
            self._take(rule, group)

    def _take(self, rule: str, nodes: Sequence[int], kind: str | None = None) -> None:
        tally = self.tally(rule)
        tally.seen += 1
        reason = self.reason(nodes)
        if reason is None:
            self.offer(rule, nodes, kind)
        else:
            tally.refuse(self.graph, nodes, reason)

    # --- the end

    def finish(self) -> tuple[SubGraph, tuple[Receipt, ...]]:
        """The rewritten graph, with what cannot be contracted together left as it was."""
        graph = self.graph
        if self.found:
            graph, dropped = contract(graph, [item for _, item in self.found], self.dependencies)
            for rule, item in self.found:
                if item in dropped:
                    reason = "would have created a cycle with other regions"
                    self.tally(rule).refuse(self.graph, item.nodes, reason)
                else:
                    self.tally(rule).matched += 1
        return graph, tuple(tally.receipt() for tally in self.tallies.values())


def _made(nodes: Iterable[OpNode]) -> tuple[str, ...]:
    return tuple(name for node in nodes for name in node.outputs)
