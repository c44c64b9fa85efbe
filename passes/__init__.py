"""Rewrites, SubGraph -> SubGraph: clean-up, canonical ops, patterns, regions.

Imports `graph_capture.record` and what lies below it; codegen and frontends stand beside it.
"""

from graph_capture.passes.cleanup import clean_up
from graph_capture.passes.fusions import create_add_rms_norm_pattern, create_geglu_pattern, create_swiglu_pattern
from graph_capture.passes.pattern import Pattern
from graph_capture.passes.pipeline import Passes, Rewritten, pass_names, rewrite
from graph_capture.passes.receipts import Receipt, Refusal
from graph_capture.passes.regions import FusionPlan, find_regions
from graph_capture.passes.registry import DEFAULT, PatternRegistry, pattern
from graph_capture.passes.spellings import Found, Unfit, canonicalize, spelling, unregister_spelling
from graph_capture.passes.templates import load_templates, store_templates

__all__ = [
    "DEFAULT",
    "Found",
    "FusionPlan",
    "Passes",
    "Pattern",
    "PatternRegistry",
    "Receipt",
    "Refusal",
    "Rewritten",
    "Unfit",
    "canonicalize",
    "clean_up",
    "create_add_rms_norm_pattern",
    "create_geglu_pattern",
    "create_swiglu_pattern",
    "find_regions",
    "load_templates",
    "pass_names",
    "pattern",
    "rewrite",
    "spelling",
    "store_templates",
    "unregister_spelling",
]
