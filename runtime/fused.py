"""`FusedGraph`: the rewritten graph, its regions, and its replay."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from graph_capture.codegen import CompiledKernel
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.explain import Explanation, explain
from graph_capture.runtime.heuristics import Decision
from graph_capture.runtime.verify import Verification, close_enough, verify

from graph_capture.executor import Call, Executor
from graph_capture.graph import OpNode, SubGraph, TensorMeta
from graph_capture.ops import FUSED, Kind, op
from graph_capture.recorded import RecordedGraph
from graph_capture.signature import Call as Bound

log = logging.getLogger("graph_capture")


@dataclass(frozen=True)
class Region:
    """A fusable region of a graph.

    Attributes:
        name: unique in its graph: ``swiglu_0``.
        node: the fused node of the rewritten graph that stands for it.
        values: the layouts of the graph's values.
        decision: whether its kernel is used, and why.
        kernel: its kernel, also where it is not used; None where none could be made.
    """

    name: str
    node: OpNode
    values: Mapping[str, TensorMeta] = field(repr=False)
    decision: Decision
    kernel: CompiledKernel | None = field(repr=False)

    @property
    def kind(self) -> str:
        """The rule that found it: ``swiglu``."""
        return self.node.op_type.removeprefix(FUSED)

    @property
    def body(self) -> SubGraph:
        """The region as a graph of canonical ops over its own value names."""
        return self.node.attr("body")

    @property
    def nodes(self) -> tuple[OpNode, ...]:
        """The recorded ops that it replaces."""
        return self.node.recorded

    @property
    def where(self) -> str:
        """The module path that its ops share."""
        return self.node.source.module if self.node.source else ""

    @property
    def source(self) -> str:
        """The generated application; empty where no kernel could be made."""
        return self.kernel.source if self.kernel else ""

    @property
    def bytes_before(self) -> int:
        """Bytes that the recorded ops read and write."""
        moving = (node for node in self.nodes if op(node.op_type).kind is not Kind.VIEW)
        return sum(self._bytes((*node.inputs, *node.outputs)) for node in moving)

    @property
    def bytes_after(self) -> int:
        """Bytes that the kernel reads and writes."""
        return self._bytes((*self.node.inputs, *self.node.outputs))

    @property
    def bytes_saved(self) -> int:
        """Bytes of memory traffic that the kernel avoids."""
        return self.bytes_before - self.bytes_after

    def _bytes(self, names: tuple[str, ...]) -> int:
        return sum(self.values[name].nbytes for name in names)


class FusedGraph:
    """A rewritten graph, bound for replay.

    Attributes:
        recorded: the graph it was made from.
        subgraph: the rewritten graph; each region is one node whose op starts with ``fused.``.
        regions: what was found, in graph order, used or not.
        receipts: what each rule looked at, matched and refused.
        config: the configuration it was made with.
    """

    def __init__(
        self,
        recorded: RecordedGraph,
        subgraph: SubGraph,
        regions: tuple[Region, ...],
        receipts: tuple[Any, ...],
        config: FusionConfig,
    ) -> None:
        self.recorded = recorded
        self.subgraph = subgraph
        self.regions = regions
        self.receipts = receipts
        self.config = config
        by_node = {region.node.outputs: region for region in regions}
        steps: list[tuple[OpNode, Call | None]] = []
        for node in subgraph.nodes:
            region = by_node.get(node.outputs) if node.op_type.startswith(FUSED) else None
            if region is not None and region.decision and region.kernel is not None:
                steps.append((node, _Step(region, config)))
            else:  # whatever is not fused runs as it was recorded, bit for bit
                steps.extend((recorded_node, None) for recorded_node in node.recorded)
        self._executor = Executor(steps, subgraph.input_names, subgraph.output_names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay on new arguments of the recorded signature; returns what ``output()`` was given.

        Raises:
            SignatureMismatchError, DataDependentError: as `RecordedGraph.run`.
        """
        return self.replay(self.recorded.bind(args, kwargs))

    def replay(self, call: Bound) -> Any:
        """Replay on a call that is known to fit."""
        return self.recorded.replay(call, self._executor)

    def explain(self) -> Explanation:
        """The receipts: what was found, where, what it saves, what was measured and decided."""
        return explain(self)

    def verify(self, *args: Any, **kwargs: Any) -> Verification:
        """Run the graph once on these arguments and compare each region's kernel, used or not, with float64.

        Writes of the graph (to inputs, buffers, caches) happen once, as in a replay.

        Raises:
            SignatureMismatchError: as `__call__`.
        """
        tensors = self.recorded.bind(args, kwargs).tensors
        names = self.subgraph.input_names
        return verify(self, dict(zip(names, [*tensors, *self.recorded.captured.values()], strict=True)))

    def __str__(self) -> str:
        return str(self.subgraph)

    def __repr__(self) -> str:
        used = sum(bool(region.decision) for region in self.regions)
        return f"<FusedGraph: {len(self.subgraph)} nodes, {used} of {len(self.regions)} regions run as kernels>"


class _Step:
    """Runs a region's kernel; if that ever fails, the recorded ops, from then on."""

    def __init__(self, region: Region, config: FusionConfig) -> None:
        assert region.kernel is not None
        self.kernel: CompiledKernel | None = region.kernel
        self.region = region
        self.config = config
        node = region.node
        self.recorded = Executor([(inner, None) for inner in node.recorded], node.inputs, node.outputs)

    def __call__(self, tensors: list[torch.Tensor]) -> Any:
        if self.kernel is None:
            return self.recorded.run(tensors)
        try:
            outputs = self.kernel(*tensors)
        except Exception as error:
            if not self.config.fallback_on_error:
                raise
            log.warning("%s failed and replays as recorded from now on: %s", self.region.name, error)
            self.kernel = None
            return self.recorded.run(tensors)
        if self.config.debug_mode:
            for name, fused, eager in zip(self.region.node.outputs, outputs, self.recorded.run(tensors), strict=True):
                if not close_enough(fused, eager):
                    log.warning("%s: %s differs from the recorded ops beyond rounding", self.region.name, name)
        return outputs
