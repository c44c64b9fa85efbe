"""What was not fused, and why: refusals of the rules, and decisions against what they found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graph_capture.runtime.account.explain import common_path

if TYPE_CHECKING:
    from graph_capture.runtime.fused import FusedGraph


def near_misses(fused: FusedGraph, kind: str) -> list[str]:
    """Why there are no more regions of a kind, a line for each reason: refusals of its rule, and decisions against."""
    places: dict[str, list[str]] = {}
    for receipt in fused.receipts:
        for refusal in receipt.refused if receipt.rule == kind else ():
            places.setdefault(refusal.reason, []).append(refusal.where)
    for region in fused.regions:
        if region.kind == kind and not region.decision:
            places.setdefault(f"not used: {region.decision.reason}", []).append(region.where)
    lines = [f"{kind}: {len(where)} x {reason} ({common_path(where)})" for reason, where in places.items()]
    if not lines and kind in fused.config.passes_off:
        lines = [f"{kind}: left out by passes_off"]
    return lines or [f"{kind}: nothing in the graph comes near it"]
