"""Which pass, or which kernel, first makes a result leave its tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from graph_capture.calls.signature import Bound
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.interpreter import Call, Executor, interpret
from graph_capture.ir.numerics import distance
from graph_capture.ir.ops import FUSED
from graph_capture.log import log
from graph_capture.runtime.program import Program
from graph_capture.runtime.region import Kernel

ROUNDINGS = 64  # what many layers may add up to


@dataclass(frozen=True)
class Bisection:
    """The outcome of `FusedGraph.bisect`.

    Attributes:
        culprit: the name of the first pass or region after which the result is off; None if there is none.
        error: the largest relative L2 distance there, or, with no culprit, after everything.
        steps: each pass and region that was tried, with its error.
    """

    culprit: str | None
    error: float
    steps: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        lines = [f"{name:<28} {error:.2e}" for name, error in self.steps]
        verdict = "the result is within its tolerance" if self.culprit is None else f"off since {self.culprit}"
        return "\n".join([*lines, f"{verdict} ({self.error:.2e})"])


def bisect(program: Program, call: Bound, constants: Sequence[torch.Tensor], tolerance: float | None) -> Bisection:
    """See `FusedGraph.bisect`."""
    recorded = program.recorded
    plain = [*call.tensors, *recorded.captured.values()]
    tensors = [*plain, *constants]
    with recorded.undone(plain):
        reference = [tensor.clone() for tensor in interpret(recorded.subgraph, plain)]
    steps: list[tuple[str, float]] = []

    def leaves(name: str, graph: SubGraph, kernels: Mapping[int, Call]) -> bool:
        executor = Executor(_steps(program, graph, kernels), graph.input_names, graph.output_names)
        with recorded.undone(plain):
            results = executor.run(tensors[: len(graph.input_names)])
        compared = [_compare(a, b, tolerance) for a, b in zip(results, reference, strict=True)]
        steps.append((name, max((error for error, _ in compared), default=0.0)))
        return any(off for _, off in compared)

    for name, graph in program.stages:
        try:
            off = leaves(name, graph, {})
        except Exception as error:  # an op that a pass made does not run
            log.warning("after %s the graph does not run: %s: %s", name, type(error).__name__, error)
            steps.append((name, float("inf")))
            off = True
        if off:
            return Bisection(name, steps[-1][1], tuple(steps))
    kernels: dict[int, Call] = {}
    for region in program.regions:
        if region.decision and region.kernel is not None:
            kernels[id(region.node)] = partial(_apply, region.kernel)
            try:
                off = leaves(region.name, program.graph, kernels)
            except Exception as error:  # a replay runs the recorded ops in its place
                log.warning("the kernel of %s failed: %s: %s", region.name, type(error).__name__, error)
                del kernels[id(region.node)]
                continue
            if off:
                return Bisection(region.name, steps[-1][1], tuple(steps))
    return Bisection(None, steps[-1][1] if steps else 0.0, tuple(steps))


def _apply(kernel: Kernel, inputs: Sequence[Any]) -> Sequence[torch.Tensor]:
    return kernel(*inputs)


def _compare(result: torch.Tensor, reference: torch.Tensor, tolerance: float | None) -> tuple[float, bool]:
    """The distance, and whether it is too large."""
    if not result.dtype.is_floating_point:
        return (0.0, False) if torch.equal(result, reference) else (float("inf"), True)
    error = distance(result, reference)
    return error, error > (ROUNDINGS * torch.finfo(result.dtype).eps if tolerance is None else tolerance)


def _steps(program: Program, graph: SubGraph, kernels: Mapping[int, Call]) -> Iterator[tuple[OpNode, Any]]:
    """Each node as the op that it is now, not as the ops that it was recorded as."""
    regions = program.by_node
    for node in graph.nodes:
        region = regions.get(id(node))
        if id(node) in kernels:
            yield node, kernels[id(node)]
        elif region is not None and region.parts is not None:
            yield from _steps(program, region.parts, kernels)
        elif node.op_type.startswith(FUSED):
            yield node, partial(interpret, node.attr("body"))
        else:
            yield node, None
