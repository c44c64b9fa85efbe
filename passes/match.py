"""Finding a template in a graph: from a candidate for its last node, operand by operand, upwards.

Every step binds one value of the template to one of the graph; commutative ops are tried in both orders. Templates with
several results continue from a value that is bound already to its nearest readers. The time for a candidate depends on
the template alone, so matching is linear in the number of candidates.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import op
from graph_capture.ir.values import same_value
from graph_capture.passes.pattern import Hole, Template

NEAREST = 8  # readers of a shared value, on either side, that are tried for a template's other results


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


@dataclass(frozen=True)
class Miss:
    """How far a template got at a candidate.

    Attributes:
        placed: nodes that were found before it failed.
        reason: what was expected and what was there.
        at: index of the node where it failed.
    """

    placed: int
    reason: str
    at: int


_FAR = Miss(0, "", -1)


def candidates(graph: SubGraph, template: Template) -> Sequence[int]:
    """Indices of the nodes that could be the template's last one."""
    return graph.by_op.get(template.anchor.op_type, ())


def match_at(graph: SubGraph, template: Template, anchor: int, ignore: frozenset[str] = frozenset()) -> Match | Miss:
    """The template's occurrence that ends in node `anchor`; attributes named in `ignore` may differ."""
    if not template.above <= graph.above[anchor]:
        return _FAR
    search = _Search(graph, template, anchor, ignore)
    state = search.solve(_State([(len(template.graph) - 1, anchor)]))
    if state is None:
        return search.miss
    return Match(tuple(sorted(state.places.values())), state.bindings, state.holes)


def _same(left: Any, right: Any) -> bool:
    """Equal in value and type, but for numbers: ``x + 1`` and ``x + 1.0`` are one call where x is a float."""
    numbers = type(left) in (int, float) and type(right) in (int, float)
    return left == right if numbers else same_value(left, right)


@dataclass
class _State:
    """A partial match. `goals` are pairs still to be unified: two nodes (indices) or two values (names)."""

    goals: list[tuple[Any, Any]]
    places: dict[int, int] = field(default_factory=dict)
    bindings: dict[str, str] = field(default_factory=dict)
    holes: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> _State:
        return _State(list(self.goals), dict(self.places), dict(self.bindings), dict(self.holes))


class _Search:
    def __init__(self, graph: SubGraph, template: Template, anchor: int, ignore: frozenset[str]) -> None:
        self.graph, self.template, self.anchor, self.ignore = graph, template.graph, anchor, ignore
        self.miss = Miss(0, "", anchor)

    def solve(self, state: _State) -> _State | None:
        """Unify all goals, then whatever of the template is left; None if that fails."""
        while state.goals:
            theirs, ours = state.goals.pop()
            if isinstance(theirs, int):
                choices = self._node(state, theirs, ours)
                if choices is None:
                    return None
                if len(choices) > 1:
                    branch = state.copy()
                    branch.goals.extend(choices[1])
                    found = self.solve(branch)
                    if found is not None:
                        return found
                state.goals.extend(choices[0])
            elif not self._value(state, theirs, ours):
                return None
        return self._continue(state)

    def _value(self, state: _State, theirs: str, ours: str) -> bool:
        bound = state.bindings.get(theirs)
        if bound is not None:
            return bound == ours or self._fail(state, self.graph.producers.get(ours), f"{ours} is not {bound}")
        producer = self.template.producers.get(theirs)
        if producer is None:
            state.bindings[theirs] = ours
            return True
        wanted = self.template.nodes[producer]
        place = self.graph.producers.get(ours)
        if place is None:
            return self._fail(state, None, f"expected {wanted.op_type}, found the input {ours}")
        node = self.graph.nodes[place]
        if node.op_type != wanted.op_type or wanted.outputs.index(theirs) != node.outputs.index(ours):
            return self._fail(state, place, f"expected {wanted.op_type}, found {node.op_type}")
        state.goals.append((producer, place))
        return True

    def _node(self, state: _State, theirs: int, ours: int) -> list[list[tuple[str, str]]] | None:
        """Place a node; the ways to pair its operands, at least one, or None."""
        wanted, node = self.template.nodes[theirs], self.graph.nodes[ours]
        if ours in state.places.values() or len(wanted.inputs) != len(node.inputs):
            return None
        if len(wanted.outputs) != len(node.outputs) or not self._attributes(state, wanted, node):
            self._fail(state, ours, f"{node.op_type} has other arguments")
            return None
        for name, value in zip(wanted.outputs, node.outputs, strict=True):
            if state.bindings.setdefault(name, value) != value:
                return None
        state.places[theirs] = ours
        straight = list(zip(wanted.inputs, node.inputs, strict=True))
        if len(straight) == 2 and node.inputs[0] != node.inputs[1] and op(node.op_type).commutative:
            return [list(zip(wanted.inputs, node.inputs[::-1], strict=True)), straight]
        return [straight]

    def _attributes(self, state: _State, wanted: OpNode, node: OpNode) -> bool:
        if not wanted.attrs and not node.attrs:
            return True
        theirs = {key: value for key, value in wanted.attrs if key not in self.ignore}
        ours = {key: value for key, value in node.attrs if key not in self.ignore}
        if theirs.keys() != ours.keys():
            return False
        for key, value in theirs.items():
            if isinstance(value, Hole):
                value = state.holes.setdefault(value.name, ours[key])
            if not _same(value, ours[key]):
                return False
        return True

    def _continue(self, state: _State) -> _State | None:
        """Place a node of the template that nothing so far depends on, near the anchor, until all are placed."""
        template, graph = self.template, self.graph
        if len(state.places) == len(template):
            made = {name for place in state.places.values() for name in graph.nodes[place].outputs}
            return None if any(state.bindings[name] in made for name in template.input_names) else state
        for index in range(len(template) - 1, -1, -1):
            node = template.nodes[index]
            shared = next((n for n in node.inputs if n in state.bindings), None)
            if index in state.places or shared is None:
                continue
            readers = graph.users.get(state.bindings[shared], ())
            middle = bisect.bisect(readers, self.anchor)
            near = readers[max(0, middle - NEAREST) : middle + NEAREST]
            for place in sorted(near, key=lambda reader: abs(reader - self.anchor)):
                if graph.nodes[place].op_type != node.op_type:
                    continue
                branch = state.copy()
                branch.goals.append((index, place))
                found = self.solve(branch)
                if found is not None:
                    return found
            self._fail(state, self.anchor, f"no {node.op_type} reads {state.bindings[shared]}")
            return None
        return None

    def _fail(self, state: _State, at: int | None, reason: str) -> bool:
        if len(state.places) > self.miss.placed:
            self.miss = Miss(len(state.places), reason, self.anchor if at is None else at)
        return False
