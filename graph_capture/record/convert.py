"""Recorded graph -> SubGraph."""

from __future__ import annotations

from typing import Any

from graph_capture.calls.foreign import adapters
from graph_capture.errors import CaptureError
from graph_capture.ir.graph import SubGraph
from graph_capture.record.recorded import RecordedGraph


def convert_recorded_graph_to_subgraph(graph: RecordedGraph | Any) -> SubGraph:
    """The immutable SubGraph of a recording: every op, connected by data flow, with layouts and alias sets.

    Args:
        graph: a recording of this package, or an `infinicore.Graph` that was recorded inside one.

    Raises:
        CaptureError: `graph` is neither.
    """
    if isinstance(graph, RecordedGraph):
        return graph.subgraph
    for adapter in adapters():
        found = adapter.subgraph(graph)
        if found is not None:
            return found
        if adapter.is_graph(graph):
            raise CaptureError(
                f"cannot convert this {type(graph).__name__}: it exposes no ops, only run(), and it was not recorded "
                "under graph_capture. Begin and end the native recording inside `with graph_capture.record(...)`, and "
                "convert its graph after that"
            )
    raise CaptureError(
        f"cannot convert a {type(graph).__name__}: it exposes no ops. Record with graph_capture.record() or "
        "start_graph_recording()"
    )
