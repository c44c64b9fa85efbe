"""Convolutions with what their weights make ready once: the batch norm behind them folded in, and another layout.

A norm is folded in float32 only: a folded weight is rounded once more, the same way at every place, and over a
deep model in half precision that adds up to several times eager's error. What is not folded becomes the pointwise
`batch_norm`, which is computed in float32 together with what follows it.

Like merged linears, each is a region whose body begins with what depends on weights alone; the library runs the rest
(see `graph_capture.runtime.library`), and does so where that measures faster than the recorded ops.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from graph_capture.ir.binding import arguments
from graph_capture.ir.convolutions import lies_last
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import FUSED, Kind, op
from graph_capture.ir.values import Arg, TensorMeta
from graph_capture.passes.cleanup import MemoryUse
from graph_capture.passes.flow import Dependencies
from graph_capture.passes.receipts import Receipt, Tally
from graph_capture.passes.rewrite import Contraction, common_source, contract
from graph_capture.passes.strides import laid_out

RULE = "ready_convolution"
CONVOLUTION = "aten.convolution.default"
NORMS = ("aten.native_batch_norm.default", "aten.cudnn_batch_norm.default")  # the second on CUDA, but for bfloat16


def ready_convolutions(
    graph: SubGraph, weights: Collection[str], dependencies: Dependencies | None = None
) -> tuple[SubGraph, Receipt]:
    """`graph` with each convolution as a region, together with the batch norm behind it.

    Args:
        weights: inputs that are the same in every replay; only with these is something made ready.
        dependencies: `graph`'s, if there are any.
    """
    tally = Tally(RULE)
    if CONVOLUTION not in graph.by_op:
        return graph, tally.receipt()
    memory = MemoryUse(graph)
    dependencies = dependencies or Dependencies(graph)
    found: list[Contraction] = []
    for index in graph.by_op[CONVOLUTION]:
        tally.seen += 1
        folds = graph.values[graph.nodes[index].outputs[0]].dtype is torch.float32
        nodes = [index, *(_norm_behind(graph, index, weights, memory) if folds else ())]
        reason = _reason(graph, nodes, weights, memory) or dependencies.blocked(nodes)
        if reason is not None:
            tally.refuse(graph, nodes, reason)
        else:
            found.append(Contraction(tuple(nodes), ready_convolution(graph, nodes)))
    if not found:
        return graph, tally.receipt()
    result, dropped = contract(graph, found, dependencies)
    for item in dropped:
        tally.refuse(graph, item.nodes, "would have created a cycle with other regions")
    made = [node.outputs[0] for node in result.nodes if is_ready(node)]
    metas = {name: result.values[name] for name in made}
    laid = laid_out(result, {n: _last(meta) for n, meta in metas.items() if lies_last(meta.device, meta.dtype)})
    if laid is None:
        for item in found:
            tally.refuse(graph, item.nodes, "something behind it does not take channels that come last")
        return graph, tally.receipt()
    tally.matched = len(found) - len(dropped)
    return laid, tally.receipt()


def biases_apart(graph: SubGraph) -> SubGraph:
    """`graph` with a convolution's bias as an op behind it where a kernel may add it on the way.

    On a GPU in half precision, that is, where the library adds it in a pass of its own too, after rounding.
    """
    nodes: list[OpNode] = []
    values = dict(graph.values)
    for node in graph.nodes:
        bias = arguments(node).get("bias") if node.op_type == CONVOLUTION else None
        meta = values[node.outputs[0]] if isinstance(bias, Arg) else None
        if meta is None or meta.device.type != "cuda" or meta.dtype.itemsize != 2 or not _grown(graph, node.outputs[0]):
            nodes.append(node)
            continue
        assert isinstance(bias, Arg)
        made = f"{node.outputs[0]}_unbiased"
        values[made] = meta._replace(storage=-1)
        rest = tuple(name for position, name in enumerate(node.inputs) if position != bias.index)
        view = _channels(node.inputs[bias.index], len(meta.shape) - 2, nodes, values)
        attrs = {name: value for name, value in node.attrs if name != "bias"}
        nodes.append(OpNode(CONVOLUTION, rest, (made,), _pairs(**attrs, bias=None), node.source))
        nodes.append(OpNode("add", (made, view), node.outputs, (), node.source))
    changed = len(values) > len(graph.values)
    return SubGraph(tuple(nodes), graph.input_names, graph.output_names, values) if changed else graph


def _grown(graph: SubGraph, name: str) -> bool:
    """Whether a pointwise or row op reads the value, or a view of it."""
    users = [graph.nodes[user] for user in graph.users.get(name, ())]
    kinds = {id(user): op(user.op_type).kind for user in users}
    return any(
        kinds[id(user)] in (Kind.POINTWISE, Kind.ROW)
        or (kinds[id(user)] is Kind.VIEW and any(_grown(graph, view) for view in user.outputs))
        for user in users
    )


def _channels(name: str, behind: int, nodes: list[OpNode], values: dict[str, TensorMeta]) -> str:
    """A vector over channels as a view [C, 1, ...] with so many dimensions behind them."""
    view = f"{name}_channels{behind}"
    if view not in values:
        meta, ones = values[name], (1,) * behind
        values[view] = meta._replace(shape=meta.shape + ones, stride=meta.stride + ones)
        nodes.append(OpNode("aten.view.default", (name,), (view,), (("size", meta.shape + ones),)))
    return view


def pointwise_norms(graph: SubGraph) -> SubGraph:
    """`graph` with batch norms in evaluation as the pointwise op, over statistics that are views [C, 1, ...]."""
    nodes: list[OpNode] = []
    values = dict(graph.values)
    for node in graph.nodes:
        if node.op_type not in NORMS or not _evaluates(graph, node):
            nodes.append(node)
            continue
        given, behind = arguments(node), len(values[node.inputs[0]].shape) - 2
        operands = {"input": node.inputs[0]}
        for name, parameter in _STATISTICS.items():
            place = given.get(parameter)
            if isinstance(place, Arg):
                operands[name] = _channels(node.inputs[place.index], behind, nodes, values)
        missing = {name: None for name in ("weight", "bias") if name not in operands}
        attrs = _pairs(**missing, eps=_epsilon(given))
        nodes.append(OpNode("batch_norm", tuple(operands.values()), node.outputs[:1], attrs, node.source))
    changed = len(values) > len(graph.values)
    return SubGraph(tuple(nodes), graph.input_names, graph.output_names, values) if changed else graph


_STATISTICS = {"mean": "running_mean", "var": "running_var", "weight": "weight", "bias": "bias"}


def _epsilon(given: Mapping[str, Any]) -> Any:
    return given["eps"] if "eps" in given else given["epsilon"]


def _evaluates(graph: SubGraph, norm: OpNode) -> bool:
    """Whether a batch norm uses the statistics that it is given, and makes its first result alone, in its input's
    dtype."""
    given = arguments(norm)
    statistics = [given.get("running_mean"), given.get("running_var")]
    if norm.attr("training") is not False or not all(isinstance(value, Arg) for value in statistics):
        return False
    if any(graph.users.get(extra) or extra in graph.output_names for extra in norm.outputs[1:]):
        return False
    return graph.values[norm.outputs[0]].dtype is graph.values[norm.inputs[0]].dtype


def _pairs(**attrs: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(attrs.items()))


def _last(meta: TensorMeta) -> TensorMeta:
    last = torch.empty(meta.shape, device="meta", memory_format=torch.channels_last)
    return meta._replace(stride=last.stride())


def is_ready(node: OpNode) -> bool:
    """Whether the node is such a region."""
    return node.op_type == FUSED + RULE


def _norm_behind(graph: SubGraph, index: int, weights: Collection[str], memory: MemoryUse) -> list[int]:
    """The batch norm that alone reads a convolution, in evaluation, with weights of its own."""
    name = graph.nodes[index].outputs[0]
    users = graph.users.get(name, ())
    if len(users) != 1 or graph.nodes[users[0]].op_type not in NORMS or not memory.private(name):
        return []
    norm = graph.nodes[users[0]]
    if norm.inputs[0] != name or not _evaluates(graph, norm):
        return []
    if any(other not in weights or not memory.constant(other) for other in norm.inputs[1:]):
        return []
    return [users[0]]


def _reason(graph: SubGraph, nodes: list[int], weights: Collection[str], memory: MemoryUse) -> str | None:
    """Why a convolution is left as it is."""
    node = graph.nodes[nodes[0]]
    x, weight = (graph.values[name] for name in node.inputs[:2])
    if node.attr("transposed") or any(node.attr("output_padding", ())):
        return "it is transposed"
    if len(x.shape) != 4 or 0 in x.shape:
        return "it has not two dimensions"
    for name in node.inputs[1:]:
        if name not in weights:
            return f"{name} is computed in the graph"
        if not memory.constant(name):
            return f"{name} is written in place"
    if len(nodes) == 1 and not lies_last(x.device, weight.dtype):
        return "there is nothing to make ready for this device and dtype"
    if x.dtype is not weight.dtype or not weight.dtype.is_floating_point:
        return "its input and its weight differ in dtype"
    return None


def ready_convolution(graph: SubGraph, nodes: list[int]) -> OpNode:
    """The region of a convolution, and of the norm behind it if there are two."""
    members = tuple(graph.nodes[index] for index in nodes)
    convolution, *norms = members
    given = arguments(convolution)
    made: dict[str, str] = {}  # value of the graph -> input of the body
    inner: list[OpNode] = []

    def inside(node: OpNode, value: object, name: str) -> str | None:
        if not isinstance(value, Arg):
            return None
        return made.setdefault(node.inputs[value.index], name)

    x, weight = inside(convolution, given["input"], "x"), inside(convolution, given["weight"], "weight")
    bias = inside(convolution, given.get("bias"), "bias")
    assert x is not None
    assert weight is not None
    if norms:
        of = arguments(norms[0])
        parts = {"weight": weight, "bias": bias} | {
            name: inside(norms[0], of.get(parameter), name)
            for name, parameter in (
                ("mean", "running_mean"),
                ("var", "running_var"),
                ("gamma", "weight"),
                ("beta", "bias"),
            )
        }
        operands = {name: value for name, value in parts.items() if value is not None}
        attrs = _pairs(**{name: Arg(number) for number, name in enumerate(operands)}, eps=_epsilon(of))
        inner.append(OpNode("folded_norm", tuple(operands.values()), ("folded", "shift"), attrs))
        weight, bias = "folded", "shift"
    how: dict[str, Any] = {name: tuple(given[name]) for name in ("stride", "padding", "dilation")} | {
        "groups": given["groups"]
    }
    size = graph.values[convolution.inputs[0]].shape
    inner.append(OpNode("packed_weight", (weight,), ("packed",), _pairs(**how, size=tuple(size), weight=Arg(0))))
    operands = {"input": x, "weight": "packed"} | ({} if bias is None else {"bias": bias})
    attrs = _pairs(**{"bias": None, **{name: Arg(number) for number, name in enumerate(operands)}, **how})
    inner.append(OpNode("packed_convolution", tuple(operands.values()), ("y",), attrs))
    result = members[-1].outputs[0]
    values: dict[str, TensorMeta] = {name: graph.values[value] for value, name in made.items()}
    values["y"] = graph.values[result]
    if lies_last(values["y"].device, values["y"].dtype):
        values["y"] = _last(values["y"])
    body = SubGraph(tuple(inner), tuple(made.values()), ("y",), values)
    return OpNode(FUSED + RULE, tuple(made), (result,), _pairs(body=body), common_source(members), members)
