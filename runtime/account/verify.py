"""Each region's kernel against its recorded ops and against float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graph_capture.ir.graph import OpNode
from graph_capture.ir.interpreter import Executor
from graph_capture.ir.numerics import apart, distance, in_float64
from graph_capture.ir.ops import Kind, op
from graph_capture.runtime.program import Program
from graph_capture.runtime.region import Region


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


def verify(program: Program, env: dict[str, torch.Tensor], used: bool = False) -> Verification:
    """Walk the rewritten graph on `env` (a tensor for each graph input), checking each region on the way.

    With `used`, only those whose kernel a replay runs.
    """
    regions = program.by_node
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

    walk(program.graph.nodes)
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
