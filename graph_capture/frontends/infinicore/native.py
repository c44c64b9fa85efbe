"""InfiniCore's own graphs, where they are recorded inside a recording of ours.

Native recording puts ops off until ``graph.run()``; its graph shows nothing else. What was recorded by us meanwhile are
its ops. It holds raw pointers, so everything that it reads or writes is kept alive as long as the graph is.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from graph_capture.errors import CaptureError
from graph_capture.ir.graph import SubGraph
from graph_capture.record.builder import GraphBuilder


@dataclass
class _NativeSegment:
    """The nodes that were written down while native recording was on, and what its graph must keep alive."""

    first: int
    kept: list[Any] = field(default_factory=list)
    last: int = -1
    writer: GraphBuilder | None = None
    graph: SubGraph | None = None


class Native:
    """What is known of the native graphs of one extension module."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension
        self.running = extension.is_graph_recording
        self._graphs: weakref.WeakKeyDictionary[Any, _NativeSegment] = weakref.WeakKeyDictionary()
        self._open: weakref.WeakKeyDictionary[GraphBuilder, _NativeSegment] = weakref.WeakKeyDictionary()

    def start(self, writer: GraphBuilder) -> None:
        """Native recording begins."""
        writer.unwatched()
        self._open[writer] = _NativeSegment(len(writer.nodes))

    def stop(self, writer: GraphBuilder, graph: Any) -> None:
        """Native recording ends with `graph`."""
        segment = self._open.pop(writer, None)
        if segment is not None and graph is not None:
            segment.last, segment.writer = len(writer.nodes), writer
            self._graphs[graph] = segment

    def keep(self, writer: GraphBuilder, values: Sequence[Any]) -> None:
        """The native graph that is being recorded needs these."""
        segment = self._open.get(writer)
        if segment is not None:
            segment.kept.extend(values)

    @contextlib.contextmanager
    def metadata_only(self, writer: GraphBuilder) -> Iterator[None]:
        """Write calls down without running them."""
        writer.metadata_only = True
        try:
            yield
        finally:
            writer.metadata_only = False

    def is_graph(self, value: Any) -> bool:
        """Whether `value` is a native graph, or a wrapper of one."""
        return isinstance(getattr(value, "_graph", value), self._extension.Graph)

    def subgraph(self, value: Any) -> SubGraph | None:
        """The ops of a native graph that was recorded inside a recording of ours.

        Raises:
            CaptureError: that recording has not ended.
        """
        graph = getattr(value, "_graph", value)
        segment = self._graphs.get(graph) if isinstance(graph, self._extension.Graph) else None
        if segment is None:
            return None
        if segment.graph is None:
            assert segment.writer is not None
            if segment.writer.result is None:
                raise CaptureError("the recording around this native graph has not ended, or ended with an exception")
            segment.graph, segment.writer = _cut(segment.writer.result, segment.first, segment.last), None
        return segment.graph


def _cut(graph: SubGraph, first: int, last: int) -> SubGraph:
    """The nodes from `first` to before `last` as a graph of their own."""
    nodes = graph.nodes[first:last]
    made = [name for node in nodes for name in node.outputs]
    inputs = dict.fromkeys(name for node in nodes for name in node.inputs if name not in set(made))
    read = {name for node in nodes for name in node.inputs}
    after = {name for node in graph.nodes[last:] for name in node.inputs} | set(graph.output_names)
    outputs = [name for name in made if name in after or name not in read]
    return SubGraph(nodes, tuple(inputs), tuple(outputs), graph.values)
