"""InfiniCore's tensors and torch's on the same memory.

A *handle* is an object of the extension module, ``infinicore.Tensor._underlying``. It has an address, a shape and
strides, but says nothing of the memory around it, and a handle made from an address (``from_blob``) keeps nothing
alive. So what is to become InfiniCore's lies in memory that InfiniCore has allocated, and torch tensors on it hold a
handle of their own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from graph_capture.calls.foreign import unrecorded
from graph_capture.errors import CaptureError
from graph_capture.ir.memory import storage_bytes
from graph_capture.ir.values import TensorMeta

DTYPES = {
    "BOOL": torch.bool,
    "BYTE": torch.uint8,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "C128": torch.complex128,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_OWNER = "_graph_capture_owner"  # of a storage: the handle whose memory it is


class MemoryBlock:
    """Handles of one `infinicore` package as torch tensors, and back."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.extension = library.lib._infinicore
        kind = self.extension.Tensor
        self._as_strided, self._narrow = kind.as_strided, kind.narrow  # as they are when nothing is recorded
        self._empty, self._strided_empty = self.extension.empty, self.extension.strided_empty
        self._blob = self.extension.strided_from_blob
        self._sync = self.extension.sync_stream

    def dtype(self, handle: Any) -> torch.dtype:
        """Raises CaptureError: torch has none like it."""
        name = handle.dtype.name
        if name not in DTYPES:
            raise CaptureError(f"torch has no dtype for InfiniCore's {name}")
        return DTYPES[name]

    def device(self, handle: Any) -> torch.device:
        """Raises CaptureError: torch cannot see the device's memory here."""
        found = self.library.device._from_infinicore_device(handle.device)
        if found.type not in ("cpu", "cuda"):
            raise CaptureError(f"tensors on {found} cannot be recorded; only those on the CPU and on CUDA devices")
        return torch.device(found.type) if found.type == "cpu" else torch.device(found.type, found.index)

    def dtype_of(self, dtype: torch.dtype) -> Any:
        """InfiniCore's dtype (of the extension). Raises CaptureError: it has none."""
        if dtype not in _NAMES:
            raise CaptureError(f"InfiniCore has no dtype for {dtype}")
        return getattr(self.extension.DataType, _NAMES[dtype])

    def device_of(self, device: torch.device) -> Any:
        """InfiniCore's device (of the extension)."""
        return self.library.device(device.type, device.index or 0)._underlying

    def range(self, handle: Any) -> tuple[int, int]:
        """The addresses that a handle reaches: from the first to past the last."""
        shape, strides = list(handle.shape), list(handle.strides)
        if any(stride < 0 for stride in strides):
            raise CaptureError(f"a tensor has negative strides {strides}, which torch cannot express")
        start = handle.data_ptr()
        if 0 in shape:
            return start, start
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        return start, start + (last + 1) * self.dtype(handle).itemsize

    def expose(self, handle: Any) -> torch.Tensor:
        """A torch tensor on the handle's memory, which it keeps alive; the handle itself it does not."""
        shape, strides = list(handle.shape), list(handle.strides)
        start, stop = self.range(handle)
        with unrecorded():
            if start == stop:
                return torch.empty_strided(shape, strides, dtype=self.dtype(handle), device=self.device(handle))
            owner = self._as_strided(handle, shape, strides)  # another handle on the same memory
            if self.device(handle).type == "cuda":  # InfiniCore's stream is another one than torch's
                self._sync()
            return self._bytes(start, stop, owner).view(self.dtype(handle)).as_strided(shape, strides)

    def spanning(self, start: int, stop: int, handles: Sequence[Any]) -> torch.Tensor:
        """Bytes from `start` to `stop`, of memory that the handles share."""
        first = min(handles, key=lambda handle: handle.data_ptr())
        return self._bytes(start, stop, self._as_strided(first, list(first.shape), list(first.strides)))

    def _bytes(self, start: int, stop: int, owner: Any) -> torch.Tensor:
        device = self.device(owner)
        with unrecorded():
            if device.type == "cpu":
                buffer = (ctypes.c_uint8 * (stop - start)).from_address(start)
                buffer.owner = owner  # type: ignore[attr-defined]  # the storage keeps the buffer alive
                tensor = torch.frombuffer(buffer, dtype=torch.uint8)
            else:
                tensor = torch.as_tensor(_OnDevice(start, stop, owner), device=device)
            setattr(tensor.untyped_storage(), _OWNER, owner)
        return tensor

    def empty(self, meta: TensorMeta) -> tuple[Any, torch.Tensor]:
        """A handle on new memory of InfiniCore's with a layout, and the torch tensor on it."""
        dtype, device = self.dtype_of(meta.dtype), self.device_of(meta.device)
        owner = self._strided_empty(list(meta.shape), list(meta.stride), dtype, device)
        return owner, self.expose(owner)

    def own(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies in memory of InfiniCore's; those that share a storage still do."""
        storages: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors:
            storages.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        copies: dict[int, torch.Tensor] = {}
        for cdata, sharing in storages.items():
            if len(sharing) == 1 and sharing[0].is_contiguous():
                copies[cdata] = self.empty(TensorMeta.of(sharing[0]))[1].copy_(sharing[0])
            else:
                first = sharing[0]
                bytes_ = storage_bytes(first)
                count = -(-bytes_.numel() // first.itemsize)
                meta = TensorMeta((count,), (1,), first.dtype, first.device)
                copies[cdata] = self.empty(meta)[1]
                storage_bytes(copies[cdata])[: bytes_.numel()].copy_(bytes_)
        return [_on(copies[tensor.untyped_storage()._cdata], tensor) for tensor in tensors]

    def handle(self, tensor: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        """A new handle on a torch tensor's memory; where InfiniCore does not own that, also what to keep alive."""
        if tensor.is_cuda:  # before InfiniCore's stream reads it
            torch.cuda.current_stream(tensor.device).synchronize()
        owner = getattr(tensor.untyped_storage(), _OWNER, None) if tensor.layout == torch.strided else None
        if not tensor.numel():
            meta = TensorMeta.of(tensor)
            return self._empty(list(meta.shape), self.dtype_of(meta.dtype), self.device_of(meta.device)), None
        if owner is None or owner.dtype != self.dtype_of(tensor.dtype):
            return self.blob(tensor), tensor
        offset = (tensor.data_ptr() - owner.data_ptr()) // tensor.itemsize
        flat = self._as_strided(owner, [offset + 1], [1])
        return self._as_strided(self._narrow(flat, 0, offset, 1), list(tensor.shape), list(tensor.stride())), None

    def blob(self, tensor: torch.Tensor) -> Any:
        """A handle on a torch tensor's memory that does not keep it alive."""
        dtype, device = self.dtype_of(tensor.dtype), self.device_of(tensor.device)
        return self._blob(tensor.data_ptr(), list(tensor.shape), list(tensor.stride()), dtype, device)


def _on(copy: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`'s place in a copy: of it alone, or of its whole storage."""
    if copy.dtype == tensor.dtype and copy.shape == tensor.shape and copy.stride() == tensor.stride():
        return copy
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(copy.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


class _OnDevice:
    """Bytes on a CUDA device, as torch takes them from others; it keeps this object alive."""

    def __init__(self, start: int, stop: int, owner: Any) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (stop - start,),
            "typestr": "|u1",
            "data": (start, False),
            "version": 3,
        }
