"""The op table: each op that a pass or a kernel knows by name, once.

Adding an op is adding a row. Ops without a row are recorded and replayed all the same (see `graph_capture.ir.ops`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from graph_capture.errors import FusionError
from graph_capture.ir import quantised
from graph_capture.ir.composed import (
    capped_attention,
    linear,
    matmul,
    repeat_kv,
    rope,
    scaled_dot_product_attention,
    softcap,
)
from graph_capture.ir.ops import TABLE, Expression, Kind, Op, parameters_of
from graph_capture.ir.values import Arg

aten = torch.ops.aten


def _row(
    name: str,
    function: Callable[..., Any],
    kind: Kind,
    expression: Expression | None = None,
    *,
    commutative: bool = False,
    composed: bool = False,
) -> None:
    TABLE[name] = Op(name, function, kind, parameters_of(function), expression, commutative, composed)


def _pointwise(name: str, function: Callable[..., Any], expression: Expression, **flags: bool) -> None:
    _row(name, function, Kind.POINTWISE, expression, **flags)


def _only(*allowed: str) -> Callable[[str], Expression]:
    """An expression for calls that give only tensors and the `allowed` parameters."""

    def make(text: str) -> Expression:
        return lambda given, dtype: text if all(isinstance(v, Arg) or k in allowed for k, v in given.items()) else None

    return make


# --- pointwise: arithmetic


def _scaled(operator: str) -> Expression:
    def make(given: Mapping[str, Any], dtype: torch.dtype) -> str:
        return f"self {operator} other * alpha" if "alpha" in given else f"self {operator} other"

    return make


_pointwise("add", aten.add.Tensor, _scaled("+"), commutative=True)
_pointwise("sub", aten.sub.Tensor, _scaled("-"))
_pointwise("mul", aten.mul.Tensor, "self * other", commutative=True)
_pointwise("div", aten.div.Tensor, "self / other")
_pointwise("add.Scalar", aten.add.Scalar, _scaled("+"))
_pointwise("sub.Scalar", aten.sub.Scalar, _scaled("-"))
_pointwise("rsub.Scalar", aten.rsub.Scalar, _only("other")("other - self"))
_pointwise("mul.Scalar", aten.mul.Scalar, "self * other")
_pointwise("div.Scalar", aten.div.Scalar, "self / other")


_NAN, _INF = "(1e999 - 1e999)", "1e999"  # as the language of expressions writes them


def _number(value: Any) -> str:
    """A recorded number as the language of expressions writes it.

    Raises:
        FusionError: it is none that kernels compute with.
    """
    if not isinstance(value, (int, float)):
        raise FusionError(f"{value!r} is not a real number")
    if isinstance(value, float) and not math.isfinite(value):
        return _NAN if math.isnan(value) else _INF if value > 0 else f"(-{_INF})"
    return f"({value!r})" if value < 0 else repr(value)


def _power(given: Mapping[str, Any], dtype: torch.dtype) -> str | None:
    by_hand = {2: "self * self", 3: "self * self * self", 0.5: "sqrt(self)", -0.5: "rsqrt(self)", -1: "1 / self"}
    exponent = given["exponent"]
    if not isinstance(exponent, (int, float)):
        return None
    if not dtype.is_floating_point:
        return by_hand.get(exponent) if isinstance(exponent, int) and exponent > 0 else None
    if exponent in by_hand or not math.isfinite(exponent) or exponent == 0:
        return by_hand.get(exponent)
    magnitude = "power(abs(self), exponent)"
    if exponent != int(exponent):
        return f"where((self < 0) & (abs(self) < {_INF}), {_NAN}, {magnitude})"
    below = "(self < 0) | (1 / self < 0)"  # -0.0 too
    return f"where({below}, -{magnitude}, {magnitude})" if exponent % 2 else magnitude


_pointwise("pow", aten.pow.Tensor_Scalar, _power)
_pointwise("neg", aten.neg.default, "-self")
_pointwise("abs", aten.abs.default, "abs(self)")
_pointwise("reciprocal", aten.reciprocal.default, "1 / self")
_pointwise("maximum", aten.maximum.default, "maximum(self, other)", commutative=True)
_pointwise("minimum", aten.minimum.default, "minimum(self, other)", commutative=True)


def _clamp(given: Mapping[str, Any], dtype: torch.dtype) -> str:
    text = "self"
    if given.get("min") is not None:
        text = f"maximum({text}, min)"
    if given.get("max") is not None:
        text = f"minimum({text}, max)"
    return text


_pointwise("clamp", aten.clamp.default, _clamp)

# --- pointwise: functions

for _name in ("exp", "log", "log1p", "sqrt", "rsqrt", "sin", "cos", "tanh", "erf", "sigmoid", "floor"):
    _pointwise(_name, getattr(aten, _name).default, f"{_name}(self)")
_pointwise("ceil", aten.ceil.default, "-floor(-self)")
_pointwise("trunc", aten.trunc.default, "where(self < 0, -floor(-self), floor(self))")


def _softplus(given: Mapping[str, Any], dtype: torch.dtype) -> str:
    beta, threshold = given.get("beta", 1), given.get("threshold", 20)
    beta, threshold = _number(beta), _number(threshold)
    return f"where(self * {beta} > {threshold}, self, log1p(exp(self * {beta})) / {beta})"


_pointwise("softplus", aten.softplus.default, _softplus)
_pointwise("silu", aten.silu.default, "self / (1 + exp(-self))")
_pointwise("relu", aten.relu.default, "maximum(self, 0)")


def _gelu(given: Mapping[str, Any], dtype: torch.dtype) -> str:
    if given.get("approximate") == "tanh":
        # 0.5 * (1 + tanh(x)) is sigmoid(2 * x), without the cancellation where x is negative.
        twice = f"{2 * math.sqrt(2 / math.pi)!r} * (self + 0.044715 * self * self * self)"
        return f"self / (1 + exp(-({twice})))"
    return f"0.5 * self * (1 + erf(self * {math.sqrt(0.5)!r}))"


_pointwise("gelu", aten.gelu.default, _gelu)


def quick_gelu(input: torch.Tensor) -> torch.Tensor:
    """``input * sigmoid(1.702 * input)``."""
    return input * torch.sigmoid(1.702 * input)


def relu_squared(input: torch.Tensor) -> torch.Tensor:
    """``relu(input) ** 2`` (So et al., 2021)."""
    return torch.relu(input).square()


_pointwise("quick_gelu", quick_gelu, "input / (1 + exp(-(1.702 * input)))", composed=True)
_pointwise("relu_squared", relu_squared, "maximum(input, 0) * maximum(input, 0)", composed=True)
_pointwise("softcap", softcap, "cap * tanh(input / cap)", composed=True)


def batch_norm(
    input: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.batch_norm` in evaluation, of channels in any dimension: the others broadcast along it, as
    [C, 1, 1] does for [N, C, H, W]."""
    sizes = mean.shape if mean.numel() > 1 else [1 if size != 1 else 2 for size in input.shape]
    channels = next(dim for dim in range(-len(sizes), 0) if sizes[dim] != 1)
    scale, shift = (None if x is None else x.flatten() for x in (weight, bias))
    normed = F.batch_norm(input.movedim(channels, 1), mean.flatten(), var.flatten(), scale, shift, eps=eps)
    return normed.movedim(1, channels)


def _batch_norm(given: Mapping[str, Any], dtype: torch.dtype) -> str:
    text = f"(input - mean) * rsqrt(var + {_number(given.get('eps', 1e-5))})"
    text += "" if given.get("weight") is None else " * weight"
    return text if given.get("bias") is None else f"{text} + bias"


_pointwise("batch_norm", batch_norm, _batch_norm)

# --- pointwise: comparisons, selection, casts

for _name, _operator in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    _symmetric = _name in ("eq", "ne")
    _pointwise(_name, getattr(aten, _name).Tensor, f"self {_operator} other", commutative=_symmetric)
    _pointwise(f"{_name}.Scalar", getattr(aten, _name).Scalar, f"self {_operator} other")
for _name, _operator in {"and": "&", "or": "|", "xor": "^"}.items():
    _pointwise(
        f"bitwise_{_name}", getattr(aten, f"bitwise_{_name}").Tensor, f"self {_operator} other", commutative=True
    )
    _logical = f"(self != 0) {_operator} (other != 0)"
    _pointwise(f"logical_{_name}", getattr(aten, f"logical_{_name}").default, _logical, commutative=True)
_pointwise("bitwise_not", aten.bitwise_not.default, "~self")
_pointwise("logical_not", aten.logical_not.default, "self == 0")
_pointwise("where", aten.where.self, "where(condition, self, other)")
_pointwise("masked_fill", aten.masked_fill.Scalar, "where(mask, value, self)")
_pointwise("cast", aten._to_copy.default, _only("dtype")("self"))  # the target's dtype is the output's

# --- row ops: over the last dimension (codegen checks that `dim` is the last one)

for _name, _overload in {"sum": aten.sum.dim_IntList, "mean": aten.mean.dim}.items():
    _row(_name, _overload, Kind.ROW, _only("dim", "keepdim")(f"{_name}(self)"))
for _name, _overload, _reduce in (("amax", aten.amax.default, "max"), ("amin", aten.amin.default, "min")):
    _any_nan = "sum(where(self != self, 1, 0)) > 0"  # a reduction's max and min pass NaN over; torch's do not
    _row(_name, _overload, Kind.ROW, f"where({_any_nan}, sum(self), {_reduce}(self))")


_hit = f"where({_any_nan}, where(self != self, 1, 0), where(self == max(self), 1, 0)) > 0"
_row("argmax", aten.argmax.default, Kind.ROW, f"min(where({_hit}, index(), {_INF}))")


def _variance(root: bool) -> Expression:
    def make(given: Mapping[str, Any], dtype: torch.dtype) -> str:
        correction = 1 if given.get("correction") is None else given["correction"]
        centred = "(self - mean(self))"
        text = f"sum({centred} * {centred}) / maximum(columns - {_number(correction)}, 0)"
        return f"sqrt({text})" if root else text

    return make


_row("var", aten.var.correction, Kind.ROW, _variance(root=False))
_row("std", aten.std.correction, Kind.ROW, _variance(root=True))

# The largest element, or 0 where it is infinite: subtracting it leaves no NaN that was not there.
_top = f"where({_any_nan}, sum(self), where(abs(max(self)) == {_INF}, 0, max(self)))"
_row("logsumexp", aten.logsumexp.default, Kind.ROW, _only("dim", "keepdim")(f"{_top} + log(sum(exp(self - {_top})))"))
_row(
    "log_softmax",
    aten._log_softmax.default,
    Kind.ROW,
    lambda given, dtype: None if given.get("half_to_float") else "(self - max(self)) - log(sum(exp(self - max(self))))",
)


def softmax(input: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`torch.nn.functional.softmax`."""
    return F.softmax(input, dim, dtype=dtype)


_row("softmax", softmax, Kind.ROW, _only("dim", "dtype")("exp(input - max(input)) / sum(exp(input - max(input)))"))


def rms_norm(
    input: torch.Tensor, weight: torch.Tensor | None = None, eps: float | None = None, offset: float = 0.0
) -> torch.Tensor:
    """`torch.nn.functional.rms_norm` over the last dimension, with ``weight + offset`` (Gemma: 1) as its weight."""
    if weight is not None and offset:
        weight = weight + offset
    return F.rms_norm(input, (input.shape[-1],), weight, eps)


def _rms_norm(given: Mapping[str, Any], dtype: torch.dtype) -> str:
    eps = torch.finfo(dtype).eps if given.get("eps") is None else given["eps"]
    text = f"input * rsqrt(mean(input * input) + {_number(eps)})"
    if given.get("weight") is None:
        return text
    return f"{text} * (weight + {_number(given['offset'])})" if given.get("offset") else f"{text} * weight"


_row("rms_norm", rms_norm, Kind.ROW, _rms_norm)


def layer_norm(
    input: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """`torch.nn.functional.layer_norm` over the last dimension."""
    return F.layer_norm(input, (input.shape[-1],), weight, bias, eps)


def _layer_norm(given: Mapping[str, Any], dtype: torch.dtype) -> str:
    centred = "(input - mean(input))"
    text = f"{centred} * rsqrt(mean({centred} * {centred}) + {_number(given.get('eps', 1e-5))})"
    text += "" if given.get("weight") is None else " * weight"
    return text if given.get("bias") is None else f"{text} + bias"


_row("layer_norm", layer_norm, Kind.ROW, _layer_norm)

# --- whole ops: fused around, never into


_function: Callable[..., Any]
for _function in (linear, scaled_dot_product_attention, matmul):
    _row(_function.__name__, _function, Kind.OPAQUE)
for _function in (repeat_kv, rope, capped_attention):
    _row(_function.__name__, _function, Kind.OPAQUE, composed=True)
_row("embedding", aten.embedding.default, Kind.OPAQUE)
_row("quant_linear", quantised.quant_linear, Kind.OPAQUE)
_row("dequantize", quantised.dequantize, Kind.OPAQUE)

# --- what torch's dispatcher does not know


def external(function: Callable[..., Any], args: Sequence[Any], kwargs: Any = ()) -> list[torch.Tensor]:
    """Call a kernel that is not a torch op, for its effect; returns the tensors it got, which it may have written."""
    keywords = dict(kwargs)
    function(*args, **keywords)
    return [value for value in (*args, *keywords.values()) if isinstance(value, torch.Tensor)]


def shape(input: torch.Tensor) -> tuple[int, ...]:
    """The shape, where it depends on data; guarded at replay."""
    return tuple(input.shape)


def values(input: torch.Tensor) -> tuple[str, bytes]:
    """Dtype and bytes of a tensor whose values Python reads at once; guarded at replay."""
    flat = input.detach().cpu().contiguous().reshape(-1)
    return str(input.dtype), flat.view(torch.uint8).numpy().tobytes()


for _function in (external, shape, values):
    _row(_function.__name__, _function, Kind.OPAQUE)

# Composite functions that choose another algorithm while any mode is active: kept whole to stay bit-equal with eager.


def svdvals(A: torch.Tensor, driver: str | None = None) -> torch.Tensor:  # noqa: N803
    """`torch.linalg.svdvals`."""
    return torch.linalg.svdvals(A, driver=driver)


def eigvalsh(A: torch.Tensor, UPLO: str = "L") -> torch.Tensor:  # noqa: N803
    """`torch.linalg.eigvalsh`."""
    return torch.linalg.eigvalsh(A, UPLO)


def cond(A: torch.Tensor, p: Any = None) -> torch.Tensor:  # noqa: N803
    """`torch.linalg.cond`."""
    return torch.linalg.cond(A, p)


for _function in (svdvals, eigvalsh, cond):
    _row(_function.__name__, _function, Kind.OPAQUE)
