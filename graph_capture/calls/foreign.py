"""Tensors of other libraries: torch sees their memory without a copy, and gives them back as what they were.

A library that has been imported is served by its frontend, an `Adapter`. Everything else here is about memory: which
torch tensor stands for which of the library's, and that two of them which overlap share one storage.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from graph_capture.errors import CaptureError

if TYPE_CHECKING:
    from graph_capture.ir.graph import SubGraph
    from graph_capture.record.builder import GraphBuilder

LIBRARIES = {"infinicore": "graph_capture.frontends.infinicore.frontend"}  # a package -> what serves it


@dataclass(frozen=True, eq=False)
class Form:
    """A class of a library, whose instances count by what they are made of.

    Attributes:
        kind: the class.
        parts: an instance -> plain values.
        whole: these parts -> an equal instance.
    """

    kind: type
    parts: Callable[[Any], tuple[Any, ...]]
    whole: Callable[[Sequence[Any]], Any]


class Adapter(Protocol):
    """What a frontend knows of its library.

    Attributes:
        tensor: the form of its tensors. Its one part is a torch tensor that shares the memory.
        values: the forms of what else counts by value (devices, dtypes).
        module: the base class of its modules.
    """

    tensor: Form
    values: tuple[Form, ...]
    module: type

    def handle(self, tensor: Any) -> Any:
        """What identifies a tensor: several wrappers may share it."""

    def wrapped(self, handle: Any) -> Any:
        """A tensor of that identity."""

    def expose(self, handle: Any) -> torch.Tensor:
        """A torch tensor that shares the memory of `handle` and keeps it alive, but not `handle` itself."""

    def torch_owner(self, tensor: Any) -> torch.Tensor | None:
        """The torch tensor that a tensor was made from, if it shares its memory and layout."""

    def range(self, handle: Any) -> tuple[int, int]:
        """The addresses that `handle` reaches: from the first to past the last."""

    def spanning(self, start: int, stop: int, handles: Sequence[Any]) -> torch.Tensor:
        """Bytes from `start` to `stop`, which belong to `handles` and keep their memory alive."""

    def own(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies in the library's memory; those that share a storage still do."""

    def recording(self, current: Callable[[], GraphBuilder | None]) -> AbstractContextManager[None]:
        """While it is open, calls of the library are recorded by the caller's recording."""

    def subgraph(self, graph: Any) -> SubGraph | None:
        """The ops of the library's own graph, where it was recorded under a recording of ours."""

    def is_graph(self, value: Any) -> bool:
        """Whether `value` is a graph of the library's own."""


def adapters() -> tuple[Adapter, ...]:
    """Those of the libraries that have been imported."""
    found = []
    for name, frontend in LIBRARIES.items():
        library = sys.modules.get(name)
        if library is not None:
            found.append(importlib.import_module(frontend).adapter(library))
    return tuple(adapter for adapter in found if adapter is not None)


def is_module(value: Any) -> bool:
    """Whether `value` is a module of such a library."""
    return any(isinstance(value, adapter.module) for adapter in adapters())


def handle_of(value: Any) -> Any:
    """What identifies a tensor of such a library; None for anything else."""
    return next((a.handle(value) for a in adapters() if isinstance(value, a.tensor.kind)), None)


class Exposures:
    """The torch tensors that stand for a call's, or a recording's, tensors of other libraries: one for each."""

    def __init__(self) -> None:
        self.adapters = adapters()
        self.others: Callable[[], Iterable[torch.Tensor]] | None = None  # torch's own, while a recording is active
        self._known: dict[int, tuple[weakref.ref[Any], torch.Tensor, Adapter]] = {}  # by id of the handle

    def parts(self, value: Any) -> tuple[Form, tuple[Any, ...]] | None:
        """The form of an instance of such a library, and what it is made of; None for anything else."""
        for adapter in self.adapters:
            if isinstance(value, adapter.tensor.kind):
                return adapter.tensor, (self.of(adapter, value),)
            for form in adapter.values:
                if isinstance(value, form.kind):
                    return form, form.parts(value)
        return None

    def of(self, adapter: Adapter, value: Any) -> torch.Tensor:
        """The torch tensor for a tensor of the library.

        Raises:
            CaptureError: during a recording, it reaches beyond memory of which a part is known.
        """
        handle = adapter.handle(value)
        known = self.get(handle)
        if known is None:
            made_from = adapter.torch_owner(value)
            known = self.at(adapter, handle) if made_from is None else self.bind(adapter, handle, made_from)
        return known

    def at(self, adapter: Adapter, handle: Any) -> torch.Tensor:
        """The torch tensor for `handle`; where its memory is known already, one that shares the storage.

        Raises:
            CaptureError: as `of`.
        """
        known = self.get(handle)
        if known is not None:
            return known
        tensor = adapter.expose(handle)
        start, stop = adapter.range(handle)
        recording = self.others is not None
        memories = [*self, *(self.others() if self.others is not None else ())] if stop > start else []
        for memory in memories:
            if holds(memory, start, stop):
                return self.bind(adapter, handle, placed(memory, start, tensor))
            if recording and meets(memory, start, stop):
                raise CaptureError(
                    f"a tensor {list(tensor.shape)} shares memory with one {list(memory.shape)} that the recording has "
                    "met before, and reaches beyond it. Pass the whole of it to the recording as an input"
                )
        return self.bind(adapter, handle, tensor)

    def get(self, handle: Any) -> torch.Tensor | None:
        """The torch tensor for `handle`, if there is one already."""
        known = self._known.get(id(handle))
        return known[1] if known is not None and known[0]() is handle else None

    def bind(self, adapter: Adapter, handle: Any, tensor: torch.Tensor) -> torch.Tensor:
        """Let `tensor` stand for `handle` as long as that lives."""
        key = id(handle)

        def forget(reference: weakref.ref[Any]) -> None:
            known = self._known.get(key)
            if known is not None and known[0] is reference:
                del self._known[key]

        self._known[key] = (weakref.ref(handle, forget), tensor, adapter)
        return tensor

    def original(self, tensor: torch.Tensor) -> Any:
        """A tensor of the library that `tensor` stands for; `tensor` itself if it is torch's own."""
        for reference, known, adapter in tuple(self._known.values()):
            handle = reference()
            if known is tensor and handle is not None:
                return adapter.wrapped(handle)
        return tensor

    def stands(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` stands for a tensor of a library that still lives."""
        return any(known is tensor and ref() is not None for ref, known, _ in tuple(self._known.values()))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([tensor for _, tensor, _ in tuple(self._known.values())])

    def unify(self, tensors: list[torch.Tensor]) -> None:
        """Let those that overlap share one storage; replaces them in `tensors` too."""
        entries = []
        for key, (reference, tensor, adapter) in self._known.items():
            handle = reference()
            if handle is not None and tensor.numel():
                entries.append((*adapter.range(handle), key, adapter, handle))
        for group in _overlapping(sorted(entries, key=lambda entry: entry[:3])):
            storages = {self._known[key][1].untyped_storage().data_ptr() for _, _, key, _, _ in group}
            if len(storages) == 1:
                continue
            start, stop = group[0][0], max(entry[1] for entry in group)
            whole = group[0][3].spanning(start, stop, [entry[4] for entry in group])
            for begin, _, key, adapter, handle in group:
                old = self._known[key][1]
                new = placed(whole, begin, old)
                tensors[:] = [new if tensor is old else tensor for tensor in tensors]
                self.bind(adapter, handle, new)


def _overlapping(entries: Sequence[Any]) -> Iterable[list[Any]]:
    """Groups of more than one entry, sorted by their ranges, in which each overlaps another."""
    group: list[Any] = []
    end = 0
    for entry in entries:
        if group and entry[0] < end:
            group.append(entry)
        else:
            if len(group) > 1:
                yield group
            group = [entry]
            end = 0
        end = max(end, entry[1])
    if len(group) > 1:
        yield group


def placed(memory: torch.Tensor, address: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor at `address` within the storage of `memory`, with the dtype, shape and strides of `like`.

    Raises:
        CaptureError: the address is not a multiple of the dtype's size from where the storage begins.
    """
    storage = memory.untyped_storage()
    offset, rest = divmod(address - storage.data_ptr(), like.itemsize)
    if rest:
        raise CaptureError("two tensors of different dtypes share memory in a way that torch cannot express")
    with unrecorded():
        empty = torch.empty(0, dtype=like.dtype, device=like.device)
        return empty.set_(storage, offset, like.shape, like.stride())


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Tensors made here are no part of a recording, and outlive an inference mode."""
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableTorchDispatch():
        yield


def holds(memory: torch.Tensor, start: int, stop: int) -> bool:
    """Whether the addresses from `start` to `stop` lie within the storage of `memory`."""
    if memory.layout != torch.strided:
        return False
    storage = memory.untyped_storage()
    first = storage.data_ptr()
    return first <= start and stop <= first + storage.nbytes()


def meets(memory: torch.Tensor, start: int, stop: int) -> bool:
    """Whether some address from `start` to `stop` lies within the storage of `memory`."""
    if memory.layout != torch.strided:
        return False
    storage = memory.untyped_storage()
    first = storage.data_ptr()
    return first < stop and start < first + storage.nbytes()


def settle(results: Sequence[torch.Tensor], forms: Sequence[Form | None], outside: Sequence[bool]) -> list[Any]:
    """A replay's results with what becomes a library's tensor in the library's own memory.

    Args:
        results: one tensor for each output.
        forms: the form of the library's tensors where an output becomes one.
        outside: whether an output lies in memory that exists outside the replay, which stays where it is.
    """
    settled = list(results)
    for adapter in adapters():
        storages = {
            results[i].untyped_storage()._cdata
            for i, form in enumerate(forms)
            if form is adapter.tensor and not outside[i]
        }
        moved = [
            i
            for i, tensor in enumerate(results)
            if tensor.layout == torch.strided and tensor.untyped_storage()._cdata in storages
        ]
        for i, tensor in zip(moved, adapter.own([results[i] for i in moved]), strict=True):
            settled[i] = tensor
    return settled
