"""Linears that read the same input (query, key and value; gate and up) become one.

The region's body concatenates the weights, multiplies once and splits the result. What depends on weights alone is
computed once, when the replay is bound (see `graph_capture.runtime.library`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch

from graph_capture.errors import FusionError
from graph_capture.ir.binding import flatten_outputs, prepare
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import FUSED, LINEARS, Kind, op
from graph_capture.ir.values import Arg, TensorMeta
from graph_capture.passes.cleanup import MemoryUse
from graph_capture.passes.flow import Dependencies
from graph_capture.passes.receipts import Receipt, Tally
from graph_capture.passes.rewrite import Contraction, body_of, common_source, contract, unviewable

RULE = "parallel_linear"


def merge_linears(
    graph: SubGraph, weights: Collection[str], dependencies: Dependencies | None = None
) -> tuple[SubGraph, Receipt]:
    """`graph` with each group of linears on one input as one region.

    Args:
        weights: inputs that are the same in every replay; only these are concatenated.
        dependencies: `graph`'s, if there are any.
    """
    tally = Tally(RULE)
    memory = MemoryUse(graph)
    dependencies = dependencies or Dependencies(graph)
    found: list[Contraction] = []
    owners: dict[str, int] = {}  # weight -> linears that use it
    for index in (index for kind in LINEARS for index in graph.by_op.get(kind, ())):
        weight = graph.nodes[index].inputs[1]
        owners[weight] = owners.get(weight, 0) + 1
    for value in graph.values:
        linears = [index for index in graph.users.get(value, ()) if _reads(graph.nodes[index], value)]
        if len(linears) < 2:
            continue
        tally.seen += 1
        reason = _reason(graph, linears, weights, owners, memory) or dependencies.blocked(linears)
        if reason is not None:
            tally.refuse(graph, linears, reason)
            continue
        found.append(Contraction(tuple(linears), merged_linears(graph, linears)))
    if not found:
        return graph, tally.receipt()
    result, dropped = contract(graph, found, dependencies)
    for item in dropped:
        tally.refuse(graph, item.nodes, "would have created a cycle with other regions")
    tally.matched = len(found) - len(dropped)
    return _relaid(result), tally.receipt()


def _relaid(graph: SubGraph) -> SubGraph:
    """`graph` with the strides that parts of a merged result, and views of them, have."""
    changed: dict[str, TensorMeta] = {}
    for node in graph.nodes:
        if node.op_type == FUSED + RULE:
            total = sum(graph.values[name].shape[-1] for name in node.outputs)
            for name in node.outputs:
                meta = graph.values[name]
                whole = torch.empty((*meta.shape[:-1], total), device="meta").stride()
                if meta.numel != meta.shape[-1]:  # a single row lies as it did
                    changed[name] = meta._replace(stride=whole)
        elif op(node.op_type).kind is Kind.VIEW and not changed.keys().isdisjoint(node.inputs):
            given = [changed.get(name, graph.values[name]) for name in node.inputs]
            views = prepare(node)([torch.empty_strided(m.shape, m.stride, dtype=m.dtype, device="meta") for m in given])
            for name, view in zip(node.outputs, flatten_outputs(views), strict=True):
                changed[name] = graph.values[name]._replace(stride=view.stride())
    return replace(graph, values={**graph.values, **changed}) if changed else graph


def _reads(node: OpNode, value: str) -> bool:
    return node.op_type in LINEARS and node.inputs[0] == value and not node.attr("transposed")


def _reason(
    graph: SubGraph, linears: Sequence[int], weights: Collection[str], owners: dict[str, int], memory: MemoryUse
) -> str | None:
    """Why these linears stay apart."""
    nodes = [graph.nodes[index] for index in linears]
    if len({len(node.inputs) for node in nodes}) > 1:
        return "some have a bias and some have none"
    if len({(node.op_type, node.attr("format")) for node in nodes}) > 1:
        return "their weights are of different formats"
    for node in nodes:
        for name in node.inputs[1:]:
            if name not in weights:
                return f"{name} is computed in the graph"
            if not memory.constant(name):
                return f"{name} is written in place"
        if owners[node.inputs[1]] > 1:
            return f"{node.inputs[1]} is used by several linears"
        if not memory.private(node.outputs[0]):
            return f"{node.outputs[0]} is returned, or written in place"
    for position in range(1, len(nodes[0].inputs)):
        metas = [graph.values[node.inputs[position]] for node in nodes]
        if len({(meta.dtype, meta.device, meta.shape[1:]) for meta in metas}) > 1:
            return "their weights differ in dtype or device"
    if graph.values[nodes[0].inputs[0]].dtype is not graph.values[nodes[0].outputs[0]].dtype:
        return "the result has another dtype"
    return next(filter(None, (_unviewable(graph, node.outputs[0], nodes) for node in nodes)), None)


def _unviewable(graph: SubGraph, name: str, nodes: Sequence[OpNode]) -> str | None:
    """The view of a result that a slice of the merged result does not allow."""
    total = sum(graph.values[node.outputs[0]].shape[-1] for node in nodes)
    shape = graph.values[name].shape
    whole = torch.empty((*shape[:-1], total), device="meta")
    return unviewable(graph, name, whole[..., : shape[-1]])


def merged_linears(graph: SubGraph, linears: Sequence[int]) -> OpNode:
    """The region of these linears, which read one input."""
    members = tuple(graph.nodes[index] for index in linears)
    plain, inputs = body_of(graph, linears, [node.outputs[0] for node in members])
    nodes: list[OpNode] = []
    values: dict[str, TensorMeta] = {name: plain.values[name] for name in plain.input_names}
    outputs = tuple(node.outputs[0] for node in plain.nodes)
    listed = tuple(Arg(index) for index in range(len(members)))
    operands = [plain.nodes[0].inputs[0]]
    for position, name in enumerate(("weight", "bias")[: len(members[0].inputs) - 1], start=1):
        parts = tuple(node.inputs[position] for node in plain.nodes)
        nodes.append(OpNode("aten.cat.default", parts, (name,), (("tensors", listed),)))
        operands.append(name)
    nodes.append(OpNode(members[0].op_type, tuple(operands), ("product",), members[0].attrs))
    sizes = tuple(graph.values[node.outputs[0]].shape[-1] for node in members)
    nodes.append(OpNode("aten.split_with_sizes.default", ("product",), outputs, (("dim", -1), ("split_sizes", sizes))))
    values |= {name: plain.values[name] for name in outputs}
    body = SubGraph(tuple(nodes), plain.input_names, outputs, values)
    made = tuple(node.outputs[0] for node in members)
    return OpNode(FUSED + RULE, inputs, made, (("body", body),), common_source(members), members)


def product_of(node: OpNode, values: Mapping[str, TensorMeta]) -> tuple[SubGraph, dict[str, TensorMeta]]:
    """The product of linears that are merged, as a graph, and the layouts of its inputs.

    Raises:
        FusionError: there is none.
    """
    body: SubGraph = node.attr("body")
    given = dict(zip(body.input_names, (values[name] for name in node.inputs), strict=True))
    for made in body.nodes:
        metas = [given[name] for name in made.inputs]
        if made.op_type in LINEARS:
            return SubGraph((made,), made.inputs, made.outputs), dict(zip(made.inputs, metas, strict=True))
        shape = (sum(meta.shape[0] for meta in metas), *metas[0].shape[1:])  # their concatenation
        stride = torch.empty(shape, device="meta").stride()
        given[made.outputs[0]] = TensorMeta(shape, stride, metas[0].dtype, metas[0].device)
    raise FusionError("it has no linear")
