"""All passes in order. Each is a pure function from graph to graph and can be left out by name."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from graph_capture.ir.graph import SubGraph
from graph_capture.ir.memory import uncollected
from graph_capture.log import log
from graph_capture.passes.canonicalize import apply_rules
from graph_capture.passes.cleanup import CLEAN_UP, split_constants
from graph_capture.passes.convolutions import RULE as READY_CONVOLUTION
from graph_capture.passes.convolutions import biases_apart, pointwise_norms, ready_convolutions
from graph_capture.passes.decode import RULES as DECODE
from graph_capture.passes.dimension_order import RULE as DIMENSION_ORDER
from graph_capture.passes.dimension_order import contiguous_rows, follow_memory
from graph_capture.passes.flow import Dependencies
from graph_capture.passes.linears import RULE as PARALLEL_LINEAR
from graph_capture.passes.linears import merge_linears
from graph_capture.passes.match import Matcher
from graph_capture.passes.pattern import Pattern
from graph_capture.passes.receipts import Receipt
from graph_capture.passes.regions import GROWN, Supports, find_regions
from graph_capture.passes.registry import DEFAULT
from graph_capture.passes.rounding import RULE as ROUNDINGS
from graph_capture.passes.rounding import as_written
from graph_capture.passes.spellings import ROUNDS

CONSTANTS = "constants"
BATCH_NORM = "batch_norm"


@dataclass(frozen=True)
class Passes:
    """What to run.

    Attributes:
        supports: why a region cannot be a kernel, or None if it can.
        patterns: the fusions to look for; the registered ones if None.
        weights: inputs that are the same in every replay.
        fold_weights: also compute once what depends on weights only.
        max_nodes, min_nodes: bounds on the recorded ops of a region.
        off: names of passes and rules to leave out.
    """

    supports: Supports
    patterns: tuple[Pattern, ...] | None = None
    weights: frozenset[str] = frozenset()
    fold_weights: bool = False
    max_nodes: int = 64
    min_nodes: int = 2
    off: frozenset[str] = frozenset()

    @property
    def chosen(self) -> tuple[Pattern, ...]:
        """The patterns that are looked for."""
        return tuple(DEFAULT if self.patterns is None else self.patterns)


@dataclass(frozen=True)
class Rewritten:
    """What the passes made.

    Attributes:
        graph: the rewritten graph; its inputs are the given graph's and then the results of `constants`.
        constants: from weights to what is computed once.
        receipts: one for each rule, in the order in which they ran.
        stages: the graph after each pass that changed it, by name.
    """

    graph: SubGraph
    constants: SubGraph
    receipts: tuple[Receipt, ...]
    stages: tuple[tuple[str, SubGraph], ...]


def unchanged(graph: SubGraph) -> Rewritten:
    """`graph` with no pass run."""
    return Rewritten(graph, SubGraph((), (), ()), (), ())


def rewrite(graph: SubGraph, passes: Passes) -> Rewritten:
    """Run all passes. No garbage is collected meanwhile: graphs are many small objects, and a collection visits all of
    the process's each time."""
    with uncollected():
        return _rewrite(graph, passes)


def _rewrite(graph: SubGraph, passes: Passes) -> Rewritten:
    receipts: list[Receipt] = []
    stages: list[tuple[str, SubGraph]] = []

    started = time.perf_counter()

    def became(name: str, result: SubGraph) -> SubGraph:
        nonlocal started
        now = time.perf_counter()
        log.debug("%s: %d -> %d ops in %.1f ms", name, len(graph), len(result), 1e3 * (now - started))
        started = now
        if result is not graph:
            stages.append((name, result))
        return result

    for name, apply in CLEAN_UP.items():
        if name not in passes.off:
            before = len(graph)
            graph = became(name, apply(graph))
            receipts.append(Receipt(name, ops=before - len(graph)))
    constants = unchanged(graph).constants
    if CONSTANTS not in passes.off:
        before = len(graph)
        constants, rest = split_constants(graph, passes.weights if passes.fold_weights else ())
        graph = became(CONSTANTS, rest if constants.nodes else graph)
        receipts.append(Receipt(CONSTANTS, ops=before - len(graph)))
    matcher = Matcher(Dependencies(graph))
    for number, rules in enumerate(ROUNDS):
        chosen = [rule for rule in rules if rule.pattern.name not in passes.off]
        result, made = apply_rules(graph, chosen, matcher)
        graph = became(f"spellings {number + 1}", result)
        matcher = matcher.on(graph)
        receipts = merged(receipts, made)
    if ROUNDINGS not in passes.off:
        result, receipt = as_written(graph)
        graph = became(ROUNDINGS, result)
        matcher = matcher.on(graph)
        receipts.append(receipt)
    if PARALLEL_LINEAR not in passes.off:
        result, receipt = merge_linears(graph, passes.weights, matcher.dependencies)
        graph = became(PARALLEL_LINEAR, result)
        matcher = matcher.on(graph)
        receipts.append(receipt)
    if BATCH_NORM not in passes.off:
        graph = became("biases apart", biases_apart(graph))
        matcher = matcher.on(graph)
    if READY_CONVOLUTION not in passes.off:
        result, receipt = ready_convolutions(graph, passes.weights, matcher.dependencies)
        graph = became(READY_CONVOLUTION, result)
        matcher = matcher.on(graph)
        receipts.append(receipt)
    if BATCH_NORM not in passes.off:
        graph = became(BATCH_NORM, pointwise_norms(graph))
        matcher = matcher.on(graph)
    if DIMENSION_ORDER not in passes.off:
        graph = became(DIMENSION_ORDER, follow_memory(contiguous_rows(graph)))
        matcher = matcher.on(graph)
    plan = find_regions(
        graph,
        supports=passes.supports,
        patterns=passes.chosen,
        max_nodes=passes.max_nodes,
        min_nodes=passes.min_nodes,
        off=passes.off,
        matcher=matcher,
    )
    graph = became("regions", plan.graph)
    return Rewritten(graph, constants, tuple(merged(receipts, plan.receipts)), tuple(stages))


def merged(receipts: Iterable[Receipt], others: Iterable[Receipt]) -> list[Receipt]:
    """Both, with the receipts of one rule added up; a spelling and a fusion of one name are two rules."""
    found = {(receipt.rule, receipt.spelling): receipt for receipt in receipts}
    for receipt in others:
        known = found.get((receipt.rule, receipt.spelling))
        if known is not None:
            receipt = replace(
                receipt,
                candidates=known.candidates + receipt.candidates,
                matches=known.matches + receipt.matches,
                refused=known.refused + receipt.refused,
            )
        found[receipt.rule, receipt.spelling] = receipt
    return list(found.values())


def pass_names(patterns: Iterable[Pattern] = DEFAULT) -> Collection[str]:
    """Everything that `Passes.off` may name."""
    rules = (rule.pattern.name for rules in ROUNDS for rule in rules)
    return dict.fromkeys(
        (
            *CLEAN_UP,
            CONSTANTS,
            *rules,
            ROUNDINGS,
            PARALLEL_LINEAR,
            READY_CONVOLUTION,
            BATCH_NORM,
            DIMENSION_ORDER,
            *DECODE,
            *(item.name for item in patterns),
            *GROWN,
        )
    )
