"""Rows of the op table for convolutions whose weights are made ready once: folded with a norm, and laid out.

On a CPU they are packed for oneDNN, which would reorder them at each call; its fused ReLU is not used, for it turns NaN
into 0. On a GPU, in half precision, channels come last, as its tensor cores read them. Results lie the same way.
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
    """A weight [O, I, H, W] as the convolution of inputs of this `size` reads it best."""
    if not lies_last(weight.device, weight.dtype):
        return weight.clone()
    if weight.device.type != "cpu":
        return channels_last(weight)
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
        result = F.conv2d(input, weight, bias, list(stride), list(padding), list(dilation), groups)
    else:
        result = torch.ops.mkldnn._convolution_pointwise(
            input, weight, bias, list(padding), list(stride), list(dilation), groups, "none", [], ""
        )
    return channels_last(result) if lies_last(input.device, input.dtype) else result


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with the strides of a new tensor whose channels come last."""
    shape = tensor.shape
    empty = torch.empty(shape, dtype=tensor.dtype, device="meta", memory_format=torch.channels_last)
    if tensor.stride() == empty.stride():
        return tensor
    return torch.empty_like(empty, device=tensor.device).copy_(tensor)


def lies_last(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether convolutions are faster there with weights that are laid out for them, and give channels last."""
    if device.type == "cuda":
        return dtype in (torch.bfloat16, torch.float16)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


for _function in (folded_norm, packed_weight, packed_convolution):
    TABLE[_function.__name__] = Op(_function.__name__, _function, Kind.OPAQUE, parameters_of(_function))
