"""Memory with another tensor's layout, expanded dimensions included."""

from __future__ import annotations

import torch

from graph_capture.ir.values import TensorMeta


def like(tensor: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """New memory with a tensor's layout, on its device or another."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device)


def copy_into(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Write the elements of `source` into `target`, of the same layout, and return it.

    torch refuses to write a tensor several elements of which are one in memory: each of these is written once.
    """
    once(target).copy_(once(source))
    return target


def once(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its expanded dimensions as they were before."""
    for dim, step in enumerate(tensor.stride()):
        if step == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def is_contiguous(meta: TensorMeta) -> bool:
    """Whether the value's strides are exactly those of a fresh tensor of its shape."""
    expected = 1
    for size, stride in zip(reversed(meta.shape), reversed(meta.stride), strict=True):
        if stride != expected:
            return False
        expected *= max(size, 1)
    return True
