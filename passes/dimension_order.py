"""Pointwise ops over values whose dimensions lie in memory in another order than they are counted.

Kernels leave their results contiguous. What lies as channels last (or as any other permutation) is therefore computed
over permuted views: a chain of such ops, and the norms and linears that read their views, become neighbours.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from graph_capture.ir.effects import is_random, written_inputs
from graph_capture.ir.graph import OpNode, Source, SubGraph
from graph_capture.ir.layouts import is_contiguous
from graph_capture.ir.ops import Kind, op
from graph_capture.ir.values import TensorMeta
from graph_capture.passes.cleanup import MemoryUse, collapse_views, dead_code
from graph_capture.passes.strides import contiguous, laid_out

RULE = "dimension_order"


def follow_memory(graph: SubGraph) -> SubGraph:
    """`graph` with each pointwise op of a dense, permuted result over operands in the order of its memory."""
    turned = _Turned(graph)
    for node in graph.nodes:
        order = _order_in_memory(graph, node, turned.memory)
        if order is None:
            turned.nodes.append(node)
        else:
            turned.compute(node, order)
    if len(turned.nodes) == len(graph):
        return graph
    result = SubGraph(tuple(turned.nodes), graph.input_names, graph.output_names, turned.values)
    return dead_code(collapse_views(result))


_BY_ROWS = ("layer_norm", "rms_norm", "linear")  # ops that read rows: their last dimension, next to each other


def contiguous_rows(graph: SubGraph) -> SubGraph:
    """`graph` where chains of pointwise ops that norms and linears read by rows begin with a copy into rows.

    What a convolution over time gives, permuted, would otherwise lie across its rows through all layers of a model.
    """
    memory = MemoryUse(graph)
    owner: dict[str, int] = {}  # a value of a chain -> the node that begins it
    wanted: dict[int, str] = {}  # what reads that chain by rows
    for index, node in enumerate(graph.nodes):
        starts = {owner[name] for name in node.inputs if name in owner}
        if node.op_type in _BY_ROWS and node.inputs[0] in owner:
            wanted[owner[node.inputs[0]]] = node.op_type
        if _order_in_memory(graph, node, memory) is not None:
            owner[node.outputs[0]] = min(starts, default=index)
    nodes: list[OpNode] = []
    values = dict(graph.values)
    fixed: dict[str, TensorMeta] = {}
    for index, node in enumerate(graph.nodes):
        for name in node.inputs if index in wanted else ():
            meta = graph.values[name]
            if meta.shape == graph.values[node.outputs[0]].shape and not is_contiguous(meta):
                copy = f"{name}_in_rows"
                if copy not in fixed:
                    row = torch.empty(meta.shape, device="meta").stride()
                    values[copy] = fixed[copy] = meta._replace(stride=row, offset=0, storage=-1)
                    nodes.append(contiguous(name, copy))
                node = node.rename({name: copy})
        nodes.append(node)
    if not fixed:
        return graph
    return laid_out(SubGraph(tuple(nodes), graph.input_names, graph.output_names, values), fixed) or graph


def _order_in_memory(graph: SubGraph, node: OpNode, memory: MemoryUse) -> tuple[int, ...] | None:
    """The dimensions of an op's result from the outermost to the innermost, where they are not counted like that."""
    if op(node.op_type).kind is not Kind.POINTWISE or node.origin or len(node.outputs) != 1:
        return None
    metas = [graph.values.get(name) for name in (*node.outputs, *node.inputs)]
    if any(meta is None or meta.bits or len(meta.stride) != len(meta.shape) for meta in metas):
        return None
    result = graph.values[node.outputs[0]]
    if is_contiguous(result) or written_inputs(node) or is_random(node):
        return None
    if not all(map(memory.constant, (*node.inputs, *node.outputs))):
        return None
    order = tuple(sorted(range(len(result.shape)), key=lambda dim: -result.stride[dim]))
    return order if is_contiguous(_permuted(result, order)) else None


def _permuted(meta: TensorMeta, order: tuple[int, ...]) -> TensorMeta:
    shape, stride = (tuple(values[dim] for dim in order) for values in (meta.shape, meta.stride))
    return meta._replace(shape=shape, stride=stride)


class _Turned:
    """The new graph, as far as it is made."""

    def __init__(self, graph: SubGraph) -> None:
        self.nodes: list[OpNode] = []
        self.values = dict(graph.values)
        self.memory = MemoryUse(graph)
        self._views: dict[tuple[str, tuple[int, ...]], str] = {}

    def compute(self, node: OpNode, order: tuple[int, ...]) -> None:
        """Add `node` over permuted views, and its result as a view of what that makes."""
        result = node.outputs[0]
        inputs = tuple(self._in_order(name, order, node.source) for name in node.inputs)
        made = self._views[result, order] = self._new(result, order)
        self.values[made] = _permuted(self.values[result], order)
        self.nodes.append(replace(node, inputs=inputs, outputs=(made,)))
        back = tuple(order.index(dim) for dim in range(len(order)))
        self.nodes.append(OpNode("aten.permute.default", (made,), (result,), (("dims", back),), node.source))

    def _in_order(self, name: str, order: tuple[int, ...], source: Source | None) -> str:
        """An operand as a view with its dimensions in this order; of what is broadcast the outer ones are left out."""
        meta = self.values[name]
        missing = len(order) - len(meta.shape)
        if meta.numel == 1 and not meta.shape:
            return name
        if (name, order) in self._views:
            return self._views[name, order]
        if missing:
            shape = (1,) * missing + meta.shape
            like = torch.empty_strided(meta.shape, meta.stride, device="meta").view(shape)
            whole = meta._replace(shape=shape, stride=like.stride())
            node = OpNode("aten.view.default", (name,), (), (("size", shape),), source)
            name, meta = self._view(name, (missing,), whole, node), whole
        dims = (("dims", order),)
        node = OpNode("aten.permute.default", (name,), (), dims, source)
        return self._view(name, order, _permuted(meta, order), node)

    def _view(self, name: str, order: tuple[int, ...], meta: TensorMeta, node: OpNode) -> str:
        made = self._views[name, order] = self._new(name, order)
        self.values[made] = meta
        self.nodes.append(replace(node, outputs=(made,)))
        return made

    def _new(self, name: str, order: tuple[int, ...]) -> str:
        made = f"{name}_by_{'_'.join(map(str, order))}"
        while made in self.values:
            made += "_"
        return made
