"""Finding a pattern in a graph, with networkx: `DiGraphMatcher` at a candidate for its last op.

A template is looked for piece by piece (see `Piece`) in the cone of ops above a candidate, as deep as the piece is.
networkx finds the ops and the values between them, commutative operands in either order. The template's inputs are
bound afterwards, edge by edge: two of them may be one value, which a monomorphism cannot say. Cones that are alike are
matched once, however many layers they are from. A walk along the operands tells how far a template got that was missed.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import networkx
from networkx.algorithms import isomorphism

from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import FUSED, op
from graph_capture.ir.values import same_value
from graph_capture.passes.flow import Dependencies, part
from graph_capture.passes.pattern import Hole, Pattern, Piece, Template, op_types_above
from graph_capture.passes.receipts import Tally

NEAREST = 8  # readers of a shared value, on either side, that are tried for a template's other results


@dataclass(frozen=True)
class Match:
    """Where a template occurs.

    Attributes:
        anchor: index of the node that is the template's last.
        nodes: indices in the graph, ascending.
        bindings: the template's value names -> the graph's.
        holes: captured attribute values.
    """

    anchor: int
    nodes: tuple[int, ...]
    bindings: Mapping[str, str]
    holes: Mapping[str, Any]


@dataclass(frozen=True)
class Miss:
    """How far a template got at a candidate: the ops that were found, and what was expected next and what was there."""

    placed: int
    reason: str


_FAR = Miss(0, "")


class Cone(NamedTuple):
    """An op and what is above it, to some depth; two cones of one `form` are alike in ops, attributes and wiring."""

    ops: tuple[int, ...]
    form: int


@dataclass
class PartialMatch:
    """A part of a template that is found: its ops, its values, its captured numbers."""

    places: dict[int, int] = field(default_factory=dict)
    bindings: dict[str, str] = field(default_factory=dict)
    holes: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> PartialMatch:
        return PartialMatch(dict(self.places), dict(self.bindings), dict(self.holes))


class Matcher:
    """Finds patterns in one graph, and remembers what it found in what is alike."""

    def __init__(self, dependencies: Dependencies) -> None:
        self.graph, self.dependencies = dependencies.graph, dependencies
        self._anchors: dict[tuple[str, frozenset[str]], list[int]] = {}
        self._above: dict[int, frozenset[str]] = {}
        self._cones: dict[tuple[int, int], Cone] = {}
        self._forms: dict[Any, int] = {}
        self._parts: dict[int, Any] = {}
        self._signatures: dict[int, int] = {}
        self._found: dict[tuple[Piece, int, frozenset[str]], tuple[tuple[int, ...], ...]] = {}
        self._far: set[tuple[Piece, int, frozenset[str]]] = set()

    def on(self, graph: SubGraph) -> Matcher:
        """A matcher for `graph`: this one, where it is the same graph still."""
        return self if graph is self.graph else Matcher(Dependencies(graph))

    def occurrences(self, pattern: Pattern, tally: Tally, settled: Collection[int]) -> Iterator[Match]:
        """The matches of all templates whose last ops are not `settled`, a set to which the caller adds.

        What gets past half of a template and fails is a near miss: `tally` counts it, unless it is settled in the end.
        """
        misses: dict[int, Miss] = {}
        for template in pattern.templates:
            for anchor in self.anchors(template):
                if anchor in settled:
                    continue
                result = self.at(template, anchor, pattern.ignore)
                if isinstance(result, Match):
                    yield result
                elif 2 * result.placed > len(template.graph) and result.placed > misses.get(anchor, _FAR).placed:
                    misses[anchor] = result
        for anchor, miss in misses.items():
            if anchor not in settled:
                tally.seen += 1
                tally.refuse(self.graph, [anchor], miss.reason)

    def anchors(self, template: Template) -> Sequence[int]:
        """The nodes that could be the template's last one."""
        key = (template.anchor.op_type, template.above)
        if key not in self._anchors:
            nodes = self.graph.nodes
            for index in self.graph.by_op.get(key[0], ()):
                if index not in self._above:
                    self._above[index] = op_types_above(self.graph, nodes[index])
            self._anchors[key] = [i for i in self.graph.by_op.get(key[0], ()) if key[1] <= self._above[i]]
        return self._anchors[key]

    def at(self, template: Template, anchor: int, ignore: frozenset[str] = frozenset()) -> Match | Miss:
        """The template's occurrence that ends in node `anchor`; attributes named in `ignore` may differ."""
        first = template.pieces[0]
        key = (first, self.cone(anchor, first.depth).form, ignore)
        if key in self._far:
            return _FAR
        state = next(self._states(template, 0, anchor, PartialMatch(), ignore), None)
        if state is not None:
            return Match(anchor, tuple(sorted(state.places.values())), state.bindings, state.holes)
        miss = _Search(self, template, ignore).miss(anchor)
        if not self._found[key] and 2 * miss.placed <= len(template.graph):
            self._far.add(key)
        return miss

    def near(self, piece: Piece, state: PartialMatch, anchor: int) -> list[int]:
        """The ops that may make the result of `piece`: readers of the value that it shares, the nearest first."""
        wanted = piece.network.nodes[piece.root]["node"].op_type
        readers = self.graph.users.get(state.bindings[str(piece.shared)], ())
        middle = bisect.bisect(readers, anchor)
        close = readers[max(0, middle - NEAREST) : middle + NEAREST]
        alike = [reader for reader in close if self.graph.nodes[reader].op_type == wanted]
        return sorted(alike, key=lambda reader: abs(reader - anchor))

    def cone(self, root: int, depth: int) -> Cone:
        """The ops at most `depth` steps above `root`, itself first."""
        cone = self._cones.get((root, depth))
        if cone is None:
            nodes, producers = self.graph.nodes, self.graph.producers
            ops = [root]
            numbers: dict[str, int] = {}
            form: list[Any] = []
            level = [root]
            for step in range(depth + 1):
                above: list[int] = []
                for index in level:
                    node = nodes[index]
                    form.append(self._signature(index))
                    form.append(
                        tuple([numbers.setdefault(name, len(numbers)) for name in (*node.inputs, *node.outputs)])
                    )
                    if step < depth:
                        above += [producers[name] for name in node.inputs if name in producers]
                level = [index for index in dict.fromkeys(above) if index not in ops]
                ops += level
            cone = Cone(tuple(ops), self._forms.setdefault(tuple(form), len(self._forms)))
            self._cones[root, depth] = cone
        return cone

    def _signature(self, index: int) -> int:
        """A number for the op type, the attributes and the number of inputs."""
        if index not in self._signatures:
            node = self.graph.nodes[index]
            attrs = node.attrs if not node.attrs or node.op_type.startswith(FUSED) else repr(node.attrs)
            key = (node.op_type, attrs, len(node.inputs))
            self._signatures[index] = self._forms.setdefault(key, len(self._forms))
        return self._signatures[index]

    def _states(
        self, template: Template, number: int, root: int, state: PartialMatch, ignore: frozenset[str]
    ) -> Iterator[PartialMatch]:
        """`state` with the pieces from `number` on, the first at `root`; straight operands and near ops come first."""
        piece, *others = template.pieces[number:]
        cone = self.cone(root, piece.depth)
        mappings = self._mappings(piece, cone, ignore)
        if not mappings:
            return
        ways = [self._bound(piece, [cone.ops[place] for place in places], state, ignore) for places in mappings]
        for _, found in ways[0] if len(ways) == 1 else heapq.merge(*ways, key=lambda way: way[0]):
            if others:
                for place in self.near(others[0], found, self._anchor(template, found)):
                    whole = next(self._states(template, number + 1, place, found, ignore), None)
                    if whole is not None:
                        yield whole
                        break
            else:
                made = {name for index in found.places.values() for name in self.graph.nodes[index].outputs}
                if not any(found.bindings.get(name) in made for name in template.graph.input_names):
                    yield found

    @staticmethod
    def _anchor(template: Template, state: PartialMatch) -> int:
        return state.places[template.pieces[0].root]

    def _mappings(self, piece: Piece, cone: Cone, ignore: frozenset[str]) -> tuple[tuple[int, ...], ...]:
        """Where networkx finds `piece` in a cone: for each of its ops, the place of one in the cone."""
        key = (piece, cone.form, ignore)
        if key not in self._found:
            nodes = self.graph.nodes
            there = {nodes[index].op_type for index in cone.ops}
            mappings = []
            if {node.op_type for node in networkx.get_node_attributes(piece.network, "node").values()} <= there:
                if cone.form not in self._parts:
                    self._parts[cone.form] = part(self.dependencies.network, cone.ops), cone.ops
                around, ops = self._parts[cone.form]
                matcher = isomorphism.DiGraphMatcher(around, piece.network, partial(_same_node, ignore), _same_edge)
                for mapping in matcher.subgraph_monomorphisms_iter():
                    ours = {theirs: index for index, theirs in mapping.items()}
                    mappings.append(tuple(ops.index(ours[theirs]) for theirs in piece.ops))
            self._found[key] = tuple(mappings)
        return self._found[key]

    def _bound(
        self, piece: Piece, ops: Sequence[int], state: PartialMatch, ignore: frozenset[str]
    ) -> Iterator[tuple[tuple[int, ...], PartialMatch]]:
        """`state` with the piece's ops at `ops`, their values bound edge by edge, and which operands are swapped."""
        if not set(ops).isdisjoint(state.places.values()):
            return
        start = state.copy()
        pairs = []
        for theirs, ours in zip(piece.ops, ops, strict=True):
            wanted, node = piece.network.nodes[theirs]["node"], self.graph.nodes[ours]
            start.places[theirs] = ours
            pairs.append((wanted, node))
            if not attributes_fit(wanted, node, ignore, start.holes) or not bind(start, wanted.outputs, node.outputs):
                return
        pending: list[tuple[tuple[int, ...], PartialMatch]] = [((), start)]
        while pending:
            swapped, state = pending.pop()
            if len(swapped) == len(pairs):
                yield swapped, state
                continue
            wanted, node = pairs[len(swapped)]
            further = []
            ways = orders(node)
            for way, operands in enumerate(ways):
                attempt = state.copy() if len(ways) > 1 else state
                if bind(attempt, wanted.inputs, operands):
                    further.append(((*swapped, way), attempt))
            pending += reversed(further)


def orders(node: OpNode) -> list[tuple[str, ...]]:
    """The orders in which a node's operands may stand: as they do, and if it is commutative the other."""
    swapped = len(node.inputs) == 2 and node.inputs[0] != node.inputs[1] and op(node.op_type).commutative
    return [node.inputs, node.inputs[::-1]] if swapped else [node.inputs]


def bind(state: PartialMatch, theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Bind a template's values to a graph's; False if one is bound to another already."""
    return all(state.bindings.setdefault(name, value) == value for name, value in zip(theirs, ours, strict=True))


def attributes_fit(wanted: OpNode, node: OpNode, ignore: frozenset[str], holes: dict[str, Any]) -> bool:
    """Whether the node's attributes are the template's; what holes capture is added to `holes`."""
    if not wanted.attrs and not node.attrs:
        return True
    theirs = {key: value for key, value in wanted.attrs if key not in ignore}
    ours = {key: value for key, value in node.attrs if key not in ignore}
    if theirs.keys() != ours.keys():
        return False
    for key, value in theirs.items():
        if isinstance(value, Hole):
            value = holes.setdefault(value.name, ours[key])
        if not _same(value, ours[key]):
            return False
    return True


def _same(left: Any, right: Any) -> bool:
    """Equal in value and type, but for numbers: ``x + 1`` and ``x + 1.0`` are one call where x is a float."""
    numbers = type(left) in (int, float) and type(right) in (int, float)
    return left == right if numbers else same_value(left, right)


def _same_node(ignore: frozenset[str], ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """For networkx: whether two values, or two ops that agree in all but their operands."""
    node, wanted = ours.get("node"), theirs.get("node")
    if node is None or wanted is None:
        return node is wanted
    return (
        node.op_type == wanted.op_type
        and ours["root"] == theirs["root"]
        and len(node.inputs) == len(wanted.inputs)
        and len(node.outputs) == len(wanted.outputs)
        and attributes_fit(wanted, node, ignore, {})
    )


def _same_edge(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """For networkx: whether a value is made or read at the same positions."""
    return bool(ours["positions"] == theirs["positions"])


class _Search:
    """How far a template gets: a walk from its last op along the operands, which stops where something is missing."""

    def __init__(self, matcher: Matcher, template: Template, ignore: frozenset[str]) -> None:
        self.matcher, self.graph, self.template, self.ignore = matcher, matcher.graph, template, ignore
        self.deepest = _FAR

    def miss(self, anchor: int) -> Miss:
        """Where the template fails that ends in node `anchor`."""
        state: PartialMatch | None = self._node(PartialMatch(), self.template.pieces[0].root, anchor)
        for piece in self.template.pieces[1:]:
            if state is None:
                break
            near = self.matcher.near(piece, state, anchor)
            before, state = (
                state,
                next((after for place in near if (after := self._node(state, piece.root, place)) is not None), None),
            )
            if state is None:
                wanted = self.template.graph.nodes[piece.root].op_type
                self._fail(before, f"no {wanted} reads {before.bindings[str(piece.shared)]}")
        return self.deepest

    def _node(self, state: PartialMatch, theirs: int, ours: int) -> PartialMatch | None:
        """`state` with a node of the template, and all that feeds it."""
        wanted, node = self.template.graph.nodes[theirs], self.graph.nodes[ours]
        if ours in state.places.values() or len(wanted.inputs) != len(node.inputs):
            return None
        state = state.copy()
        alike = len(wanted.outputs) == len(node.outputs) and attributes_fit(wanted, node, self.ignore, state.holes)
        if not alike:
            return self._fail(state, f"{node.op_type} has other arguments")
        if not bind(state, wanted.outputs, node.outputs):
            return None
        state.places[theirs] = ours
        for operands in orders(node):
            after: PartialMatch | None = state
            for name, value in reversed(list(zip(wanted.inputs, operands, strict=True))):
                after = after and self._value(after, name, value)
            if after is not None:
                return after
        return None

    def _value(self, state: PartialMatch, theirs: str, ours: str) -> PartialMatch | None:
        bound = state.bindings.get(theirs)
        if bound is not None:
            return state if bound == ours else self._fail(state, f"{ours} is not {bound}")
        producer = self.template.graph.producers.get(theirs)
        if producer is None:
            return PartialMatch(state.places, {**state.bindings, theirs: ours}, state.holes)
        wanted = self.template.graph.nodes[producer]
        place = self.graph.producers.get(ours)
        if place is None:
            return self._fail(state, f"expected {wanted.op_type}, found the input {ours}")
        node = self.graph.nodes[place]
        if node.op_type != wanted.op_type or wanted.outputs.index(theirs) != node.outputs.index(ours):
            return self._fail(state, f"expected {wanted.op_type}, found {node.op_type}")
        return self._node(state, producer, place)

    def _fail(self, state: PartialMatch, reason: str) -> PartialMatch | None:
        if len(state.places) > self.deepest.placed:
            self.deepest = Miss(len(state.places), reason)
        return None
