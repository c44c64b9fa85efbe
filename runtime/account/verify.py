"""Each region's kernel against its recorded ops and against float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from graph_capture.ir.choices import roundings_apart
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.interpreter import Executor
from graph_capture.ir.numerics import KERNEL, MULTIPLE, Spread, apart, distance, in_float64
from graph_capture.ir.ops import Kind, op
from graph_capture.runtime.program import Program
from graph_capture.runtime.region import Region

RUNS = 4  # more of the recorded ops where a kernel seems off, to learn how much they differ from run to run
NEAR = {2: 8, 4: 256}  # roundings of a half, and of what is wider, by which one element may be off


@dataclass(frozen=True)
class Verification:
    """The outcome of `FusedGraph.verify`.

    Attributes:
        rows: worst first, one dict for each region that has a kernel: ``region``, ``where``, ``error_recorded``,
            ``error_fused`` (relative L2 distance to the recorded ops in float64, the largest over the outputs), ``ok``;
            and ``failed``, what the kernel raised, where it did: a replay then runs the recorded ops, which is right.
    """

    rows: list[dict[str, Any]]

    @property
    def ok(self) -> bool:
        """Whether every kernel is at least as close to float64 as the recorded ops, or exact up to one rounding, with
        their infinities and NaN."""
        return all(row["ok"] for row in self.rows)

    def __str__(self) -> str:
        lines = [
            f"{row['region']:<24} recorded {row['error_recorded']:.2e}  fused {row['error_fused']:.2e}  "
            f"{'OFF' if not row['ok'] else 'failed, as recorded' if 'failed' in row else 'ok'}"
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
            executor = Executor([(n, None) for n in node.recorded], node.inputs, node.outputs)
            results = executor.run(inputs)
            if region is not None and region.kernel is not None and (region.decision or not used):
                row = _check(region, before, results, executor)
                rows.append(row if "failed" not in row else {**row, "ok": program.config.fallback_on_error})
            env.update(zip(node.outputs, results, strict=True))

    walk(program.graph.nodes)
    return Verification(sorted(rows, key=lambda row: (row["ok"], -row["error_fused"])))


def _check(
    region: Region, inputs: Sequence[torch.Tensor], recorded: Sequence[torch.Tensor], executor: Executor
) -> dict[str, Any]:
    assert region.kernel is not None
    row: dict[str, Any] = {
        "region": region.name,
        "where": region.where,
        "error_recorded": 0.0,
        "error_fused": 0.0,
        "ok": True,
    }
    try:
        outputs = region.kernel(*apart(region.body, inputs))
    except Exception as error:  # a replay runs the recorded ops in its place
        return {**row, "failed": f"{type(error).__name__}: {error}"}
    narrow = {meta.dtype for meta in region.body.values.values() if meta.dtype.is_floating_point}
    # Long sums in another order are as good, not the same: of two such errors either may be the smaller. So is a
    # rounding that may fall to either side.
    luck = 2.0 if any(op(node.op_type).kind is Kind.OPAQUE for node in region.body.nodes) else 1.0
    luck = max(luck, 1.25 if len(narrow) > 1 else 1.0)
    again = cache(lambda: [executor.run(apart(region.body, inputs)) for _ in range(RUNS)])
    exact = _exact(region, inputs, recorded)
    for number, (reference, eager, ours) in enumerate(zip(exact, recorded, outputs, strict=True)):
        # One rounding to the output's dtype is free. It is twice as large where the arithmetic has that precision
        # itself.
        rounding = torch.finfo(ours.dtype).eps if ours.dtype.is_floating_point or ours.dtype.is_complex else 0.0
        correct = ours.dtype.itemsize < 4 and not region.kernel.interpreted
        before, after, near = compared(ours, eager, reference)
        allowed = max(before * luck, rounding / 2 if correct else rounding)
        ok = near and after <= allowed
        if not ok and not rounding:  # one choice is as good as another between equals
            ok = roundings_apart(region.node, inputs, number, eager, ours) <= KERNEL
        elif not ok:  # it may be the recorded ops that were lucky, where they differ from run to run
            ok = _like_runs(ours, [eager, *(results[number] for results in again())], reference, allowed)
        row["error_recorded"] = max(row["error_recorded"], before)
        row["error_fused"] = max(row["error_fused"], after)
        row["ok"] = bool(row["ok"] and ok)
    return row


def _like_runs(ours: torch.Tensor, runs: Sequence[torch.Tensor], reference: torch.Tensor, allowed: float) -> bool:
    """Whether a result is such as the recorded ops give, that do not give the same twice."""
    spread = Spread(runs[0])
    for run in runs[1:]:
        spread.add(run)
    if not spread.noise or not spread.allows(ours):
        return False
    worst = max(compared(ours, run, reference)[0] for run in runs)
    noise = max(distance(run, runs[0]) for run in runs)
    return compared(ours, runs[0], reference)[1] <= max(allowed, worst) + MULTIPLE * noise


def _exact(region: Region, inputs: Sequence[torch.Tensor], recorded: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The recorded ops in float64: not what the passes made of them, which may be what is wrong.

    A cast that the code wrote rounds there too; those within a spelling that became one op do not.
    """
    graph = SubGraph(region.nodes, region.node.inputs, region.node.outputs, region.values)
    casts = [node for node in region.node.origin if node.op_type == "cast" and not node.origin]
    rounds = {name for node in casts for name in node.outputs if region.values[name].dtype.is_floating_point}
    try:
        return in_float64(graph, inputs, rounds)
    except Exception:  # an op that torch has not in float64
        return recorded


def compared(ours: torch.Tensor, eager: torch.Tensor, reference: torch.Tensor) -> tuple[float, float, bool]:
    """The relative L2 distances of `eager` and of `ours` to `reference`, and whether each of our elements is near it.

    Where eager or we have a NaN or an infinity, both must. One element counts as much beside large ones as by itself.
    """
    if not (ours.dtype.is_floating_point or ours.dtype.is_complex):
        off = (ours != eager) & (ours.double() != reference.double())
        return 0.0, float(off.any()), not off.any()
    left, middle, right = (_real(tensor) for tensor in (ours, eager, reference))
    plain = left.isfinite() & middle.isfinite()
    same = (left == middle) | (left.isnan() & middle.isnan())
    if left.shape != middle.shape or not bool((plain | same).all()):
        return 0.0, math.inf, False
    plain &= right.isfinite()
    left, middle, right = (tensor[plain] for tensor in (left, middle, right))
    if not left.numel():
        return 0.0, 0.0, True
    norm = right.norm().item() or 1.0
    before, after = (middle - right).norm().item() / norm, (left - right).norm().item() / norm
    near = NEAR[min(ours.dtype.itemsize, 4)] * torch.finfo(ours.dtype).eps
    allowed = near * (right.abs() + right.abs().median()) + 8 * (middle - right).abs()
    return before, after, bool(((left - right).abs() <= allowed).all())


def _real(tensor: torch.Tensor) -> torch.Tensor:
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.double()
