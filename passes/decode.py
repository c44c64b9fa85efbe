"""The ops of a decode step that are worth a kernel for their own sake: linears and attention of few rows.

Such a linear takes as long as reading its weight does, so that a kernel of codegen's can be as fast as a library's, and
compute the pointwise ops that follow on the way. How few rows count is codegen's to say.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

from graph_capture.ir.effects import is_random, written_inputs
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import ATTENTION_OPS, FUSED, LINEARS, Kind, op
from graph_capture.passes.linears import RULE as PARALLEL_LINEAR

RULE = "linear_epilogue"
ALONE = "skinny_linear"  # a linear with nothing behind it that its kernel could take
ATTENTION = "decode_attention"
SMALL = "small_op"  # a pointwise op on its own, the call of which takes longer than its work
RULES = (RULE, ALONE, ATTENTION, SMALL)
SMALL_BYTES = 2**14  # of its result
Reason = Callable[[Sequence[int]], "str | None"]


def is_merged(node: OpNode) -> bool:
    """Whether the node is several linears of one input."""
    return node.op_type == FUSED + PARALLEL_LINEAR


def decode_regions(graph: SubGraph, reason: Reason, most: int) -> Iterator[tuple[str, tuple[int, ...], str | None]]:
    """Each attention, and each linear with as much of what follows as can be one kernel, be it nothing.

    Args:
        reason: why nodes (ascending indices) cannot be one region, or None if they can.
        most: nodes that a region may have.

    Yields:
        The rule, ascending indices, and what speaks against them.
    """
    for name in ATTENTION_OPS:
        for index in graph.by_op.get(name, ()):
            yield ATTENTION, (index,), reason([index])
    for index, node in enumerate(graph.nodes):
        if node.op_type not in LINEARS and not is_merged(node):
            continue
        group, stop = _behind(graph, index, most)
        alone = reason([index])
        while len(group) > 1:
            against = reason(group)
            if against is None:
                yield RULE, tuple(group), None
                break
            stop = stop or alone or against
            group.pop()
            while op(graph.nodes[group[-1]].op_type).kind is Kind.VIEW:  # nobody is left to read it
                group.pop()
        else:
            if stop is not None:
                yield RULE, (index,), stop
            yield ALONE, (index,), alone


def small_ops(graph: SubGraph) -> Iterator[int]:
    """The pointwise ops of a decode step, other regions of which are contracted, that are small and on their own."""
    kinds = {FUSED + rule for rule in RULES}
    if not any(node.op_type in kinds for node in graph.nodes):
        return
    for index, node in enumerate(graph.nodes):
        if op(node.op_type).kind is Kind.POINTWISE and not written_inputs(node) and not is_random(node):
            metas = [graph.values.get(name) for name in node.outputs]
            if len(metas) == 1 and metas[0] is not None and metas[0].nbytes <= SMALL_BYTES:
                yield index


def _behind(graph: SubGraph, start: int, most: int) -> tuple[list[int], str | None]:
    """A linear, the ops that read it element by element, and the linears of its input that these read too, in order;
    and what ended that."""
    group: list[int] = []
    stop = None
    source = graph.nodes[start].inputs[0]
    pending = [start]
    while pending and len(group) < most:
        index = heapq.heappop(pending)
        if index in group:
            continue
        node = graph.nodes[index]
        if node.op_type not in LINEARS and index != start:
            target = op(node.op_type)
            if target.kind is Kind.VIEW:
                if not _is_part(graph, node):
                    continue
            elif target.kind is not Kind.POINTWISE or written_inputs(node) or is_random(node):
                continue
            elif (row := _row_reader(graph, node)) is not None:
                stop = stop or f"{node.op_type} is read by {row}, which takes it"
                continue
        elif node.op_type in LINEARS and node.inputs[0] != source:
            continue
        group.append(index)
        for name in node.outputs:
            for user in graph.users.get(name, ()):
                heapq.heappush(pending, user)
        for name in node.inputs if index != start else ():
            producer = graph.producers.get(name)
            if producer is not None and graph.nodes[producer].op_type in LINEARS:
                heapq.heappush(pending, producer)
    group.sort()
    views = takewhile(lambda index: op(graph.nodes[index].op_type).kind is Kind.VIEW, reversed(group))
    return group[: len(group) - len(list(views))], stop


def _is_part(graph: SubGraph, node: OpNode) -> bool:
    """Whether a view takes some of the columns."""
    whole = graph.values[node.inputs[0]].shape
    return all(graph.values[name].shape[:-1] == whole[:-1] for name in node.outputs)


def _row_reader(graph: SubGraph, node: OpNode) -> str | None:
    """The row op that reads a result of `node`: the two are one kernel."""
    for name in node.outputs:
        for user in graph.users.get(name, ()):
            if op(graph.nodes[user].op_type).kind is Kind.ROW:
                return graph.nodes[user].op_type
    return None
