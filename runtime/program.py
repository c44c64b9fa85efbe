"""`Program`: what was recorded, what became of it, and what was decided. Nothing in it runs or changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from graph_capture.ir.graph import SubGraph
from graph_capture.passes import Receipt, Rewritten
from graph_capture.record.recorded import RecordedGraph
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.region import Decision, Region


@dataclass(frozen=True)
class Program:
    """A recording after all decisions: what is explained, verified, bisected, saved and bound for replay.

    Attributes:
        recorded: the graph it was made from.
        rewritten: the rewritten graph (each region one node whose op starts with ``fused.``), what is computed once,
            the graph after each pass, and the receipts.
        regions: what was found, in graph order, used or not; the parts of a region follow it.
        config: the configuration it was made with.
        whole: how the whole graph measured against the one with no kernel; None where that was not measured.
    """

    recorded: RecordedGraph
    rewritten: Rewritten
    regions: tuple[Region, ...]
    config: FusionConfig
    whole: Decision | None = None

    @property
    def graph(self) -> SubGraph:
        """The rewritten graph."""
        return self.rewritten.graph

    @property
    def constants(self) -> SubGraph:
        """What is computed once, from weights or from nothing; its results are inputs of `graph`."""
        return self.rewritten.constants

    @property
    def stages(self) -> tuple[tuple[str, SubGraph], ...]:
        """The graph after each pass, by the pass's name."""
        return self.rewritten.stages

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """What each rule looked at, matched and refused."""
        return self.rewritten.receipts

    @property
    def by_node(self) -> Mapping[int, Region]:
        """The regions by the ids of the nodes that stand for them."""
        return {id(region.node): region for region in self.regions}

    @property
    def constant_bytes(self) -> int:
        """Memory that the results of `constants` take, in bytes."""
        return sum(self.graph.values[name].nbytes for name in self.constants.output_names)

    def without_failed(self, failures: Mapping[str, str]) -> Program:
        """The same program without the kernels of regions that have failed: name -> what they raised."""
        regions = [
            replace(region, decision=replace(region.decision, use=False, reason=f"its kernel failed: {failures[name]}"))
            if (name := region.name) in failures
            else region
            for region in self.regions
        ]
        return replace(self, regions=tuple(regions))

    def without_kernels(self, reason: str) -> Program:
        """The same program with every region left as recorded, for `reason`."""
        regions = [
            replace(region, decision=replace(region.decision, use=False, reason=reason)) if region.decision else region
            for region in self.regions
        ]
        return replace(self, regions=tuple(regions))
