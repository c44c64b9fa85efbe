"""Recorded graph -> SubGraph."""

from __future__ import annotations

from graph_capture.errors import CaptureError
from graph_capture.graph import SubGraph
from graph_capture.recorded import RecordedGraph


def convert_recorded_graph_to_subgraph(graph: RecordedGraph) -> SubGraph:
    """The immutable SubGraph of a recording: every op, connected by data flow, with layouts and alias sets.

    Raises:
        CaptureError: `graph` is not a recording of this package.
    """
    if not isinstance(graph, RecordedGraph):
        raise CaptureError(
            f"cannot convert a {type(graph).__name__}: it exposes no ops. Record with graph_capture.record() or "
            "start_graph_recording()"
        )
    return graph.subgraph
