"""The receipts of a fused graph, as rows, as JSON, and as a table."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from graph_capture.runtime.fused import FusedGraph, Region


@dataclass(frozen=True)
class Explanation:
    """What was found and decided.

    Attributes:
        rows: one dict for each group of equal regions with one outcome: ``region``, ``where``, ``alike``, ``ops``,
            ``bytes_before``, ``bytes_after``, ``bytes_saved`` (each for one region), ``t_fallback``, ``t_fused``
            (seconds, or None), ``used``, ``reason``.
        rules: one dict for each rule: ``rule``, ``candidates``, ``matches``, ``refusals`` (reason -> count).
    """

    rows: list[dict[str, Any]]
    rules: list[dict[str, Any]]

    def to_json(self) -> str:
        """Both lists as one JSON object."""
        return json.dumps({"regions": self.rows, "rules": self.rules}, indent=2)

    def table(self) -> Table:
        """The regions as a rich table."""
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for column in ("region", "where", "n", "ops", "saves", "recorded", "fused", "decision"):
            table.add_column(column, no_wrap=column in ("region", "recorded", "fused", "saves"))
        for row in self.rows:
            table.add_row(
                row["region"],
                row["where"],
                str(row["alike"]),
                str(row["ops"]),
                format_bytes(row["bytes_saved"]),
                format_seconds(row["t_fallback"]),
                format_seconds(row["t_fused"]),
                ("used: " if row["used"] else "not used: ") + row["reason"],
            )
        return table

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=140, color_system=None)
        if self.rows:
            console.print(self.table())
        else:
            console.print("no fusable region was found")
        for rule in self.rules:
            refused = "; ".join(f"{count} x {reason}" for reason, count in rule["refusals"].items())
            console.print(
                f"{rule['rule']}: {rule['matches']} of {rule['candidates']} candidates matched"
                + (f" (refused: {refused})" if refused else ""),
                highlight=False,
            )
        assert isinstance(console.file, StringIO)
        return console.file.getvalue().rstrip()


def explain(fused: FusedGraph) -> Explanation:
    """The receipts of `fused`."""
    groups: dict[Any, list[Region]] = {}
    for region in fused.regions:
        shapes = tuple(str(region.values[name]) for name in (*region.node.inputs, *region.node.outputs))
        groups.setdefault((region.kind, region.body, shapes, region.decision), []).append(region)
    rows = []
    for (kind, *_), regions in groups.items():
        first = regions[0]
        rows.append(
            {
                "region": kind,
                "where": common_path([region.where for region in regions]),
                "alike": len(regions),
                "ops": len(first.nodes),
                "bytes_before": first.bytes_before,
                "bytes_after": first.bytes_after,
                "bytes_saved": first.bytes_saved,
                "t_fallback": first.decision.t_fallback,
                "t_fused": first.decision.t_fused,
                "used": first.decision.use,
                "reason": first.decision.reason,
            }
        )
    rules = [
        {
            "rule": receipt.rule,
            "candidates": receipt.candidates,
            "matches": receipt.matches,
            "refusals": dict(receipt.refusals),
        }
        for receipt in fused.receipts
    ]
    return Explanation(rows, rules)


def common_path(paths: list[str]) -> str:
    """Module paths as one: indices that differ become ``*``; other differences are listed (at most three)."""
    patterns = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in paths))
    if len(set(paths)) == 1:
        return paths[0] or "top level"
    shown = [pattern or "top level" for pattern in patterns[:3]]
    return ", ".join(shown) + (f" and {len(patterns) - 3} more" if len(patterns) > 3 else "")


def format_bytes(count: float) -> str:
    """A size for people: ``96 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def format_seconds(seconds: float | None) -> str:
    """A duration for people: ``12.3 us``."""
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
