"""Whether a region is fused: first by what is known of it, then by measurement."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from graph_capture.cache import DiskCache
from graph_capture.codegen import CompiledKernel, KernelCompiler
from graph_capture.errors import FusionError
from graph_capture.ir.effects import written_inputs
from graph_capture.ir.graph import SubGraph
from graph_capture.ir.interpreter import Executor
from graph_capture.ir.numerics import apart
from graph_capture.ir.values import TensorMeta
from graph_capture.log import log
from graph_capture.passes.region_bodies import stands_alone
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.decide.decision_store import DecisionStore, Times
from graph_capture.runtime.decide.lazy import LazyKernel
from graph_capture.runtime.decide.measure import compare
from graph_capture.runtime.library import LibraryKernel
from graph_capture.runtime.region import Decision, Kernel

LATER = 30.0  # seconds until a doubtful measurement is taken again
Run = Callable[[Sequence[torch.Tensor]], Any]


def input_metas(graph: SubGraph, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorMeta]:
    """The layouts of a region's inputs.

    Raises:
        FusionError: an input is missing.
    """
    missing = [name for name in graph.input_names if name not in tensors]
    if missing:
        raise FusionError(f"inputs are missing: {', '.join(missing)}; the graph takes {', '.join(graph.input_names)}")
    return {name: TensorMeta.of(tensors[name]) for name in graph.input_names}


class FusionHeuristics:
    """The rules of a `FusionConfig`, with a cache of what was measured."""

    def __init__(self, config: FusionConfig | None = None, compiler: KernelCompiler | None = None) -> None:
        self.config = config or FusionConfig()
        cache = DiskCache("kernels", self.config.cache_dir) if self.config.enable_cache else None
        self.compiler = compiler or KernelCompiler(self.config.target, cache, self.config.op_library)
        self.store = DecisionStore(self.config.cache_dir) if self.config.enable_cache else None
        self.weights: Mapping[str, torch.Tensor] = {}  # of the graph that is analysed: what is measured may read them
        self._measured: dict[str, Decision] = {}
        self._doubted: dict[str, tuple[Times, float]] = {}  # what a busy machine gave, and when

    def should_fuse(
        self,
        graph: SubGraph,
        input_shapes: Mapping[str, Sequence[int]] | Sequence[Sequence[int]] | None = None,
        ops: int | None = None,
    ) -> Decision:
        """Whether fusing `graph` is allowed and can pay, from its ops and sizes alone. The result is truthy or falsy.

        `input_shapes` follows ``graph.input_names`` or maps them; without it the shapes in ``graph.values`` are used.
        `ops` is how many recorded ops the graph stands for, where that differs from its length.
        """
        if input_shapes is None:
            shapes = [graph.values[name].shape for name in graph.input_names if name in graph.values]
        elif isinstance(input_shapes, Mapping):
            shapes = [tuple(input_shapes[name]) for name in graph.input_names]
        else:
            shapes = [tuple(shape) for shape in input_shapes]
        reason = self._forbidden(graph, ops, shapes)
        if reason is None and (unsupported := self.compiler.supports(graph)) is not None:
            reason = f"no kernel: {unsupported}"
        return Decision(reason is None, reason or "every op can be fused")

    def _forbidden(self, graph: SubGraph, ops: int | None, shapes: Sequence[Sequence[int]]) -> str | None:
        """What in the configuration speaks against a region of so many ops (default: the graph's) and such inputs."""
        config = self.config
        ops = len(graph) if ops is None else ops
        if not config.enable_fusion:
            return "fusion is off (enable_fusion=False)"
        alone = ops == 1 and stands_alone(graph, graph.nodes[0])
        if ops < config.min_nodes_for_fusion and not alone:
            return f"{ops} ops are fewer than min_nodes_for_fusion={config.min_nodes_for_fusion}"
        if ops > config.max_graph_size:
            return f"{ops} ops are more than max_graph_size={config.max_graph_size}"
        elements = max((math.prod(shape) for shape in shapes), default=0)
        if elements < config.min_tensor_elements:
            return f"{elements} elements are fewer than min_tensor_elements={config.min_tensor_elements}"
        return None

    def profile_and_decide(self, graph: SubGraph, inputs: Mapping[str, torch.Tensor]) -> Decision:
        """Whether the fused kernel of `graph` is used for `inputs`, by measurement (see `FusionConfig.profile`).

        Both sides run on `inputs` themselves, but for copies of what the region writes.

        Raises:
            FusionError: an input is missing, or, with ``fallback_on_error=False``, no kernel can be made.
        """
        metas = input_metas(graph, inputs)
        return self.decide(graph, metas, lambda: apart(graph, [inputs[name] for name in metas]))[0]

    def decide(
        self,
        graph: SubGraph,
        metas: Mapping[str, TensorMeta],
        tensors: Callable[[], Sequence[torch.Tensor]],
        fallback: Run | None = None,
        ops: int | None = None,
        libraries: Sequence[LibraryKernel] = (),
    ) -> tuple[Decision, Kernel | None]:
        """`profile_and_decide` on inputs of these layouts; also returns the kernel where one was made.

        Args:
            tensors: makes such inputs, in the graph's order; it is called where something is to be measured.
            fallback: runs the recorded ops on them (default: the graph's own ops).
            ops: how many recorded ops there are.
            libraries: the region as library calls, where that is another way to run it; or two.
        """
        forbidden = self._forbidden(graph, ops, [meta.shape for meta in metas.values()])
        decision, kernel = Decision(False, forbidden or ""), None
        if forbidden is None:
            tensors = functools.cache(tensors)
            fallback = fallback or fallback_of(graph)
            made: list[tuple[Decision, Kernel]] = []
            try:
                made.append(self._by_profile(graph, None, tensors, metas, fallback))
            except FusionError as error:
                if not self.config.fallback_on_error and not libraries:
                    raise
                decision = Decision(False, f"no kernel: {error}")
            for library in libraries:
                if self.config.profile != "measure" and any(decided for decided, _ in made):
                    break
                made.append(self._by_profile(graph, library, tensors, metas, fallback))
            if made:
                decision, kernel = min(made, key=_merit)
        if self.config.debug_mode:
            log.info("%s -> %s", " ".join(node.op_type for node in graph.nodes), decision)
        return decision, kernel

    def prepare(
        self,
        regions: Sequence[tuple[SubGraph, Sequence[TensorMeta], int]],
        others: Sequence[tuple[SubGraph, Mapping[str, TensorMeta]]] = (),
    ) -> None:
        """Build side by side the kernels that deciding these regions (body, inputs, recorded ops) will ask for, and
        `others`."""
        if not self.config.enable_cache:
            return
        timed = self.config.profile == "measure"
        wanted: list[tuple[SubGraph, tuple[TensorMeta, ...], int | None]] = [
            (graph, tuple(metas.values()), 0) for graph, metas in others
        ]
        for graph, inputs, ops in regions:
            metas = {
                name: TensorMeta(meta.shape, meta.stride, meta.dtype, meta.device)
                for name, meta in zip(graph.input_names, inputs, strict=True)
            }
            if not metas or self._forbidden(graph, ops, [meta.shape for meta in metas.values()]) is not None:
                continue
            known = self._known(self._key(graph, self.config.target, metas))
            if known is None or known:
                choice = known.choice if known is not None else None if timed else 0
                wanted.append((graph, tuple(metas.values()), choice))
        self.compiler.prepare(wanted)

    def _known(self, key: str) -> Decision | None:
        """What was decided before, in this process or another; not what is to be measured again by now."""
        known = self._measured.get(key) if self.config.enable_cache else None
        if known is None and self.store is not None and (times := self.store.get(key)) is not None:
            known = self._measured[key] = replace(self.judge(times), cached=True)
            if not times.stands:
                self._doubted[key] = (times, -math.inf)
        if key in self._doubted and time.monotonic() - self._doubted[key][1] > LATER:
            return None
        return known

    def kernel(self, graph: SubGraph, metas: Mapping[str, TensorMeta]) -> CompiledKernel:
        """The kernel of `graph` for inputs of these layouts.

        Raises:
            FusionError: it cannot be made, for whatever reason.
        """
        compiler = self.compiler if self.config.enable_cache else self.compiler.fresh()
        dtypes = {name: meta.dtype for name, meta in metas.items()}
        shapes = {name: meta.shape for name, meta in metas.items()}
        strides = {name: meta.stride for name, meta in metas.items()}
        device = next((meta.device for meta in metas.values()), None)
        try:
            return compiler.compile(graph, dtypes, shapes, strides, device)
        except FusionError:
            raise
        except Exception as error:  # a compiler's own failure must not become the user's
            raise FusionError(f"{type(error).__name__}: {error}") from error

    def _by_profile(
        self,
        graph: SubGraph,
        library: LibraryKernel | None,
        tensors: Callable[[], Sequence[torch.Tensor]],
        metas: Mapping[str, TensorMeta],
        fallback: Run,
    ) -> tuple[Decision, Kernel]:
        """Decide on `library`, or on the kernel of `graph`.

        Raises:
            FusionError: there is no kernel.
        """
        config = self.config
        kernel: Kernel
        if config.profile != "measure":
            kernel = library or self.kernel(graph, metas)
            if config.profile == "always":
                return Decision(True, 'profile="always"'), kernel
            reason = "is interpreted on this machine" if kernel.interpreted else "is machine code"
            return Decision(not kernel.interpreted, f'profile="static": the kernel {reason}'), kernel
        device = next(iter(metas.values())).device
        key = self._key(graph, config.target if library is None else library.way, metas)
        known = self._known(key)
        if known is not None:
            if library is not None:
                return known, library
            if known:
                return known, self.kernel(graph, metas).with_choice(known.choice)
            return known, cast(Kernel, LazyKernel(lambda: self.kernel(graph, metas).with_choice(known.choice)))
        kernel = library or self.kernel(graph, metas)
        try:
            inputs = tensors()
            counters = _counters(graph, inputs)
            ways = [(way, _reset(call, counters)) for way, call in ways_to_run(kernel, inputs)]
            kernels, calls = zip(*_that_run(ways), strict=True)
            recorded = _reset(functools.partial(fallback, inputs), counters)
            t_fallback, *measured = compare([recorded, *calls], device)
            best = measured.index(min(measured))
            kernel = kernels[best]
            times = Times.of(t_fallback, measured[best], kernel.interpreted, getattr(kernel, "choice", 0))
        except Exception as error:
            if not config.fallback_on_error:
                raise
            decision = Decision(False, f"the kernel failed: {type(error).__name__}: {error}")
        else:
            times = times.after(self._doubted.pop(key, (None, 0.0))[0])
            if not times.stands:
                self._doubted[key] = (times, time.monotonic())
            decision = self.judge(times)
            if self.store is not None:
                self.store.put(key, times)
        self._measured[key] = decision
        return decision, kernel

    def _key(self, graph: SubGraph, kind: str, metas: Mapping[str, TensorMeta]) -> str:
        """What a measurement depends on; equal in every process."""
        device = next(iter(metas.values())).device
        dtypes, shapes = {n: m.dtype for n, m in metas.items()}, {n: m.shape for n, m in metas.items()}
        layouts = [(m.stride, str(m.device)) for m in metas.values()]
        how = f"{kind}, {self.config.op_library}, {torch.get_num_threads()} threads"
        return DiskCache.key(graph.cache_key(dtypes, shapes), repr(layouts), how, device=device)

    def judge(self, times: Times) -> Decision:
        """What `FusionConfig.fusion_ratio` makes of what was measured."""
        ratio = times.fused / times.fallback
        if ratio < self.config.fusion_ratio:
            reason = f"{1 / ratio:.2f}x faster"
        elif ratio < 1:
            reason = f"gain too small, {1 / ratio:.2f}x faster"
        else:
            reason = f"{ratio:.2f}x slower" if ratio < 10 else f"{ratio:.0f}x slower"
            reason += ", interpreted" if times.interpreted else ""
        return decision_of(ratio < self.config.fusion_ratio, reason, times)


def decision_of(use: bool, reason: str, times: Times) -> Decision:
    """A decision that rests on these times."""
    known = (times.fallback, times.fused, False, times.choice, times.spread, times.doubts > 0)
    return Decision(use, reason, *known)


def ways_to_run(kernel: Kernel, tensors: Sequence[torch.Tensor]) -> list[tuple[Kernel, Callable[[], Any]]]:
    """The candidates of `kernel` with calls on `tensors` as a plan makes them: into outputs that are there already,
    where that can be."""
    if not isinstance(kernel, CompiledKernel):
        return [(kernel, functools.partial(kernel.bind(tensors, share=False), tensors))]
    outputs = kernel.spec.allocate(tensors)
    launches = [(each, each.prepare(tensors, outputs)) for each in kernel.candidates((*tensors, *outputs))]
    return [(each, functools.partial(_launch, launch, outputs)) for each, launch in launches]


def _that_run(ways: list[tuple[Kernel, Callable[[], Any]]]) -> list[tuple[Kernel, Callable[[], Any]]]:
    """The ways that can run on this device: blocks may need more shared memory than it has.

    Raises:
        Exception: none can; what the last one raised.
    """
    if len(ways) == 1:
        return ways
    running, failure = [], None
    for way, call in ways:
        try:
            call()
            running.append((way, call))
        except Exception as error:
            failure = error
    if not running and failure is not None:
        raise failure
    return running


def _launch(launch: Callable[[], Any], held: Sequence[torch.Tensor]) -> None:
    """Launch into `held`, of which the launch itself has but addresses."""
    launch()


def fallback_of(graph: SubGraph) -> Run:
    """A call that runs a graph's own ops on tensors."""
    return Executor.of(graph).run


def _counters(graph: SubGraph, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The integers that a graph writes: positions in a cache, which must not run off its end while it is timed."""
    written = {node.inputs[position] for node in graph.nodes for position in written_inputs(node)}
    given = zip(graph.input_names, tensors, strict=True)
    return [tensor for name, tensor in given if name in written and not tensor.is_floating_point()]


def _reset(call: Callable[[], Any], counters: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """`call`, with the counters at 0 each time; the same work on either side."""
    if not counters:
        return call

    def with_reset() -> Any:
        for counter in counters:
            counter.zero_()
        return call()

    return with_reset


def _merit(made: tuple[Decision, Kernel]) -> tuple[bool, float]:
    """Sorts the used before the unused, then the faster before the slower."""
    decision = made[0]
    known = decision.t_fallback is not None and decision.t_fused is not None
    return not decision, decision.t_fused / decision.t_fallback if known else 0.0  # type: ignore[operator]
