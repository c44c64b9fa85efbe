"""Linear layers, where only their parts were recorded."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from graph_capture.passes.spellings.rule import Attributes, Found, require, rule


def _linear(found: Found) -> Attributes:
    return _linear_fits(found, found["weight"].shape)


def _conv1d(found: Found) -> Attributes:
    _linear_fits(found, found["weight"].shape[::-1])
    return {"transposed": True}


def _linear_fits(found: Found, weight: tuple[int, ...]) -> Attributes:
    input, output, bias = found["input"], found["output"], found.values.get("bias")
    fits = len(weight) == 2 and input.shape[-1:] == weight[1:] and output.shape == (*input.shape[:-1], *weight[:1])
    require(fits and (bias is None or bias.shape == weight[:1]), f"{input} becomes {output}")
    return {}


_MATRIX = tuple({"input": shape, "weight": (5, 8), "bias": (5,)} for shape in ((2, 8), (2, 3, 8)))
_TRANSPOSED = ({"input": (2, 3, 8), "weight": (8, 5), "bias": (5,)},)
_SIZES = frozenset({"size"})

RULES = (
    rule(
        "linear",
        (lambda input, weight: F.linear(input, weight),),
        _linear,
        shapes=_MATRIX,
        keep_whole=False,
        ignore=_SIZES,
    ),
    rule(
        "linear",
        (lambda input, weight, bias: F.linear(input, weight, bias),),
        _linear,
        shapes=_MATRIX,
        keep_whole=False,
        ignore=_SIZES,
    ),
    rule(
        "linear",
        (lambda input, weight, bias: torch.addmm(bias, input.view(-1, 8), weight).view(*input.shape[:-1], 5),),
        _conv1d,
        shapes=_TRANSPOSED,
        ignore=_SIZES,
    ),
)
