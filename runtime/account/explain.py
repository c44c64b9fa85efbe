"""The receipts of a fused graph, as rows, as JSON, and as a table."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any

from graph_capture.ir.graph import OpNode
from graph_capture.ir.ops import Kind, op
from graph_capture.passes.receipts import Receipt, module_of, values_of
from graph_capture.runtime.program import Program
from graph_capture.runtime.region import Decision, Region
from graph_capture.runtime.replay.cuda_graph import Graphs
from graph_capture.runtime.replay.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Explanation:
    """What was found and decided.

    Attributes:
        rows: one dict for each group of equal regions with one outcome: ``region``, ``where``, ``alike``, ``ops``,
            ``bytes_before``, ``bytes_after``, ``bytes_saved`` (each for one region), ``t_fallback``, ``t_fused``
            (seconds, or None), ``cached`` (measured by an earlier process), ``used``, ``reason``, ``spread`` (how many
            times longer than the shortest sample the next one was), ``doubtful`` (the machine was too busy to tell; it
            is measured again later), ``parts`` (regions inside, where there is no kernel).
        rules: one dict for each rule: ``rule``, ``spelling`` (not a fusion: it makes spellings one op), ``candidates``,
            ``matches``, ``refusals`` (reason -> count), ``places`` (reason -> module path), ``removed`` (recorded ops
            that a clean-up pass removed).
        constant_bytes: memory of what is computed once.
        whole: ``t_fallback``, ``t_fused``, ``cached``, ``used``, ``reason`` of the whole graph; None: not measured.
        memory: bytes; ``planned`` and ``eager``: device -> what intermediate values take at most, in the plan's arena
            and one by one; ``arena``: device -> the whole arena, which other signatures share; ``results``: of this
            signature's results and small arguments, where they stay; ``graphs``: of its CUDA graphs, or None;
            ``graphs_before``, ``graphs_after``: reserved around their capture, or None.
            Empty before there is a plan.
    """

    rows: list[dict[str, Any]]
    rules: list[dict[str, Any]]
    constant_bytes: int = 0
    whole: dict[str, Any] | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """All of it as one JSON object."""
        return json.dumps(
            {
                "regions": self.rows,
                "rules": self.rules,
                "constant_bytes": self.constant_bytes,
                "whole": self.whole,
                "memory": self.memory,
            },
            indent=2,
        )

    def table(self) -> Table:
        """The regions as a rich table."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

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
                _verdict(row),
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=140, color_system=None)
        if self.rows:
            console.print(self.table())
        else:
            console.print("no fusable region was found")
        if self.whole is not None:
            times = [format_seconds(self.whole[name]) for name in ("t_fallback", "t_fused")]
            text = f"as a whole: {times[0]} without kernels, {times[1]} with; {_verdict(self.whole)}"
            console.print(text, highlight=False, markup=False)
        for text in self._memory_lines():
            console.print(text, highlight=False, markup=False)
        for rule in self.rules:
            if rule["removed"]:
                kept = f", {format_bytes(self.constant_bytes)} kept" if rule["rule"] == "constants" else ""
                console.print(f"{rule['rule']}: {rule['removed']} ops fewer{kept}", highlight=False, markup=False)
            if not rule["candidates"]:
                continue
            name = f"{rule['rule']} (spelling)" if rule["spelling"] else rule["rule"]
            text = f"{name}: {rule['matches']} of {rule['candidates']} candidates matched"
            console.print(text, highlight=False, markup=False)
            for reason, count in rule["refusals"].items():
                place = rule["places"][reason]
                console.print(f"    {count} x {reason} ({place})", highlight=False, markup=False)
        assert isinstance(console.file, StringIO)
        return console.file.getvalue().rstrip()

    def _memory_lines(self) -> list[str]:
        lines = []
        for device, planned in self.memory.get("planned", {}).items():
            eager = format_bytes(self.memory["eager"][device])
            arena = format_bytes(self.memory["arena"][device])
            lines.append(
                f"intermediate values on {device}: {format_bytes(planned)} planned, {eager} one by one, in an arena of "
                f"{arena} for all signatures"
            )
        if self.memory.get("graphs_after") is not None:
            before, after = (format_bytes(self.memory[f"graphs_{when}"]) for when in ("before", "after"))
            lines.append(f"CUDA graphs: {before} of device memory reserved before their capture, {after} after it")
        return lines


def explain(program: Program, plan: Plan | None, graphs: Graphs | None) -> Explanation:
    """The receipts of `program`, and what its replay takes of memory, where it has a plan."""
    groups: dict[Any, list[Region]] = {}
    for region in program.regions:
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
                **_decided(first.decision),
                "parts": sorted({part.kind for part in program.regions if part.parent == first.name}),
            }
        )
    whole = None if program.whole is None else _decided(program.whole)
    rules = [_rule(receipt) for receipt in program.receipts]
    return Explanation(rows, rules, program.constant_bytes, whole, _memory(plan, graphs))


def _memory(plan: Plan | None, graphs: Graphs | None) -> dict[str, Any]:
    if plan is None:
        return {}
    return {
        "planned": {str(device): size for device, size in plan.peak_bytes.items()},
        "eager": {str(device): size for device, size in plan.eager_bytes.items()},
        "arena": {str(device): arena.nbytes for device, arena in plan.arenas.items()},
        "results": plan.lent_bytes + (0 if graphs is None else graphs.lent_bytes),
        "graphs": None if graphs is None else max(0, graphs.bytes_after - graphs.bytes_before),
        "graphs_before": None if graphs is None else graphs.bytes_before,
        "graphs_after": None if graphs is None else graphs.bytes_after,
    }


def _decided(decision: Decision) -> dict[str, Any]:
    return {
        "t_fallback": decision.t_fallback,
        "t_fused": decision.t_fused,
        "cached": decision.cached,
        "used": decision.use,
        "reason": decision.reason,
        "spread": decision.spread,
        "doubtful": decision.doubtful,
    }


def _verdict(row: dict[str, Any]) -> str:
    doubt = f", doubtful: samples differ by {row['spread']:.3g}x on a busy machine" if row["doubtful"] else ""
    return ("used: " if row["used"] else "not used: ") + row["reason"] + doubt + (" (cached)" if row["cached"] else "")


def _rule(receipt: Receipt) -> dict[str, Any]:
    places: dict[str, list[str]] = {}
    for refusal in receipt.refused:
        places.setdefault(refusal.reason, []).append(refusal.where)
    return {
        "rule": receipt.rule,
        "spelling": receipt.spelling,
        "candidates": receipt.candidates,
        "matches": receipt.matches,
        "refusals": dict(receipt.refusals),
        "places": {reason: common_path(paths) for reason, paths in places.items()},
        "removed": receipt.ops,
    }


@dataclass(frozen=True)
class Why:
    """The answer of `FusedGraph.why`.

    Attributes:
        rows: one dict for each recorded op, in order: ``value`` (its result), ``op``, ``where``, ``region`` (or None),
            ``used``, ``reasons``.
    """

    rows: list[dict[str, Any]]

    def to_json(self) -> str:
        """The rows as a JSON list."""
        return json.dumps(self.rows, indent=2)

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            lines.append(f"{row['value']} = {row['op']} ({row['where'] or 'top level'})")
            lines += [f"    {reason}" for reason in row["reasons"]]
        return "\n".join(lines)


def why(program: Program, what: str) -> Why:
    """See `FusedGraph.why`."""
    named = {name for region in program.regions if region.name == what for name in values_of(region.nodes)}
    asked = [
        node
        for node in program.recorded.subgraph.nodes
        if what in node.outputs or _within(what, module_of(node)) or not named.isdisjoint(node.outputs)
    ]
    if not asked:
        raise KeyError(f"no module, value or region of the graph is called {what!r}")
    return _why(program, asked)


def why_all(program: Program) -> Why:
    """`why` for every recorded op."""
    return _why(program, program.recorded.subgraph.nodes)


def _why(program: Program, asked: Sequence[OpNode]) -> Why:
    inside: dict[str, list[Region]] = {}  # value -> the regions that make it, outermost first
    for region in program.regions:
        for name in values_of(region.nodes):
            inside.setdefault(name, []).append(region)
    refused: dict[str, list[str]] = {}
    for receipt in program.receipts:
        for refusal in receipt.refused:
            for name in refusal.values:
                refused.setdefault(name, []).append(f"{receipt.rule}: {refusal.reason}")
    gone = _removed(program)
    rows = []
    for node in asked:
        name = node.outputs[0] if node.outputs else ""
        regions = inside.get(name, [])
        home = next((r for r in regions if r.decision), regions[-1] if regions else None)
        reasons = [f"{r.name} ({r.where or 'top level'}): {_outcome(r)}" for r in regions]
        if not regions:
            reasons = [gone[name]] if name in gone else list(dict.fromkeys(refused.get(name, ()))) or [_by_kind(node)]
        rows.append(
            {
                "value": name,
                "op": node.op_type,
                "where": module_of(node),
                "region": home.name if home is not None else None,
                "used": home is not None and bool(home.decision),
                "reasons": reasons,
            }
        )
    return Why(rows)


def _within(what: str, path: str) -> bool:
    """Whether `what` names the module at `path` or one around it, from any level on."""
    return bool(what) and f".{what}." in f".{path}."


def _outcome(region: Region) -> str:
    verdict = ("used: " if region.decision else "not used: ") + region.decision.reason
    return verdict + ("; its parts run instead" if region.parts is not None else "")


def _removed(program: Program) -> dict[str, str]:
    """Value -> which pass removed its op."""
    found = dict.fromkeys(values_of(program.constants.nodes), "computed once: it is the same in every replay")
    before = set(values_of(program.recorded.subgraph.nodes))
    for name, graph in program.stages:
        after = set(values_of(graph.nodes))
        found = dict.fromkeys(before - after, f"removed by the pass {name}") | found
        before = after
    return found


def _by_kind(node: OpNode) -> str:
    kind = op(node.op_type).kind
    if kind is Kind.VIEW:
        return "a view: it moves no data"
    if kind is Kind.OPAQUE:
        return f"{node.op_type} runs whole: no rule takes it"
    return "no neighbour that it could be fused with"


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
