"""``torch.compile(model, backend="graph_capture")``: Dynamo's graphs, recorded, fused and replayed.

Dynamo hands over an FX graph and calls what it gets for it with every tensor that the graph reads, parameters
included. Parameters and buffers are captured by reference; of a graph that serves several layers they are arguments.
The other arguments are dynamic: of each shape there is one recording.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from graph_capture.calls.signature import Call
from graph_capture.errors import CaptureError, FusionError
from graph_capture.log import log
from graph_capture.record.fx import FxRun, path_of, source_of
from graph_capture.record.recorder import Recording, is_recording
from graph_capture.runtime.capture.capture import Captured, Key
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.fuse import FusionScheduler

SHAPES = 16  # recordings of one graph with one set of parameters; further shapes run as they are
REBOUND = 2  # sets of parameters that a graph is recorded for; after that they are arguments like others
SEEN = 256  # shapes of a dynamic graph that are remembered
# What inductor's modes ask for: all of it but CUDA graphs is what is done anyway.
MODES = {
    "default": {},
    "reduce-overhead": {},
    "max-autotune": {},
    "max-autotune-no-cudagraphs": {"cuda_graph": "off"},
}
_FIRST = "a shape of a dynamic graph is new"


def graph_capture(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend: what Dynamo calls with each graph that it has made.

    Under ``dynamic=True``, and where Dynamo has found that a size changes, a shape is recorded when it comes the second
    time, and runs as it is the first time: a length that grows by one at each call is not worth a recording.

    Args:
        module: the graph.
        example_inputs: for each of its arguments.
        mode: one of torch.compile's; it leaves everything as it is, but that "max-autotune-no-cudagraphs" means
            ``cuda_graph="off"``.
        options: fields of `FusionConfig`.

    Raises:
        CaptureError: there is no such option or mode.
        ValueError: an option's value is out of its range.
    """
    if mode is not None and mode not in MODES:
        raise CaptureError(f"there is no mode {mode!r}; there are {', '.join(MODES)}")
    known = [field.name for field in fields(FusionConfig)]
    unknown = sorted(set(options or ()) - set(known))
    if unknown:
        raise CaptureError(
            f"backend='graph_capture' has no option {', '.join(map(repr, unknown))}; its options are the fields of "
            f"FusionConfig: {', '.join(known)}"
        )
    config: Any = MODES[mode or "default"] | dict(options or {})
    return CompiledGraph(module, example_inputs, _scheduler(FusionConfig(**config)))


@functools.lru_cache(maxsize=8)
def _scheduler(config: FusionConfig) -> FusionScheduler:
    return FusionScheduler(config)  # kernels, decisions and memory are shared by all graphs of a model


class CompiledGraph:
    """One of Dynamo's graphs, called with a value for each of its placeholders.

    Attributes:
        module: the graph as it came, which runs wherever a replay cannot.
        scheduler: what fuses its recordings.
        numbers: positions of numbers that are passed as tensors; their values belong to the signature.
        names: the parameters by position.
        dynamic: whether sizes are arguments too.
        captured: the recordings, with the parameters that came last; None before the first call.
    """

    def __init__(self, module: torch.fx.GraphModule, example_inputs: Sequence[Any], scheduler: FusionScheduler) -> None:
        self.module, self.scheduler = module, scheduler
        self.numbers, self.names = set[int](), dict[int, str]()
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        for i, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
            origin = node.meta.get("grapharg")
            if getattr(origin, "pass_arg_as_tensor", False) and not getattr(origin, "is_tensor", True):
                self.numbers.add(i)
            elif _is_static(value):
                name = getattr(getattr(origin, "source", None), "name", "")
                self.names[i] = path_of(name() if callable(name) else name) or str(node.target)
        self.dynamic = any(isinstance(value, torch.SymInt) for value in example_inputs)
        where = next((at for node in module.graph.nodes if (at := source_of(node)).file), None)
        self._where = "" if where is None else f" ({where.file}:{where.line})"
        self._rebound = 0
        self.captured: CapturedFx | None = None
        self._told: set[str] = set()

    def __call__(self, *args: Any) -> Any:
        """Replay, record, or run the graph as it is."""
        if is_recording():
            return self.module(*args)
        if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            reason = "a gradient is asked for (call the model under torch.no_grad())"
            if reason not in self._told:
                self._told.add(reason)
                log.warning("%s runs as it is where %s", self, reason)
            return self.module(*args)
        captured = self.captured
        if captured is None or not all(args[i] is tensor for i, tensor in captured.held.items()):
            self._rebound += 1
            positions = self.names if self._rebound <= REBOUND else ()
            captured = self.captured = CapturedFx(self, {i: args[i] for i in positions})
        numbers, held = self.numbers, captured.held
        return captured(*[arg.item() if i in numbers else arg for i, arg in enumerate(args) if i not in held])

    def __repr__(self) -> str:
        return f"a graph of torch.compile{self._where}"


class CapturedFx(Captured):
    """One of Dynamo's graphs with one set of parameters: a recording for each shape of its other arguments.

    Args:
        graph: the graph.
        held: the parameters, by position.
    """

    def __init__(self, graph: CompiledGraph, held: dict[int, Any]) -> None:
        self._graph, self._held = graph, held
        self._parameters = {graph.names[i]: tensor for i, tensor in held.items()}
        count = sum(node.op == "placeholder" for node in graph.module.graph.nodes)
        self._moving = [i for i in range(count) if i not in held]
        super().__init__(self._as_it_is, graph.scheduler.config, SHAPES, None, "guard", True, {})
        self._scheduler = graph.scheduler
        self._surroundings = None  # Dynamo guards what the code reads
        self._options |= {"surroundings": None, "roots": (), "follow": False, "undo_failed": True}
        self._seen: set[Key] = set()
        self._declined[_FIRST] = None  # not worth a word

    @property
    def held(self) -> dict[int, Any]:
        """The parameters, by position; they count by identity."""
        return self._held

    def _arguments(self, moving: Sequence[Any]) -> list[Any]:
        """A value for each placeholder."""
        values = {**self._held, **dict(zip(self._moving, moving, strict=True))}
        return [values[i] for i in range(len(values))]

    def _as_it_is(self, *moving: Any) -> Any:
        values = self._arguments(moving)
        for i in self._graph.numbers:
            values[i] = torch.tensor(values[i], dtype=torch.float64)
        return self._graph.module(*values)

    def _not_recorded(self, key: Key, call: Call) -> str | None:
        reason = super()._not_recorded(key, call)
        if reason is not None or self._graphs.get(key):
            return reason
        if len(self._graphs) >= SHAPES:
            return f"it has been recorded for {SHAPES} other shapes"
        if self._graph.dynamic and key not in self._seen:
            self._seen = self._seen if len(self._seen) < SEEN else set()
            self._seen.add(key)
            return _FIRST
        return None

    def _record(self, key: Key, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> Any:
        """Record the graph; where that cannot be, run it as it is from now on."""
        log.info("recording %s: %s", self, why)
        self.misses.append(why)
        run, finished = None, False
        try:
            with Recording(args, kwargs, **self._options) as recording:
                run = FxRun(self._graph.module, self._parameters)
                result = run.run(*self._arguments(args), enable_io_processing=False)
                finished = True
                recording.output(result)
            self._keep(key, recording.graph)
        except FusionError:  # asked for by fallback_on_error=False
            raise
        except Exception as error:
            node = None if finished or run is None else run.node
            self._given_up[key] = _cannot(node, error)
            self._decline(self._given_up[key])
            return result if finished else self._as_it_is(*args)  # what was written is there, or undone
        return recording.result

    def __repr__(self) -> str:
        return repr(self._graph)


def _cannot(node: torch.fx.Node | None, error: Exception) -> str:
    """Why a graph is not recorded: the op, where it is, and what stands against it."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    what = (
        "it cannot be recorded"
        if node is None
        else f"{getattr(node.target, '__name__', node.target)} ({source_of(node)}) cannot be recorded"
    )
    return f"{what}: {type(error).__name__}: {text[0]}"


def _is_static(value: Any) -> bool:
    """Whether an example input is a parameter or a buffer, or was marked as one that stays."""
    if not isinstance(value, torch.Tensor):
        return False
    return isinstance(value, torch.nn.Parameter) or getattr(value, "_dynamo_static_input_type", None) is not None
