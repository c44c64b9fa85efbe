"""SubGraph -> SubGraph rewrites."""

from graph_capture.passes.canonicalize import canonicalize
from graph_capture.passes.fusions import create_add_rms_norm_pattern, create_geglu_pattern, create_swiglu_pattern
from graph_capture.passes.pattern import DEFAULT, Pattern, PatternRegistry, pattern
from graph_capture.passes.regions import FusionPlan, Receipt, find_regions

__all__ = [
    "DEFAULT",
    "FusionPlan",
    "Pattern",
    "PatternRegistry",
    "Receipt",
    "canonicalize",
    "create_add_rms_norm_pattern",
    "create_geglu_pattern",
    "create_swiglu_pattern",
    "find_regions",
    "pattern",
]
