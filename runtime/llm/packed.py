"""Modules whose weights stay packed, and `quantize`, which makes them of a model's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from graph_capture.ir.quantised import dequantize, format_of, quant_linear


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
