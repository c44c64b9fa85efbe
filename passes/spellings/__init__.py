"""How models spell the ops of the table: plain PyTorch functions, grouped in rules.

A rule is a row: the op, its spellings, a guard. The guard looks at the layouts of a match's values (by the functions'
parameter names, and ``output``) and at the numbers it captured, and gives the attributes of the op, or raises `Unfit`.
Adding a spelling is adding one function to a row. Rows are tried in order, the more particular before the more general.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from graph_capture.errors import CaptureError
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import TABLE
from graph_capture.passes.canonicalize import Found, Guard, Rule, Unfit, apply_rounds
from graph_capture.passes.cleanup import clean_up
from graph_capture.passes.pattern import Function, Pattern
from graph_capture.passes.spellings import activations, attention, linear, norms, rotary

__all__ = ["ROUNDS", "Found", "Rule", "Unfit", "canonicalize", "prepare", "spelling", "unregister_spelling"]

_RULES = (*norms.RULES, *activations.RULES, *attention.RULES, *rotary.RULES, *linear.RULES)


def canonicalize(graph: SubGraph, rounds: Iterable[Sequence[Rule]] | None = None) -> SubGraph:
    """`graph` with every spelling that a rule knows replaced by its op; by all rules unless `rounds` are given."""
    return apply_rounds(graph, ROUNDS if rounds is None else rounds)


def prepare(graph: SubGraph, rounds: Iterable[Sequence[Rule]] | None = None) -> SubGraph:
    """What models' graphs and patterns go through alike: clean-up, then one op for each spelling."""
    return canonicalize(clean_up(graph), rounds)


def respelled(graph: SubGraph, name: str) -> OpNode | None:
    """The one op `name` that the rules make of `graph`, the ops of a spelling; None if they do not."""
    chosen = [[rule for rule in rules if rule.pattern.name == name] for rules in ROUNDS]
    made = canonicalize(graph, chosen).nodes
    return made[0] if len(made) == 1 and made[0].op_type == name else None


def _rounds() -> list[tuple[Rule, ...]]:
    """Rules of one round look at the same graph; their spellings are brought through the rounds before."""
    rounds: list[tuple[Rule, ...]] = []
    for number in range(1 + max(rule.round for rule in _RULES)):
        through = partial(prepare, rounds=tuple(rounds))
        chosen = [rule for rule in _RULES if rule.round == number]
        rounds.append(tuple(replace(rule, pattern=replace(rule.pattern, prepare=through)) for rule in chosen))
    return rounds


ROUNDS = _rounds()  # users' own spellings come last in the first one


def spelling(
    name: str, attributes: Guard = lambda found: found.numbers, **options: Any
) -> Callable[[Function], Function]:
    """Register a function as a spelling: its ops, wherever they occur connected like this, become op `name`.

    The function's parameters are called as the op's: those without a default are tensors, those with one are numbers
    that a match captures. It is looked for among the ops that were recorded, after clean-up.

    Args:
        name: an op of the table (`graph_capture.register_op` adds one).
        attributes: looks at a match, and gives the op's attributes; the captured numbers unless given. It raises
            `Unfit` where the match is not what it looks like.
        options: the other attributes of `Pattern`: shapes and dtypes to record it in.

    Raises:
        CaptureError: there is no such op, or the function cannot be recorded as a pattern.
    """
    if name not in TABLE:
        raise CaptureError(f"no op named {name!r} in the table; register_op adds one")

    def register(function: Function) -> Function:
        added = Rule(Pattern(name, function, prepare=clean_up, **options), attributes, 0)
        _ = added.pattern.templates  # which says what is wrong with the function
        ROUNDS[0] = (*ROUNDS[0], added)
        return function

    return register


def unregister_spelling(function: Function) -> None:
    """Forget a spelling that was registered.

    Raises:
        CaptureError: it is none.
    """
    left = tuple(rule for rule in ROUNDS[0] if rule.pattern.function is not function)
    if len(left) == len(ROUNDS[0]):
        raise CaptureError(f"{getattr(function, '__name__', function)!r} is not a spelling")
    ROUNDS[0] = left
