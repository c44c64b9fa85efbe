"""A program as one page of HTML: each stage of its rewriting as a graph, with what is known of each op and region.

`page/` holds the rest: `page.js` and `page.css` are ours; `vendor.js` (Cytoscape.js draws, dagre lays out) is made by
``make page`` from what `package-lock.json` pins.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from graph_capture.codegen import CompiledKernel
from graph_capture.errors import CaptureError, FusionError
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.passes.receipts import module_of, values_of
from graph_capture.runtime.account.dump import pretty
from graph_capture.runtime.account.explain import explain, format_bytes, format_seconds, why_all
from graph_capture.runtime.account.verify import Verification
from graph_capture.runtime.program import Program
from graph_capture.runtime.region import Region
from graph_capture.runtime.replay.cuda_graph import Graphs
from graph_capture.runtime.replay.plan import Plan

ASSETS = Path(__file__).parent / "page"
ATTRIBUTE = 120  # letters of an attribute that are shown


def view(
    program: Program,
    path: str | os.PathLike[str],
    title: str,
    plan: Plan | None,
    graphs: Graphs | None,
    checked: Verification | None,
) -> Path:
    """See `FusedGraph.view`; `checked` gives the errors."""
    explained = json.loads(explain(program, plan, graphs).to_json())
    data = {**_Page(program).data(checked), "title": title, "rules": explained["rules"], "whole": explained["whole"]}
    data |= {"plan": "" if plan is None else str(plan), "guards": list(program.recorded.guards)}
    page = (ASSETS / "page.html").read_text(encoding="utf-8").replace("{{title}}", escape(title))
    for name in ("page.css", "vendor.js", "page.js"):
        page = page.replace(f"{{{{{name}}}}}", (ASSETS / name).read_text(encoding="utf-8"))
    # Nothing in a string may end the script that the data are in.
    page = page.replace("{{data}}", json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise CaptureError(f"the page cannot be written to {path}: {error}") from error
    return Path(path)


class _Page:
    """Collects nodes and texts, each once: stages share most of theirs."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._regions = program.by_node
        self._nodes: dict[Any, int] = {}
        self._node_data: list[dict[str, Any]] = []
        self._texts: dict[str, int] = {}
        self._values: dict[str, list[Any]] = {}

    def data(self, checked: Verification | None) -> dict[str, Any]:
        program = self._program
        recorded = program.recorded
        stages = [("recorded", recorded.subgraph.nodes), *((name, graph.nodes) for name, graph in program.stages)]
        if program.regions:
            stages.append(("replay", tuple(self._replayed(program.graph))))
        for graph in (recorded.subgraph, *(graph for _, graph in program.stages), *self._parts()):
            self._values |= {
                name: [str(meta), meta.nbytes, list(meta.stride), str(meta.device)]
                for name, meta in graph.values.items()
                if name not in self._values
            }
        errors = {row["region"]: _finite(row) for row in checked.rows} if checked is not None else {}
        return {
            "stages": [{"name": name, "nodes": [self._node(node) for node in nodes]} for name, nodes in stages],
            "nodes": self._node_data,
            "values": self._values,
            "regions": {r.name: self._region(r) | {"error": errors.get(r.name)} for r in program.regions},
            "texts": list(self._texts),
            "ops": {row["value"]: [row["region"], row["used"], row["reasons"]] for row in why_all(program).rows},
            "refusals": [
                [receipt.rule, refusal.reason, refusal.where, list(refusal.values)]
                for receipt in program.receipts
                for refusal in receipt.refused
            ],
            "inputs": list(recorded.signature.names),
            "weights": list(recorded.captured),
            "outputs": list(recorded.subgraph.output_names),
        }

    def _parts(self) -> Iterator[SubGraph]:
        return (region.parts for region in self._program.regions if region.parts is not None)

    def _replayed(self, graph: SubGraph) -> Iterator[OpNode]:
        """What really runs: kernels, and the recorded ops where there is none."""
        for node in graph.nodes:
            region = self._regions.get(id(node))
            if region is None or region.decision:
                yield from (node,) if region is not None else node.recorded
            elif region.parts is not None:
                yield from self._replayed(region.parts)
            else:
                yield from node.recorded

    def _node(self, node: OpNode) -> int:
        region = self._regions.get(id(node))
        attrs = [(name, str(value)) for name, value in node.attrs if not isinstance(value, SubGraph)]
        text = ", ".join(f"{name}={value[:ATTRIBUTE]}" for name, value in attrs)
        key = (node.op_type, node.inputs, node.outputs, text)
        if key not in self._nodes:
            self._nodes[key] = len(self._node_data)
            file = "/".join(Path(node.source.file).parts[-3:]) if node.source else ""
            line = f"{file}:{node.source.line}" if node.source and file else ""
            found = {"op": node.op_type, "in": node.inputs, "out": node.outputs, "attrs": text}
            # What spans modules belongs to the last: between layers it would tie them all into one knot.
            found |= {"at": module_of(node.recorded[-1]), "line": line, "of": values_of([node])}
            if region is not None:
                found["region"] = region.name
            self._node_data.append({name: value for name, value in found.items() if value not in ("", ())})
        return self._nodes[key]

    def _region(self, region: Region) -> dict[str, Any]:
        files = {"the recorded ops": str(region.body)}
        try:
            if isinstance(region.kernel, CompiledKernel):
                files |= {"kernel source": region.kernel.source, "spec": pretty(region.kernel.spec)}
            elif region.kernel is not None:
                files["library calls"] = region.kernel.source
        except FusionError as error:  # a kernel that is made when somebody asks for it
            files["error"] = str(error)
        return {
            "kind": region.kind,
            "at": region.where,
            "parent": region.parent,
            "parts": region.parts is not None,
            "kernel": region.kernel is not None,
            "bytes": [region.bytes_before, region.bytes_after],
            "ops": [node.op_type for node in region.nodes],
            "decision": _finite(asdict(region.decision)),
            "files": {name: self._texts.setdefault(text, len(self._texts)) for name, text in files.items()},
        }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity and no NaN."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def card(program: Program) -> str:
    """A few lines of HTML for a notebook: what was found, what it saves, what is used."""
    rows = explain(program, None, None).rows
    style = "text-align:left;padding:2px 12px 2px 0;vertical-align:top"
    head = "".join(f'<th style="{style}">{name}</th>' for name in ("region", "where", "n", "saves", "time", "decision"))
    cells = ("".join(f'<td style="{style}">{escape(cell)}</td>' for cell in _cells(row)) for row in rows)
    ops = f"{len(program.recorded.subgraph)} recorded ops, {len(program.graph)} after the passes"
    return f"<b>FusedGraph</b>: {ops}<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _cells(row: dict[str, Any]) -> Sequence[str]:
    times = " → ".join(format_seconds(row[name]) for name in ("t_fallback", "t_fused"))
    verdict = ("✓ " if row["used"] else "✗ ") + row["reason"]
    return row["region"], row["where"], str(row["alike"]), format_bytes(row["bytes_saved"]), times, verdict
