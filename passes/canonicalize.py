"""The many spellings of an op become the one op of the table; see `graph_capture.passes.spellings`.

The node that takes a spelling's place remembers what it replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import op
from graph_capture.passes.cleanup import CLEAN_UP
from graph_capture.passes.match import Match, Miss, candidates, match_at
from graph_capture.passes.receipts import Receipt, Tally
from graph_capture.passes.rewrite import Contraction, Dependencies, common_source, contract, live_outputs
from graph_capture.passes.spellings import ROUNDS, Found, Rule, Unfit


def canonicalize(graph: SubGraph, rounds: Iterable[Sequence[Rule]] = ROUNDS) -> SubGraph:
    """`graph` with every spelling that a rule knows replaced by its op."""
    for rules in rounds:
        graph, _ = apply_rules(graph, rules)
    return graph


def prepare(graph: SubGraph, off: Collection[str] = ()) -> SubGraph:
    """What models' graphs and patterns go through alike: clean-up, then one op for each spelling."""
    for name, apply in CLEAN_UP.items():
        graph = graph if name in off else apply(graph)
    return canonicalize(graph, [[rule for rule in rules if rule.pattern.name not in off] for rules in ROUNDS])


def apply_rules(graph: SubGraph, rules: Sequence[Rule]) -> tuple[SubGraph, list[Receipt]]:
    """One round: matches of all rules on the same graph, the first come first, replaced at once."""
    tallies: dict[str, Tally] = {}
    found: list[Contraction] = []
    taken: set[int] = set()
    dependencies = Dependencies(graph)
    for rule in rules:
        tally = tallies.setdefault(rule.pattern.name, Tally(rule.pattern.name))
        misses: dict[int, Miss] = {}
        for template in rule.pattern.templates:
            for anchor in candidates(graph, template):
                if anchor in taken:
                    continue
                match = match_at(graph, template, anchor, rule.pattern.ignore)
                if isinstance(match, Miss):
                    if 2 * match.placed > len(template.graph) and match.placed > misses.get(anchor, match).placed - 1:
                        misses[anchor] = match
                    continue
                if not taken.isdisjoint(match.nodes):
                    continue
                tally.seen += 1
                try:
                    node = _replacement(graph, rule, match, dependencies)
                except Unfit as reason:
                    tally.refuse(graph, match.nodes, str(reason))
                    continue
                tally.matched += 1
                found.append(Contraction(match.nodes, node))
                taken.update(match.nodes)
        for anchor, miss in misses.items():
            if anchor not in taken:
                tally.seen += 1
                tally.refuse(graph, [anchor], miss.reason)
    receipts = [tally.receipt() for tally in tallies.values()]
    return (contract(graph, found, dependencies)[0] if found else graph), receipts


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
