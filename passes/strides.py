"""Who can tell that a value lies in memory in another way than it was recorded, and graphs where values do."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import torch

from graph_capture.ir.binding import flatten_outputs, prepare
from graph_capture.ir.effects import is_random
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.interpreter import interpret
from graph_capture.ir.layouts import is_contiguous
from graph_capture.ir.op_table import TABLE
from graph_capture.ir.ops import EXTERNAL, FUSED, op
from graph_capture.ir.values import TensorMeta

_BY_MEMORY = (
    "as_strided",
    "set_",
    "resize",
    "_resize",
    "view_as_real_copy",
)  # aten ops that look past a tensor's strides


def noticed(graph: SubGraph, name: str, strides: Sequence[int]) -> str | None:
    """Who would see that value `name` has `strides` rather than its own, or None.

    Its readers are run on meta tensors, and theirs, as far as their results' strides change. A result of the graph is
    seen by the caller; an op that looks at memory, or that nobody knows, sees everything.
    """
    if tuple(strides) == graph.values[name].stride:
        return None
    if name in graph.output_names:
        return "the caller"
    meta = graph.values[name]
    made = {name: torch.empty_strided(meta.shape, strides, dtype=meta.dtype, device="meta")}
    pending = [*graph.users.get(name, ())]
    seen: set[int] = set()
    while pending:
        index = heapq.heappop(pending)
        if index in seen:
            continue
        seen.add(index)
        node = graph.nodes[index]
        for leaf in node.recorded:
            if not made.keys().isdisjoint(leaf.inputs) and (reason := _run(graph.values, leaf, made)) is not None:
                return reason
        for output in node.outputs:
            if output in made:
                if output in graph.output_names:
                    return "the caller"
                for user in graph.users.get(output, ()):
                    heapq.heappush(pending, user)
    return None


def laid_out(graph: SubGraph, fixed: Mapping[str, TensorMeta]) -> SubGraph | None:
    """`graph` where some values lie in another way, and what is behind them follows; results are put back as they were
    recorded. None where an op does not take it, or would see it."""
    changed: dict[str, TensorMeta] = {}
    for node in graph.nodes:
        if node.outputs and node.outputs[0] in fixed:
            changed[node.outputs[0]] = fixed[node.outputs[0]]
        elif not changed.keys().isdisjoint(node.inputs):
            given = [_meta(changed.get(name, graph.values[name])) for name in node.inputs]
            body = node.attr("body") if node.op_type.startswith(FUSED) else None
            if not all(map(_is_known, node.recorded)):
                return None
            try:
                results = interpret(body, given) if body else flatten_outputs(prepare(node)(given))
            except (RuntimeError, ValueError, NotImplementedError):  # a view, mostly
                return None
            for name, tensor in zip(node.outputs, results, strict=True):
                if tensor.stride() != graph.values[name].stride:
                    changed[name] = graph.values[name]._replace(stride=tensor.stride())
    returned = [name for name in dict.fromkeys(graph.output_names) if name in changed]
    back = {name: f"{name}_as_recorded" for name in returned}
    copies = []
    for name in returned:
        if not is_contiguous(graph.values[name]) or len(_sharing(graph, name)) > 1:
            return None
        copies.append(contiguous(name, back[name]))
    values = {**graph.values, **changed} | {back[n]: graph.values[n]._replace(storage=-1) for n in returned}
    outputs = tuple(back.get(name, name) for name in graph.output_names)
    return SubGraph((*graph.nodes, *copies), graph.input_names, outputs, values)


def contiguous(name: str, copy: str) -> OpNode:
    """A contiguous copy of a value."""
    return OpNode("aten.clone.default", (name,), (copy,), (("memory_format", torch.contiguous_format),))


def _sharing(graph: SubGraph, name: str) -> list[str]:
    """The values that share a value's memory."""
    storage = graph.values[name].storage
    return [other for other, meta in graph.values.items() if meta.storage == storage] if storage >= 0 else [name]


def _run(values: Mapping[str, TensorMeta], node: OpNode, made: dict[str, torch.Tensor]) -> str | None:
    """Add those results of a node to `made` that lie in another way for what its inputs do; or say why not."""
    where = f"{node.op_type}{f' ({node.source.module})' if node.source and node.source.module else ''}"
    if not _is_known(node) or not values.keys() >= {*node.inputs, *node.outputs}:
        return where
    plain = [_meta(values[name]) for name in node.inputs]
    given = [made.get(name, tensor) for name, tensor in zip(node.inputs, plain, strict=True)]
    call = prepare(node)
    try:
        before, after = flatten_outputs(call(plain)), flatten_outputs(call(given))
    except Exception:  # a view that these strides do not allow, or what meta tensors do not know
        return where
    for output, one, other in zip(node.outputs, before, after, strict=True):
        if one.shape != other.shape:
            return where
        if one.stride() != other.stride():
            made[output] = other
    return None


def _meta(meta: TensorMeta) -> torch.Tensor:
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")


def _is_known(node: OpNode) -> bool:
    """Whether an op looks at its inputs' elements alone, wherever they lie."""
    if any(isinstance(value, torch.device) for _, value in node.attrs):  # it would not stay on the meta device
        return False
    if node.op_type in TABLE:
        return node.op_type != EXTERNAL
    overload = op(node.op_type).overload
    if overload is None or overload.namespace != "aten" or is_random(node):
        return False
    return not overload._schema.name.partition("::")[2].startswith(_BY_MEMORY)
