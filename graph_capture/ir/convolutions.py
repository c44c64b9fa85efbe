"""Rows of the op table for convolutions whose weights are made ready once: folded with a norm, and packed.

Packed weights are oneDNN's: it would reorder them at each call. Its fused ReLU is not used: it turns NaN into 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from graph_capture.ir.ops import TABLE, Kind, Op, parameters_of


def folded_norm(
    weight: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [O, ...] and bias [O] of a convolution that does the batch norm behind it too; in the weight's dtype."""
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    scale = (var.to(wide) + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.to(wide)
    shift = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
    shift = shift * scale
    if beta is not None:
        shift = shift + beta.to(wide)
    scaled = weight.to(wide) * scale.view(-1, *[1] * (weight.dim() - 1))
    return scaled.to(weight.dtype), shift.to(weight.dtype)


def packed_weight(
    weight: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """A weight [O, I, H, W] as the convolution of inputs of this `size` reads it best; on a GPU as it is."""
    if not packs(weight.device, weight.dtype):
        return weight.clone()
    packed: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight, list(padding), list(stride), list(dilation), groups, list(size)
    )
    return packed


def packed_convolution(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """`torch.nn.functional.conv2d` of [N, I, H, W] with a weight from `packed_weight`."""
    if not weight.is_mkldnn:
        return F.conv2d(input, weight, bias, list(stride), list(padding), list(dilation), groups)
    result: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
        input, weight, bias, list(padding), list(stride), list(dilation), groups, "none", [], ""
    )
    return result


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN takes packed weights there."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


for _function in (folded_norm, packed_weight, packed_convolution):
    TABLE[_function.__name__] = Op(_function.__name__, _function, Kind.OPAQUE, parameters_of(_function))
