"""The fused graph against the unfused one, as a whole: regions that are faster alone need not be together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from graph_capture.cache import DiskCache
from graph_capture.calls.signature import Call
from graph_capture.calls.template import ResultTemplate
from graph_capture.ir.effects import is_random
from graph_capture.ir.graph import SubGraph
from graph_capture.ir.memory import RandomState
from graph_capture.ir.ops import EXTERNAL
from graph_capture.log import log
from graph_capture.record.recorded import RecordedGraph
from graph_capture.runtime.decide.decision_store import DecisionStore, Times
from graph_capture.runtime.decide.heuristics import decision_of
from graph_capture.runtime.decide.measure import compare, example_inputs
from graph_capture.runtime.program import Program
from graph_capture.runtime.region import Decision

Play = Callable[[Call], Any]  # a replay of a call that fits


def decide_whole(
    program: Program, replays: Callable[[], Sequence[Play]], store: DecisionStore | None
) -> Decision | None:
    """Whether `program` replays faster than the same graph with no kernel; None where that cannot be measured.

    `replays` gives a replay without kernels and one with them, to be timed side by side.

    Both run on made-up arguments. A graph that writes into captured tensors, which are the user's, is not run; nor is
    one whose guards or foreign kernels would not take made-up arguments. The random generators are put back.
    """
    recorded = program.recorded
    foreign = any(node.op_type == EXTERNAL for node in recorded.subgraph.nodes)
    if recorded.guarded or foreign or not recorded.written.isdisjoint(recorded.captured):
        return None
    key = _key(program)
    known = None if store is None else store.get(key)
    if known is not None and known.stands:
        return replace(_judge(known), cached=True)
    random = RandomState() if any(map(is_random, recorded.subgraph.nodes)) else None
    try:
        times = _measure(program, replays()).after(known)
    except Exception as error:  # whatever the ops make of such inputs
        log.debug("the whole graph was not measured: %s", error)
        return None
    finally:
        if random is not None:
            random.restore()
    if store is not None:
        store.put(key, times)
    return _judge(times)


def _measure(program: Program, replays: Sequence[Play]) -> Times:
    recorded = program.recorded
    call = made_up_call(recorded)
    # Positions in a cache must not run off its end while this repeats.
    given = zip(recorded.signature.names, call.tensors, strict=True)
    counters = [t for name, t in given if name in recorded.written and not t.is_floating_point()]

    def run(replay: Play) -> None:
        for counter in counters:
            counter.zero_()
        replay(call)

    runs = [functools.partial(run, replay) for replay in replays]
    for trial in runs:
        trial()  # a plan is made at the first replay
    before, after = compare(runs, device_of(program.graph))
    return Times.of(before, after)


def made_up_call(recorded: RecordedGraph) -> Call:
    """Arguments of the recorded structure and layouts: new tensors, new containers, new objects."""
    signature = recorded.signature
    arguments, contents, *_ = signature.key
    tensors = example_inputs(signature.names, dict(zip(signature.names, signature.metas, strict=True)))
    root = ("node", tuple, None, tuple(spec for _, spec in arguments))
    made = ResultTemplate(root, dict(enumerate(contents)), 0, signature.closed, tuple(range(len(tensors))))
    return Call(made.build(tensors, ()), {})


def _judge(times: Times) -> Decision:
    ratio = times.fused / times.fallback
    reason = (
        f"the whole graph is {1 / ratio:.2f}x faster" if ratio < 1 else "the whole graph is not faster with kernels"
    )
    return decision_of(ratio < 1, reason, times)


def _key(program: Program) -> str:
    graph = program.graph
    metas = [graph.values[name] for name in graph.input_names]
    structure = graph.cache_key([meta.dtype for meta in metas], [meta.shape for meta in metas])
    layouts = repr([(meta.stride, str(meta.device)) for meta in metas])
    used = repr([(region.name, region.decision.use, region.source) for region in program.regions if region.decision])
    threads = f"{torch.get_num_threads()} threads"
    return DiskCache.key("whole", structure, layouts, used, threads, device=device_of(graph))


def device_of(graph: SubGraph) -> torch.device:
    """Where a graph runs: on a GPU, if any of its values is there."""
    devices = (meta.device for meta in graph.values.values() if meta.device.type == "cuda")
    return next(devices, torch.device("cpu"))
