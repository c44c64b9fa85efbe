"""Which pass, or which kernel, first makes a result leave its tolerance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from graph_capture.calls.signature import Bound
from graph_capture.ir.choices import Choices, Forced
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.interpreter import Call, Executor, Watch, interpret
from graph_capture.ir.numerics import ROUNDINGS, RUNS, STEADY, close_enough, rounding, same_bits
from graph_capture.ir.ops import FUSED
from graph_capture.log import log
from graph_capture.record.recorded import RecordedGraph
from graph_capture.runtime.program import Program
from graph_capture.runtime.region import Kernel


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
    reference = _Reference(recorded, plain)
    steps: list[tuple[str, float]] = []

    def leaves(name: str, graph: SubGraph, kernels: Mapping[int, Call]) -> bool:
        forced = reference.forced()
        executor = Executor(forced.steps(_steps(program, graph, kernels)), graph.input_names, graph.output_names)
        with recorded.undone(plain):
            results = executor.run(tensors[: len(graph.input_names)])
        close, error = reference.agrees(results, forced, tolerance)
        steps.append((name, error))
        return not close

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


class _Reference:
    """What the recorded ops give, and by how much that differs from run to run."""

    def __init__(self, recorded: RecordedGraph, tensors: Sequence[torch.Tensor]) -> None:
        self._recorded, self._tensors = recorded, tensors
        self._choices = Choices()
        self._repeated: Forced | None = None
        graph = recorded.subgraph
        executor = Executor([(node, None) for node in graph.nodes], graph.input_names, graph.output_names)
        self._runs = [self._run(executor, self._choices.watch(graph.nodes))]

    def forced(self) -> Forced:
        """For runs that choose as these did, so that what follows a choice can be compared."""
        return Forced(self._choices.made, ROUNDINGS, self._repeated)

    def agrees(self, results: Sequence[torch.Tensor], forced: Forced, tolerance: float | None) -> tuple[bool, float]:
        """Whether a run that was forced gave what these do, and the largest distance."""
        while True:
            found = [
                close_enough(result, runs, ROUNDINGS * rounding(result.dtype) if tolerance is None else tolerance)
                for result, *runs in zip(results, *self._runs, strict=True)
            ]
            refused = bool(forced.refused())
            close = not refused and all(close for close, _ in found)
            if close or len(self._runs) == RUNS or (len(self._runs) == STEADY and self._steady):
                return close, math.inf if refused else max((error for _, error in found), default=0.0)
            self._repeat()
            forced.known = self._repeated

    @property
    def _steady(self) -> bool:
        first, *more = self._runs
        return all(same_bits(*pair) for run in more for pair in zip(first, run, strict=True))

    def _repeat(self) -> None:
        """One more run of the recorded ops, to learn how much those that are not deterministic differ by."""
        graph = self._recorded.subgraph
        self._repeated = self._repeated or Forced(self._choices.made, ROUNDINGS)
        steps = list(self._repeated.steps((node, None) for node in graph.nodes))
        self._runs.append(self._run(Executor(steps, graph.input_names, graph.output_names)))

    def _run(self, executor: Executor, watch: Watch | None = None) -> list[torch.Tensor]:
        with self._recorded.undone(self._tensors):
            return [tensor.clone() for tensor in executor.run(self._tensors, watch)]


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
