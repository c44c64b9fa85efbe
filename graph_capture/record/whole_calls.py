"""Torch functions that the recorder keeps whole, because fusion wants them whole: their call as (op, arguments)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Call = tuple[Any, ...]  # (op, args) or (op, args, kwargs)
SEMANTIC: dict[Any, Callable[..., Call | None]] = {}  # None: what they do inside is recorded


def _keeps(*functions: Any) -> Callable[[Callable[..., Call | None]], Callable[..., Call | None]]:
    def register(adapter: Callable[..., Call | None]) -> Callable[..., Call | None]:
        SEMANTIC.update(dict.fromkeys(functions, adapter))
        return adapter

    return register


@_keeps(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def _call_matmul(input: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor | None = None) -> Call | None:
    return None if out is not None else ("matmul", (input, other))


@_keeps(F.softmax, torch.softmax, torch.Tensor.softmax)
def _call_softmax(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    out: torch.Tensor | None = None,
) -> Call | None:
    return None if out is not None or not isinstance(dim, int) else ("softmax", (input, dim, dtype))


@_keeps(F.rms_norm, torch.rms_norm)
def _call_rms_norm(
    input: torch.Tensor,
    normalized_shape: Any,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> Call | None:
    return ("rms_norm", (input, weight, eps)) if tuple(normalized_shape) == tuple(input.shape[-1:]) else None


@_keeps(F.layer_norm)
def _call_layer_norm(
    input: torch.Tensor,
    normalized_shape: Any,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> Call | None:
    return ("layer_norm", (input, weight, bias, eps)) if tuple(normalized_shape) == tuple(input.shape[-1:]) else None


def _call_whole(name: str) -> Callable[..., Call | None]:
    """For a function whose op has its parameters, in its order, under its names."""
    return lambda *args, out=None, **kwargs: None if out is not None else (name, args, kwargs)


for _function, _name in (
    (F.linear, "linear"),
    (F.scaled_dot_product_attention, "scaled_dot_product_attention"),
    *((getattr(torch.linalg, name), name) for name in ("svdvals", "eigvalsh", "cond")),
):
    _keeps(_function)(_call_whole(_name))
