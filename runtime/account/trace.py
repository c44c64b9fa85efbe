"""One replay as events of the Trace Event Format, which Perfetto and ``chrome://tracing`` show."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from graph_capture.errors import CaptureError
from graph_capture.ir.interpreter import Step
from graph_capture.log import log
from graph_capture.passes.receipts import module_of
from graph_capture.runtime.decide.whole import device_of
from graph_capture.runtime.program import Program
from graph_capture.runtime.replay.plan import Plan

REPLAY = "replay"
SCOPE = "user_annotation"  # the names of regions and steps
ON_DEVICE = ("gpu_user_annotation", "kernel", "gpu_memcpy", "gpu_memset", "ac2g")
KEPT = (SCOPE, "cpu_op", "cuda_runtime", "cuda_driver", *ON_DEVICE)


def trace(
    program: Program,
    path: str | os.PathLike[str],
    replay: Callable[[], Any],
    plan: Plan | None,
    steps: Sequence[Step],
) -> Any:
    """See `FusedGraph.trace`. `replay` runs once; `steps` are those that `plan` was made of."""
    if torch.autograd._profiler_enabled():
        raise CaptureError("a profiler is on already, which sees regions and steps by their names; trace without it")
    activities = [ProfilerActivity.CPU]
    if device_of(program.graph).type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    if plan is not None:
        _ = plan.traced  # compiled now, not in the replay
    with profile(activities=activities) as profiler:
        with record_function(REPLAY):
            result = replay()
        if ProfilerActivity.CUDA in activities:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        found = json.loads(raw.read_text(encoding="utf-8"))["traceEvents"]
    events = _of_the_replay(found)
    if plan is None:
        log.warning("the replay that was traced has no plan: its events are those of torch's ops alone")
    else:
        events += _described(program, events, plan, steps)
    try:
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}), encoding="utf-8")
    except OSError as error:
        raise CaptureError(f"the trace cannot be written to {path}: {error}") from error
    return result


def _of_the_replay(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The replay's events, in microseconds from its beginning on, and the names of their processes and threads."""
    start, end = next((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["name"] == REPLAY)
    kept = [e for e in events if e.get("cat") in KEPT and (e["ts"] <= end or e["cat"] in ON_DEVICE)]
    kept.sort(key=lambda e: e["ts"])
    for event in kept:
        event["ts"] = round(event["ts"] - start, 3)
    threads = {(event["pid"], event.get("tid")) for event in kept}
    processes = {pid for pid, _ in threads}
    meta: dict[Any, dict[str, Any]] = {}
    for event in events:
        key = event["pid"], event.get("tid")
        if event["ph"] == "M" and (key in threads or (event["name"].startswith("process") and key[0] in processes)):
            meta[event["name"], *key] = {name: value for name, value in event.items() if name != "ts"}
    return [*meta.values(), *kept]


def _described(
    program: Program, events: Sequence[dict[str, Any]], plan: Plan, steps: Sequence[Step]
) -> list[dict[str, Any]]:
    """Say of each scope what it is; return the bytes of the arenas in use as counters."""
    regions = {region.name: region for region in program.regions}
    metas = {**program.recorded.subgraph.values, **program.graph.values}
    scopes = iter(plan.scopes)
    place = next(scopes, None)
    about: dict[Any, dict[str, Any]] = {}  # by the id that a scope has on the CPU and on a GPU
    counters: list[dict[str, Any]] = []

    def count(event: dict[str, Any], time: float, step: int) -> None:
        for device, live in plan.live_bytes.items():
            size = live[step] if step < len(live) else 0
            counters.append(
                {"ph": "C", "name": f"arena {device}", "pid": event["pid"], "ts": time, "args": {"bytes": size}}
            )

    for event in events:
        if event.get("cat") != SCOPE or place is None or event["name"] != place.name:
            continue  # the replay itself, or a scope of the user's
        region = regions.get(place.label)
        node = steps[place.step].node if region is None else region.node
        found: dict[str, Any] = {
            "module": module_of(node),
            "line": f"{node.source.file}:{node.source.line}" if node.source and node.source.file else "",
            "inputs": [f"{name}: {metas[name]}" if name in metas else name for name in node.inputs],
            "outputs": [f"{name}: {metas[name]}" if name in metas else name for name in node.outputs],
        }
        if region is not None:
            found |= {"ops": [inner.op_type for inner in region.nodes], "bytes": region.bytes_after}
            found |= {"bytes_saved": region.bytes_saved, "decision": asdict(region.decision)}
        event["args"] = {**event.get("args", {}), **found}
        event["name"] = place.label or node.op_type
        about[event["args"].get("External id")] = {"name": event["name"], "args": found}
        count(event, event["ts"], place.step)
        place, end = next(scopes, None), event["ts"] + event["dur"]
        if place is None:
            count(event, round(end, 3), len(steps))
    for event in events:
        known = about.get(event.get("args", {}).get("External id"))
        if event.get("cat") == "gpu_user_annotation" and known is not None:
            event["name"], event["args"] = known["name"], {**event["args"], **known["args"]}
    return counters
