"""`FusedGraph`: the rewritten graph, its regions, and its replay."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from graph_capture.codegen import CompiledKernel
from graph_capture.passes import Rewritten
from graph_capture.passes.cleanup import is_contiguous
from graph_capture.passes.regions import moved_bytes
from graph_capture.passes.rewrite import unviewable
from graph_capture.runtime.bisect import Bisection, bisect
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.explain import Explanation, Why, explain, why
from graph_capture.runtime.heuristics import Decision, Kernel
from graph_capture.runtime.library import Bound as BoundLibrary
from graph_capture.runtime.library import Constants, LibraryKernel
from graph_capture.runtime.sample import check_sample
from graph_capture.runtime.verify import Verification, apart, close_enough, verify

from graph_capture.errors import FusionError
from graph_capture.executor import Call, Executor
from graph_capture.graph import OpNode, SubGraph, TensorMeta
from graph_capture.launches import Launch, Tensors
from graph_capture.log import log
from graph_capture.matcher import Match
from graph_capture.ops import FUSED
from graph_capture.plan import Plan
from graph_capture.recorded import RecordedGraph
from graph_capture.replay import Memory, Replay
from graph_capture.signature import Call as Bound


@dataclass(frozen=True)
class Region:
    """A fusable region of a graph.

    Attributes:
        name: unique in its graph: ``swiglu_0``.
        node: the fused node of the rewritten graph that stands for it.
        values: the layouts of the graph's values.
        decision: whether its kernel is used, and why.
        kernel: its kernel, also where it is not used; None where none could be made.
        parts: where there is no kernel, the region with smaller regions inside, which run instead.
        parent: the name of the region that it is a part of.
    """

    name: str
    node: OpNode
    values: Mapping[str, TensorMeta] = field(repr=False)
    decision: Decision
    kernel: Kernel | None = field(repr=False)
    parts: SubGraph | None = field(default=None, repr=False)
    parent: str = ""

    @property
    def kind(self) -> str:
        """The rule that found it: ``swiglu``."""
        return self.node.op_type.removeprefix(FUSED)

    @property
    def body(self) -> SubGraph:
        """The region as a graph of canonical ops over its own value names."""
        return self.node.attr("body")

    @property
    def nodes(self) -> tuple[OpNode, ...]:
        """The recorded ops that it replaces."""
        return self.node.recorded

    @property
    def where(self) -> str:
        """The module path that its ops share."""
        return self.node.source.module if self.node.source else ""

    @property
    def source(self) -> str:
        """The generated application; empty where no kernel could be made."""
        return self.kernel.source if self.kernel else ""

    @property
    def bytes_before(self) -> int:
        """Bytes that the recorded ops read and write."""
        graph = SubGraph(self.nodes, self.node.inputs, self.node.outputs, self.values)
        return sum(moved_bytes(graph, [index]) for index in range(len(graph)))

    @property
    def bytes_after(self) -> int:
        """Bytes that the kernel reads and writes."""
        graph = SubGraph(self.nodes, self.node.inputs, self.node.outputs, self.values)
        return moved_bytes(graph, range(len(graph)))

    @property
    def bytes_saved(self) -> int:
        """Bytes of memory traffic that the kernel avoids."""
        return self.bytes_before - self.bytes_after


class FusedGraph:
    """A rewritten graph, bound for replay.

    Attributes:
        recorded: the graph it was made from.
        subgraph: the rewritten graph; each region is one node whose op starts with ``fused.``.
        constants: what is computed once, from weights or from nothing; its results are inputs of `subgraph`.
        stages: the graph after each pass, by name.
        regions: what was found, in graph order, used or not; the parts of a region follow it.
        receipts: what each rule looked at, matched and refused.
        config: the configuration it was made with.
        samples: what `FusionConfig.verify_every` has found lately, oldest first.
        whole: how the whole graph measured against the one with no kernel; None where that was not measured.
    """

    whole: Decision | None = None

    def __init__(
        self,
        recorded: RecordedGraph,
        rewritten: Rewritten,
        regions: tuple[Region, ...],
        config: FusionConfig,
        memory: Memory | None = None,
    ) -> None:
        self.recorded = recorded
        self.subgraph = rewritten.graph
        self.constants = rewritten.constants
        self.stages = rewritten.stages
        self.receipts = rewritten.receipts
        self.config = config
        self.samples: deque[Verification] = deque(maxlen=16)
        self._replays = itertools.count(1)
        self._regions = {id(region.node): region for region in regions}
        self._bound: list[Constants] = []  # whose results the replay takes as further inputs
        self._more: list[Constants] = []  # that regions hold themselves
        self._inner_names: list[str] = []
        self._labels: dict[int, str] = {}
        weights = [recorded.captured[name] for name in self.constants.input_names]
        self._constants = Constants(self.constants, weights, share=False) if self.constants.nodes else None
        if self._constants is not None:
            self._bound.append(self._constants)
        steps: list[tuple[OpNode, Call | None]] = []
        for node, call, label in self._steps(self.subgraph):
            if label:
                self._labels[len(steps)] = label
            steps.append((node, call))
        self.regions = tuple(self._regions[id(region.node)] for region in regions)
        names = (*self.subgraph.input_names, *self._inner_names)
        executor = Executor(steps, names, self.subgraph.output_names, self._labels)
        self._replay = Replay(
            executor,
            len(recorded.signature.names),
            memory,
            keep_outputs=config.clone_outputs,
            enabled=not config.debug_mode,
        )

    def _steps(self, graph: SubGraph) -> Iterator[tuple[OpNode, Call | None, str]]:
        """A region is its kernel, or its parts; whatever is not fused runs as it was recorded, bit for bit."""
        for node in graph.nodes:
            region = self._regions.get(id(node))
            step = self._step(region, graph) if region is not None and region.decision else None
            if region is not None and isinstance(step, _Inlined):
                self._bound.extend(step.constants)
                self._inner_names.extend(step.names)
                yield from ((inner, None, region.name) for inner in step.nodes)
            elif region is not None and isinstance(step, _Step):
                yield node, step, region.name
            elif region is not None and region.parts is not None:
                yield from self._steps(region.parts)
            else:
                yield from ((recorded, None, "") for recorded in node.recorded)

    def _step(self, region: Region, graph: SubGraph) -> _Step | _Inlined | None:
        if region.kernel is None:
            return None
        try:
            relaid = _relaid(graph, region.node)
            if isinstance(region.kernel, LibraryKernel) and not relaid and not self.config.debug_mode:
                return _Inlined.of(region, region.kernel, self.recorded, self.config)
            step = _Step(region, self.recorded, self.config, relaid)
            if isinstance(step.kernel, BoundLibrary):
                self._more.append(step.kernel.constants)
            return step
        except FusionError as error:  # found only with the weights at hand
            decision = replace(region.decision, use=False, reason=str(error))
            self._regions[id(region.node)] = replace(region, decision=decision)
            return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay on new arguments of the recorded signature; returns what ``output()`` was given.

        Raises:
            SignatureMismatchError, DataDependentError: as `RecordedGraph.run`.
        """
        return self.replay(self.recorded.bind(args, kwargs))

    def replay(self, call: Bound | Match) -> Any:
        """Replay on a call that is known to fit."""
        every = self.config.verify_every
        if every and next(self._replays) % every == 0 and (sample := check_sample(self, call)) is not None:
            self.samples.append(sample)
        constants = [tensor for bound in self._bound for tensor in bound()]
        return self.recorded.replay(call, self._replay, constants, sum([bound.version for bound in self._bound]))

    @property
    def plan(self) -> Plan | None:
        """How a replay runs; None before the first one, or where there can be no plan."""
        return self._replay.plan

    def constant_tensors(self) -> Sequence[torch.Tensor]:
        """The results of `constants`, made again where a weight behind them has changed."""
        return self._constants() if self._constants is not None else ()

    def refresh(self) -> None:
        """Compute `constants` and copies of merged weights again at the next replay.

        Needed only after a write that torch does not count (``parameter.data.mul_(2)``), and only with
        ``fold_weights=True`` or ``merge_linears="copy"``: everything else reads the weights themselves.
        """
        for constants in (*self._bound, *self._more):
            constants.refresh()

    @property
    def constant_bytes(self) -> int:
        """Memory that the results of `constants` take, in bytes."""
        return sum(self.subgraph.values[name].nbytes for name in self.constants.output_names)

    def explain(self) -> Explanation:
        """The receipts: what was found, where, what it saves, what was measured and decided."""
        return explain(self)

    def why(self, what: str) -> Why:
        """Why the ops of a module (``layers.3.mlp``), a value or a region are fused, or are not.

        Raises:
            KeyError: there is no such module, value or region.
        """
        return why(self, what)

    def bisect(self, *args: Any, tolerance: float | None = None, **kwargs: Any) -> Bisection:
        """The first pass or region after which the result differs from the recording's by more than `tolerance`.

        Runs the graph as each pass left it, then with one kernel more at a time; what it writes is undone. The
        difference is a relative L2 distance (default: 64 roundings of each output's dtype).

        Raises:
            SignatureMismatchError: as `__call__`.
        """
        return bisect(self, self.recorded.bind(args, kwargs), tolerance)

    def verify(self, *args: Any, **kwargs: Any) -> Verification:
        """Run the graph once on these arguments and compare each region's kernel, used or not, with float64.

        Writes of the graph (to inputs, buffers, caches) happen once, as in a replay.

        Raises:
            SignatureMismatchError: as `__call__`.
        """
        return verify(self, self.tensors(self.recorded.bind(args, kwargs)))

    def save(self, path: str | os.PathLike[str], weights: bool = True) -> None:
        """Write the graph into one safetensors file, which `graph_capture.load` replays without the model's code.

        Args:
            path: the file; it is replaced as a whole.
            weights: keep the captured parameters too. Without them, `load` must be given them. Buffers and constants
                are always kept.

        Raises:
            CaptureError: the graph takes or gives something other than tensors, plain values, tuples, lists and dicts;
                or runs an op that is not torch's.
        """
        from graph_capture.runtime.save import save

        save(self, path, weights)

    def tensors(self, call: Bound | Match) -> dict[str, torch.Tensor]:
        """A tensor for each input of `subgraph` in a call."""
        tensors = [*call.tensors, *self.recorded.captured.values(), *self.constant_tensors()]
        return dict(zip(self.subgraph.input_names, tensors, strict=True))

    def __str__(self) -> str:
        return str(self.subgraph)

    def __repr__(self) -> str:
        used = sum(bool(region.decision) for region in self.regions)
        return f"<FusedGraph: {len(self.subgraph)} nodes, {used} of {len(self.regions)} regions run as kernels>"


@dataclass(frozen=True)
class _Inlined:
    """A region as library calls that are steps of the replay themselves.

    Attributes:
        nodes: the calls.
        names: value names of what the weights make computed, which is an input of the replay.
        constants: what computes it.
    """

    nodes: tuple[OpNode, ...]
    names: tuple[str, ...] = ()
    constants: tuple[Constants, ...] = ()

    @classmethod
    def of(cls, region: Region, kernel: LibraryKernel, graph: RecordedGraph, config: FusionConfig) -> _Inlined:
        """Raises FusionError where the weights cannot be merged."""
        outer = dict(zip(kernel.body.input_names, region.node.inputs, strict=True))
        outer |= dict(zip(kernel.rest.output_names, region.node.outputs, strict=True))
        inner = [*kernel.rest.input_names, *(name for node in kernel.rest.nodes for name in node.outputs)]
        renamed = {name: f"{region.name}.{name}" for name in inner} | outer
        nodes = tuple(node.rename(renamed) for node in kernel.rest.nodes)
        if kernel.once is None:
            return cls(nodes)
        given = {name: graph.captured[renamed[name]] for name in kernel.once.input_names}
        constants = Constants(kernel.once, list(given.values()), config.merge_linears == "views")
        return cls(nodes, tuple(renamed[name] for name in kernel.once.output_names), (constants,))


class _Step:
    """Runs a region's kernel; if that ever fails, the recorded ops, from then on."""

    def __init__(
        self, region: Region, graph: RecordedGraph, config: FusionConfig, relaid: Sequence[tuple[int, TensorMeta]]
    ) -> None:
        assert region.kernel is not None
        self.relaid = relaid
        self.region = region
        self.config = config
        node = region.node
        self.recorded = Executor([(inner, None) for inner in node.recorded], node.inputs, node.outputs)
        weights = [graph.captured.get(name, _NOTHING) for name in node.inputs]
        self.kernel: Callable[[list[torch.Tensor]], Any] | None = region.kernel.bind(
            weights, share=config.merge_linears == "views"
        )

    def __call__(self, tensors: list[torch.Tensor]) -> Any:
        if self.kernel is None:
            return self.recorded.run(tensors)
        before = apart(self.region.body, tensors) if self.config.debug_mode else tensors
        try:
            outputs = self.kernel(tensors)
        except Exception as error:
            if not self.config.fallback_on_error:
                raise
            log.warning("%s failed and replays as recorded from now on: %s", self.region.name, error)
            self.kernel = None
            return self.recorded.run(tensors)
        if self.relaid:
            outputs = list(outputs)
            for index, meta in self.relaid:
                if outputs[index].stride() != meta.stride:
                    empty = outputs[index].new_empty_strided(meta.shape, meta.stride)
                    outputs[index] = empty.copy_(outputs[index])
        if self.config.debug_mode:
            for name, fused, eager in zip(self.region.node.outputs, outputs, self.recorded.run(before), strict=True):
                if not close_enough(fused, eager):
                    log.warning("%s: %s differs from the recorded ops beyond rounding", self.region.name, name)
        return outputs

    def prepare(self, inputs: Tensors, outputs: Tensors) -> Launch:
        """See `graph_capture.launches.Prepares`."""
        if self.kernel is None or not isinstance(self.region.kernel, CompiledKernel):
            raise FusionError("only compiled kernels are bound to addresses")
        return self.region.kernel.prepare(inputs, outputs)

    def failed(self, error: Exception, inputs: Tensors, outputs: Tensors) -> Launch:
        """The recorded ops, whose results are copied to where the kernel's were to be."""
        if not self.config.fallback_on_error:
            raise error
        if self.kernel is not None:
            log.warning("%s failed and replays as recorded from now on: %s", self.region.name, error)
            self.kernel = None

        def launch() -> None:
            for output, result in zip(outputs, self.recorded.run(inputs), strict=True):
                if output.data_ptr() != result.data_ptr():
                    output.copy_(result)

        return launch


def _relaid(graph: SubGraph, node: OpNode) -> list[tuple[int, TensorMeta]]:
    """The outputs, by position, that must have the strides that were recorded, for the views of them."""
    found = []
    for index, name in enumerate(node.outputs):
        meta = graph.values[name]
        if not is_contiguous(meta) and unviewable(graph, name, torch.empty(meta.shape, device="meta")) is not None:
            found.append((index, meta))
    return found


_NOTHING = torch.empty(0)  # stands for what is not a weight
