"""A program as a folder of files that reads in order: each stage, each region's spec, sources and machine code, the
decisions, the plan."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from graph_capture.codegen import CompiledKernel
from graph_capture.errors import CaptureError, FusionError
from graph_capture.runtime.account.explain import explain, why_all
from graph_capture.runtime.program import Program
from graph_capture.runtime.region import Region
from graph_capture.runtime.replay.cuda_graph import Graphs
from graph_capture.runtime.replay.plan import Plan

VARIABLE = "GRAPH_CAPTURE_DUMP"
INDEX = "index.txt"
_FIRST = "What graph_capture made of a recording, in the order in which it was made."


def dump(program: Program, folder: str | os.PathLike[str], plan: Plan | None, graphs: Graphs | None) -> Path:
    """See `graph_capture.FusedGraph.dump`."""
    root = _emptied(Path(folder))
    lines = [_FIRST, ""]
    for number, (name, what, files) in enumerate(_parts(program, plan, graphs)):
        title = f"{number:02d}_{name}"
        for file, content in files.items():
            path = root / title / file if len(files) > 1 or "/" in file else root / f"{title}{Path(file).suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content.rstrip("\n") + "\n", encoding="utf-8")
        lines.append(f"{title:<34} {what}")
    (root / INDEX).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def _emptied(root: Path) -> Path:
    """The folder, new or with an earlier dump taken out of it.

    Raises:
        CaptureError: it holds something that no dump has put there, or cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            index = root / INDEX
            if not index.is_file() or not index.read_text(encoding="utf-8", errors="replace").startswith(_FIRST):
                raise CaptureError(f"{root} is not empty, and not an earlier dump; name another folder")
            shutil.rmtree(root)
            root.mkdir()
    except OSError as error:
        raise CaptureError(f"{root} cannot be written: {error}") from error
    return root


def _parts(program: Program, plan: Plan | None, graphs: Graphs | None) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """Name, what it is, and the files: of one, or of a folder."""
    yield "recorded", "the recording, op by op, with modules and source lines", {"graph.py": str(program.recorded)}
    guards = "\n".join((str(program.recorded.signature), *program.recorded.guards))
    yield "guards", "what a call must look like, and what must not have changed", {"guards.txt": guards}
    before = program.recorded.subgraph
    for name, graph in program.stages:
        change = f"{len(before)} ops -> {len(graph)}" if len(graph) != len(before) else f"{len(graph)} ops"
        yield f"after_{name}", f"the graph after the pass {name!r}: {change}", {"graph.py": str(graph)}
        before = graph
    if program.constants.nodes:
        yield "constants", "what is computed once, not in each replay", {"graph.py": str(program.constants)}
    regions: dict[str, str] = {}
    for number, region in enumerate(program.regions):
        regions |= {f"{number:03d}_{region.name}/{file}": text for file, text in _region_files(region).items()}
    if regions:
        what = "of each region: body, spec, generated source, the source that is compiled, machine code, decision"
        yield "regions", what, regions
    account = explain(program, plan, graphs)
    yield "decisions", "what was found and decided", {"explain.txt": str(account), "explain.json": account.to_json()}
    reasons = why_all(program)
    yield (
        "reasons",
        "of every recorded op, why it is fused or not",
        {"why.txt": str(reasons), "why.json": reasons.to_json()},
    )
    if plan is not None:
        yield "plan", "the replay as straight Python", {"plan.py": str(plan)}


def _region_files(region: Region) -> dict[str, str]:
    found = {"body.py": str(region.body)}
    if region.parts is not None:
        found["parts.py"] = str(region.parts)
    try:
        if isinstance(region.kernel, CompiledKernel):
            kernel = region.kernel
            found |= {"spec.txt": pretty(kernel.spec), "generated.txt": kernel.source}
            found |= kernel.target.artifacts(kernel.spec, kernel.name)
        elif region.kernel is not None:
            found["library_calls.py"] = region.kernel.source
    except FusionError as error:  # a kernel that is made when somebody asks for it
        found["error.txt"] = str(error)
    decision = {**asdict(region.decision), "where": region.where, "ops": [node.op_type for node in region.nodes]}
    found["decision.json"] = json.dumps(decision, indent=2)
    return {f"{number}_{file}": text for number, (file, text) in enumerate(found.items())}


def pretty(value: Any, indent: int = 0) -> str:
    """A frozen description, a field a line."""
    pad = "  " * (indent + 1)
    if is_dataclass(value):
        lines = [f"{pad}{item.name} = {pretty(getattr(value, item.name), indent + 1)}" for item in fields(value)]
        return "\n".join((type(value).__name__, *lines))
    if isinstance(value, tuple) and any(map(is_dataclass, value)):
        return "\n".join(("", *(f"{pad}{pretty(item, indent + 1)}" for item in value)))
    return repr(value)
