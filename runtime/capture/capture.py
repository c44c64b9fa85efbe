"""`capture`: wrap a model so that each new signature is recorded once and replayed afterwards."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from graph_capture.calls.context import Context, context, transformed
from graph_capture.calls.context import difference as context_difference
from graph_capture.calls.signature import Bound, Call
from graph_capture.errors import CaptureError, DataDependentError
from graph_capture.log import log
from graph_capture.record.diff import differences
from graph_capture.record.recorded import RecordedGraph
from graph_capture.record.recorder import DataDependent, Recording, is_recording
from graph_capture.runtime.capture.buckets import Bucket, Buckets, compare
from graph_capture.runtime.capture.standin import StandIn
from graph_capture.runtime.capture.surroundings import surroundings
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.fuse import FusionScheduler
from graph_capture.runtime.fused import FusedGraph

RESTLESS = 8  # recordings in a row without a replay that are worth a warning
VARIANTS = 8  # recordings of one signature, for values that Python reads
Key = tuple[Any, ...]


class Captured(StandIn):
    """A callable that records at the first call of each signature and replays the fused graph afterwards.

    A signature is the structure of the arguments, the layout and the kind of each tensor, the value of everything else,
    what a function uses from around it (its closure, its globals, its ``self``), and what is switched on around the
    call (autocast, default dtype and device, flags). At most `max_signatures` are kept; the one used longest ago goes
    first.
    Everything else that a recording read is guarded; see `guards`. Attributes and methods of a captured module are
    reached through it; a copy records anew.

    Attributes:
        misses: why the latest recordings were made, oldest first: what differed, what it was and what it is.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        config: FusionConfig | None,
        max_signatures: int,
        check: Any,
        data_dependent: DataDependent,
        verify: bool,
        buckets: Mapping[str, Bucket],
    ) -> None:
        functools.update_wrapper(self, function, updated=())
        self._function = function
        self._made_with = (config, max_signatures, check, data_dependent, verify, dict(buckets))
        self._scheduler = FusionScheduler(config)
        self._max_signatures = max_signatures
        self._check = check
        self._found_around = surroundings(function)
        around = (lambda: self._found_around) if self._found_around else None
        self._surroundings = around
        self._options: dict[str, Any] = {
            "data_dependent": data_dependent,
            "verify": verify,
            "surroundings": around,
            "roots": (function,),
        }
        self._in_a_row = self._recordings = 0
        self._buckets = Buckets(function, buckets) if buckets else None
        self._graphs: OrderedDict[Key, list[FusedGraph]] = OrderedDict()
        self._changing: OrderedDict[Key, frozenset[str]] = OrderedDict()  # what the latest recording changed
        self._declined: dict[str, None] = {}  # reasons that were told
        self._given_up: dict[Key, str] = {}
        self._lock = threading.RLock()
        self.misses: deque[str] = deque(maxlen=64)

    @property
    def graphs(self) -> tuple[FusedGraph, ...]:
        """The fused graphs, the most recently used last."""
        return tuple(fused for variants in self._graphs.values() for fused in variants)

    @property
    def guards(self) -> str:
        """What must hold for each recording to be replayed: its signature, and what else it read."""
        return "\n".join("\n    ".join((str(g.recorded.signature), *g.recorded.guards)) for g in self.graphs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay, or record and return the recording's own result.

        Where a call is traced or transformed, or a gradient is asked of an argument, the function itself runs.

        Raises:
            CaptureError: the call cannot be recorded; see `record`.
        """
        if torch.compiler.is_compiling() or is_recording():  # inside another captured function: one of its ops
            return self._function(*args, **kwargs)
        reason = transformed()
        if reason is not None:
            return self._run(reason, args, kwargs)
        padded = self._buckets.pad(args, kwargs) if self._buckets is not None else None
        if padded is None:
            return self._call(args, kwargs)
        before = self._recordings
        result = padded.cut(self._call(padded.args, padded.kwargs))
        if self._recordings != before:
            self._check_padding(args, kwargs, result)
        return result

    def _run(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function as it is."""
        self._decline(reason)
        return self._function(*args, **kwargs)

    def _decline(self, reason: str) -> None:
        """Say once for what reason calls run as they are."""
        if reason not in self._declined:
            self._declined[reason] = None
            self.misses.append(f"run as it is: {reason}")
            log.warning("%s runs as it is where %s", self, reason)

    def _check_padding(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Compare what was just recorded with the call as it is.

        Raises:
            CaptureError: it writes into the caller's memory or objects, or padding changes the result.
        """
        if not self._graphs:
            return
        key, variants = next(reversed(self._graphs.items()))
        recorded = variants[-1].recorded
        try:
            if recorded.writes or recorded.template.changes:
                raise CaptureError("a call that writes into its arguments or the model cannot be padded")
            if self._options["verify"]:
                compare(result, lambda: self._function(*args, **kwargs))
        except CaptureError:
            self._graphs.pop(key, None)
            raise

    # --- finding a recording

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        around = context()
        bound: Bound
        with self._lock:
            found = self._at_once(around, args, kwargs)
            if found is None:
                bound = call = Call(args, kwargs, self._surroundings)
                key = (around, call.key)
                reason = self._not_recorded(key, call)
                if reason is not None:
                    return self._run(reason, args, kwargs)
                candidates, why = self._candidates(key, call)
                if not candidates:
                    return self._record(key, call, args, kwargs, why or self._why(around, call))
            else:
                bound, candidates = found
            self._in_a_row = 0
        changed: DataDependentError | None = None
        for fused in candidates:
            try:
                return self._replay(fused, bound, around)
            except DataDependentError as error:
                changed = error
        with self._lock:
            call = Call(args, kwargs, self._surroundings)
            key = (around, call.key)
            if len(self._graphs.get(key, ())) >= VARIANTS:
                self._give_up(key, str(changed))
                return self._function(*args, **kwargs)
            return self._record(key, call, args, kwargs, str(changed))

    def _at_once(self, around: Context, args: Any, kwargs: Any) -> tuple[Bound, list[FusedGraph]] | None:
        """The call with the latest recordings, if they are seen at once to fit: mostly they do."""
        variants = next(reversed(self._graphs.values()), None)
        if variants is None or len(variants) != 1 or variants[0].recorded.context != around:
            return None
        recorded = variants[0].recorded
        if recorded.guards.broken() is not None:
            return None
        call = recorded.signature.match(args, kwargs, self._surroundings)
        if call is None or recorded.fit.misfit(call.tensors, recorded.guards.moves) is not None:
            return None
        graded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors)
        return None if graded else (call, variants)

    def _candidates(self, key: Key, call: Call) -> tuple[list[FusedGraph], str | None]:
        """The recordings of a signature that fit, the latest first; why others do not."""
        why = None
        found = []
        variants = self._graphs.get(key, [])
        for fused in reversed(variants):
            recorded = fused.recorded
            broken = recorded.guards.broken()
            if broken is not None:
                why = broken
                variants.remove(fused)
                continue
            misfit = recorded.fit.misfit(call.tensors, recorded.guards.moves)
            if misfit is None:
                found.append(fused)
            why = why or misfit
        if found:
            self._graphs.move_to_end(key)
        elif len(variants) >= VARIANTS:
            variants.clear()
        return found, why

    def _not_recorded(self, key: Key, call: Call) -> str | None:
        """Why a call runs as it is; None where it is recorded and replayed."""
        if key in self._given_up:
            return self._given_up[key]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors):
            return "an argument requires a gradient (call it under torch.no_grad())"
        other = next((t for t in call.tensors if type(t) not in _PLAIN), None)
        if any(tensor.is_nested for tensor in call.tensors):
            return "an argument is a nested tensor"
        if other is not None:
            return f"an argument is a {type(other).__name__}"
        module = self._function
        if isinstance(module, torch.nn.Module) and any(
            isinstance(p, (UninitializedParameter, UninitializedBuffer)) for p in module.parameters()
        ):
            return "a lazy module gets its weights"
        return None

    def _why(self, around: Context, call: Call) -> str:
        variants = next((found for found in reversed(self._graphs.values()) if found), None)
        if variants is None:
            return "the first call"
        recorded = variants[-1].recorded
        changed = context_difference(recorded.context, around) if recorded.context is not None else None
        return changed or recorded.signature.difference(call)

    def _replay(self, fused: FusedGraph, call: Bound, around: Context) -> Any:
        if around[2] is None:
            return fused.replay(call)
        with torch._C.DisableTorchFunction():  # the default device is a function mode, and recorded ops know theirs
            return fused.replay(call)

    def _give_up(self, key: Key, changed: str) -> None:
        self._given_up[key] = "a value that Python reads has had too many values"
        self._graphs.pop(key, None)
        log.warning(
            "%s has recorded %d values of what Python reads, and runs such calls as they are: %s",
            self,
            VARIANTS,
            changed,
        )

    # --- recording

    def _record(self, key: Key, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> Any:
        log.info("recording %s: %s", self, why)
        self.misses.append(why)
        self._recordings += 1
        self._in_a_row += 1
        if self._in_a_row == RESTLESS:
            log.warning("%s has recorded %d calls in a row and replayed none; lately: %s", self, RESTLESS, why)
        with Recording(args, kwargs, **self._options) as recording:
            recording.output(self._function(*args, **kwargs))
        graph = recording.graph
        if self._check is not None:
            self._record_twice(call, graph)
        self._keep(key, graph)
        return recording.result

    def _keep(self, key: Key, graph: RecordedGraph) -> None:
        """Fuse what was recorded, for the calls to come."""
        if not self._changes(key, graph):
            self._graphs.setdefault(key, []).append(self._scheduler.analyze(graph))
            self._graphs.move_to_end(key)
            while len(self._graphs) > self._max_signatures:
                self._graphs.popitem(last=False)
                self._scheduler.heuristics.compiler.forget()

    def _changes(self, key: Key, graph: RecordedGraph) -> bool:
        """Whether the code changed something outside its arguments, so that its recording holds no longer.

        Raises:
            CaptureError: it did so the last time too.
        """
        changed = frozenset(name for name, _, _ in graph.guards.changed)
        before = self._changing.pop(key, frozenset())
        repeated = changed & before
        if repeated:
            raise CaptureError(
                f"the code changes {', '.join(sorted(repeated)[:5])} at each call, which a replay would not. Keep it "
                "in a tensor that is written in place, or in an object that is passed in"
            )
        if changed:
            self._changing[key] = changed
            while len(self._changing) > self._max_signatures:
                self._changing.popitem(last=False)
        return bool(changed)

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


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def capture(
    function: Callable[..., Any],
    config: FusionConfig | None = None,
    *,
    max_signatures: int = 16,
    check: Any = None,
    data_dependent: DataDependent = "guard",
    verify: bool = True,
    verify_every: int | None = None,
    buckets: Mapping[str, Bucket] | None = None,
) -> Captured:
    """Wrap a module or function for inference: recorded at the first call of each new signature, replayed afterwards.

    A call whose guards no longer hold (a weight was replaced, a flag of a module changed) is recorded again. A call
    that is traced or transformed (`torch.compile`, `torch.func`, `make_fx`, `torch.jit.trace`, a mode of torch's), or
    an argument of which requires a gradient, runs as it is, with one warning. Results of replays where gradients are
    enabled raise in a backward pass.

    Args:
        function: a module, function, method or callable.
        config: how regions are fused.
        max_signatures: how many recordings are kept.
        check: other inputs (one argument, a tuple of positional or a dict of keyword arguments). At the first call they
            are recorded too, and every scalar and op that differs is reported: what the code computed in Python. What
            that recording writes is undone.
        data_dependent: a value that Python reads is checked at each replay, and recorded again where it changed, up to
            8 values; after that, calls of the signature run as they are. With "error" it is refused.
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
    return Captured(function, config, max_signatures, check, data_dependent, verify, buckets or {})


def _as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
