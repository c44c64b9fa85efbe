"""How models spell the ops of the table: plain PyTorch functions, grouped in rules.

A rule is a row: the op, its spellings, a guard. The guard looks at the layouts of a match's values (by the functions'
parameter names, and ``output``) and at the numbers it captured, and gives the attributes of the op, or raises `Unfit`.
Adding a spelling is adding one function to a row. Rows are tried in order, the more particular before the more general.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from graph_capture.ir.graph import SubGraph
from graph_capture.passes.canonicalize import Found, Rule, Unfit, apply_rounds
from graph_capture.passes.cleanup import clean_up
from graph_capture.passes.spellings import activations, attention, linear, norms, rotary

__all__ = ["ROUNDS", "Found", "Rule", "Unfit", "canonicalize", "prepare"]

_RULES = (*norms.RULES, *activations.RULES, *attention.RULES, *rotary.RULES, *linear.RULES)


def canonicalize(graph: SubGraph, rounds: Iterable[Sequence[Rule]] | None = None) -> SubGraph:
    """`graph` with every spelling that a rule knows replaced by its op; by all rules unless `rounds` are given."""
    return apply_rounds(graph, ROUNDS if rounds is None else rounds)


def prepare(graph: SubGraph, rounds: Iterable[Sequence[Rule]] | None = None) -> SubGraph:
    """What models' graphs and patterns go through alike: clean-up, then one op for each spelling."""
    return canonicalize(clean_up(graph), rounds)


def _rounds() -> tuple[tuple[Rule, ...], ...]:
    """Rules of one round look at the same graph; their spellings are brought through the rounds before."""
    rounds: list[tuple[Rule, ...]] = []
    for number in range(1 + max(rule.round for rule in _RULES)):
        through = partial(prepare, rounds=tuple(rounds))
        chosen = [rule for rule in _RULES if rule.round == number]
        rounds.append(tuple(replace(rule, pattern=replace(rule.pattern, prepare=through)) for rule in chosen))
    return tuple(rounds)


ROUNDS = _rounds()
