"""Ops that torch has not, or not in this form, as functions of torch's own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def softcap(input: torch.Tensor, cap: float) -> torch.Tensor:
    """``cap * tanh(input / cap)``: logits bounded by `cap` (Gemma 2)."""
    return torch.tanh(input / cap) * cap


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, transposed: bool = False
) -> torch.Tensor:
    """`torch.nn.functional.linear`: [..., K] x [N, K] (+ [N]) -> [..., N]; the weight is [K, N] if `transposed`."""
    return F.linear(input, weight.t() if transposed else weight, bias)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    fill: float | None = None,
    keeps: bool = False,
    tokens_first: bool = False,
    strict: bool = False,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention`: [B, H, L, E] x [B, H, S, E] x [B, H, S, V] -> [B, H, L, V].

    With `fill`, scores become `fill` where the bool `attn_mask` is True, or, if it `keeps`, where it is False.
    `tokens_first`: key and value are [B, S, H, E], without or with B. `strict`: a query whose keys are all masked by
    -inf gets NaN, as from a softmax that is written out; torch's attention gives 0.
    """
    if tokens_first:
        key, value = key.transpose(-3, -2), value.transpose(-3, -2)
    if fill is not None and attn_mask is not None:
        left_out = attn_mask.logical_not() if keeps else attn_mask
        return _filled_attention(query, key, value, left_out, fill, scale, enable_gqa)
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if strict and attn_mask is not None:
        result = result.masked_fill((attn_mask == -math.inf).all(-1, keepdim=True), math.nan)
    return result


def _filled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    left_out: torch.Tensor,
    fill: float,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Attention whose scores are `fill` where they are `left_out`. torch's attention adds `fill` to them instead, which
    is another thing for scores that are not finite, and for rows that are left out as a whole: then, and where looking
    for that would make a device wait, the scores are made and filled."""
    if query.device.type == "cpu" and not bool(left_out.all(-1).any()):
        mask = torch.zeros(left_out.shape, dtype=query.dtype).masked_fill_(left_out, fill)
        result = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)
        if not bool(result.isnan().any()):
            return result
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // key.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return torch.softmax(scores.masked_fill(left_out, fill), -1) @ value


def matmul(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.matmul`."""
    return torch.matmul(input, other)


def repeat_kv(input: torch.Tensor, repeats: int, tokens_first: bool = False) -> torch.Tensor:
    """[B, H, S, E] -> [B, H * repeats, S, E]: each head `repeats` times in a row.

    With `tokens_first` the input is [B, S, H, E], without or with B.
    """
    if tokens_first:
        *rows, heads, width = input.shape
        wide = input.unsqueeze(-2).expand(*rows, heads, repeats, width)
        return wide.reshape(*rows, heads * repeats, width).transpose(-3, -2)
    batch, heads, length, width = input.shape
    return input[:, :, None].expand(batch, heads, repeats, length, width).reshape(batch, -1, length, width)


def rope(
    input: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
    half_tables: bool = False,
) -> torch.Tensor:
    """Rotary position embedding (Su et al., 2021) of the first E elements of each [..., D] row.

    `cos` and `sin` broadcast over `input`; their last dimension is E, or with `half_tables` E / 2, for both halves.
    Element i is rotated with i + E / 2, or, if `interleaved`, 2 i with 2 i + 1. Without `sin`, `cos` is complex,
    cos + i sin [..., E / 2], and the rotation is the product of complex numbers, in float32 at least (Meta's Llama).
    """
    if sin is None:
        pairs = input.to(cos.real.dtype).unflatten(-1, (-1, 2)).contiguous()
        return torch.view_as_real(torch.view_as_complex(pairs) * cos).flatten(-2).to(input.dtype)
    if half_tables:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    width = cos.shape[-1]
    turned, kept = input[..., :width], input[..., width:]
    if interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        other = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), -1)
    turned = turned * cos + other * sin
    return torch.cat((turned, kept), -1) if kept.shape[-1] else turned


def capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    cap: float = 30.0,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` whose scores go through `softcap` before the mask is added (Gemma 2, 2024)."""
    if enable_gqa:
        key, value = (repeat_kv(heads, query.shape[-3] // key.shape[-3]) for heads in (key, value))
    scores = softcap(query @ key.transpose(-2, -1) * scale, cap)
    scores = scores if attn_mask is None else scores + attn_mask
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype) @ value
