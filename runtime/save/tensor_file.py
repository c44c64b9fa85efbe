"""Captured tensors in a safetensors file: weights under their names, what shares memory as that memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from graph_capture.errors import CacheError, CaptureError
from graph_capture.ir.graph import SubGraph
from graph_capture.ir.graph_json import as_dict, decode_meta, encode_meta, text
from graph_capture.ir.memory import storage_bytes
from graph_capture.ir.values import TensorMeta

Tensors = Mapping[str, torch.Tensor]


def encode_tensors(captured: Tensors, weights: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What goes into the file, and for each captured tensor its layout and where it is.

    Raises:
        CaptureError: a tensor cannot be written down.
    """
    stored: dict[str, torch.Tensor] = {}
    table: dict[str, Any] = {}
    members: dict[int, int] = {}  # storage -> how many captured tensors lie in it
    places: dict[int, str] = {}
    kept = [name for name, tensor in captured.items() if weights or not isinstance(tensor, torch.nn.Parameter)]
    for name in kept:
        tensor = captured[name]
        if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg() or tensor.is_meta:
            raise CaptureError(f"{name!r} cannot be saved: it is not a plain tensor with data")
        key = tensor.untyped_storage()._cdata
        members[key] = members.get(key, 0) + 1
    for name, tensor in captured.items():
        entry: dict[str, Any] = {"meta": encode_meta(TensorMeta.of(tensor))}
        table[name] = entry
        if name not in kept:
            continue
        key = tensor.untyped_storage()._cdata
        alone = members[key] == 1 and tensor.untyped_storage().nbytes() == tensor.nbytes
        if alone and tensor.is_contiguous() and not tensor.is_complex():
            entry["tensor"] = name
            stored[name] = tensor.detach().cpu()
        else:
            entry["storage"] = places.setdefault(key, f"storage:{len(places)}")
            if entry["storage"] not in stored:
                stored[entry["storage"]] = storage_bytes(tensor.detach()).cpu()
        entry["digest"] = _digest(stored[entry.get("tensor") or entry["storage"]])
    return stored, table


def decode_tensors(table: Mapping[str, Any], file: Any, given: Tensors, graph: SubGraph) -> dict[str, torch.Tensor]:
    """The captured tensors of `graph`, in order: those that are `given`, the others from an open safetensors file.

    Raises:
        CacheError: one is missing, damaged, or does not fit.
    """
    found: dict[str, torch.Tensor] = {}
    memories: dict[str, torch.Tensor] = {}
    for name, value in table.items():
        entry = as_dict(value)
        meta, recorded = decode_meta(entry.get("meta")), graph.values.get(name)
        if recorded is None or (meta.shape, meta.stride, meta.dtype, meta.device) != recorded[:4]:
            raise CacheError(f"the layout of {name!r} is not what the graph was recorded with")
        if meta.device.type == "meta":
            raise CacheError(f"{name!r} is on the meta device, where nothing has values")
        if name in given:
            found[name] = given[name]
        elif "tensor" in entry:
            found[name] = _tensor(file, text(entry["tensor"]), entry.get("digest")).to(meta.device)
        elif "storage" in entry:
            place = text(entry["storage"])
            if place not in memories:
                memories[place] = _tensor(file, place, entry.get("digest")).to(meta.device)
            found[name] = _view(memories[place], meta)
        else:
            raise CacheError(f"it was saved without {name!r}; give it in load(weights=...)")
        now = TensorMeta.of(found[name])
        if now[:4] != meta[:4]:
            raise CacheError(f"{name!r} must be {meta} with strides {list(meta.stride)} on {meta.device}, not {now}")
    return found


def _tensor(file: Any, name: str, digest: Any) -> torch.Tensor:
    from safetensors import SafetensorError

    try:
        tensor = file.get_tensor(name).clone()  # out of the mapped file: memory of its own, aligned
    except SafetensorError as error:
        raise CacheError(f"the tensor {name!r} is missing or damaged: {error}") from error
    if _digest(tensor) != digest:
        raise CacheError(f"the data of {name!r} is damaged")
    return tensor


def _view(memory: torch.Tensor, meta: TensorMeta) -> torch.Tensor:
    """A tensor of this layout in the bytes of `memory`."""
    span = meta.offset + 1 + sum((size - 1) * step for size, step in zip(meta.shape, meta.stride, strict=True))
    if memory.dtype is not torch.uint8 or (
        meta.numel and span * meta.dtype.itemsize > memory.untyped_storage().nbytes()
    ):
        raise CacheError("a tensor reaches beyond its memory")
    empty = torch.empty(0, dtype=meta.dtype, device=memory.device)
    return empty.set_(memory.untyped_storage(), meta.offset, meta.shape, meta.stride)


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
