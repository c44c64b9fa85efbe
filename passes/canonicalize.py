"""How the many spellings of an op become the one op of the table; `graph_capture.passes.spellings` has the rules.

The node that takes a spelling's place remembers what it replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import op
from graph_capture.ir.values import TensorMeta
from graph_capture.passes.flow import Dependencies
from graph_capture.passes.match import Match, Matcher
from graph_capture.passes.pattern import Pattern
from graph_capture.passes.receipts import Receipt, Tally
from graph_capture.passes.rewrite import Contraction, common_source, contract, live_outputs


class Unfit(Exception):
    """Why a match is not what it looks like."""


@dataclass(frozen=True)
class Found:
    """What a guard sees of a match.

    Attributes:
        values: the layouts of its values, by their names in the function.
        numbers: what it captured, by parameter name.
        last: its last node.
    """

    values: Mapping[str, TensorMeta]
    numbers: Mapping[str, Any]
    last: OpNode

    def __getitem__(self, name: str) -> TensorMeta:
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values


Attributes = Mapping[str, Any]
Guard = Callable[[Found], Attributes]


@dataclass(frozen=True)
class Rule:
    """`pattern` becomes one call of op `pattern.name`; its parameters are the inputs, `attributes` gives the rest.

    A rule of a later `round` sees what earlier rounds made.
    """

    pattern: Pattern
    attributes: Guard
    round: int


def apply_rounds(graph: SubGraph, rounds: Iterable[Sequence[Rule]]) -> SubGraph:
    """`graph` with every spelling that a rule knows replaced by its op."""
    for rules in rounds:
        graph, _ = apply_rules(graph, rules)
    return graph


def apply_rules(
    graph: SubGraph, rules: Sequence[Rule], matcher: Matcher | None = None
) -> tuple[SubGraph, list[Receipt]]:
    """One round: matches of all rules on the same graph, the first come first, replaced at once."""
    matcher = matcher or Matcher(Dependencies(graph))
    tallies: dict[str, Tally] = {}
    replaced: list[Contraction] = []
    taken: set[int] = set()
    for rule in rules:
        tally = tallies.setdefault(rule.pattern.name, Tally(rule.pattern.name, spelling=True))
        for match in matcher.occurrences(rule.pattern, tally, taken):
            if not taken.isdisjoint(match.nodes):
                continue
            tally.seen += 1
            try:
                node = _replacement(graph, rule, match, matcher.dependencies)
            except Unfit as reason:
                tally.refuse(graph, match.nodes, str(reason))
                continue
            tally.matched += 1
            replaced.append(Contraction(match.nodes, node))
            taken.update(match.nodes)
    receipts = [tally.receipt() for tally in tallies.values()]
    return (contract(graph, replaced, matcher.dependencies)[0] if replaced else graph), receipts


def _replacement(graph: SubGraph, rule: Rule, match: Match, dependencies: Dependencies) -> OpNode:
    """The node that takes the place of `match`.

    Raises:
        Unfit: it would not be the same.
    """
    output = match.bindings["output"]
    visible = live_outputs(graph, match.nodes)
    if visible not in ([output], []):
        other = next(name for name in visible if name != output)
        raise Unfit(f"{graph.nodes[graph.producers[other]].op_type} inside is used elsewhere")
    bound = {name: graph.values[value] for name, value in match.bindings.items() if value in graph.values}
    attributes = dict(rule.attributes(Found(bound, match.holes, graph.nodes[match.nodes[-1]])))
    blocked = dependencies.blocked(match.nodes)
    if blocked is not None:
        raise Unfit(blocked)
    inputs = []
    skipped: list[str] = []
    for parameter in op(rule.pattern.name).parameters:
        name = "input" if parameter.name == "self" else parameter.name
        if name in match.bindings and name not in attributes:
            inputs.append(match.bindings[name])
            attributes.update(dict.fromkeys(skipped))  # a tensor left out before one that is given
            skipped.clear()
        elif name not in attributes:
            skipped.append(name)
    nodes = tuple(graph.nodes[index] for index in match.nodes)
    return OpNode(rule.pattern.name, tuple(inputs), (output,), tuple(attributes.items()), common_source(nodes), nodes)
