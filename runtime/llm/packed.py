"""Modules whose weights stay packed, and `quantize`, which makes them of a model's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from graph_capture.errors import CaptureError
from graph_capture.ir.quantised import TILE, decoded, dequantize, format_of, quant_linear

BITS = ("int8", "int4")
LARGEST = 3e4  # magnitude of a weight: scales and minima are float16


class PackedLinear(nn.Module):
    """`torch.nn.Linear` over a packed weight.

    Args:
        packed: [out_features, bytes of a row] uint8, in the format `scheme` (see `graph_capture.ir.quantised`).
        bias: [out_features], in the dtype of what is multiplied.
    """

    def __init__(self, packed: nn.Parameter, scheme: str, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.packed, self.scheme, self.bias = packed, scheme, bias
        self.out_features, self.in_features = packed.shape[0], format_of(scheme).inner(packed.shape[1])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in the input's dtype."""
        result: torch.Tensor = quant_linear(input, self.packed, self.bias, format=self.scheme)
        return result

    def extra_repr(self) -> str:
        """What is printed of it."""
        return f"{self.in_features}, {self.out_features}, {self.scheme}, bias={self.bias is not None}"


class PackedEmbedding(nn.Module):
    """`torch.nn.Embedding` over packed rows, which are unpacked as they are looked up.

    Args:
        packed, scheme: as a `PackedLinear`'s.
        dtype: of the result.
        embed_scale: what transformers' own embeddings multiply their result by, where they do.
    """

    def __init__(
        self, packed: nn.Parameter, scheme: str, dtype: torch.dtype, embed_scale: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.packed, self.scheme, self.dtype = packed, scheme, dtype
        self.num_embeddings, self.embedding_dim = packed.shape[0], format_of(scheme).inner(packed.shape[1])
        self.embed_scale: torch.Tensor | None
        self.register_buffer("embed_scale", embed_scale, persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[...] int64 -> [..., embedding_dim]."""
        rows: torch.Tensor = dequantize(F.embedding(input, self.packed), format=self.scheme, dtype=self.dtype)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(self.dtype)

    def extra_repr(self) -> str:
        """What is printed of it."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme}"


def packable(module: nn.Module) -> bool:
    """Whether a packed weight can take the place of this module's: a linear, or an embedding as transformers has them.
    What else derives from these may use its weight in ways of its own."""
    if type(module) is nn.Linear:
        return True
    known = type(module) is nn.Embedding or hasattr(module, "embed_scale")
    return isinstance(module, nn.Embedding) and known and module.max_norm is None


def pack_module(model: nn.Module, name: str, packed: nn.Parameter, scheme: str) -> None:
    """Put a packed module in the place of a `packable` one; its own weight is let go.

    Args:
        packed: [rows of its weight, bytes of a row] uint8.
    """
    module = model.get_submodule(name)
    if isinstance(module, nn.Linear):
        made: nn.Module = PackedLinear(packed, scheme, module.bias)
    else:
        scale = getattr(module, "embed_scale", None)
        scale = torch.as_tensor(scale) if isinstance(scale, (int, float)) else scale
        dtype = module.weight.dtype
        assert isinstance(dtype, torch.dtype)
        made = PackedEmbedding(packed, scheme, dtype, scale)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, made.train(module.training))


@dataclass(frozen=True)
class PackedWeight:
    """What became of a weight: `error` is the RMS of its change, as a part of the RMS of the weight; `before` and
    `after` are bytes."""

    name: str
    scheme: str
    before: int
    after: int
    error: float


def quantize(model: nn.Module, scheme: str, *, group: int = 64) -> list[PackedWeight]:
    """Round the weights of a model's linears and embeddings to integers of few bits, in place.

    Groups of weights along a row share a scale, and with 4 bits a minimum, in float16; each weight is rounded to the
    nearest that there is. Embeddings and the head over the vocabulary have 8 bits in either scheme.

    Args:
        model: its weights in any floating dtype; in which it computes afterwards as well.
        scheme: "int8" or "int4".
        group: weights that share a scale: a multiple of 32, at most 1024, that divides every row.

    Returns:
        A receipt for each weight, in the model's order.

    Raises:
        CaptureError: there is no such scheme; the group does not divide a row; a weight is not finite, or too large
            for float16; or there is nothing to quantise. The model is then as it was.
    """
    if scheme not in BITS:
        raise CaptureError(f"weights are quantised to {' or '.join(BITS)}, not to {scheme!r}")
    chosen: dict[str, Any] = {name: module for name, module in model.named_modules() if packable(module)}
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    shared = {id(m.weight) for m in chosen.values() if isinstance(m, nn.Embedding) or m is head}
    formats = {name: f"{'int8' if id(m.weight) in shared else scheme}:{group}" for name, m in chosen.items()}
    if not chosen:
        raise CaptureError(f"{type(model).__name__} has no linears or embeddings to quantise")
    for name, module in chosen.items():
        try:
            format_of(formats[name]).row_bytes(module.weight.shape[1])
        except CaptureError as reason:
            raise CaptureError(f"{name} cannot be quantised: {reason}") from reason
        largest = module.weight.detach().abs().max().item() if module.weight.numel() else 0.0
        if not largest <= LARGEST:
            raise CaptureError(f"{name} has a weight of magnitude {largest:g}; at most {LARGEST:g} can be quantised")
    made: dict[int, nn.Parameter] = {}
    receipts = []
    for name, module in chosen.items():
        weight, own = module.weight, formats[name]
        if id(weight) not in made:
            packed, error = packed_rows(weight.detach(), own)
            made[id(weight)] = nn.Parameter(packed, requires_grad=False)
            receipts.append(PackedWeight(name, own, weight.nbytes, packed.nbytes, error))
        pack_module(model, name, made[id(weight)], own)
    return receipts


def packed_rows(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, float]:
    """A weight [N, K] in one of our own formats ("int8:64"), and by how much that changed it (see `PackedWeight`)."""
    row = format_of(scheme)
    eight = scheme.startswith("int8")
    out = weight.new_empty(weight.shape[0], row.row_bytes(weight.shape[1]), dtype=torch.uint8)
    step, changed, total = max(1, TILE // weight.shape[1]), 0.0, 0.0
    for first in range(0, weight.shape[0], step):
        values = weight[first : first + step].to(torch.float32)
        groups = values.unflatten(1, (-1, row.group))
        if eight:
            lowest = torch.zeros_like(groups[..., :1])
            scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
        else:
            lowest = groups.amin(-1, keepdim=True).half()
            scale = ((groups.amax(-1, keepdim=True) - lowest.float()) / 15).half()
        steps = (groups - lowest.float()) / scale.float().clamp(min=torch.finfo(torch.float16).smallest_normal / 2**10)
        whole = steps.round().clamp(-127 if eight else 0, 127 if eight else 15).to(torch.int8).view(torch.uint8)
        parts = [scale.view(torch.uint8), whole]
        if not eight:
            low, high = whole.chunk(2, -1)
            parts = [scale.view(torch.uint8), lowest.view(torch.uint8), low | high << 4]
        out[first : first + step] = torch.cat(parts, -1).flatten(1)
        changed += (decoded(out[first : first + step], scheme) - values).double().square().sum().item()
        total += values.double().square().sum().item()
    return out, math.sqrt(changed / total) if total else 0.0
