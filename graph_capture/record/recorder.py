"""The recorder: runs the user's code as it is and writes down every op it calls.

Two torch modes do the work. The dispatch mode sees each ATen op after autograd and autocast; the function mode above it
keeps a few calls whole (`graph_capture.record.whole_calls.SEMANTIC`). `graph_capture.record.builder` turns the calls
into nodes.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from graph_capture.calls.signature import Surroundings
from graph_capture.errors import CaptureError
from graph_capture.ir.ops import op, op_of
from graph_capture.record.builder import GraphBuilder
from graph_capture.record.reads import is_looked_at
from graph_capture.record.recorded import RecordedGraph
from graph_capture.record.treatments import (
    PROPERTIES,
    READS_DATA,
    READS_INPUTS,
    STORAGES,
    Treatment,
    by_values,
    casts_inside,
    read_by,
    treatment_of,
)
from graph_capture.record.whole_calls import SEMANTIC

_active = threading.local()
_patching = threading.Lock()
_recordings = 0  # how many are active in all threads
aten = torch.ops.aten

_SETS_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]

DataDependent = Literal["error", "guard"]


class Recording:
    """What `record` yields. Call `output` inside the context; read `graph` after it."""

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        keep_whole: bool = True,
        data_dependent: DataDependent = "error",
        verify: bool = False,
        surroundings: Surroundings | None = None,
        rollback: bool = False,
        undo_failed: bool = False,
        roots: Sequence[Any] = (),
        follow: bool = True,
    ) -> None:
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = (args, kwargs)
        self._surroundings = surroundings
        self._rollback, self._undo_failed = rollback, undo_failed
        self._roots, self._follow = roots, follow
        self._keep_whole = keep_whole
        self._data_dependent = data_dependent
        self._verify = verify
        self._output: Any = None
        self._has_output = False
        self._graph: RecordedGraph | None = None
        self._writer: GraphBuilder | None = None
        self._stack = contextlib.ExitStack()

    def output(self, value: Any) -> None:
        """Declare what `RecordedGraph.run` returns: tensors, Python values, containers and objects of them.

        Raises:
            CaptureError: called outside the context, or twice.
        """
        if self._writer is None:
            raise CaptureError("recording.output() must be called inside the recording context")
        if self._has_output:
            raise CaptureError("recording.output() was called twice; pass all outputs at once, as a tuple or a dict")
        self._output, self._has_output = value, True

    @property
    def graph(self) -> RecordedGraph:
        """The recorded graph.

        Raises:
            CaptureError: the context has not ended, or ended with an exception.
        """
        if self._graph is None:
            raise CaptureError("there is no graph: the recording has not ended, or it ended with an exception")
        return self._graph

    @property
    def result(self) -> Any:
        """What `output` was given; where gradients are enabled, as a replay would give it.

        Raises:
            CaptureError: as `graph`.
        """
        return self._output if self.graph else None

    def __enter__(self) -> Recording:
        if is_recording():
            raise CaptureError("a recording is already active in this thread; end it before you start another")
        if self._arguments is None:
            raise CaptureError("a recording can be entered once; call record() again")
        (args, kwargs), self._arguments = self._arguments, None
        guard = self._data_dependent == "guard"
        verify = self._verify or self._rollback
        writer = GraphBuilder(args, kwargs, self._surroundings, guard=guard, verify=verify, roots=self._roots)
        with contextlib.ExitStack() as stack:
            if not torch.is_inference_mode_enabled():
                stack.enter_context(torch.no_grad())
            writer.autocast = torch._C._is_any_autocast_enabled()
            if writer.autocast:
                stack.enter_context(_own_casts())
            if "torch._dynamo" in sys.modules:  # what is compiled runs as it is, op by op
                stack.enter_context(_uncompiled)
            stack.enter_context(writer.modules)
            stack.enter_context(_foreign_kernels())
            for adapter in writer.exposures.adapters:
                stack.enter_context(adapter.recording(current_writer))
            stack.enter_context(_DispatchMode(writer))
            if self._keep_whole:
                stack.enter_context(_FunctionMode(writer))
            if self._follow:  # a pattern is never replayed: what it reads is nobody's concern
                stack.enter_context(writer.reads_of_code)
            self._stack = stack.pop_all()
        self._writer = writer
        _active.recording = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        writer, self._writer = self._writer, None
        _active.recording = None
        self._stack.close()
        assert writer is not None
        output = self._output if self._has_output or error is not None else writer.alive()
        self._output = None
        if error is not None and self._undo_failed:  # whoever runs the code once more must find what it found
            writer.undo()
        if error is None:
            with contextlib.nullcontext() if torch.is_inference_mode_enabled() else torch.no_grad():
                self._graph = writer.finish(output, rollback=self._rollback)
            self._output = writer.settled(output)


def record(*args: Any, data_dependent: DataDependent = "error", verify: bool = True, **kwargs: Any) -> Recording:
    """Record every op called inside ``with record(...) as recording``.

    Args:
        args, kwargs: example inputs, of any structure; `RecordedGraph.run` later takes the same. Objects among them (a
            cache) are opened: their tensors are inputs, and what the code changes in them a replay changes too. A
            tensor used inside that is not one of them is captured by reference, like a weight.
        data_dependent: what to do where Python reads a value that depends on data: refuse, or keep it as a guard that
            each replay checks.
        verify: replay the graph once when the context ends and compare with what the code returned and wrote. Costs
            about one more forward and a copy of what was written; see `RecordedGraph.verification`.

    Raises (on entry, inside the context, or at its end):
        CaptureError: a recording is already active in this thread; nothing was produced that could be an output.
        DataDependentError: the code reads a tensor's value into Python.
        UnrecordedWriteError: the recorded ops do not explain what the code returned or wrote.
    """
    return Recording(args, kwargs, data_dependent=data_dependent, verify=verify)


def is_recording() -> bool:
    """Whether a recording is active in this thread."""
    return getattr(_active, "recording", None) is not None


def current_writer() -> GraphBuilder | None:
    """What writes down this thread's calls, if any are to be."""
    recording = getattr(_active, "recording", None)
    writer = recording._writer if recording is not None else None
    return None if writer is None or writer.suspended else writer


def emit(name: str, *args: Any) -> Any:
    """Call an op of the table by its name; a recording keeps it whole."""
    target, writer = op(name), current_writer()
    if writer is None:
        return target.function(*args)
    return writer.call(target, args, {}, lambda: _whole(target.function, args, {}))


def start_graph_recording(*args: Any, **kwargs: Any) -> None:
    """Begin a recording that `stop_graph_recording` ends; the arguments are those of `record`.

    Raises:
        CaptureError: a recording is already active in this thread.
    """
    record(*args, **kwargs).__enter__()


def stop_graph_recording() -> RecordedGraph:
    """End the recording that `start_graph_recording` began, and return its graph.

    Raises:
        CaptureError: no recording is active, or nothing was produced that could be an output.
        UnrecordedWriteError: as `record`.
    """
    recording = getattr(_active, "recording", None)
    if recording is None:
        raise CaptureError("no recording is active in this thread; call start_graph_recording() first")
    recording.__exit__(None, None, None)
    return recording.graph


class _DispatchMode(TorchDispatchMode):
    def __init__(self, writer: GraphBuilder) -> None:
        super().__init__()
        self.writer = writer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper costs microseconds an op, and nothing here is compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        writer = self.writer
        treatment = treatment_of(func)
        if writer.suspended or treatment is Treatment.RUN:
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func._can_decompose():  # elsewhere autograd's keys have done it
            with self:
                return func.decompose(*args, **kwargs)
        if writer.autocast and casts_inside(func, args, kwargs):
            raise CaptureError(
                f"autocast casts inside {func} ({writer.modules.source()}), which a recording does not see. Call it "
                "under torch.autocast(..., enabled=False)"
            )
        if treatment is Treatment.RECORD:
            return writer.call(op_of(func), args, kwargs, lambda: func(*args, **kwargs))
        if treatment is Treatment.CONSTANT:
            return writer.constant(args[0])
        if treatment is Treatment.READ:
            return writer.reads(op_of(func), args, kwargs, lambda: func(*args, **kwargs))
        if treatment is Treatment.MIXED:
            raise CaptureError(
                f"{func} gives Python numbers beside tensors ({writer.modules.source()}), and a replay would keep the "
                "recorded ones. Let it give them as tensors"
            )
        for position in READS_INPUTS.get(func._opname, ()):
            writer.reads(op("values"), args[position : position + 1], {}, _nothing, what=f"{func._opname} reads")
        depends = by_values(func, args) and writer.depends(f"the shape of the result of {func}", args)
        result = writer.call(op_of(func), args, kwargs, lambda: func(*args, **kwargs))
        if depends:
            writer.guard_shapes(result)
        return result


class _Uncompiled:
    """What torch.compile has made runs as it is. The stance is one for all threads: the first to record sets it, and
    the last one to end takes it back."""

    def __init__(self) -> None:
        self._lock, self._count, self._before = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._count:
                self._before.enter_context(torch.compiler.set_stance("force_eager"))
            self._count += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                self._before.close()


_uncompiled = _Uncompiled()


@contextlib.contextmanager
def _own_casts() -> Iterator[None]:
    """Autocast casts weights anew: a copy that it has kept from before would be taken for a weight."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def _storage_size(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _nothing() -> None:
    pass


class _FunctionMode(TorchFunctionMode):
    def __init__(self, writer: GraphBuilder) -> None:
        super().__init__()
        self.writer = writer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        writer = self.writer
        writer.autocast = torch._C._is_any_autocast_enabled()
        if func in READS_DATA:
            return writer.reads(op("values"), args[:1], {}, lambda: func(*args, **kwargs), what=READS_DATA[func])
        if func is torch._C._set_grad_enabled:
            writer.grad.set(*args)
        if func == _SETS_DATA:
            writer.replaces_memory(args[0])
        for tensor in [] if writer.suspended else read_by(func, args, kwargs):
            writer.reads(op("values"), (tensor,), {}, _nothing, what=f"{getattr(func, '__name__', func)} reads")
        asks = func in STORAGES and not writer.suspended
        if asks and is_looked_at(sys._getframe(1)):
            writer.asked(_storage_size, "size of the storage", args[0])
            writer.reads(op("values"), args[:1], {}, _nothing, what="the storage")
        if func in PROPERTIES and not writer.suspended:
            writer.asked(func, PROPERTIES[func], args[0])
        if func is torch.Tensor.__repr__:  # for people's eyes
            with writer.suspend():
                return func(*args, **kwargs)
        adapter = SEMANTIC.get(func)
        # Under autocast the casts belong to the context, not to the call: record what happens inside.
        if adapter is None or writer.suspended or torch._C._is_any_autocast_enabled():
            return func(*args, **kwargs)
        call = adapter(*args, **kwargs)
        if call is None:
            return func(*args, **kwargs)
        name, arguments, keywords = call if len(call) == 3 else (*call, {})
        return writer.call(op(name), arguments, keywords, lambda: _whole(func, args, kwargs))


def _whole(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C._DisableTorchDispatch():  # also keeps composite functions from choosing another algorithm
        return func(*args, **kwargs)


@contextlib.contextmanager
def _foreign_kernels() -> Iterator[None]:
    """While any recording is active, calls of ninetoothed's kernel handles are recorded by the caller's recording."""
    global _recordings
    with _patching:
        _recordings += 1
        if _recordings == 1:
            _patch(_handle_class(), True)
    try:
        yield
    finally:
        with _patching:
            _recordings -= 1
            if _recordings == 0:
                _patch(_handle_class(), False)


def _handle_class() -> Any:
    import sys

    module = sys.modules.get("ninetoothed.jit")  # where it was never imported, there is no handle
    return getattr(module, "_Handle", None)


def _patch(kind: Any, on: bool) -> None:
    if kind is None:
        return
    launch = getattr(kind.__call__, "__wrapped__", kind.__call__)
    kind.__call__ = _recorded_launch(launch) if on else launch


def _recorded_launch(launch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(launch)
    def call(handle: Any, *args: Any, **kwargs: Any) -> Any:
        writer = current_writer()
        if writer is None:
            return launch(handle, *args, **kwargs)
        return writer.external(functools.partial(launch, handle), args, kwargs)

    return call
