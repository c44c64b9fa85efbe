"""``graph-capture view``: a model, or a saved graph, as one page of HTML."""

from __future__ import annotations

from pathlib import Path

from graph_capture import FusedGraph
from graph_capture.log import log
from graph_capture.runtime.account.verify import Verification, verify
from graph_capture.runtime.account.view import view
from graph_capture.runtime.decide.whole import made_up_call


def write(fused: FusedGraph, path: str, title: str) -> Path:
    """The page of a graph that nobody else uses: its plan and its errors come from calls with made-up arguments.

    Raises:
        CaptureError: the page cannot be written.
    """
    checked: Verification | None = None
    try:
        call = made_up_call(fused.recorded)
        for _ in range(2):  # the second replay has a plan
            fused.replay(call)
        checked = verify(fused.program, fused.tensors(call))
    except Exception as error:  # whatever the ops make of such arguments
        log.info("the page gives no errors, for made-up arguments do not fit: %s", error)
    return view(fused.program, path, title, fused.plan, fused.cuda_graphs, checked)
