"""Which value a tensor is, and which alias set a memory, while a recording is active.

A tensor is known by identity, a memory by its storage, both weakly: recording keeps no intermediate alive.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from graph_capture.calls.foreign import meets
from graph_capture.calls.signature import Call, Signature
from graph_capture.calls.structure import signed
from graph_capture.errors import CaptureError
from graph_capture.ir.graph import OpNode
from graph_capture.ir.values import TensorMeta
from graph_capture.record.check import RecordingCheck
from graph_capture.record.gradients import GradMode
from graph_capture.record.shapes import storage_of
from graph_capture.record.source import ModulePaths, caller
from graph_capture.record.state import State


class Names:
    """The names of the tensors of one recording.

    Attributes:
        modules: where the user's code is.
        nodes, values, captured: what has been recorded so far.
        suspended: while true, calls run unrecorded.
        grad: whether gradients are enabled, as the code sees it.
    """

    def __init__(self, arguments: Call, check: RecordingCheck | None) -> None:
        self.nodes: list[OpNode] = []
        self.values: dict[str, TensorMeta] = {}
        self.captured: dict[str, torch.Tensor] = {}
        self.suspended = False
        self.grad = GradMode(torch.is_grad_enabled())
        self._graded: set[str] | None = set() if self.grad.enabled else None  # values that would require a gradient
        nested = next(
            (path for path, t in zip(arguments.walk.paths, arguments.tensors, strict=True) if t.is_nested), None
        )
        if nested is not None:
            raise CaptureError(f"argument {nested[1]} is a nested tensor, which is not recorded. Pad it")
        self._arguments = arguments
        self._signature = Signature(arguments)
        self._state = State(signed(arguments.walk))
        self.modules = ModulePaths(self._state)
        self._check = check
        self._lent: set[str] = set()  # captured tensors that stand for another library's
        self._made: dict[int, weakref.ref[torch.Tensor]] = {}  # tensors that ops made, in order
        self._names: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._views: dict[int, dict[torch.dtype, str]] = {}  # alias set -> a value in it, for each dtype
        self._counts: dict[str, int] = {}
        self._dynamic: set[int] = {-1}  # alias sets whose data depends on an input, a captured tensor or randomness
        self.exposures = arguments.walk.exposures
        for name, tensor in zip(self._signature.names, arguments.tensors, strict=True):
            self._outside(tensor, self._fresh(name))
        self.exposures.others = lambda: (*arguments.tensors, *self.captured.values())

    def _fresh(self, base: str) -> str:
        count = self._counts.get(base, 0)
        self._counts[base] = count + 1
        name = f"{base}_{count}" if count else base
        return name if name not in self.values else self._fresh(base)

    def _storage(self, tensor: torch.Tensor) -> int:
        if tensor.layout != torch.strided:
            return -1
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is not None:  # the weak reference pins the address: a freed storage is never taken for a new one
            return known[1]
        index = len(self._storages)
        self._storages[storage._cdata] = (StorageWeakRef(storage), index)
        return index

    def _bind(self, tensor: torch.Tensor, name: str) -> int:
        """Give `tensor` this name; returns its alias set."""
        if tensor.is_nested:
            raise CaptureError(
                f"{name!r} is a nested tensor ({self.modules.source()}), which is not recorded. Pad it, or leave this "
                "part uncaptured"
            )
        storage = self._storage(tensor)
        self._names[id(tensor)] = (weakref.ref(tensor), name)
        self.values[name] = TensorMeta.of(tensor, storage)
        if storage >= 0:
            self._views.setdefault(storage, {}).setdefault(tensor.dtype, name)
        return storage

    def _outside(self, tensor: torch.Tensor, name: str) -> None:
        """Bind a tensor that exists outside the recording.

        Raises:
            CaptureError: it is a subclass whose ops torch does not run as ATen ops on plain memory.
        """
        if type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            raise CaptureError(
                f"{name!r} is a {type(tensor).__name__}, whose ops do not run on plain memory; unwrap it before the "
                f"recording ({self.modules.source()})"
            )
        if tensor.layout == torch.strided and storage_of(tensor) not in self._storages and tensor.numel():
            self._check_apart(tensor, name)
        storage = self._bind(tensor, name)
        self._dynamic.add(storage)
        if self._graded is not None and tensor.requires_grad:
            self._graded.add(name)
        if self._check is not None:
            with self.suspend():
                self._check.sees(name, tensor, storage)

    def _check_apart(self, tensor: torch.Tensor, name: str) -> None:
        """Refuse a tensor of torch's that lies in memory which stands for another library's by another storage."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        for known in self.exposures:
            other = known.untyped_storage()
            if other._cdata != storage._cdata and meets(known, start, start + storage.nbytes()):
                raise CaptureError(
                    f"{name!r} shares memory with a tensor of another library in a way that the recording does not "
                    f"see ({self.modules.source()}); pass both to the recording as inputs"
                )

    def adopt(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Let `tensor` stand for the recorded `value` from now on: it holds the same elements, with the same layout."""
        name, storage = self.name_of(value), tensor.untyped_storage()
        self._storages[storage._cdata] = (StorageWeakRef(storage), self._storage(value))
        self._names[id(tensor)] = (weakref.ref(tensor), name)
        self._made.pop(id(tensor), None)
        self._made[id(tensor)] = weakref.ref(tensor)

    def unwatched(self) -> None:
        """Give up the check at the end: what the code computes is not there yet when it ends."""
        self._check = None

    def live(self) -> Iterator[torch.Tensor]:
        """The tensors with a name that somebody holds."""
        return (tensor for ref, _ in tuple(self._names.values()) if (tensor := ref()) is not None)

    def name_of(self, tensor: torch.Tensor) -> str:
        """The name of `tensor`; one never seen before is captured by reference."""
        known = self._names.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        owner = self.modules.owner_of(tensor)
        views = self._views.get(self._storage(tensor), {})
        if views and owner is None:
            return self._view(tensor, views)
        name = self._fresh(owner.path if owner else "const")
        self.captured[name] = tensor
        if self.exposures.stands(tensor) and not tensor.untyped_storage().resizable():  # else it is torch's memory
            self._lent.add(name)
        self._outside(tensor, name)
        return name

    def _view(self, tensor: torch.Tensor, views: dict[torch.dtype, str]) -> str:
        """A tensor made below the dispatcher (``.data``) from memory that is recorded: a view of it."""
        if tensor.dtype not in views:
            raise CaptureError(
                f"a tensor of {tensor.dtype} shares memory with {next(iter(views.values()))!r} in a way that was not "
                f"recorded ({caller()}); use Tensor.view(dtype)"
            )
        attrs = {"size": tuple(tensor.shape), "stride": tensor.stride(), "storage_offset": tensor.storage_offset()}
        name = self._fresh("as_strided")
        self._bind(tensor, name)
        self._append("aten.as_strided.default", (views[tensor.dtype],), (name,), attrs)
        return name

    def replaces_memory(self, tensor: torch.Tensor) -> None:
        """``tensor.data = ...`` is about to run.

        Raises:
            CaptureError: the tensor exists outside the recording, and a replay would leave it as it is.
        """
        known = self._names.pop(id(tensor), None)
        outside = known is not None and (known[1] in self.captured or known[1] in self._signature.names)
        if outside or self.modules.owner_of(tensor) is not None:
            raise CaptureError(
                f"the code replaces the memory of a tensor that exists outside it (.data = ..., "
                f"{self.modules.source()}): a replay would not; write in place (copy_)"
            )

    def _append(self, op_type: str, inputs: tuple[str, ...], outputs: tuple[str, ...], attrs: Any = ()) -> OpNode:
        node = OpNode(op_type, inputs, outputs, attrs, source=self.modules.source())
        self.nodes.append(node)
        return node

    @contextlib.contextmanager
    def suspend(self) -> Iterator[None]:
        """Run calls unrecorded."""
        before, self.suspended = self.suspended, True
        try:
            with torch._C._DisableTorchDispatch():
                yield
        finally:
            self.suspended = before
