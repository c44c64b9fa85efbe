"""From a recorded graph to a fused one: the scheduler runs the passes, decides each region, and builds the replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from graph_capture.codegen import supports
from graph_capture.passes import canonicalize, find_regions
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.fused import FusedGraph, Region
from graph_capture.runtime.heuristics import Decision, FusionHeuristics, fallback_of, input_metas
from graph_capture.runtime.measure import example_inputs

from graph_capture.executor import Executor
from graph_capture.graph import OpNode, SubGraph, TensorMeta
from graph_capture.ops import FUSED
from graph_capture.recorded import RecordedGraph


class FusionScheduler:
    """Analyses graphs and runs single regions under one `FusionConfig`, sharing kernels and measured decisions."""

    def __init__(self, config: FusionConfig | None = None) -> None:
        self.config = config or FusionConfig()
        self.heuristics = FusionHeuristics(self.config)

    def dispatch(self, graph: SubGraph, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run one region on `inputs`, by its fused kernel where that is decided and by its ops elsewhere.

        Returns:
            One tensor for each of ``graph.output_names``.

        Raises:
            FusionError: an input is missing; or, with ``fallback_on_error=False``, no kernel can be made.
        """
        tensors = [inputs[name] for name in input_metas(graph, inputs)]
        decision, kernel = self.heuristics.decide(graph, tensors)
        if decision and kernel is not None:
            return dict(zip(graph.output_names, kernel(*tensors), strict=True))
        return dict(zip(graph.output_names, fallback_of(graph, tensors)(), strict=True))

    def analyze(self, graph: RecordedGraph) -> FusedGraph:
        """Find the fusable regions of `graph`, make and measure their kernels, and bind the replay."""
        config = self.config
        if not config.enable_fusion:
            return FusedGraph(graph, graph.subgraph, (), (), config)
        plan = find_regions(
            canonicalize(graph.subgraph),
            supports=supports,
            max_nodes=config.max_graph_size,
            min_nodes=config.min_nodes_for_fusion,
        )
        regions: list[Region] = []
        counts: dict[str, int] = {}
        decided: dict[tuple[object, ...], Region] = {}
        for node in plan.graph.nodes:
            if not node.op_type.startswith(FUSED):
                continue
            kind = node.op_type.removeprefix(FUSED)
            number = counts[kind] = counts.get(kind, -1) + 1
            values = graph.subgraph.values
            key = (node.attr("body"), *(values[name]._replace(offset=0, storage=-1) for name in node.inputs))
            alike = decided.get(key)
            if alike is None:
                alike = decided[key] = self._region(node, values)
            regions.append(replace(alike, name=f"{kind}_{number}", node=node))
        return FusedGraph(graph, plan.graph, tuple(regions), plan.receipts, config)

    def _region(self, node: OpNode, values: Mapping[str, TensorMeta]) -> Region:
        """Decide one region on made-up inputs; those that are alike share the outcome."""
        body: SubGraph = node.attr("body")
        tensors = dict(zip(node.inputs, example_inputs(node.inputs, values), strict=True))
        executor = Executor([(recorded, None) for recorded in node.recorded], node.inputs, node.outputs)
        arguments = list(tensors.values())
        decision, kernel = self.heuristics.decide(body, arguments, lambda: executor.run(arguments), len(node.recorded))
        if kernel is None and decision:
            decision = Decision(False, "no kernel")
        return Region(node.op_type, node, values, decision, kernel)


def fuse(graph: RecordedGraph, config: FusionConfig | None = None) -> FusedGraph:
    """Rewrite `graph` so that fusable regions run as single kernels where that measured faster.

    Raises:
        FusionError: only with ``fallback_on_error=False``: a region's kernel cannot be made.
    """
    return FusionScheduler(config).analyze(graph)
