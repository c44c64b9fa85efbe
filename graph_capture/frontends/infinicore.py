"""Recording InfiniCore: its calls inside a recording become ops of our table, on the memory that they work on.

Every function of `infinicore` reaches the extension module ``infinicore.lib._infinicore`` by a look-up at the time of the
call; so does a function that a model has stored. While a recording is active the module's ops, and the methods of its
tensors, are ours: they ask whether this thread records, check the arguments, run the op on torch tensors that share
InfiniCore's memory, under the recorder, and put the result into memory of InfiniCore's. The table is in
`infinicore_ops`, what concerns memory in `infinicore_memory`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from graph_capture.errors import CaptureError
from graph_capture.foreign import Form, unrecorded
from graph_capture.frontends.infinicore_memory import Memory
from graph_capture.frontends.infinicore_native import Native
from graph_capture.frontends.infinicore_ops import CALLERS, OPS, Row, Unfit
from graph_capture.frontends.infinicore_views import HARMLESS, VIEWS
from graph_capture.graph import SubGraph, TensorMeta
from graph_capture.writer import Writer

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
    from graph_capture.foreign import adapters
    from graph_capture.recorder import current_writer

    for found in adapters():
        if isinstance(found, InfiniCore) and isinstance(tensor, found.tensor.kind):
            writer = current_writer()
            return found.expose(found.handle(tensor)) if writer is None else writer.exposures.of(found, tensor)
    raise CaptureError(f"a {type(tensor).__name__} is not an InfiniCore tensor")


class InfiniCore:
    """The frontend of one `infinicore` package; see `graph_capture.foreign.Adapter`."""

    def __init__(self, library: Any) -> None:
        self.memory = Memory(library)
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
        self.values = (device, dtype)
        self.module: type = library.nn.Module
        self._library = library
        self._extension = extension
        self._native = Native(extension)
        self._original: dict[str, Any] = {name: value for name, value in vars(extension).items() if callable(value)}
        self._lock, self._active = threading.Lock(), 0
        self._undo = contextlib.ExitStack()
        self._blobs: dict[int, weakref.ref[Any]] = {}  # handles made from an address inside a recording
        self._literals: dict[int, weakref.ref[Any]] = {}  # those of them that are on memory which nobody knows
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
    def recording(self, current: Callable[[], Writer | None]) -> Iterator[None]:
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

    def _wrap(self, undo: contextlib.ExitStack, current: Callable[[], Writer | None]) -> None:
        def put(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, value)

        makers = {"empty", "strided_empty", "zeros", "ones"}
        special = {
            **{name: functools.partial(self._make, name) for name in makers},
            "from_blob": self._from_blob,
            "strided_from_blob": self._from_blob,
            "start_graph_recording": self._start,
            "stop_graph_recording": self._stop,
        }
        for name, original in self._original.items():
            if isinstance(original, type):
                continue
            row = OPS.get(name) or OPS.get(name.removesuffix("_"))
            if name in special:
                record = special[name]
            elif row is not None:
                record = functools.partial(self._op, row, name != row.name)
            else:
                record = functools.partial(self._unknown, name)
            put(self._extension, name, _Recorded(current, original, record))
        kind = self._extension.Tensor
        for name, original in tuple(vars(kind).items()):
            if name.startswith("_") or not callable(original) or name in HARMLESS:
                continue
            if name in VIEWS:
                record = functools.partial(self._view, name)
            elif name in _METHODS:
                record = functools.partial(_METHODS[name], self)
            else:
                record = functools.partial(self._unknown, f"Tensor.{name}")
            put(kind, name, _method(_Recorded(current, original, record)))
        put(self.module, "__call__", _entering(current, self.module.__call__))
        put(self.tensor.kind, "__init__", self._linking(current, self.tensor.kind.__init__))
        if getattr(self._library, "use_ntops", False):  # else some functions would launch kernels of their own
            put(self._library, "use_ntops", False)

    def _linking(self, current: Callable[[], Writer | None], original: Callable[..., None]) -> Callable[..., None]:
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

    # --- calls

    def _exposed(self, writer: Writer, handle: Any) -> torch.Tensor:
        """The recording's torch tensor for a handle."""
        known = writer.exposures.get(handle)
        if known is not None:
            return known
        if _holds(self._blobs, handle):
            return self._of_blob(writer, handle)
        tensor = writer.exposures.at(self, handle)
        owner = writer.modules.owner_of(handle)
        if owner is not None:
            writer.modules.owners[id(tensor)] = owner
        return tensor

    def _of_blob(self, writer: Writer, handle: Any) -> torch.Tensor:
        """Memory at an address: that of a recorded tensor, or (numpy's, a list's) a literal of the code."""
        start, stop = self.range(handle)
        writer.exposures.others, others = lambda: list(writer.live()), writer.exposures.others
        try:
            tensor = writer.exposures.at(self, handle)
        finally:
            writer.exposures.others = others
        known = [memory for memory in (*writer.live(), *writer.exposures) if memory is not tensor]
        if stop > start and not any(_on_storage(memory, tensor) for memory in known):
            _hold(self._literals, handle)
            with writer.suspend():
                writer.constant(tensor)
        return tensor

    def _refuse_literals(self, writer: Writer, handles: Sequence[Any]) -> None:
        """Nothing may be written into memory that nobody knows."""
        for handle in handles:
            self._tensor(writer, handle)
            if _holds(self._literals, handle):
                raise Unfit("it writes into memory that was given by its address, which a replay would not find again")

    def _op(
        self, row: Row, in_place: bool, writer: Writer, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """A call of an op of the table."""
        name = f"infinicore.{row.name}{'_' if in_place else ''}"
        values = [self._tensor(writer, value) for value in args]
        named = {key: self._tensor(writer, value) for key, value in kwargs.items()}
        outs: list[Any] = []
        if in_place and row.outs:
            outs = values[: row.outs]
            values = values[row.outs :]
            outs += [named.pop(key) for key in tuple(named) if key not in row.parameters.parameters]
        native = self._native.running()
        if native and not row.deferred:
            warnings.warn(
                f"{name} is not deferred by native recording: it runs at once, on values that are not computed yet, and "
                f"its result is no part of the native graph ({writer.modules.source()}). Replay our graph instead, or "
                "use an op that is deferred",
                stacklevel=5,
            )
        with _named_errors(name, writer):
            self._refuse_literals(writer, args if row.writes else args[: row.outs] if in_place else ())
            bound = row.parameters.bind(*values, **named)
            if native:
                return self._op_natively(row, writer, bound, outs, lambda: original(*args, **kwargs))
            results = _listed(row.function(*bound.args, **bound.kwargs))
            if in_place:
                for out, result in zip(outs, results, strict=True):
                    self._check_out(out, result)
                    out.copy_(result)
                return None
            handles = tuple(self._result(writer, result) for result in results)
        return handles[0] if len(handles) == 1 else handles

    def _op_natively(self, row: Row, writer: Writer, bound: Any, outs: Any, run: Callable[[], Any]) -> Any:
        """InfiniCore defers the op; we write down what it is, from shapes and dtypes alone."""
        with self._native.metadata_only(writer):
            results = _listed(row.function(*bound.args, **bound.kwargs))
            for out, result in zip(outs, results, strict=True) if outs else ():
                self._check_out(out, result)
            given = run()
            for out, result in zip(outs, results, strict=True) if outs else ():
                out.copy_(result)
            if given is not None:
                for handle, result in zip(_listed(given), results, strict=True):
                    self._adopt(writer, handle, self.expose(handle), result)
        self._native.keep(writer, (*bound.args, *bound.kwargs.values(), *outs, *_listed(given)))
        return given

    @staticmethod
    def _check_out(out: torch.Tensor, result: torch.Tensor) -> None:
        fits = out.shape == result.shape and out.dtype is result.dtype and out.device == result.device
        if not fits:
            raise Unfit(f"the result {result.dtype}{list(result.shape)} does not fit into {out.dtype}{list(out.shape)}")

    def _result(self, writer: Writer, result: torch.Tensor) -> Any:
        """A handle on memory of InfiniCore's that takes the place of a result of torch's."""
        owner, tensor = self.memory.empty(TensorMeta.of(result)) if result.is_contiguous() else (None, None)
        if owner is None or tensor is None:
            return self._result(writer, result.clone(memory_format=torch.contiguous_format))
        with writer.suspend(), unrecorded():
            tensor.copy_(result)
        handle, _ = self.memory.handle(tensor)
        return self._adopt(writer, handle, tensor, result)

    def _adopt(self, writer: Writer, handle: Any, tensor: torch.Tensor, result: torch.Tensor) -> Any:
        if tensor.stride() != result.stride() and tensor.numel():
            result = result.contiguous()
        writer.adopt(tensor, result)
        writer.exposures.bind(self, handle, tensor)
        return handle

    def _tensor(self, writer: Writer, value: Any) -> Any:
        return self._exposed(writer, value) if isinstance(value, self._extension.Tensor) else value

    def _make(self, name: str, writer: Writer, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Memory: what torch would make."""
        handle = original(*args, **kwargs)
        with _named_errors(f"infinicore.{name}", writer):
            tensor = self.expose(handle)
            options: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}
            with self._native.metadata_only(writer) if self._native.running() else contextlib.nullcontext():
                if name == "strided_empty":
                    value = torch.empty_strided(tensor.shape, tensor.stride(), **options)
                else:
                    value = getattr(torch, name)(tensor.shape, **options)
            if name in ("zeros", "ones") and not self._native.running():
                with writer.suspend(), unrecorded():
                    tensor.copy_(value)
            alias, _ = self.memory.handle(tensor)
            return self._adopt(writer, alias if tensor.numel() else handle, tensor, value)

    def _from_blob(self, writer: Writer, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        handle = original(*args, **kwargs)
        _hold(self._blobs, handle)
        return handle

    def _view(self, name: str, writer: Writer, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A view: torch says whether it can be, InfiniCore makes its own."""
        tensor = self._exposed(writer, args[0])
        with _named_errors(f"infinicore.Tensor.{name}", writer):
            view = VIEWS[name](tensor, *args[1:], **kwargs)
            if not view.numel():
                handle = self.memory.handle(view)[0]
            else:
                handle = original(*args, **kwargs)
                same = handle.data_ptr() == view.data_ptr() and list(handle.shape) == list(view.shape)
                if not same:
                    raise Unfit(f"InfiniCore's view {list(handle.shape)} is not torch's {list(view.shape)}")
        writer.exposures.bind(self, handle, view)
        return handle

    def _contiguous(self, writer: Writer, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The same memory if InfiniCore takes it for contiguous, else a copy."""
        (handle,) = args
        tensor = self._exposed(writer, handle)
        if handle.is_contiguous():
            same = original(handle)
            writer.exposures.bind(self, same, tensor)
            return same
        return self._op(OPS["rearrange"], False, writer, original, args, kwargs)

    def _to(self, writer: Writer, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        handle, device = args
        tensor = self._exposed(writer, handle)
        if handle.device == device:
            same = original(handle, device)
            writer.exposures.bind(self, same, tensor)
            return same
        if self._native.running():
            raise CaptureError(f"Tensor.to({device}) cannot be put off by native recording ({writer.modules.source()})")
        target = self._library.device._from_infinicore_device(device)
        with _named_errors("infinicore.Tensor.to", writer):
            name = target.type if target.type == "cpu" else f"{target.type}:{target.index}"
            return self._result(writer, tensor.contiguous().to(name))

    def _copy(self, writer: Writer, original: Callable[..., Any], args: Any, kwargs: Any) -> None:
        target, source = (self._exposed(writer, handle) for handle in args)
        with _named_errors("infinicore.Tensor.copy_", writer):
            self._refuse_literals(writer, args[:1])
            if target.shape != source.shape or target.dtype is not source.dtype:
                raise Unfit(f"{source.dtype}{list(source.shape)} cannot go into {target.dtype}{list(target.shape)}")
            if not self._native.running():
                target.copy_(source)
                return
            with self._native.metadata_only(writer):
                original(*args, **kwargs)
                target.copy_(source)
            self._native.keep(writer, (target, source))

    def _unknown(self, name: str, writer: Writer, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A function that is not in the table: harmless only if it has nothing to do with tensors."""
        kind = self._extension.Tensor
        if not any(isinstance(value, kind) for value in (*args, *kwargs.values())):
            result = original(*args, **kwargs)
            if not isinstance(result, kind):
                return result
        raise CaptureError(
            f"infinicore's {name} is not in the recorder's table of ops ({writer.modules.source()}): a replay would "
            "leave it out. Call it outside the recording, or add a row to graph_capture/frontends/infinicore_ops.py"
        )

    def _start(self, writer: Writer, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._native.start(writer)
        return result

    def _stop(self, writer: Writer, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        graph = original(*args, **kwargs)
        self._native.stop(writer, graph)
        return graph

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


_METHODS: dict[str, Callable[..., Any]] = {
    "copy_": InfiniCore._copy,
    "contiguous": InfiniCore._contiguous,
    "to": InfiniCore._to,
}


class _Recorded:
    """A function of the extension module that is recorded where its thread records."""

    def __init__(self, current: Callable[[], Writer | None], original: Callable[..., Any], record: Any) -> None:
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


def _entering(current: Callable[[], Writer | None], original: Callable[..., Any]) -> Callable[..., Any]:
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


@contextlib.contextmanager
def _named_errors(name: str, writer: Writer) -> Iterator[None]:
    """What torch, or a check, says against the arguments, as an error that names the op and the line."""
    try:
        yield
    except CaptureError:
        raise
    except (Unfit, RuntimeError, IndexError, ValueError, TypeError) as error:
        raise CaptureError(f"{name}: {error} ({writer.modules.source()})") from error


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _hold(table: dict[int, weakref.ref[Any]], handle: Any) -> None:
    """Remember a handle as long as it lives."""
    table[id(handle)] = weakref.ref(handle, lambda ref, key=id(handle): table.pop(key, None))


def _holds(table: dict[int, weakref.ref[Any]], handle: Any) -> bool:
    known = table.get(id(handle))
    return known is not None and known() is handle


def _on_storage(memory: torch.Tensor, tensor: torch.Tensor) -> bool:
    return memory.untyped_storage()._cdata == tensor.untyped_storage()._cdata
