"""From a region to the description of its kernel: the first lowering that claims the region decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from graph_capture.codegen.spec import attention, linear, rows
from graph_capture.codegen.spec import rotary_lowering as rotary
from graph_capture.codegen.spec.kernel import Spec
from graph_capture.errors import FusionError
from graph_capture.ir.binding import expression, flatten_outputs, prepare
from graph_capture.ir.graph import SubGraph
from graph_capture.ir.values import TensorMeta

# A lowering is a module: `claims` looks at a region's ops, `check_ops` says what is wrong with them, `lower` makes the
# spec. The first that claims a region has it.
LOWERINGS: tuple[Any, ...] = (rotary, linear, attention, rows)


def infer_values(graph: SubGraph, inputs: Mapping[str, TensorMeta]) -> dict[str, TensorMeta]:
    """The layout of every value of `graph`, found by running its ops on meta tensors.

    Raises:
        FusionError: an op does not accept its inputs.
    """
    env: dict[str, torch.Tensor] = {}
    for name, meta in inputs.items():
        env[name] = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")
    device = next((meta.device for meta in inputs.values()), torch.device("cpu"))
    for node in graph.nodes:
        try:
            results = flatten_outputs(prepare(node)([env[name] for name in node.inputs]))
        except Exception as error:
            raise FusionError(f"{node.op_type} does not accept its inputs: {error}") from error
        env.update(zip(node.outputs, results, strict=True))
    return {name: TensorMeta.of(tensor)._replace(device=device) for name, tensor in env.items()}


def check_ops(graph: SubGraph) -> None:
    """Look at the ops of `graph` alone.

    Raises:
        FusionError: they cannot be one kernel; the message says why.
    """
    _lowering(graph).check_ops(graph)


def lower(graph: SubGraph, values: Mapping[str, TensorMeta], define: rows.Definitions = expression) -> Spec:
    """`graph`, whose values have these layouts, as one kernel; `define` gives the scalar expressions of its ops.

    Raises:
        FusionError: it cannot be one kernel; the message says why.
    """
    if any(values[name].bits for name in graph.input_names if name in values):
        raise FusionError("an input is a conjugate or negative view, and kernels read memory as it is")
    lowering = _lowering(graph)
    lowering.check_ops(graph)
    spec: Spec = lowering.lower(graph, values, define)
    return spec


def _lowering(graph: SubGraph) -> Any:
    return next(module for module in LOWERINGS if module.claims(graph))


def supports(
    graph: SubGraph,
    metas: Mapping[str, TensorMeta] | None = None,
    check_ops: Callable[[SubGraph], None] = check_ops,
    lower: Callable[[SubGraph, Mapping[str, TensorMeta]], Spec] = lower,
    accept: Callable[[Spec], None] = lambda spec: None,
) -> str | None:
    """Why `graph` cannot be one kernel, or None if it can. Without layouts (here or in ``graph.values``) only its ops
    are looked at. A target asks with its own `check_ops`, `lower` and `accept`."""
    known = dict(graph.values) | dict(metas or {})
    try:
        if not all(name in known for name in graph.input_names):
            check_ops(graph)
            return None
        if not all(name in known for node in graph.nodes for name in node.outputs):
            check_ops(graph)
            known = infer_values(graph, {name: known[name] for name in graph.input_names})
        accept(lower(graph, known))
    except FusionError as error:
        return str(error)
    return None
