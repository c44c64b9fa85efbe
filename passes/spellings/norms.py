"""RMSNorm and LayerNorm, taken apart."""

from __future__ import annotations

from typing import Any

import torch

from graph_capture.passes.pattern import Function
from graph_capture.passes.spellings.rule import CASTS, HALF, Attributes, Found, floats, require, rule

_VECTORS = ({"weight": (8,), "bias": (8,)},)


def _rms(square: Function, scale: Function, finish: Function) -> Function:
    def rms_norm(input: Any, weight: Any, eps: float = 1e-6) -> Any:
        hidden = input.to(torch.float32)
        return finish(input, scale(hidden, square(hidden).mean(-1, keepdim=True) + eps), weight)

    return rms_norm


def _rms_in_dtype(finish: Function) -> Function:
    """T5's: only the variance is in float32."""

    def rms_norm(input: Any, weight: Any, eps: float = 1e-6) -> Any:
        variance = input.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return finish(input, input * torch.rsqrt(variance + eps), weight)

    return rms_norm


def _plain_rms(square: Function, scale: Function) -> Function:
    def rms_norm(input: Any, eps: float = 1e-6) -> Any:
        hidden = input.to(torch.float32)
        return scale(hidden, square(hidden).mean(-1, keepdim=True) + eps).to(input.dtype)

    return rms_norm


def _offset_rms(square: Function, scale: Function) -> Function:
    def rms_norm(input: Any, weight: Any, eps: float = 1e-6, offset: float = 1.0) -> Any:
        hidden = input.to(torch.float32)
        hidden = scale(hidden, square(hidden).mean(-1, keepdim=True) + eps)
        return (hidden * (weight.to(torch.float32) + offset)).to(input.dtype)

    return rms_norm


def _offset_rms_in_dtype(input: Any, weight: Any, eps: float = 1e-6, offset: float = 1.0) -> Any:
    hidden = input.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return hidden.to(input.dtype) * (weight + offset)


_SQUARES: tuple[Function, ...] = (lambda x: x.pow(2), lambda x: x * x)
_SCALES: tuple[Function, ...] = (
    lambda x, variance: x * torch.rsqrt(variance),
    lambda x, variance: x / torch.sqrt(variance),
    lambda x, variance: x * variance.pow(-0.5),
    lambda x, variance: x * (1.0 / torch.sqrt(variance)),
)
_FINISHES: tuple[Function, ...] = (
    lambda input, hidden, weight: weight * hidden.to(input.dtype),
    lambda input, hidden, weight: (weight * hidden).to(input.dtype),
    lambda input, hidden, weight: (weight.to(torch.float32) * hidden).to(input.dtype),
)
_WAYS = [(square, scale) for square in _SQUARES for scale in _SCALES]


def _rms_norm(found: Found) -> Attributes:
    _norm(found)
    return found.numbers


def _norm(found: Found) -> None:
    input, output = found["input"], found["output"]
    floats(found, "input", "output", "weight", "bias")
    require(output.shape == input.shape, f"{input} becomes {output}")
    for name in ("weight", "bias"):
        if name in found:
            require(found[name].shape == input.shape[-1:], f"{name} {found[name]} does not span the last dimension")


def _layer(centre: Function, variance: Function, scale: Function, affine: bool) -> Function:
    def layer_norm(input: Any, weight: Any, bias: Any, eps: float = 1e-5) -> Any:
        hidden = input.to(torch.float32)
        centred = centre(hidden)
        hidden = scale(centred, variance(hidden, centred) + eps).to(input.dtype)
        return weight * hidden + bias

    def plain_layer_norm(input: Any, eps: float = 1e-5) -> Any:
        hidden = input.to(torch.float32)
        centred = centre(hidden)
        return scale(centred, variance(hidden, centred) + eps).to(input.dtype)

    return layer_norm if affine else plain_layer_norm


_VARIANCES: tuple[Function, ...] = (
    lambda hidden, centred: centred.pow(2).mean(-1, keepdim=True),
    lambda hidden, centred: (centred * centred).mean(-1, keepdim=True),
    lambda hidden, centred: hidden.var(-1, unbiased=False, keepdim=True),
)


def _centre(hidden: Any) -> Any:
    return hidden - hidden.mean(-1, keepdim=True)


_LAYERS = [(_centre, variance, scale) for variance in _VARIANCES for scale in _SCALES]

# A LayerNorm spelled out contains an RMSNorm, of the centred values.
RULES = (
    rule(
        "layer_norm",
        [_layer(*way, affine=True) for way in _LAYERS],
        _rms_norm,
        shapes=_VECTORS,
        dtypes=HALF,
        ignore=CASTS,
    ),
    rule("layer_norm", [_layer(*way, affine=False) for way in _LAYERS], _rms_norm, dtypes=HALF, ignore=CASTS),
    rule(
        "rms_norm",
        (*(_offset_rms(a, b) for a, b in _WAYS), _offset_rms_in_dtype),
        _rms_norm,
        shapes=_VECTORS,
        dtypes=HALF,
        ignore=CASTS,
    ),
    rule(
        "rms_norm",
        (*(_rms(a, b, c) for a, b in _WAYS for c in _FINISHES), _rms_in_dtype(_FINISHES[0])),
        _rms_norm,
        shapes=_VECTORS,
        dtypes=HALF,
        ignore=CASTS,
    ),
    rule("rms_norm", [_plain_rms(*way) for way in _WAYS], _rms_norm, dtypes=HALF, ignore=CASTS),
)
