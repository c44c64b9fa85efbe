"""Whose roundings the code can tell: values in half precision of which something wider, or of another kind, is made.

One op in the place of several, and one kernel, round less often than the code does. Where the result is widened,
compared or turned into integers, that shows: a spelling then stays as it was written, and a kernel rounds as ops do.
Products (linears, attention) end this, but for what attention weighs by: what a sum has mixed is not followed further.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from graph_capture.ir.effects import alias_set, written_inputs
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import ATTENTION_OPS, FUSED, GUARD, LINEARS, Kind, op
from graph_capture.passes.receipts import Receipt, Tally
from graph_capture.passes.rewrite import inline

RULE = "roundings"
HALVES = (torch.bfloat16, torch.float16)
_PRODUCTS = frozenset({*LINEARS, "matmul", *ATTENTION_OPS}) | {
    f"aten.{name}.default" for name in ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "convolution")
}
_EXACT = frozenset({"neg", "abs", "relu", "where", "aten.cat.default", "aten.stack.default", "aten.clone.default"})
_GROWS = frozenset({"pow", "sum", "mean", "aten.var.correction", *_PRODUCTS})  # out of float16's range
_JUMPS = frozenset({"floor", "ceil", "trunc", "aten.round.default"})


def shown(graph: SubGraph, told: Collection[str] = ()) -> frozenset[str]:
    """The values in half precision of which the code can tell how often they were rounded; `told` are known ones."""
    halves = {name for name, meta in graph.values.items() if meta.dtype in HALVES}
    if not halves:
        return frozenset()
    seen = halves.intersection(told)
    memories = {alias_set(graph, name) for name in seen}
    for node in reversed(graph.nodes):
        if node.op_type in _PRODUCTS and not _weighs(graph, node):
            continue
        shows = not seen.isdisjoint(node.outputs) or node.op_type in _JUMPS or node.op_type.startswith(GUARD)
        shows = shows or any(alias_set(graph, node.inputs[at]) in memories for at in written_inputs(node))
        dtypes = {graph.values[name].dtype for name in node.outputs if name in graph.values}
        for name in halves.intersection(node.inputs):
            if shows or dtypes - {graph.values[name].dtype}:
                seen.add(name)
                memories.add(alias_set(graph, name))
    return frozenset(seen)


def _weighs(graph: SubGraph, node: OpNode) -> bool:
    """Whether a product's first operand is a softmax."""
    name: str | None = node.inputs[0]
    while name is not None and name in graph.producers:
        producer = graph.nodes[graph.producers[name]]
        if producer.op_type == "softmax":
            return True
        name = producer.inputs[0] if producer.op_type == "cast" or op(producer.op_type).kind is Kind.VIEW else None
    return False


def rounds(graph: SubGraph, node: OpNode) -> bool:
    """Whether a node makes values in half precision that are not simply its inputs'."""
    if op(node.op_type).kind is Kind.VIEW or node.op_type in _EXACT:
        return False
    return any(name in graph.values and graph.values[name].dtype in HALVES for name in node.outputs)


def as_written(graph: SubGraph) -> tuple[SubGraph, Receipt]:
    """`graph` with the spellings taken apart that round where their op does not, and where that shows; in float16 also
    those that make numbers on the way which it may not hold."""
    tally = Tally(RULE)
    while True:
        seen = shown(graph)
        apart = [index for index, node in enumerate(graph.nodes) if _differs(graph, node, seen)]
        if not apart:
            return graph, tally.receipt()
        for index in apart:
            tally.seen += 1
            tally.refuse(graph, [index], f"{graph.nodes[index].op_type} rounds less often than what it stands for")
        results = {name for index in apart for name in graph.nodes[index].outputs}
        graph = inline(graph, lambda node, results=results: not results.isdisjoint(node.outputs))  # type: ignore[misc]


def _differs(graph: SubGraph, node: OpNode, seen: Collection[str]) -> bool:
    if not node.origin or node.op_type.startswith(FUSED):
        return False
    inner = [leaf for leaf in node.recorded if rounds(graph, leaf)]
    if len(inner) < 2:
        return False
    if any(name in seen for name in node.outputs):
        return True
    if node.op_type in ATTENTION_OPS:  # scores that float16 cannot hold: the op is right where the code is not
        return False
    halves = {graph.values[name].dtype for leaf in inner for name in leaf.outputs}
    return torch.float16 in halves and any(_grows(leaf) for leaf in inner[:-1])


def _grows(node: OpNode) -> bool:
    return node.op_type in _GROWS or (node.op_type == "mul" and len({*node.inputs}) == 1)
