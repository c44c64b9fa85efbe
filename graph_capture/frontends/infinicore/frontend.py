"""Recording InfiniCore: its calls inside a recording become ops of our table, on the memory that they work on.

Every function of `infinicore` reaches the extension module ``infinicore.lib._infinicore`` by a look-up at the time of
the call; so does a function that a model has stored. While a recording is active the module's ops, and the methods of
its tensors, are ours: they ask whether this thread records, check the arguments, run the op on torch tensors that share
InfiniCore's memory, under the recorder, and put the result into memory of InfiniCore's. The table is in
`infinicore_ops`, what a call becomes in `infinicore_calls`, what concerns memory in `infinicore_memory`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from graph_capture.calls.foreign import Form
from graph_capture.errors import CaptureError
from graph_capture.frontends.infinicore.calls import Calls
from graph_capture.frontends.infinicore.memory import MemoryBlock
from graph_capture.frontends.infinicore.native import Native
from graph_capture.frontends.infinicore.ops import CALLERS, OPS
from graph_capture.frontends.infinicore.views import HARMLESS, VIEWS
from graph_capture.ir.graph import SubGraph
from graph_capture.record.builder import GraphBuilder

_inside = threading.local()


@functools.cache
def _adapter(library: Any) -> InfiniCore:
    return InfiniCore(library)


def adapter(library: Any) -> InfiniCore | None:
    """The frontend of an imported `infinicore`; None if it is not what we know, or not imported in full yet."""
    extension = getattr(getattr(library, "lib", None), "_infinicore", None)
    known = hasattr(library, "nn") and all(hasattr(extension, name) for name in ("strided_empty", "strided_from_blob"))
    return _adapter(library) if known else None


def to_torch(tensor: Any) -> torch.Tensor:
    """A torch tensor on an InfiniCore tensor's memory, without a copy; inside a recording, the recorded value.

    Raises:
        CaptureError: it is of a dtype, or on a device, that torch does not have.
    """
    from graph_capture.calls.foreign import adapters
    from graph_capture.record.recorder import current_writer

    for found in adapters():
        if isinstance(found, InfiniCore) and isinstance(tensor, found.tensor.kind):
            writer = current_writer()
            return found.expose(found.handle(tensor)) if writer is None else writer.exposures.of(found, tensor)
    raise CaptureError(f"a {type(tensor).__name__} is not an InfiniCore tensor")


class InfiniCore:
    """The frontend of one `infinicore` package; see `graph_capture.calls.foreign.Adapter`."""

    def __init__(self, library: Any) -> None:
        self.memory = MemoryBlock(library)
        self.expose, self.range = self.memory.expose, self.memory.range
        self.spanning, self.own = self.memory.spanning, self.memory.own
        extension, kinds = library.lib._infinicore, (library.device, library.dtype)
        self.tensor = Form(library.Tensor, lambda tensor: (self.expose(self.handle(tensor)),), self._whole)
        device = Form(kinds[0], lambda it: (it.type, it.index), lambda parts: kinds[0](*parts))
        dtype = Form(
            kinds[1],
            lambda it: (it._underlying.name,),
            lambda parts: kinds[1](getattr(extension.DataType, parts[0])),
        )
        self.values: tuple[Form, ...] = (device, dtype)
        self.module: type = library.nn.Module
        self._library = library
        self._extension = extension
        self._native = Native(extension)
        self._original: dict[str, Any] = {name: value for name, value in vars(extension).items() if callable(value)}
        self._lock, self._active = threading.Lock(), 0
        self._undo = contextlib.ExitStack()
        self._calls = Calls(self, self.memory, self._native)
        CALLERS.append(self._call_own)

    # --- tensors

    @staticmethod
    def handle(tensor: Any) -> Any:
        """What wrappers of one tensor share."""
        return tensor._underlying

    def wrapped(self, handle: Any) -> Any:
        """An `infinicore.Tensor` of a handle."""
        return self.tensor.kind(handle)

    def _whole(self, parts: Sequence[torch.Tensor]) -> Any:
        handle, keep = self.memory.handle(parts[0])
        return self.tensor.kind(handle, _torch_ref=keep)

    @staticmethod
    def torch_owner(tensor: Any) -> torch.Tensor | None:
        """The torch tensor that ``from_torch`` was given."""
        made_from = getattr(tensor, "_torch_ref", None)
        if not isinstance(made_from, torch.Tensor) or not made_from.is_contiguous():
            return None
        handle = tensor._underlying
        same = made_from.data_ptr() == handle.data_ptr() and list(made_from.shape) == list(handle.shape)
        return made_from if same else None

    # --- native graphs

    def subgraph(self, graph: Any) -> SubGraph | None:
        """The ops of an `infinicore.Graph` that was recorded under our recorder."""
        return self._native.subgraph(graph)

    def is_graph(self, value: Any) -> bool:
        """Whether `value` is an `infinicore.Graph`, or the extension's."""
        return self._native.is_graph(value)

    # --- wrapping the extension module

    @contextlib.contextmanager
    def recording(self, current: Callable[[], GraphBuilder | None]) -> Iterator[None]:
        """Wrap the extension module while any recording is active; a call is recorded by its own thread's."""
        if self._native.running():
            raise CaptureError("InfiniCore's native recording is on already; begin it inside the recording")
        with self._lock:
            if self._active == 0:
                with contextlib.ExitStack() as undo:
                    self._wrap(undo, current)
                    self._undo = undo.pop_all()
            self._active += 1
        CALLERS.append(self._call_own)
        try:
            yield
        finally:
            CALLERS.remove(self._call_own)
            with self._lock:
                self._active -= 1
                if self._active == 0:
                    self._undo.close()

    def _wrap(self, undo: contextlib.ExitStack, current: Callable[[], GraphBuilder | None]) -> None:
        def put(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, value)

        calls = self._calls
        special: dict[str, Callable[..., Any]] = {
            **{name: functools.partial(calls.make, name) for name in ("empty", "strided_empty", "zeros", "ones")},
            "from_blob": calls.from_blob,
            "strided_from_blob": calls.from_blob,
            "start_graph_recording": calls.start,
            "stop_graph_recording": calls.stop,
        }
        methods = {"copy_": calls.copy, "contiguous": calls.contiguous, "to": calls.to}
        for name, original in self._original.items():
            if isinstance(original, type):
                continue
            row = OPS.get(name) or OPS.get(name.removesuffix("_"))
            if name in special:
                record = special[name]
            elif row is not None:
                record = functools.partial(calls.op, row, name != row.name)
            else:
                record = functools.partial(calls.unknown, name)
            put(self._extension, name, _Recorded(current, original, record))
        kind = self._extension.Tensor
        for name, original in tuple(vars(kind).items()):
            if name.startswith("_") or not callable(original) or name in HARMLESS:
                continue
            if name in VIEWS:
                record = functools.partial(calls.view, name)
            elif name in methods:
                record = methods[name]
            else:
                record = functools.partial(calls.unknown, f"Tensor.{name}")
            put(kind, name, _method(_Recorded(current, original, record)))
        put(self.module, "__call__", _entering(current, self.module.__call__))
        put(self.tensor.kind, "__init__", self._linking(current, vars(self.tensor.kind)["__init__"]))
        if getattr(self._library, "use_ntops", False):  # else some functions would launch kernels of their own
            put(self._library, "use_ntops", False)

    def _linking(
        self, current: Callable[[], GraphBuilder | None], original: Callable[..., None]
    ) -> Callable[..., None]:
        @functools.wraps(original)
        def init(tensor: Any, underlying: Any, *args: Any, **kwargs: Any) -> None:
            original(tensor, underlying, *args, **kwargs)
            writer, made_from = current(), getattr(tensor, "_torch_ref", None)
            if (
                writer is None
                or not isinstance(made_from, torch.Tensor)
                or writer.exposures.get(underlying) is not None
            ):
                return
            if made_from.numel() and not made_from.is_contiguous():
                raise CaptureError(
                    f"from_torch ignores strides, and {list(made_from.shape)} is not contiguous "
                    f"({writer.modules.source()}); call contiguous() first"
                )
            writer.exposures.bind(self, underlying, made_from)

        return init

    def _call_own(self, name: str, args: tuple[Any, ...]) -> None:
        """Run an op of InfiniCore's own on torch tensors."""
        handles = [self.memory.blob(value) if isinstance(value, torch.Tensor) else value for value in args]
        device = args[0].device
        if device.type == "cuda":  # InfiniCore's stream is another one
            torch.cuda.current_stream(device).synchronize()
        in_place = self._original.get(f"{name}_")
        if in_place is not None:
            in_place(*handles)
        else:
            result = self._original[name](*handles[1:])
            if device.type == "cuda":
                self._original["sync_stream"]()
            args[0].copy_(self.expose(result))
        if device.type == "cuda":
            self._original["sync_stream"]()


class _Recorded:
    """A function of the extension module that is recorded where its thread records."""

    def __init__(self, current: Callable[[], GraphBuilder | None], original: Callable[..., Any], record: Any) -> None:
        self._current, self._original, self._record = current, original, record

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        writer = None if getattr(_inside, "call", False) else self._current()
        if writer is None:
            return self._original(*args, **kwargs)
        _inside.call = True  # what the extension itself calls is a part of this
        try:
            return self._record(writer, self._original, args, kwargs)
        finally:
            _inside.call = False


def _method(recorded: _Recorded) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: recorded(self, *args, **kwargs)


def _entering(current: Callable[[], GraphBuilder | None], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        writer = current()
        if writer is None:
            return original(module, *args, **kwargs)
        writer.modules.enter(module)
        try:
            return original(module, *args, **kwargs)
        finally:
            writer.modules.leave(module)

    return call
