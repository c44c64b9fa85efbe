"""`Region`: a fusable part of a graph, and what was decided about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graph_capture.codegen import CompiledKernel
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import FUSED
from graph_capture.ir.values import TensorMeta
from graph_capture.passes.region_bodies import moved_bytes
from graph_capture.runtime.library import LibraryKernel

Kernel = CompiledKernel | LibraryKernel


@dataclass(frozen=True)
class Decision:
    """Whether a fused kernel is used, why, and what was measured (seconds a call; None: not measured).

    Attributes:
        cached: whether the times were measured by an earlier process.
        choice: which of the kernel's `candidates` was the fastest.
        spread: how many times longer than the shortest sample of a side the next one was.
        doubtful: whether the machine was too busy to tell; it is measured again later.
    """

    use: bool
    reason: str
    t_fallback: float | None = None
    t_fused: float | None = None
    cached: bool = False
    choice: int = 0
    spread: float = 1.0
    doubtful: bool = False

    def __bool__(self) -> bool:
        return self.use


@dataclass(frozen=True)
class Region:
    """A fusable region of a graph.

    Attributes:
        name: unique in its graph: ``swiglu_0``.
        node: the fused node of the rewritten graph that stands for it.
        values: the layouts of the graph's values.
        decision: whether its kernel is used, and why.
        kernel: its kernel, also where it is not used; None where none could be made.
        parts: where there is no kernel, the region with smaller regions inside, which run instead.
        parent: the name of the region that it is a part of.
    """

    name: str
    node: OpNode
    values: Mapping[str, TensorMeta] = field(repr=False)
    decision: Decision
    kernel: Kernel | None = field(repr=False)
    parts: SubGraph | None = field(default=None, repr=False)
    parent: str = ""

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
        graph = SubGraph(self.nodes, self.node.inputs, self.node.outputs, self.values)
        return sum(moved_bytes(graph, [index]) for index in range(len(graph)))

    @property
    def bytes_after(self) -> int:
        """Bytes that the kernel reads and writes."""
        graph = SubGraph(self.nodes, self.node.inputs, self.node.outputs, self.values)
        return moved_bytes(graph, range(len(graph)))

    @property
    def bytes_saved(self) -> int:
        """Bytes of memory traffic that the kernel avoids."""
        return self.bytes_before - self.bytes_after
