"""How models spell the ops of the table: plain PyTorch functions, grouped in rules.

A rule is a row: the op, its spellings, a guard. The guard looks at the layouts of a match's values (by the functions'
parameter names, and ``output``) and at the numbers it captured, and gives the attributes of the op, or raises `Unfit`.
Adding a spelling is adding one function to a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from graph_capture.passes.cleanup import clean_up
from graph_capture.passes.pattern import Function, Pattern

from graph_capture.graph import OpNode, SubGraph, TensorMeta



class Unfit(Exception):
    """Why a match is not what it looks like."""


@dataclass(frozen=True)
class Found:
    """What a guard sees of a match.

    Attributes:
        values: the layouts of its values, by their names in the function.
        numbers: what it captured, by parameter name.
        last: its last node.
    """

    values: Mapping[str, TensorMeta]
    numbers: Mapping[str, Any]
    last: OpNode

    def __getitem__(self, name: str) -> TensorMeta:
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values


Attributes = Mapping[str, Any]
Guard = Callable[[Found], Attributes]


@dataclass(frozen=True)
class Rule:
    """`pattern` becomes one call of op `pattern.name`; its parameters are the inputs, `attributes` gives the rest."""

    pattern: Pattern
    attributes: Guard


def _same(condition: bool, reason: str) -> None:
    if not condition:
        raise Unfit(reason)


def _floats(found: Found, *names: str) -> None:
    dtypes = {found[name].dtype for name in names if name in found}
    _same(len(dtypes) == 1, "dtypes are mixed: " + ", ".join(sorted(map(str, dtypes))))
    _same(next(iter(dtypes)).is_floating_point, f"{next(iter(dtypes))} is not a floating-point dtype")


# --- norms

_HALF = (torch.float32, torch.bfloat16)  # float16 is spelled as bfloat16 is; the guard compares dtypes
_CASTS = frozenset({"dtype"})
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
    _floats(found, "input", "output", "weight", "bias")
    _same(output.shape == input.shape, f"{input} becomes {output}")
    for name in ("weight", "bias"):
        if name in found:
            _same(found[name].shape == input.shape[-1:], f"{name} {found[name]} does not span the last dimension")


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

# --- activations


def _no_attributes(found: Found) -> Attributes:
    _floats(found, "input", "output")
    return found.numbers


def _gelu_erf(found: Found) -> Attributes:
    _floats(found, "input", "output")
    _near(found, "inner", math.sqrt(0.5))
    return {}


def _gelu_erf_divided(found: Found) -> Attributes:
    _floats(found, "input", "output")
    _near(found, "inner", math.sqrt(2))
    return {}


def _gelu_tanh(found: Found) -> Attributes:
    _floats(found, "input", "output")
    _near(found, "inner", math.sqrt(2 / math.pi))
    _near(found, "cubic", 0.044715)
    return {"approximate": "tanh"}


def _quick_gelu(found: Found) -> Attributes:
    _floats(found, "input", "output")
    _near(found, "slope", 1.702)
    return {}


def _near(found: Found, name: str, expected: float) -> None:
    number = found.numbers[name]
    close = isinstance(number, (int, float)) and math.isclose(number, expected, rel_tol=1e-6)
    _same(close, f"its constant is {number!r}, not {expected:.7g}")


_NEW_GELU: tuple[Function, ...] = (
    lambda input, inner=0.8, cubic=0.04: 0.5 * input * (1.0 + torch.tanh(inner * (input + cubic * input.pow(3.0)))),
    lambda input, inner=0.8, cubic=0.04: 0.5 * input * (1.0 + torch.tanh(inner * (input + cubic * input.pow(3)))),
    lambda input, inner=0.8, cubic=0.04: 0.5 * input * (1.0 + torch.tanh(inner * (input + cubic * input * input * input))),
    lambda input, inner=0.8, cubic=0.04: 0.5 * input * (1.0 + torch.tanh(input * inner * (1.0 + cubic * input * input))),
    lambda input, inner=0.8, cubic=0.04: input * 0.5 * (1.0 + torch.tanh(inner * (input + cubic * torch.pow(input, 3)))),
)

# --- softmax, attention


def _softmax(found: Found) -> Attributes:
    _floats(found, "input", "output")
    return {"dim": -1}


def _decomposed_softmax(input: Any) -> Any:
    raised = torch.exp(input - torch.amax(input, -1, keepdim=True))
    return raised / raised.sum(-1, keepdim=True)


def _decomposed_softmax_max(input: Any) -> Any:
    raised = torch.exp(input - torch.max(input, dim=-1, keepdim=True).values)
    return raised / torch.sum(raised, dim=-1, keepdim=True)


def _repeat_by_expand(input: Any) -> Any:
    batch, heads, length, width = input.shape
    return input[:, :, None, :, :].expand(batch, heads, 3, length, width).reshape(batch, heads * 3, length, width)


def _repeat_interleaved(input: Any) -> Any:
    return torch.repeat_interleave(input, 3, dim=1)


def _repeat_kv(found: Found) -> Attributes:
    input, output = found["input"], found["output"]
    fits = len(input.shape) == 4 == len(output.shape) and input.shape[2:] == output.shape[2:]
    fits = fits and input.shape[0] == output.shape[0] and input.shape[1] > 0 == output.shape[1] % input.shape[1]
    _same(fits, f"{input} becomes {output}")
    return {"repeats": output.shape[1] // input.shape[1]}


def _attention_spellings() -> dict[str, tuple[Function, ...]]:
    """softmax(q k^T scaled, masked) v: the ways to scale, to mask, to cast."""
    scaled: dict[str, Function] = {
        "scale": lambda query, key, scale: torch.matmul(query, key.transpose(2, 3)) * scale,
        "divisor": lambda query, key, scale: torch.matmul(query, key.transpose(2, 3)) / scale,
        "query_scale": lambda query, key, scale: torch.matmul(query * scale, key.transpose(2, 3)),
        "query_divisor": lambda query, key, scale: torch.matmul(query / scale, key.transpose(2, 3)),
        "none": lambda query, key, scale: torch.matmul(query, key.transpose(2, 3)),
    }
    normalised: tuple[Function, ...] = (
        lambda scores, query: F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype),
        lambda scores, query: F.softmax(scores, dim=-1),
        lambda scores, query: F.softmax(scores.float(), dim=-1).to(query.dtype),
        lambda scores, query: F.softmax(scores.float(), dim=-1).type_as(scores),
    )

    def attention(score: Function, weigh: Function, masked: bool, unscaled: bool) -> Function:
        def with_mask(query: Any, key: Any, value: Any, attn_mask: Any, scale: float = 1.0) -> Any:
            return torch.matmul(weigh(score(query, key, scale) + attn_mask, query), value)

        def without_mask(query: Any, key: Any, value: Any, scale: float = 1.0) -> Any:
            return torch.matmul(weigh(score(query, key, scale), query), value)

        def plain_with_mask(query: Any, key: Any, value: Any, attn_mask: Any) -> Any:
            return torch.matmul(weigh(score(query, key, 1.0) + attn_mask, query), value)

        def plain(query: Any, key: Any, value: Any) -> Any:
            return torch.matmul(weigh(score(query, key, 1.0), query), value)

        return (plain_with_mask if masked else plain) if unscaled else (with_mask if masked else without_mask)

    return {
        name: tuple(attention(s, w, masked, name == "none") for w in normalised for masked in (True, False))
        for name, s in scaled.items()
    }


def _attention(divides: bool) -> Guard:
    def attributes(found: Found) -> Attributes:
        query, key, value = found["query"], found["key"], found["value"]
        _floats(found, "query", "key", "value", "output")
        _same(len(query.shape) == len(key.shape) == len(value.shape) == 4, "it is not over four dimensions")
        alike = query.shape[:2] == key.shape[:2] == value.shape[:2] and key.shape[2] == value.shape[2]
        _same(alike, f"{query}, {key} and {value} do not go together")
        if "attn_mask" in found:
            mask, scores = found["attn_mask"], (*query.shape[:3], key.shape[2])
            _same(mask.dtype is query.dtype, f"the mask is {mask.dtype}")
            _same(_broadcasts(mask.shape, scores), f"the mask {mask} does not broadcast over the scores")
        scale = found.numbers.get("scale", 1.0)
        _same(isinstance(scale, (int, float)), f"its scale is {scale!r}")
        return {"scale": float(1 / scale if divides else scale)}

    return attributes


def _broadcasts(shape: tuple[int, ...], over: tuple[int, ...]) -> bool:
    padded = (1,) * (len(over) - len(shape)) + tuple(shape)
    return len(padded) == len(over) and all(a in (1, b) for a, b in zip(padded, over, strict=True))


def _grouped(query: Any, key: Any, value: Any) -> Any:
    return F.scaled_dot_product_attention(query, _repeat_by_expand(key), _repeat_by_expand(value))


def _grouped_masked(query: Any, key: Any, value: Any, attn_mask: Any) -> Any:
    return F.scaled_dot_product_attention(query, _repeat_by_expand(key), _repeat_by_expand(value), attn_mask)


def _grouped_attention(found: Found) -> Attributes:
    _same(not found.last.attr("dropout_p"), "it has dropout")
    return {**dict(found.last.attrs), "enable_gqa": True}


# --- rotary embedding


def _rotated(rotate: Function) -> Function:
    return lambda input, cos, sin: input * cos + rotate(input) * sin


def _rotate_half(x: Any) -> Any:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _rotate_half_chunked(x: Any) -> Any:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotate_every_two(x: Any) -> Any:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _rotate_every_two_viewed(x: Any) -> Any:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), dim=-1).flatten(-2)


def _rope(found: Found) -> Attributes:
    input, cos, sin, output = (found[name] for name in ("input", "cos", "sin", "output"))
    _floats(found, "input", "cos", "sin", "output")
    _same(input.shape == output.shape, f"{input} becomes {output}")
    _same(cos.shape == sin.shape, f"cos {cos} and sin {sin} differ")
    _same(cos.shape[-1:] == input.shape[-1:], f"cos {cos} does not span the rows of {input}")
    _same(_broadcasts(cos.shape, input.shape), f"cos {cos} does not broadcast over {input}")
    half = input.shape[-1] // 2
    _same(half > 0 == input.shape[-1] % 2, f"the rows of {input} have no halves")
    if "slice" in found:  # the negated one
        _sliced(found, "slice", half, half)
        _sliced(found, "slice_1", 0, half)
    elif "split" in found:
        _same(found["split"].shape[-1] == half, "it is not cut in halves")
    return {}


def _interleaved_rope(found: Found) -> Attributes:
    input = found["input"]
    _floats(found, "input", "cos", "sin", "output")
    _same(input.shape == found["output"].shape, f"{input} becomes {found['output']}")
    _same(found["cos"].shape == found["sin"].shape, f"cos {found['cos']} and sin {found['sin']} differ")
    _same(found["cos"].shape[-1:] == input.shape[-1:], f"cos {found['cos']} does not span the rows of {input}")
    _same(_broadcasts(found["cos"].shape, input.shape), f"cos {found['cos']} does not broadcast over {input}")
    return {"interleaved": True}


def _sliced(found: Found, name: str, start: int, size: int) -> None:
    part, whole = found[name], found["input"]
    begins = part.offset - whole.offset == start * whole.stride[-1]
    _same(begins and part.shape == (*whole.shape[:-1], size), f"{part} is another part of {whole}")


def _partial_rope(input: Any, cos: Any, sin: Any) -> Any:
    width = cos.shape[-1]
    return torch.cat((_rotated(_rotate_half)(input[..., :width], cos, sin), input[..., width:]), -1)


def _partial(found: Found) -> Attributes:
    input, width = found["input"], found["cos"].shape[-1]
    _same(input.shape == found["output"].shape and 0 < width < input.shape[-1], f"{input} becomes {found['output']}")
    _sliced(found, "slice", 0, width)
    _sliced(found, "slice_3", width, input.shape[-1] - width)
    return {}


def _whole_rope(input: Any, cos: Any, sin: Any) -> Any:
    return torch.cat((_rotated(_rotate_half)(input, cos, sin), input[..., 5:]), -1)  # no slice of its halves


def _nothing_left(found: Found) -> Attributes:
    _same(found["slice_2"].numel == 0, f"{found['slice_2']} is not empty")
    return {}


# --- linear


def _linear(found: Found) -> Attributes:
    return _linear_fits(found, found["weight"].shape)


def _conv1d(found: Found) -> Attributes:
    _linear_fits(found, found["weight"].shape[::-1])
    return {"transposed": True}


def _linear_fits(found: Found, weight: tuple[int, ...]) -> Attributes:
    input, output, bias = found["input"], found["output"], found.values.get("bias")
    fits = len(weight) == 2 and input.shape[-1:] == weight[1:] and output.shape == (*input.shape[:-1], *weight[:1])
    _same(fits and (bias is None or bias.shape == weight[:1]), f"{input} becomes {output}")
    return {}


_MATRIX = tuple({"input": shape, "weight": (5, 8), "bias": (5,)} for shape in ((2, 8), (2, 3, 8)))
_TRANSPOSED = tuple({"input": shape, "weight": (8, 5), "bias": (5,)} for shape in ((2, 8), (2, 3, 8)))
_HEADS = ({"query": (2, 4, 3, 8), "key": (2, 4, 3, 8), "value": (2, 4, 3, 8), "attn_mask": (2, 1, 3, 3)},)


_CUT = frozenset({"start", "end"})


def _after(rounds: int) -> Callable[[SubGraph], SubGraph]:
    """What a spelling goes through that is written in terms of earlier rounds' ops."""

    def prepare(graph: SubGraph) -> SubGraph:
        from graph_capture.passes.canonicalize import canonicalize

        return canonicalize(clean_up(graph), ROUNDS[:rounds])

    return prepare


def _rule(name: str, spellings: Iterable[Function], attributes: Guard, **options: Any) -> Rule:
    first, *others = spellings
    options = {"prepare": clean_up} | options
    return Rule(Pattern(name, first, tuple(others), **options), attributes)


_ROTARY = ({"input": (2, 3, 4, 8), "cos": (2, 1, 4, 8), "sin": (2, 1, 4, 8)},)
_NARROW = ({"input": (2, 3, 4, 8), "cos": (2, 1, 4, 4), "sin": (2, 1, 4, 4)},)
_GROUPED = ({"query": (2, 6, 4, 8), "key": (2, 2, 4, 8), "value": (2, 2, 4, 8), "attn_mask": (2, 1, 4, 4)},)

# Rules of one round look at the same graph; a later round sees what earlier ones made.
ROUNDS: tuple[tuple[Rule, ...], ...] = (
    (
        _rule(
            "rms_norm",
            (*(_offset_rms(a, b) for a, b in _WAYS), _offset_rms_in_dtype),
            _rms_norm,
            shapes=_VECTORS,
            dtypes=_HALF,
            ignore=_CASTS,
        ),
        _rule(
            "rms_norm",
            (*(_rms(a, b, c) for a, b in _WAYS for c in _FINISHES), *(_rms_in_dtype(c) for c in _FINISHES[:1])),
            _rms_norm,
            shapes=_VECTORS,
            dtypes=_HALF,
            ignore=_CASTS,
        ),
        _rule("rms_norm", [_plain_rms(*way) for way in _WAYS], _rms_norm, dtypes=_HALF, ignore=_CASTS),
        _rule(
            "layer_norm",
            [_layer(*way, affine=True) for way in _LAYERS],
            _rms_norm,
            shapes=_VECTORS,
            dtypes=_HALF,
            ignore=_CASTS,
        ),
        _rule("layer_norm", [_layer(*way, affine=False) for way in _LAYERS], _rms_norm, dtypes=_HALF, ignore=_CASTS),
        _rule("silu", (lambda input: input * torch.sigmoid(input),), _no_attributes),
        _rule("quick_gelu", (lambda input, slope=1.7: input * torch.sigmoid(slope * input),), _quick_gelu),
        _rule(
            "gelu",
            (
                lambda input, inner=0.7: 0.5 * input * (1.0 + torch.erf(input * inner)),
                lambda input, inner=0.7: input * 0.5 * (1.0 + torch.erf(input * inner)),
                lambda input, inner=0.7: input * (0.5 * (1.0 + torch.erf(input * inner))),
            ),
            _gelu_erf,
        ),
        _rule(
            "gelu",
            (
                lambda input, inner=1.4: 0.5 * input * (1.0 + torch.erf(input / inner)),
                lambda input, inner=1.4: input * (0.5 * (1.0 + torch.erf(input / inner))),
            ),
            _gelu_erf_divided,
        ),
        _rule("gelu", _NEW_GELU, _gelu_tanh),
        _rule(
            "relu_squared",
            (
                lambda input: torch.relu(input).pow(2),
                lambda input: torch.square(torch.relu(input)),
                lambda input: torch.relu(input) * torch.relu(input),
                lambda input: torch.clamp(input, min=0).pow(2),
            ),
            _no_attributes,
        ),
        _rule("softcap", (lambda input, cap=30.0: torch.tanh(input / cap) * cap,), _no_attributes),
        _rule("softmax", (_decomposed_softmax, _decomposed_softmax_max), _softmax),
        _rule(
            "repeat_kv",
            (_repeat_by_expand, _repeat_interleaved),
            _repeat_kv,
            shapes=({"input": (2, 2, 4, 8)},),
            ignore=frozenset({"size"}),
        ),
        _rule(
            "rope",
            (_rotated(_rotate_half), _rotated(_rotate_half_chunked)),
            _rope,
            shapes=_ROTARY,
            ignore=frozenset({"start", "end", "split_size"}),
        ),
        _rule(
            "rope",
            (_rotated(_rotate_every_two), _rotated(_rotate_every_two_viewed)),
            _interleaved_rope,
            shapes=_ROTARY,
            ignore=frozenset({"end", "size"}),
        ),
        _rule(
            "linear",
            (lambda input, weight: F.linear(input, weight),),
            _linear,
            shapes=_MATRIX,
            keep_whole=False,
            ignore=frozenset({"size"}),
        ),
        _rule(
            "linear",
            (lambda input, weight, bias: F.linear(input, weight, bias),),
            _linear,
            shapes=_MATRIX,
            keep_whole=False,
            ignore=frozenset({"size"}),
        ),
        _rule(
            "linear",
            (lambda input, weight, bias: torch.addmm(bias, input.view(-1, 8), weight).view(*input.shape[:-1], 5),),
            _conv1d,
            shapes=_TRANSPOSED[1:],
            ignore=frozenset({"size"}),
        ),
    ),
    (
        *(
            _rule(
                "scaled_dot_product_attention",
                spellings,
                _attention(divides=name.endswith("divisor")),
                shapes=_HEADS,
                dtypes=_HALF,
                ignore=_CASTS,
                prepare=_after(1),
            )
            for name, spellings in _attention_spellings().items()
        ),
        _rule("rope", (_partial_rope,), _partial, shapes=_NARROW, ignore=_CUT, prepare=_after(1)),
        _rule("rope", (_whole_rope,), _nothing_left, shapes=_ROTARY, ignore=_CUT, prepare=_after(1)),
    ),
    (
        _rule(
            "scaled_dot_product_attention",
            (_grouped, _grouped_masked),
            _grouped_attention,
            shapes=_GROUPED,
            ignore=frozenset({"repeats", "scale", "is_causal", "dropout_p"}),
            prepare=_after(2),
        ),
    ),
)
