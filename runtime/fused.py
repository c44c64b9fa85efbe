"""`FusedGraph`: the rewritten graph, its regions, and its replay."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from graph_capture.calls.fast_check import FastCall
from graph_capture.calls.signature import Bound
from graph_capture.errors import CaptureError, FusionError
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.interpreter import Call, Executor, Step
from graph_capture.log import log
from graph_capture.passes import Receipt
from graph_capture.record.recorded import RecordedGraph
from graph_capture.runtime.account.bisect import Bisection, bisect
from graph_capture.runtime.account.dump import dump
from graph_capture.runtime.account.explain import Explanation, Why, explain, why
from graph_capture.runtime.account.sample import check_sample
from graph_capture.runtime.account.trace import trace
from graph_capture.runtime.account.verify import Verification, verify
from graph_capture.runtime.account.view import card, view
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.library import BoundLibrary, Constants, LibraryKernel
from graph_capture.runtime.program import Program
from graph_capture.runtime.region import Decision, Region
from graph_capture.runtime.replay.cuda_graph import GraphReplay, Graphs
from graph_capture.runtime.replay.memory import Memory
from graph_capture.runtime.replay.plan import Plan
from graph_capture.runtime.replay.replay import Replay
from graph_capture.runtime.replay.steps import Inlined, KernelStep, RegionStep, relaid_outputs
from graph_capture.runtime.save.write import save


class FusedGraph:
    """A program bound for replay.

    Attributes:
        samples: what `FusionConfig.verify_every` has found lately, oldest first.
    """

    def __init__(self, program: Program, memory: Memory | None = None) -> None:
        self.samples: deque[Verification] = deque(maxlen=16)
        self._replays = itertools.count(1)
        self._later: Callable[[Program], Program] | None = None
        self._memory = memory
        self._bind(program)

    def _bind(self, program: Program) -> None:
        self._inlines = self._given_up = False  # library calls that were not recorded are steps; one has failed
        self._program = program
        self._region_steps: list[RegionStep] = []
        self._regions = dict(program.by_node)
        self._bound: list[Constants] = []  # whose results the replay takes as further inputs
        self._more: list[Constants] = []  # that regions hold themselves
        self._inner_names: list[str] = []
        self._labels: dict[int, str] = {}
        recorded, config = program.recorded, program.config
        weights = [recorded.captured[name] for name in self.constants.input_names]
        self._constants = Constants(self.constants, weights, share=False) if self.constants.nodes else None
        if self._constants is not None:
            self._bound.append(self._constants)
        steps: list[tuple[OpNode, Call | None]] = []
        for node, call, label in self._steps(self.subgraph):
            if label:
                self._labels[len(steps)] = label
            steps.append((node, call))
        regions = tuple(self._regions[id(region.node)] for region in program.regions)
        self._program = replace(program, regions=regions)  # some may not have been bindable
        names = (*self.subgraph.input_names, *self._inner_names)
        executor = Executor(steps, names, self.subgraph.output_names, self._labels)
        dynamic = len(recorded.signature.names)
        on_cuda = any(meta.device.type == "cuda" for meta in self.subgraph.values.values())
        make: Callable[..., Replay] = Replay
        if on_cuda and config.cuda_graph == "auto":
            make = GraphReplay
        self._replay = make(
            executor, dynamic, self._memory, keep_outputs=config.clone_outputs, enabled=not config.debug_mode
        )

    def decide_later(self, decide: Callable[[Program], Program]) -> None:
        """Have `decide` decide the program's regions before the first replay, rather than now."""
        self._later = decide

    def _settle(self) -> None:
        if self._later is not None:
            decide, self._later = self._later, None
            self._bind(decide(self._program))

    @property
    def program(self) -> Program:
        """What was recorded, rewritten and decided; a kernel that has failed since is not used any more."""
        failed = {step.region.name: step.failure for step in self._region_steps if step.failure is not None}
        if failed:
            self._region_steps = [step for step in self._region_steps if step.failure is None]
            self._program = self._program.without_failed(failed)
        return self._program

    @program.setter
    def program(self, program: Program) -> None:
        self._program = program

    @property
    def recorded(self) -> RecordedGraph:
        """The graph it was made from."""
        return self._program.recorded

    @property
    def subgraph(self) -> SubGraph:
        """The rewritten graph; each region is one node whose op starts with ``fused.``."""
        return self._program.graph

    @property
    def constants(self) -> SubGraph:
        """What is computed once, from weights or from nothing; its results are inputs of `subgraph`."""
        return self._program.constants

    @property
    def stages(self) -> tuple[tuple[str, SubGraph], ...]:
        """The graph after each pass, by name."""
        return self._program.stages

    @property
    def regions(self) -> tuple[Region, ...]:
        """What was found, in graph order, used or not; the parts of a region follow it."""
        return self.program.regions

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """What each rule looked at, matched and refused."""
        return self._program.receipts

    @property
    def config(self) -> FusionConfig:
        """The configuration it was made with."""
        return self._program.config

    @property
    def whole(self) -> Decision | None:
        """How the whole graph measured against the one with no kernel; None where that was not measured."""
        return self._program.whole

    def _steps(self, graph: SubGraph) -> Iterator[tuple[OpNode, Call | None, str]]:
        """A region is its kernel, or its parts; whatever is not fused runs as it was recorded, bit for bit."""
        for node in graph.nodes:
            region = self._regions.get(id(node))
            step = self._step(region, graph) if region is not None and region.decision else None
            if region is not None and isinstance(step, Inlined):
                self._inlines = True
                self._bound.extend(step.constants)
                self._inner_names.extend(step.names)
                yield from ((inner, call, region.name) for inner, call in step.nodes)
            elif region is not None and isinstance(step, RegionStep):
                yield node, step, region.name
            elif region is not None and region.parts is not None:
                yield from self._steps(region.parts)
            else:
                yield from ((recorded, None, "") for recorded in node.recorded)

    def _step(self, region: Region, graph: SubGraph) -> RegionStep | Inlined | None:
        if region.kernel is None:
            return None
        try:
            relaid = relaid_outputs(graph, region)
            if isinstance(region.kernel, LibraryKernel) and not relaid and not self.config.debug_mode:
                return Inlined.of(region, region.kernel, self.recorded, self.config)
            make = RegionStep if isinstance(region.kernel, LibraryKernel) else KernelStep
            step = make(region, self.recorded, self.config, relaid)
            self._region_steps.append(step)
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

    def replay(self, call: Bound | FastCall) -> Any:
        """Replay on a call that is known to fit."""
        if self._later is not None:
            self._settle()
        every = self.config.verify_every
        if every and next(self._replays) % every == 0:
            sample = check_sample(self.program, self.tensors(call))
            if sample is not None:
                self.samples.append(sample)
        if self._given_up:
            return self.recorded.replay(call)
        try:
            return self.recorded.replay(call, self.execute)
        except (CaptureError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not self.config.fallback_on_error or self.recorded.writes or not self._inlines:
                raise
            result = self.recorded.replay(call)  # which raises what the ops themselves do
            self._given_up = True
            notes = "; ".join([str(error), *getattr(error, "__notes__", ())])
            log.warning("a replay failed, and the ops run as recorded from now on: %s: %s", type(error).__name__, notes)
            return result

    def execute(self, dynamic: Sequence[torch.Tensor], static: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One tensor for each output, from a call's tensors and the captured ones."""
        constants = [tensor for bound in self._bound for tensor in bound()]
        version = sum([bound.version for bound in self._bound])
        return self._replay.run(dynamic, [*static, *constants], (self.recorded.guards.moves, version))

    @property
    def steps(self) -> Sequence[Step]:
        """What a replay without a plan runs, in order."""
        return self._replay.executor.steps

    @property
    def cuda_graphs(self) -> Graphs | None:
        """The CUDA graphs in use; None before they are captured, or where there are none."""
        return self._replay.graphs if isinstance(self._replay, GraphReplay) else None

    @property
    def plan(self) -> Plan | None:
        """How a replay runs; None before the first one, or where there can be no plan."""
        return self._replay.plan

    def when_planned(self, listener: Callable[[], None]) -> None:
        """Have `listener` called as soon as there is a plan."""
        self._replay.on_plan = listener

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
        return self._program.constant_bytes

    def explain(self) -> Explanation:
        """The receipts: what was found, where, what it saves, what was measured and decided."""
        return explain(self.program, self.plan, self.cuda_graphs)

    def why(self, what: str) -> Why:
        """Why the ops of a module (``layers.3.mlp``), a value or a region are fused, or are not.

        Raises:
            KeyError: there is no such module, value or region.
        """
        return why(self.program, what)

    def bisect(self, *args: Any, tolerance: float | None = None, **kwargs: Any) -> Bisection:
        """The first pass or region after which the result differs from the recording's by more than `tolerance`.

        Runs the graph as each pass left it, then with one kernel more at a time; what it writes is undone. The
        difference is a relative L2 distance (default: 64 roundings of each output's dtype).

        Raises:
            SignatureMismatchError: as `__call__`.
        """
        self._settle()
        return bisect(self.program, self.recorded.bind(args, kwargs), self.constant_tensors(), tolerance)

    def verify(self, *args: Any, **kwargs: Any) -> Verification:
        """Run the graph once on these arguments and compare each region's kernel, used or not, with float64.

        Writes of the graph (to inputs, buffers, caches) happen once, as in a replay.

        Raises:
            SignatureMismatchError: as `__call__`.
        """
        self._settle()
        return verify(self.program, self.tensors(self.recorded.bind(args, kwargs)))

    def dump(self, folder: str | os.PathLike[str]) -> Path:
        """Write what became of the recording into a folder, in files that read in order (`index.txt` lists them).

        The recording, its guards, the graph after each pass; of each region its body, spec, generated source, the
        source that is compiled, machine code where there is a tool for it; the decisions, why each op is fused or not,
        and, once there has been a replay, the plan. ``GRAPH_CAPTURE_DUMP=FOLDER`` does it for every graph of a process.

        Args:
            folder: made if it is not there; an earlier dump in it is replaced.

        Returns:
            The folder.

        Raises:
            CaptureError: the folder holds something else, or cannot be written.
        """
        return dump(self.program, folder, self.plan, self.cuda_graphs)

    def view(self, path: str | os.PathLike[str], /, *args: Any, title: str = "graph_capture", **kwargs: Any) -> Path:
        """Write one page of HTML, for a browser without a network: each stage of the rewriting as a graph of modules.

        Each op and region says its shapes, bytes, times, decision, near misses, source line and kernel source.

        Args:
            path: the file; it is replaced.
            args, kwargs: a call, as for `verify`; with it, the page also gives the error of each kernel.
            title: of the page.

        Returns:
            The file.

        Raises:
            SignatureMismatchError: as `__call__`.
            CaptureError: the file cannot be written.
        """
        checked = self.verify(*args, **kwargs) if args or kwargs else None
        return view(self.program, path, title, self.plan, self.cuda_graphs, checked)

    def _repr_html_(self) -> str:
        return card(self.program)

    def trace(self, path: str | os.PathLike[str], /, *args: Any, **kwargs: Any) -> Any:
        """Replay once on these arguments, and write what ran when as JSON for Perfetto or ``chrome://tracing``.

        Each region and each other step is an event by name, with module, line, shapes and bytes; inside lie torch's
        ops and, on CUDA, the kernels (launched one by one: a CUDA graph hides what they belong to). The bytes of the
        arena that are in use are a counter.

        Returns:
            What the call returns. Writes of the graph happen once, as in any replay.

        Raises:
            SignatureMismatchError, DataDependentError: as `__call__`.
            CaptureError: the file cannot be written; or a profiler is on already.
        """
        self._settle()
        call = self.recorded.bind(args, kwargs)
        if self.plan is None:  # a plan is made of what a first run shows
            with self.recorded.undone([*call.tensors, *self.recorded.captured.values()]):
                self.recorded.replay(call, self.execute)
        plan, steps = self.plan, self._replay.executor.steps
        return trace(self.program, path, lambda: self.recorded.replay(call, self.execute), plan, steps)

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
        save(self.program, path, weights)

    def tensors(self, call: Bound | FastCall) -> dict[str, torch.Tensor]:
        """A tensor for each input of `subgraph` in a call."""
        tensors = [*call.tensors, *self.recorded.captured.values(), *self.constant_tensors()]
        return dict(zip(self.subgraph.input_names, tensors, strict=True))

    def __str__(self) -> str:
        return str(self.subgraph)

    def __repr__(self) -> str:
        used = sum(bool(region.decision) for region in self.regions)
        return f"<FusedGraph: {len(self.subgraph)} nodes, {used} of {len(self.regions)} regions run as kernels>"
