"""What each rule looked at, where it applied, and why not elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from graph_capture.ir.graph import OpNode, SubGraph


@dataclass(frozen=True)
class Refusal:
    """A place where a rule could have applied, and why it did not.

    Attributes:
        reason: which guard, op or order stood against it.
        where: the module path of the op that the place is named after.
        values: results of the recorded ops concerned.
    """

    reason: str
    where: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Receipt:
    """The outcome of one rule.

    Attributes:
        rule: its name.
        candidates: places where its structure was found, wholly or for the most part.
        matches: places where it applied.
        refused: the others.
        ops: recorded ops that it removed (clean-up passes).
        spelling: whether it makes spellings one op, rather than ops one region; a fusion may have the same name.
    """

    rule: str
    candidates: int = 0
    matches: int = 0
    refused: tuple[Refusal, ...] = ()
    ops: int = 0
    spelling: bool = False

    @property
    def refusals(self) -> tuple[tuple[str, int], ...]:
        """Reasons with how often each was given, sorted."""
        return tuple(sorted(Counter(refusal.reason for refusal in self.refused).items()))


@dataclass
class Tally:
    """Counts one rule's candidates while a pass runs."""

    rule: str
    seen: int = 0
    matched: int = 0
    refused: list[Refusal] = field(default_factory=list)
    spelling: bool = False

    def refuse(self, graph: SubGraph, nodes: Iterable[int], reason: str) -> None:
        """Note that `nodes` (indices) were not taken."""
        members = [graph.nodes[index] for index in nodes]
        self.refused.append(Refusal(reason, module_of(members[-1]), values_of(members)))

    def receipt(self) -> Receipt:
        """The tally, closed."""
        return Receipt(self.rule, self.seen, self.matched, tuple(self.refused), spelling=self.spelling)


def module_of(node: OpNode) -> str:
    """The module path of `node`; empty at top level."""
    return node.source.module if node.source else ""


def values_of(nodes: Iterable[OpNode]) -> tuple[str, ...]:
    """The results of the recorded ops behind `nodes`."""
    return tuple(name for node in nodes for leaf in node.recorded for name in leaf.outputs)
