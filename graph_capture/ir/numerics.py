"""Whether results are right: bit for bit, up to rounding, and against float64."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from graph_capture.ir.effects import written_inputs
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.interpreter import Executor


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits, NaN for NaN."""
    if torch.equal(left, right):
        return left.shape == right.shape
    if left.shape != right.shape or not (left.is_floating_point() or left.is_complex()):
        return False
    return torch.equal(_as_bytes(left), _as_bytes(right))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def alike(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Bit-equal (NaN equals NaN), or equal up to the rounding of an op that is not deterministic."""
    if expected.shape != found.shape or expected.dtype != found.dtype or expected.layout != found.layout:
        return False
    if expected.layout != torch.strided or expected.device.type == "meta":
        return True
    if expected.dtype is torch.complex32:  # few ops take it
        expected, found = expected.to(torch.complex64), found.to(torch.complex64)
    if torch.equal(expected, found):
        return True
    if not expected.dtype.is_floating_point and not expected.dtype.is_complex:
        return False
    tolerance = 16 * torch.finfo(expected.dtype).eps
    wide = torch.complex128 if expected.dtype.is_complex else torch.float64
    return torch.allclose(found.to(wide), expected.to(wide), tolerance, tolerance, equal_nan=True)


def apart(graph: SubGraph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs of a graph, with copies of those that it writes: caches, counters."""
    written = {node.inputs[position] for node in graph.nodes for position in written_inputs(node)}
    return [t.clone() if name in written else t for name, t in zip(graph.input_names, inputs, strict=True)]


def in_float64(graph: SubGraph, inputs: Sequence[torch.Tensor], rounds: Collection[str] = ()) -> list[torch.Tensor]:
    """Run a graph with every floating-point value in float64, casts between floats included.

    The casts that make the values `rounds` round first, as they were told.
    """
    nodes = []
    for node in graph.nodes:
        name, given = node.outputs[0] if node.outputs else "", node.inputs
        if name in rounds:
            nodes.append(OpNode(node.op_type, given, (f"{name} rounded",), node.attrs))
            given = (f"{name} rounded",)
        nodes.append(OpNode(node.op_type, given, node.outputs, tuple((k, _widen(v)) for k, v in node.attrs)))
    executor = Executor([(node, None) for node in nodes], graph.input_names, graph.output_names)
    inputs = apart(graph, inputs)
    return executor.run([_widened(tensor) for tensor in inputs])


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _widen(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def distance(tensor: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 distance; inf where one has a NaN or an infinity that the other has not."""
    left, right = tensor.double(), reference.double()
    if not torch.equal(left.isnan(), right.isnan()):
        return float("inf")
    infinite = left.isinf() | right.isinf()
    if not torch.equal(left[infinite], right[infinite]):
        return float("inf")
    keep = ~(infinite | left.isnan())
    difference, norm = (left[keep] - right[keep]).norm().item(), right[keep].norm().item()
    return difference / norm if norm else difference


def close_enough(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results in one dtype agree up to a few roundings."""
    if not tensor.dtype.is_floating_point:
        return torch.equal(tensor, other)
    return distance(tensor, other) <= 4 * torch.finfo(tensor.dtype).eps
