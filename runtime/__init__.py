"""From a recorded graph to a fast replay: decisions, scheduling, replay."""

from graph_capture.runtime.buckets import Bucket
from graph_capture.runtime.capture import Captured, capture
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.explain import Explanation
from graph_capture.runtime.fused import FusedGraph, Region
from graph_capture.runtime.heuristics import Decision, FusionHeuristics
from graph_capture.runtime.save import load
from graph_capture.runtime.scheduler import FusionScheduler, fuse
from graph_capture.runtime.verify import Verification

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
