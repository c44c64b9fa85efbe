"""`capture`: wrap a model so that each new signature is recorded once and replayed afterwards."""

from __future__ import annotations

import functools
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from graph_capture.calls.foreign import is_module
from graph_capture.calls.signature import Bound, Call
from graph_capture.calls.structure import ByIdentity, Walk
from graph_capture.errors import CaptureError, DataDependentError
from graph_capture.log import log
from graph_capture.record.diff import differences
from graph_capture.record.recorded import RecordedGraph
from graph_capture.record.recorder import DataDependent, Recording, is_recording
from graph_capture.runtime.capture.buckets import Bucket, Buckets, compare
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.fuse import FusionScheduler
from graph_capture.runtime.fused import FusedGraph

LARGE = 10_000  # values; something around a function that holds more (a tokenizer) counts by identity
RESTLESS = 8  # recordings in a row without a replay that are worth a warning


class Captured:
    """A callable that records at the first call of each signature and replays the fused graph afterwards.

    A signature is the structure of the arguments, the shape, stride, dtype, device and aliasing of each tensor, the
    value of everything else, and what a function uses from around it: its closure, its globals, its ``self``. At most
    `max_signatures` are kept; the one used longest ago goes first.

    Attributes:
        misses: why the latest recordings were made, oldest first.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        config: FusionConfig | None,
        *,
        max_signatures: int,
        check: Any,
        data_dependent: DataDependent,
        verify: bool,
        buckets: Mapping[str, Bucket],
    ) -> None:
        functools.update_wrapper(self, function, updated=())
        self._function = function
        self._scheduler = FusionScheduler(config)
        self._max_signatures = max_signatures
        self._check = check
        self._options: dict[str, Any] = {
            "data_dependent": data_dependent,
            "verify": verify,
            "surroundings": self._surroundings,
        }
        self._large = frozenset(name for name, value in surroundings(function).items() if _is_large(value))
        self._in_a_row = self._recordings = 0
        self._buckets = Buckets(function, buckets) if buckets else None
        self._graphs: OrderedDict[tuple[Any, ...], FusedGraph] = OrderedDict()
        self._lock = threading.RLock()
        self.misses: deque[str] = deque(maxlen=64)

    @property
    def graphs(self) -> tuple[FusedGraph, ...]:
        """The fused graphs, the most recently used last."""
        return tuple(self._graphs.values())

    @property
    def guards(self) -> str:
        """What must hold for each recording to be replayed: its signature, and the weights and modules it relies on."""
        return "\n".join(
            "\n    ".join((str(fused.recorded.signature), *fused.recorded.guards)) for fused in self._graphs.values()
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay, or record and return the recording's own result.

        Raises:
            CaptureError: the call cannot be recorded; see `record`.
        """
        if is_recording():  # inside another captured function: one of its ops
            return self._function(*args, **kwargs)
        padded = self._buckets.pad(args, kwargs) if self._buckets is not None else None
        if padded is None:
            return self._call(args, kwargs)
        before = self._recordings
        result = padded.cut(self._call(padded.args, padded.kwargs))
        if self._recordings != before:
            self._check_padding(args, kwargs, result)
        return result

    def _check_padding(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Compare what was just recorded with the call as it is.

        Raises:
            CaptureError: it writes into the caller's memory or objects, or padding changes the result.
        """
        key, fused = next(reversed(self._graphs.items()))
        try:
            if fused.recorded.writes or fused.recorded.template.changes:
                raise CaptureError("a call that writes into its arguments or the model cannot be padded")
            if self._options["verify"]:
                compare(result, self._function(*args, **kwargs))
        except CaptureError:
            self._graphs.pop(key, None)
            raise

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:
            fused = next(reversed(self._graphs.values()), None)  # mostly the one
            call: Bound | None = None
            if fused is not None and fused.recorded.guards.broken() is None:
                call = fused.recorded.signature.match(args, kwargs, self._surroundings)
            if call is None:
                call = Call(args, kwargs, self._surroundings)
                fused = self._graphs.get(call.key)
                if fused is None:
                    return self._record(call, args, kwargs, self._why(call))
                broken = fused.recorded.guards.broken()
                if broken is not None:
                    return self._record(call, args, kwargs, broken)
                self._graphs.move_to_end(call.key)
            assert fused is not None
            self._in_a_row = 0
        try:
            return fused.replay(call)
        except DataDependentError as changed:
            with self._lock:
                return self._record(Call(args, kwargs, self._surroundings), args, kwargs, str(changed))

    def _surroundings(self) -> dict[str, Any]:
        found = surroundings(self._function)
        return {name: ByIdentity(value) if name in self._large else value for name, value in found.items()}

    def _why(self, call: Call) -> str:
        latest = next(reversed(self._graphs.values()), None)
        return "the first call" if latest is None else latest.recorded.signature.difference(call)

    def _record(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> Any:
        log.info("recording %s: %s", self, why)
        self.misses.append(why)
        self._recordings += 1
        self._in_a_row += 1
        if self._in_a_row == RESTLESS:
            log.warning("%s has recorded %d calls in a row and replayed none; lately: %s", self, RESTLESS, why)
        with Recording(args, kwargs, **self._options) as recording:
            result = self._function(*args, **kwargs)
            recording.output(result)
        graph = recording.graph
        if self._check is not None:
            self._record_twice(call, graph)
        previous = self._graphs.pop(call.key, None)
        if previous is not None:
            self._settle(previous.recorded, graph)
        self._graphs[call.key] = self._scheduler.analyze(graph)
        while len(self._graphs) > self._max_signatures:
            self._graphs.popitem(last=False)
        return result

    def _settle(self, previous: RecordedGraph, graph: RecordedGraph) -> None:
        """Deal with plain attributes that the code itself changes: harmless where it records the same ops all the same.

        Raises:
            CaptureError: it records other ops, so that no recording could ever be replayed.
        """
        changed = previous.guards.rebound & graph.guards.rebound
        if not changed:
            return
        found = differences(previous, graph)
        if found:
            raise CaptureError(
                f"the code changes {', '.join(sorted(changed))} at each call and computes with it ({found[0]}). Keep "
                "it in a tensor that is written in place, or pass it in"
            )
        graph.guards.without(changed)

    def _record_twice(self, call: Call, graph: RecordedGraph) -> None:
        """Record `check` too and compare.

        Raises:
            DataDependentError: both have one signature, yet the recordings differ.
        """
        args, kwargs = _as_arguments(self._check)
        self._check = None
        with Recording(args, kwargs, **self._options, rollback=True) as recording:
            recording.output(self._function(*args, **kwargs))
        found = differences(graph, recording.graph)
        report = "\n  ".join(("two recordings with different inputs differ:", *found))
        if found and Call(args, kwargs, self._surroundings).key == call.key:
            raise DataDependentError(
                f"{report}\nThe code turns input values into Python values; a replay would freeze them"
            )
        if found:
            log.warning("%s", report)
            self.misses.append(report)

    def explain(self) -> str:
        """The receipts of every signature seen so far."""
        return "\n\n".join(f"{fused.recorded.signature}\n{fused.explain()}" for fused in self.graphs)

    def __repr__(self) -> str:
        return f"<captured {self._function!r:.60}: {len(self._graphs)} signatures>"


def capture(
    function: Callable[..., Any],
    config: FusionConfig | None = None,
    *,
    max_signatures: int = 16,
    check: Any = None,
    data_dependent: DataDependent = "error",
    verify: bool = True,
    verify_every: int | None = None,
    buckets: Mapping[str, Bucket] | None = None,
) -> Captured:
    """Wrap a module or function for inference: recorded at the first call of each new signature, replayed afterwards.

    A call whose guards no longer hold (a weight was replaced, a flag of a module changed) is recorded again.

    Args:
        function: a module, function, method or callable.
        config: how regions are fused.
        max_signatures: how many recordings are kept.
        check: other inputs (one argument, a tuple of positional or a dict of keyword arguments). At the first call they
            are recorded too, and every scalar and op that differs is reported: what the code computed in Python. What
            that recording writes is undone.
        data_dependent: with "guard", a value that Python reads is checked at each replay, and recorded again where it
            changed.
        verify: check each recording by one replay; see `record`.
        verify_every: see `FusionConfig.verify_every`; None leaves what `config` says.
        buckets: dimensions that may be padded, by a name of yours, so that one recording serves all lengths up to a
            size. The first call of each size is also run as it is, and padding that changes its result is an error::

                sequence = Bucket((16, 32, 64), {"tokens": 1, "mask": 1}, outputs={"logits": 1})
                fast = capture(model, buckets={"sequence": sequence})

    Raises:
        ValueError: `max_signatures` is less than 1, or a bucket names an argument that the function does not have.
    """
    if max_signatures < 1:
        raise ValueError(f"max_signatures must be at least 1, got {max_signatures}")
    if verify_every is not None:
        config = replace(config or FusionConfig(), verify_every=verify_every)
    return Captured(
        function,
        config,
        max_signatures=max_signatures,
        check=check,
        data_dependent=data_dependent,
        verify=verify,
        buckets=buckets or {},
    )


def _as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def surroundings(function: Any) -> dict[str, Any]:
    """What `function` uses besides its arguments, by name. A module's are guarded by the guards of each recording."""
    if isinstance(function, torch.nn.Module) or is_module(function):
        return {}
    if isinstance(function, functools.partial):
        return {"partial": (function.args, function.keywords), **surroundings(function.func)}
    if isinstance(function, types.MethodType):
        owner = function.__self__
        held = vars(owner) if callable(owner) and not isinstance(owner, (torch.nn.Module, type)) else owner
        return {"self": held, **surroundings(function.__func__)}
    if not isinstance(function, types.FunctionType):
        call = getattr(type(function), "__call__", None)  # noqa: B004
        return surroundings(types.MethodType(call, function)) if isinstance(call, types.FunctionType) else {}
    code, around = function.__code__, function.__globals__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    found = {name: cell.cell_contents for name, cell in cells if _is_bound(cell)}
    return found | {n: around[n] for n in code.co_names if n in around and not isinstance(around[n], _STATIC)}


_STATIC = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)


def _is_bound(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _is_large(value: Any) -> bool:
    walk = Walk()
    walk.spec(value)
    return len(walk.objects) + sum(len(content[2]) for content in walk.contents) > LARGE
