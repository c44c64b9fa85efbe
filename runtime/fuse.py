"""From a recorded graph to a fused one: the scheduler runs the passes, decides each region, and builds the replay."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from graph_capture.cache import DiskCache
from graph_capture.codegen import CompiledKernel, is_native
from graph_capture.codegen.spec.linear import LinearSpec
from graph_capture.errors import CaptureError, FusionError
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.interpreter import Executor
from graph_capture.ir.ops import FUSED
from graph_capture.ir.values import TensorMeta
from graph_capture.log import log
from graph_capture.passes import Passes, find_regions, load_templates, rewrite, store_templates
from graph_capture.passes.convolutions import RULE as READY_CONVOLUTION
from graph_capture.passes.convolutions import is_ready
from graph_capture.passes.decode import RULES as DECODE
from graph_capture.passes.decode import SMALL, is_merged
from graph_capture.passes.linears import RULE as PARALLEL_LINEAR
from graph_capture.passes.linears import product_of
from graph_capture.passes.pipeline import unchanged
from graph_capture.passes.region_bodies import is_composed, is_library, rounded_outputs
from graph_capture.passes.rewrite import inline, values_of
from graph_capture.record.fx import record_fx
from graph_capture.record.recorded import RecordedGraph
from graph_capture.runtime.account.dump import VARIABLE as DUMP
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.decide.heuristics import FusionHeuristics, fallback_of, input_metas
from graph_capture.runtime.decide.measure import example_inputs
from graph_capture.runtime.decide.whole import Play, decide_whole, device_of
from graph_capture.runtime.fused import FusedGraph
from graph_capture.runtime.library import LibraryKernel
from graph_capture.runtime.program import Program
from graph_capture.runtime.region import Decision, Kernel, Region
from graph_capture.runtime.replay.memory import Memory


class FusionScheduler:
    """Analyses graphs and runs single regions under one `FusionConfig`, sharing kernels and measured decisions."""

    def __init__(self, config: FusionConfig | None = None) -> None:
        self.config = config or FusionConfig()
        self.heuristics = FusionHeuristics(self.config)
        self._memory = Memory(self.config.graph_memory)  # graphs of one scheduler replay in turns
        self._dispatched: deque[Kernel] = deque(maxlen=256)  # of regions that may come again

    def dispatch(self, graph: SubGraph, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run one region on `inputs`, by its fused kernel where that is decided and by its ops elsewhere.

        Returns:
            One tensor for each of ``graph.output_names``.

        Raises:
            FusionError: an input is missing; or, with ``fallback_on_error=False``, no kernel can be made.
        """
        metas = input_metas(graph, inputs)
        tensors = [inputs[name] for name in metas]
        decision, kernel = self.heuristics.decide(graph, metas, lambda: tensors)
        if kernel is not None and kernel not in self._dispatched:
            self._dispatched.append(kernel)
        if decision and kernel is not None:
            return dict(zip(graph.output_names, kernel(*tensors), strict=True))
        return dict(zip(graph.output_names, fallback_of(graph)(tensors), strict=True))

    def analyze(self, graph: RecordedGraph) -> FusedGraph:
        """Find the fusable regions of `graph`, make and measure their kernels, and bind the replay."""
        self.heuristics.weights = graph.captured
        try:
            return self._analyzed(graph)
        finally:
            self.heuristics.weights = {}

    def _analyzed(self, graph: RecordedGraph) -> FusedGraph:
        config = self.config
        if not config.enable_fusion:
            return dumped(FusedGraph(Program(graph, unchanged(graph.subgraph), (), config), self._memory))
        off = config.passes_off | ({PARALLEL_LINEAR} if config.merge_linears == "off" else frozenset())
        device = device_of(graph.subgraph)
        if config.profile != "always" and not is_native(config.target, device, self.heuristics.compiler.cache):
            off |= frozenset(DECODE)  # never faster, and seconds to measure at a model's sizes
        if device.type != "cpu":
            off |= {SMALL}  # in a CUDA graph, the call of an op costs nothing
        passes = Passes(
            self.heuristics.compiler.supports,
            config.patterns,
            frozenset(graph.captured),
            config.fold_weights,
            config.max_graph_size,
            config.min_nodes_for_fusion,
            off,
        )
        cache = DiskCache("templates", config.cache_dir) if config.enable_cache else None
        known = cache is None or load_templates(cache)
        rewritten = rewrite(graph.subgraph, passes)
        if cache is not None and not known:
            store_templates(cache)
        regions = _RegionDecider(self.heuristics, passes, rewritten.graph)
        if not regions.convolutions_pay():
            passes = replace(passes, off=passes.off | {READY_CONVOLUTION})
            rewritten = rewrite(graph.subgraph, passes)
            regions = _RegionDecider(self.heuristics, passes, rewritten.graph)
        used = sum(bool(region.decision) for region in regions.found)
        log.info(
            "%d recorded ops -> %d, %d of %d regions used",
            len(graph.subgraph),
            len(rewritten.graph),
            used,
            len(regions.found),
        )
        return dumped(self._as_a_whole(Program(graph, rewritten, tuple(regions.found), config)))

    def _as_a_whole(self, program: Program) -> FusedGraph:
        """The fused graph; with no kernel in it where it measures no faster for them."""
        fused = FusedGraph(program, self._memory)
        if self.config.profile != "measure" or not any(region.decision for region in fused.regions):
            return fused

        def replays() -> list[Play]:
            unfused = FusedGraph(program.without_kernels("left out to compare"), self._memory)
            return [unfused.replay, fused.replay]

        whole = decide_whole(fused.program, replays, self.heuristics.store)
        if whole is not None and not whole:
            log.info("%s: all regions replay as recorded", whole.reason)
            fused = FusedGraph(fused.program.without_kernels(whole.reason), self._memory)
        fused.program = replace(fused.program, whole=whole)
        return fused


_dumps = itertools.count()


def dumped(fused: FusedGraph) -> FusedGraph:
    """`fused`, written down where the environment asks for it: now, and once more when there is a plan."""
    place = os.environ.get(DUMP)
    if place:
        folder = Path(place, f"{os.getpid()}_{next(_dumps):03d}")

        def write() -> None:
            try:
                fused.dump(folder)
            except CaptureError as error:
                log.warning("%s=%s: %s", DUMP, place, error)

        write()
        fused.when_planned(write)
    return fused


class _RegionDecider:
    """Decides the regions of one graph; those that are alike once."""

    def __init__(self, heuristics: FusionHeuristics, passes: Passes, graph: SubGraph) -> None:
        self.heuristics, self.passes, self.values = heuristics, passes, graph.values
        self.found: list[Region] = []
        self._counts: Counter[str] = Counter()
        self._decided: dict[tuple[object, ...], Region] = {}
        self._add(graph)

    def convolutions_pay(self) -> bool:
        """Whether convolutions whose weights are made ready are faster, all of them together: what one of them gives
        lies as the next one takes it. They are used then, each of them."""
        ready = [number for number, region in enumerate(self.found) if is_ready(region.node)]
        decisions = [self.found[number].decision for number in ready]
        before, after = ([getattr(d, side) for d in decisions] for side in ("t_fallback", "t_fused"))
        if None in before or None in after:
            return all(decisions)
        ratio = sum(after) / sum(before) if ready else 0.0
        if ratio >= 1:
            return False
        for number, decision in zip(ready, decisions, strict=True):
            if not decision:
                reason = f"all of them together are {1 / ratio:.2f}x faster"
                self.found[number] = replace(self.found[number], decision=replace(decision, use=True, reason=reason))
        return True

    def _key(self, node: OpNode) -> tuple[object, ...]:
        """Equal for regions that are alike."""
        return (node.attr("body"), *(self.values[name]._replace(offset=0, storage=-1) for name in node.inputs))

    def _prepare(self, graph: SubGraph) -> None:
        """Have the kernels of a graph's regions made side by side, and those of parts that are tried anyway."""
        nodes = {self._key(node): node for node in graph.nodes if node.op_type.startswith(FUSED)}
        for node in [*nodes.values()]:
            parts = self._parts(node, frozenset({PARALLEL_LINEAR})) if self._is_apart(node) else None
            found = [] if parts is None else parts.nodes
            nodes |= {self._key(part): part for part in found if part.op_type.startswith(FUSED)}
        new, least = [node for key, node in nodes.items() if key not in self._decided], self.passes.min_nodes
        self.heuristics.prepare(
            [(node.attr("body"), [self.values[x] for x in node.inputs], _weight(node, least)) for node in new],
            [product_of(node, self.values) for node in new if self._multiplies(node)],
        )

    def _add(self, graph: SubGraph, parent: str = "", off: frozenset[str] = frozenset()) -> None:
        self._prepare(graph)
        for node in graph.nodes:
            if not node.op_type.startswith(FUSED):
                continue
            kind = node.op_type.removeprefix(FUSED)
            name = f"{kind}_{self._counts[kind]}"
            self._counts[kind] += 1
            key = self._key(node)
            alike = self._decided.get(key)
            if alike is None:
                undecided = Region(node.op_type, node, self.values, Decision(False, ""), None)
                alike = self._decided[key] = decide_region(self.heuristics, undecided, self._libraries(node))
            tried = off | {kind}
            parts = self._parts(node, tried) if self._divides(alike) else None
            place = len(self.found)
            self.found.append(replace(alike, name=name, node=node, parts=parts, parent=parent))
            if parts is None:
                continue
            counts = self._counts.copy()
            self._add(parts, name, tried)
            if alike.decision:
                saved = _saved_by_parts(alike, self.found[place + 1 :])
                if saved is None:
                    self._counts = counts
                    self.found[place:] = [replace(self.found[place], parts=None)]
                else:
                    reason = f"its parts are {saved:.2f}x faster"
                    self.found[place] = replace(
                        self.found[place], decision=replace(alike.decision, use=False, reason=reason)
                    )

    def _libraries(self, node: OpNode) -> list[LibraryKernel]:
        """The region as library calls, where some of these stand for several recorded ops; and with a kernel of our own
        for the product of merged linears."""
        body: SubGraph = node.attr("body")
        if node.op_type == FUSED + PARALLEL_LINEAR:
            weights = body.input_names[1:]
            product = merged_kernel(self.heuristics, node, self.values) if self._multiplies(node) else None
            return [LibraryKernel(body, weights), *([LibraryKernel(body, weights, product)] if product else [])]
        if is_ready(node):
            return [LibraryKernel(body, body.input_names[1:])]
        if not any(map(is_library, node.origin)) or (len(node.origin) > 1 and self.passes.supports(body) is not None):
            return []
        return [LibraryKernel(body)]

    def _multiplies(self, node: OpNode) -> bool:
        """Whether a kernel of our own may multiply merged linears; on a CPU, kernels in a row do as well."""
        return node.op_type == FUSED + PARALLEL_LINEAR and not self._is_apart(node)

    def _divides(self, region: Region) -> bool:
        """Whether a region is worth taking apart: what it is made of may be used, or be faster."""
        node = region.node
        if self._is_apart(node):
            return not region.decision or region.decision.t_fused is not None
        if region.kind == PARALLEL_LINEAR or is_ready(node):
            return False
        if region.decision:  # the library's product and a kernel of the rest may be faster than one kernel of both
            return region.decision.t_fused is not None and _has_many_rows(region)
        if region.kind in DECODE:
            return len(node.origin) > 1 or is_merged(node.origin[0])
        return region.kernel is None and len(node.origin) > 1 and self.passes.supports(node.attr("body")) is not None

    def _is_apart(self, node: OpNode) -> bool:
        """Whether its parts are tried whatever is decided: with few rows, kernels in a row may be faster on a CPU than
        one call."""
        return node.op_type == FUSED + PARALLEL_LINEAR and self.values[node.outputs[0]].device.type == "cpu"

    def _parts(self, node: OpNode, tried: frozenset[str]) -> SubGraph | None:
        """What a region that is not used is made of, with regions of its own; None where it has none."""
        origin = SubGraph(node.origin, node.inputs, node.outputs, values_of(node.origin, self.values))
        graph = inline(origin, is_composed)
        plan = find_regions(
            graph,
            supports=self.passes.supports,
            patterns=[item for item in self.passes.chosen if not item.compound],
            max_nodes=self.passes.max_nodes,
            min_nodes=self.passes.min_nodes,
            off=self.passes.off | tried,
            told=rounded_outputs(node),
        )
        return plan.graph if any(part.op_type.startswith(FUSED) for part in plan.graph.nodes) else None


def _has_many_rows(region: Region) -> bool:
    """Whether its kernel is a product of many rows and what follows it."""
    spec = region.kernel.spec if isinstance(region.kernel, CompiledKernel) else None
    return isinstance(spec, LinearSpec) and spec.rows is None and len(region.node.origin) > 1


def _saved_by_parts(region: Region, parts: Sequence[Region]) -> float | None:
    """How many times faster than a region its parts are, where all of it is measured and they are."""
    leaves = [part for part in parts if part.parts is None]
    times = [part.decision.t_fused if part.decision else part.decision.t_fallback for part in leaves]
    whole = region.decision.t_fused
    if whole is None or None in times or sum(len(part.nodes) for part in leaves) < len(region.nodes):
        return None
    total = sum(time for time in times if time is not None)
    return whole / total if total < whole else None


def _weight(node: OpNode, least: int) -> int:
    """For how many recorded ops a region counts, `least` of which make one."""
    return least if node.op_type == FUSED + SMALL else len(node.recorded)


def merged_kernel(
    heuristics: FusionHeuristics, node: OpNode, values: Mapping[str, TensorMeta]
) -> CompiledKernel | None:
    """A kernel of our own for the product of merged linears, where there can be one."""
    with contextlib.suppress(FusionError):
        return heuristics.kernel(*product_of(node, values))
    return None


def decide_region(heuristics: FusionHeuristics, region: Region, libraries: Sequence[LibraryKernel]) -> Region:
    """Decide a region on made-up inputs; `libraries` are the region as library calls, where there are such ways too."""
    node = region.node
    layouts = [TensorMeta(*region.values[name][:4]) for name in node.inputs]
    metas = dict(zip(region.body.input_names, layouts, strict=True))
    executor = Executor([(recorded, None) for recorded in node.recorded], node.inputs, node.outputs)
    ops = _weight(node, heuristics.config.min_nodes_for_fusion)
    tensors = functools.partial(example_inputs, node.inputs, region.values, weights=heuristics.weights)
    decision, kernel = heuristics.decide(region.body, metas, tensors, executor.run, ops, libraries)
    return replace(region, decision=decision, kernel=kernel)


def fuse(
    graph: RecordedGraph | torch.fx.GraphModule | torch.export.ExportedProgram,
    config: FusionConfig | None = None,
    *,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> FusedGraph:
    """Rewrite `graph` so that fusable regions run as single kernels where that measured faster.

    Args:
        graph: a recording; or a graph of torch.fx or torch.export, which is recorded first.
        config: how regions are fused.
        args, kwargs: example inputs for such a graph (default: those that an exported program was made with).

    Raises:
        CaptureError: an FX graph comes without example inputs, or cannot be recorded.
        FusionError: the library that `op_library` names cannot be imported; or, with ``fallback_on_error=False``, a
            region's kernel cannot be made.
    """
    recorded = graph if isinstance(graph, RecordedGraph) else record_fx(graph, args, kwargs)
    return FusionScheduler(config).analyze(recorded)
