"""Activations, soft-capping and softmax, taken apart."""

from __future__ import annotations

import math
from typing import Any

import torch

from graph_capture.passes.pattern import Function
from graph_capture.passes.spellings.rule import Attributes, Found, floats, near, rule


def _no_attributes(found: Found) -> Attributes:
    floats(found, "input", "output")
    return found.numbers


def _gelu_erf(found: Found) -> Attributes:
    floats(found, "input", "output")
    near(found, "inner", math.sqrt(0.5))
    return {}


def _gelu_erf_divided(found: Found) -> Attributes:
    floats(found, "input", "output")
    near(found, "inner", math.sqrt(2))
    return {}


def _gelu_tanh(found: Found) -> Attributes:
    floats(found, "input", "output")
    near(found, "inner", math.sqrt(2 / math.pi))
    near(found, "cubic", 0.044715)
    return {"approximate": "tanh"}


def _quick_gelu(found: Found) -> Attributes:
    floats(found, "input", "output")
    near(found, "slope", 1.702)
    return {}


def _tanh_gelu(inside: Function) -> Function:
    return lambda input, inner=0.8, cubic=0.04: 0.5 * input * (1.0 + torch.tanh(inside(input, inner, cubic)))


_NEW_GELU = (
    _tanh_gelu(lambda x, inner, cubic: inner * (x + cubic * x.pow(3.0))),
    _tanh_gelu(lambda x, inner, cubic: inner * (x + cubic * x.pow(3))),
    _tanh_gelu(lambda x, inner, cubic: inner * (x + cubic * x * x * x)),
    _tanh_gelu(lambda x, inner, cubic: x * inner * (1.0 + cubic * x * x)),
)


def _softmax(found: Found) -> Attributes:
    floats(found, "input", "output")
    return {"dim": -1}


def _decomposed_softmax(input: Any) -> Any:
    raised = torch.exp(input - torch.amax(input, -1, keepdim=True))
    return raised / raised.sum(-1, keepdim=True)


def _decomposed_softmax_max(input: Any) -> Any:
    raised = torch.exp(input - torch.max(input, dim=-1, keepdim=True).values)
    return raised / torch.sum(raised, dim=-1, keepdim=True)


def _softcap_scaled(found: Found) -> Attributes:
    floats(found, "input", "output")
    near(found, "factor", 1 / found.numbers["cap"] if found.numbers["cap"] else math.inf)
    return {"cap": found.numbers["cap"]}


RULES = (
    rule(
        "silu",
        (lambda input: input * torch.sigmoid(input), lambda input: input / (1.0 + torch.exp(-input))),
        _no_attributes,
    ),
    rule("quick_gelu", (lambda input, slope=1.7: input * torch.sigmoid(slope * input),), _quick_gelu),
    rule(
        "gelu",
        (
            lambda input, inner=0.7: 0.5 * input * (1.0 + torch.erf(input * inner)),
            lambda input, inner=0.7: input * (0.5 * (1.0 + torch.erf(input * inner))),
        ),
        _gelu_erf,
    ),
    rule(
        "gelu",
        (
            lambda input, inner=1.4: 0.5 * input * (1.0 + torch.erf(input / inner)),
            lambda input, inner=1.4: input * (0.5 * (1.0 + torch.erf(input / inner))),
        ),
        _gelu_erf_divided,
    ),
    rule("gelu", _NEW_GELU, _gelu_tanh),
    rule(
        "relu_squared",
        (
            lambda input: torch.relu(input).pow(2),
            lambda input: torch.relu(input) * torch.relu(input),
            lambda input: torch.clamp(input, min=0).pow(2),
        ),
        _no_attributes,
    ),
    rule("softcap", (lambda input, cap=30.0: torch.tanh(input / cap) * cap,), _no_attributes),
    rule("softcap", (lambda input, factor=0.03, cap=30.0: torch.tanh(input * factor) * cap,), _softcap_scaled),
    rule("softmax", (_decomposed_softmax, _decomposed_softmax_max), _softmax),
)
