"""Each region's kernel against its recorded ops and against float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from graph_capture.executor import Executor
from graph_capture.graph import OpNode, SubGraph
from graph_capture.ops import Kind, op, written_inputs

if TYPE_CHECKING:
    from graph_capture.runtime.fused import FusedGraph, Region


@dataclass(frozen=True)
class Verification:
    """The outcome of `FusedGraph.verify`.

    Attributes:
        rows: worst first, one dict for each region that has a kernel: ``region``, ``where``, ``error_recorded``,
            ``error_fused`` (relative L2 distance to float64, the largest over the outputs), ``ok``.
    """

    rows: list[dict[str, Any]]

    @property
    def ok(self) -> bool:
        """Whether every kernel is at least as close to float64 as the recorded ops, or exact up to one rounding."""
        return all(row["ok"] for row in self.rows)

    def __str__(self) -> str:
        lines = [
            f"{row['region']:<24} recorded {row['error_recorded']:.2e}  fused {row['error_fused']:.2e}  "
            f"{'ok' if row['ok'] else 'OFF'}"
            for row in self.rows
        ]
        return "\n".join(lines) or "no region has a kernel"


def verify(fused: FusedGraph, env: dict[str, torch.Tensor], used: bool = False) -> Verification:
    """Walk the rewritten graph on `env` (a tensor for each graph input), checking each region on the way.

    With `used`, only those whose kernel a replay runs.
    """
    regions = {id(region.node): region for region in fused.regions}
    rows = []

    def walk(nodes: Iterable[OpNode]) -> None:
        for node in nodes:
            region = regions.get(id(node))
            if region is not None and region.parts is not None:
                walk(region.parts.nodes)
                continue
            inputs = [env[name] for name in node.inputs]
            before = apart(region.body, inputs) if region is not None else inputs
            results = Executor([(n, None) for n in node.recorded], node.inputs, node.outputs).run(inputs)
            if region is not None and region.kernel is not None and (region.decision or not used):
                rows.append(_check(region, before, results))
            env.update(zip(node.outputs, results, strict=True))

    walk(fused.subgraph.nodes)
    return Verification(sorted(rows, key=lambda row: (row["ok"], -row["error_fused"])))


def _check(region: Region, inputs: Sequence[torch.Tensor], recorded: Sequence[torch.Tensor]) -> dict[str, Any]:
    assert region.kernel is not None
    exact = in_float64(region.body, inputs)
    outputs = region.kernel(*apart(region.body, inputs))
    worst = {"error_recorded": 0.0, "error_fused": 0.0, "ok": True}
    for reference, eager, ours in zip(exact, recorded, outputs, strict=True):
        before, after = distance(eager, reference), distance(ours, reference)
        # One rounding to the output's dtype is free. It is twice as large where the arithmetic has that precision
        # itself, and in Triton's interpreter, which truncates.
        rounding = torch.finfo(ours.dtype).eps if ours.dtype.is_floating_point else 0.0
        correct = ours.dtype.itemsize < 4 and not region.kernel.interpreted
        # Long sums in another order are as good, not the same: of two such errors either may be the smaller.
        luck = 2.0 if any(op(node.op_type).kind is Kind.OPAQUE for node in region.body.nodes) else 1.0
        allowed = max(before * luck, rounding / 2 if correct else rounding)
        worst["error_recorded"] = max(worst["error_recorded"], before)
        worst["error_fused"] = max(worst["error_fused"], after)
        worst["ok"] = bool(worst["ok"] and after <= allowed)
    return {"region": region.name, "where": region.where, **worst}


def apart(graph: SubGraph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs of a graph, with copies of those that it writes: caches, counters."""
    written = {node.inputs[position] for node in graph.nodes for position in written_inputs(node)}
    return [t.clone() if name in written else t for name, t in zip(graph.input_names, inputs, strict=True)]


def in_float64(graph: SubGraph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Run a graph with every floating-point value in float64, casts between floats included."""
    nodes = [
        OpNode(node.op_type, node.inputs, node.outputs, tuple((k, _widen(v)) for k, v in node.attrs))
        for node in graph.nodes
    ]
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
