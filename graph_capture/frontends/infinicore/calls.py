"""What a call of InfiniCore's extension module becomes, where its thread records."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from graph_capture.calls.foreign import Adapter, unrecorded
from graph_capture.errors import CaptureError
from graph_capture.frontends.infinicore.memory import MemoryBlock
from graph_capture.frontends.infinicore.native import Native
from graph_capture.frontends.infinicore.ops import OPS, Operator, UnfitOperands
from graph_capture.frontends.infinicore.views import VIEWS
from graph_capture.ir.values import TensorMeta
from graph_capture.record.builder import GraphBuilder


class Calls:
    """Each method takes the recording, the wrapped function, and the arguments of a call; it gives what that would.

    Raises (all of them):
        CaptureError: the arguments do not fit, or a replay could not repeat the call.
    """

    def __init__(self, adapter: Adapter, memory: MemoryBlock, native: Native) -> None:
        self._adapter, self.memory, self._native = adapter, memory, native
        self._extension = memory.extension
        self._blobs: dict[int, weakref.ref[Any]] = {}  # handles made from an address inside a recording
        self._literals: dict[int, weakref.ref[Any]] = {}  # those of them that are on memory which nobody knows

    def exposed(self, writer: GraphBuilder, handle: Any) -> torch.Tensor:
        """The recording's torch tensor for a handle."""
        known = writer.exposures.get(handle)
        if known is not None:
            return known
        if _holds(self._blobs, handle):
            return self._of_blob(writer, handle)
        owner = writer.modules.owner_of(handle)
        wrapper = self._wrapper(handle) if owner is None else owner.value
        made_from = None if wrapper is None else self._adapter.torch_owner(wrapper)
        if made_from is not None:  # torch's memory, which a handle would not keep alive
            tensor = writer.exposures.bind(self._adapter, handle, made_from)
        else:
            tensor = writer.exposures.at(self._adapter, handle)
        if owner is not None:
            writer.modules.owners[id(tensor)] = owner
        return tensor

    def _wrapper(self, handle: Any) -> Any:
        """A wrapper of a handle that nothing but the code's own variables hold. Slow, but few are met."""
        kind = self._adapter.tensor.kind
        for holder in gc.get_referrers(handle):
            if isinstance(holder, kind):
                return holder
            if isinstance(holder, dict) and holder.get("_underlying") is handle:  # an instance's attributes
                return next((wrapper for wrapper in gc.get_referrers(holder) if isinstance(wrapper, kind)), None)
        return None

    def _of_blob(self, writer: GraphBuilder, handle: Any) -> torch.Tensor:
        """MemoryBlock at an address: that of a recorded tensor, or (numpy's, a list's) a literal of the code."""
        start, stop = self.memory.range(handle)
        writer.exposures.others, others = lambda: list(writer.live()), writer.exposures.others
        try:
            tensor = writer.exposures.at(self._adapter, handle)
        finally:
            writer.exposures.others = others
        known = [memory for memory in (*writer.live(), *writer.exposures) if memory is not tensor]
        if stop > start and not any(_on_storage(memory, tensor) for memory in known):
            _hold(self._literals, handle)
            with writer.suspend():
                writer.constant(tensor)
        return tensor

    def _refuse_literals(self, writer: GraphBuilder, handles: Sequence[Any]) -> None:
        """Nothing may be written into memory that nobody knows."""
        for handle in handles:
            self._tensor(writer, handle)
            if _holds(self._literals, handle):
                raise UnfitOperands(
                    "it writes into memory that was given by its address, which a replay would not find again"
                )

    def op(
        self, row: Operator, in_place: bool, writer: GraphBuilder, original: Callable[..., Any], args: Any, kwargs: Any
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
                f"{name} is not deferred by native recording: it runs at once, on values that are not computed yet, "
                f"and is no part of the native graph ({writer.modules.source()}). Replay our graph instead, or "
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

    def _op_natively(self, row: Operator, writer: GraphBuilder, bound: Any, outs: Any, run: Callable[[], Any]) -> Any:
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
                    self._adopt(writer, handle, self.memory.expose(handle), result)
        self._native.keep(writer, (*bound.args, *bound.kwargs.values(), *outs, *_listed(given)))
        return given

    @staticmethod
    def _check_out(out: torch.Tensor, result: torch.Tensor) -> None:
        fits = out.shape == result.shape and out.dtype is result.dtype and out.device == result.device
        if not fits:
            raise UnfitOperands(
                f"the result {result.dtype}{list(result.shape)} does not fit into {out.dtype}{list(out.shape)}"
            )

    def _result(self, writer: GraphBuilder, result: torch.Tensor) -> Any:
        """A handle on memory of InfiniCore's that takes the place of a result of torch's."""
        owner, tensor = self.memory.empty(TensorMeta.of(result)) if result.is_contiguous() else (None, None)
        if owner is None or tensor is None:
            return self._result(writer, result.clone(memory_format=torch.contiguous_format))
        with writer.suspend(), unrecorded():
            tensor.copy_(result)
        handle, _ = self.memory.handle(tensor)
        return self._adopt(writer, handle, tensor, result)

    def _adopt(self, writer: GraphBuilder, handle: Any, tensor: torch.Tensor, result: torch.Tensor) -> Any:
        if tensor.stride() != result.stride() and tensor.numel():
            result = result.contiguous()
        writer.adopt(tensor, result)
        writer.exposures.bind(self._adapter, handle, tensor)
        return handle

    def _tensor(self, writer: GraphBuilder, value: Any) -> Any:
        return self.exposed(writer, value) if isinstance(value, self._extension.Tensor) else value

    def make(self, name: str, writer: GraphBuilder, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """New memory. What a replay gives back must be the same each time, so where nobody wrote it is zeros."""
        handle = original(*args, **kwargs)
        with _named_errors(f"infinicore.{name}", writer):
            tensor = self.memory.expose(handle)
            options: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}
            with self._native.metadata_only(writer) if self._native.running() else contextlib.nullcontext():
                if name == "strided_empty":
                    value = torch.empty_strided(tensor.shape, tensor.stride(), **options).zero_()
                else:
                    value = (torch.ones if name == "ones" else torch.zeros)(tensor.shape, **options)
            if not self._native.running():
                with writer.suspend(), unrecorded():
                    tensor.copy_(value)
            alias, _ = self.memory.handle(tensor)
            return self._adopt(writer, alias if tensor.numel() else handle, tensor, value)

    def from_blob(self, writer: GraphBuilder, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        handle = original(*args, **kwargs)
        _hold(self._blobs, handle)
        return handle

    def view(self, name: str, writer: GraphBuilder, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A view: torch says whether it can be, InfiniCore makes its own."""
        tensor = self.exposed(writer, args[0])
        with _named_errors(f"infinicore.Tensor.{name}", writer):
            view = VIEWS[name](tensor, *args[1:], **kwargs)
            if not view.numel():
                handle = self.memory.handle(view)[0]
            else:
                handle = original(*args, **kwargs)
                same = handle.data_ptr() == view.data_ptr() and list(handle.shape) == list(view.shape)
                if not same:
                    raise UnfitOperands(f"InfiniCore's view {list(handle.shape)} is not torch's {list(view.shape)}")
        writer.exposures.bind(self._adapter, handle, view)
        return handle

    def contiguous(self, writer: GraphBuilder, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The same memory if InfiniCore takes it for contiguous, else a copy."""
        (handle,) = args
        tensor = self.exposed(writer, handle)
        if handle.is_contiguous():
            same = original(handle)
            writer.exposures.bind(self._adapter, same, tensor)
            return same
        return self.op(OPS["rearrange"], False, writer, original, args, kwargs)

    def to(self, writer: GraphBuilder, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        handle, device = args
        tensor = self.exposed(writer, handle)
        if handle.device == device:
            same = original(handle, device)
            writer.exposures.bind(self._adapter, same, tensor)
            return same
        if self._native.running():
            raise CaptureError(f"Tensor.to({device}) cannot be put off by native recording ({writer.modules.source()})")
        target = self.memory.library.device._from_infinicore_device(device)
        with _named_errors("infinicore.Tensor.to", writer):
            name = target.type if target.type == "cpu" else f"{target.type}:{target.index}"
            return self._result(writer, tensor.contiguous().to(name))

    def copy(self, writer: GraphBuilder, original: Callable[..., Any], args: Any, kwargs: Any) -> None:
        target, source = (self.exposed(writer, handle) for handle in args)
        with _named_errors("infinicore.Tensor.copy_", writer):
            self._refuse_literals(writer, args[:1])
            if target.shape != source.shape or target.dtype is not source.dtype:
                raise UnfitOperands(
                    f"{source.dtype}{list(source.shape)} cannot go into {target.dtype}{list(target.shape)}"
                )
            if not self._native.running():
                target.copy_(source)
                return
            with self._native.metadata_only(writer):
                original(*args, **kwargs)
                target.copy_(source)
            self._native.keep(writer, (target, source))

    def unknown(self, name: str, writer: GraphBuilder, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
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

    def start(self, writer: GraphBuilder, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._native.start(writer)
        return result

    def stop(self, writer: GraphBuilder, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        graph = original(*args, **kwargs)
        self._native.stop(writer, graph)
        return graph


@contextlib.contextmanager
def _named_errors(name: str, writer: GraphBuilder) -> Iterator[None]:
    """What torch, or a check, says against the arguments, as an error that names the op and the line."""
    try:
        yield
    except CaptureError:
        raise
    except (UnfitOperands, RuntimeError, IndexError, ValueError, TypeError) as error:
        raise CaptureError(f"{name}: {error} ({writer.modules.source()})") from error


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _hold(table: dict[int, weakref.ref[Any]], handle: Any) -> None:
    """Remember a handle as long as it lives."""
    key = id(handle)
    table[key] = weakref.ref(handle, lambda ref: table.pop(key, None) and None)


def _holds(table: dict[int, weakref.ref[Any]], handle: Any) -> bool:
    known = table.get(id(handle))
    return known is not None and known() is handle


def _on_storage(memory: torch.Tensor, tensor: torch.Tensor) -> bool:
    return memory.untyped_storage()._cdata == tensor.untyped_storage()._cdata
