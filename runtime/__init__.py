"""From a recorded graph to a fast replay. Each folder imports only those before it:

config, library, region, program, replay, decide, account, save, fused, fuse, load, capture, llm.
"""

from graph_capture.runtime.account.explain import Explanation
from graph_capture.runtime.account.verify import Verification
from graph_capture.runtime.capture.buckets import Bucket
from graph_capture.runtime.capture.capture import Captured, capture
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.decide.heuristics import FusionHeuristics
from graph_capture.runtime.fuse import FusionScheduler, fuse
from graph_capture.runtime.fused import FusedGraph
from graph_capture.runtime.load import load
from graph_capture.runtime.region import Decision, Region

__all__ = [
    "Bucket",
    "Captured",
    "Decision",
    "Explanation",
    "FusedGraph",
    "FusionConfig",
    "FusionHeuristics",
    "FusionScheduler",
    "Region",
    "Verification",
    "capture",
    "fuse",
    "load",
]
