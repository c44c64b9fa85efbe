"""The views of InfiniCore's tensors as torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Tensor = torch.Tensor

# Methods that say something about a tensor and leave it alone.
HARMLESS = frozenset(
    {"data_ptr", "debug", "device", "dtype", "info", "is_contiguous", "is_pinned", "ndim", "numel", "shape", "size"}
    | {"stride", "strides"}
)


def _as_strided(tensor: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """A tensor that repeats another along new dimensions is recorded as that: passes know it."""
    new = _inserted(tensor, shape, strides)
    if new is None:
        return tensor.as_strided(tuple(shape), tuple(strides))
    for dim in new:
        tensor = tensor.unsqueeze(dim)
    return tensor.expand(tuple(shape))


def _inserted(tensor: Tensor, shape: Sequence[int], strides: Sequence[int]) -> list[int] | None:
    """The positions of dimensions of stride 0 that are all that sets the new layout apart; None if more does."""
    found, known = [], 0
    for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        if known < tensor.dim() and (size, stride) == (tensor.shape[known], tensor.stride(known)):
            known += 1
        elif stride == 0:
            found.append(dim)
        else:
            return None
    return found if known == tensor.dim() and found else None


VIEWS: dict[str, Callable[..., Tensor]] = {
    "as_strided": _as_strided,
    "narrow": lambda tensor, dim, start, length: tensor.narrow(dim, start, length),
    "permute": lambda tensor, dims: tensor.permute(tuple(dims)),
    "squeeze": lambda tensor, dim: _squeezed(tensor, dim),
    "unsqueeze": lambda tensor, dim: tensor.unsqueeze(dim),
    "view": lambda tensor, shape: tensor.view(tuple(shape)),
}


def _squeezed(tensor: Tensor, dim: int) -> Tensor:
    if tensor.shape[dim] != 1:
        raise ValueError(f"dimension {dim} of {list(tensor.shape)} is not of size 1")
    return tensor.squeeze(dim)
