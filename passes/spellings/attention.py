"""Attention written out, and repeated key/value heads."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from graph_capture.passes.pattern import Function
from graph_capture.passes.spellings.rule import (
    CASTS,
    HALF,
    Attributes,
    Found,
    Guard,
    broadcasts,
    floats,
    require,
    rule,
)


def _repeat_by_expand(input: Any) -> Any:
    batch, heads, length, width = input.shape
    return input[:, :, None, :, :].expand(batch, heads, 3, length, width).reshape(batch, heads * 3, length, width)


def _repeat_interleaved(input: Any) -> Any:
    return torch.repeat_interleave(input, 3, dim=1)


def _repeat_tokens_first(input: Any) -> Any:
    *rows, heads, width = input.shape
    wide = input.unsqueeze(-2).expand(*rows, heads, 3, width).contiguous()
    return wide.view(*rows, heads * 3, width).transpose(-3, -2)


def _repeat_kv_tokens_first(found: Found) -> Attributes:
    input, output = found["input"], found["output"]
    fits = len(input.shape) == len(output.shape) in (3, 4) and input.shape[:-3] == output.shape[:-3]
    fits = fits and (input.shape[-3], input.shape[-1]) == (output.shape[-2], output.shape[-1])
    wide = (*input.shape[:-1], output.shape[-3] // max(1, input.shape[-2]), input.shape[-1])
    fits = fits and found["expand"].shape == wide and output.shape[-3] == wide[-3] * wide[-2] > 0
    require(fits, f"{input} becomes {output}")
    return {"repeats": wide[-2], "tokens_first": True}


def _repeat_kv(found: Found) -> Attributes:
    input, output = found["input"], found["output"]
    fits = len(input.shape) == 4 == len(output.shape) and input.shape[2:] == output.shape[2:]
    fits = fits and input.shape[0] == output.shape[0] and input.shape[1] > 0 == output.shape[1] % input.shape[1]
    require(fits, f"{input} becomes {output}")
    return {"repeats": output.shape[1] // input.shape[1]}


def _attention_spellings() -> dict[str, tuple[Function, ...]]:
    """softmax(q k^T scaled, masked) v: the ways to scale, to mask, to cast."""
    scaled: dict[str, Function] = {
        "scale": lambda query, key, scale: torch.matmul(query, key.transpose(-2, -1)) * scale,
        "divisor": lambda query, key, scale: torch.matmul(query, key.transpose(-2, -1)) / scale,
        "query_scale": lambda query, key, scale: torch.matmul(query * scale, key.transpose(-2, -1)),
        "query_divisor": lambda query, key, scale: torch.matmul(query / scale, key.transpose(-2, -1)),
        "none": lambda query, key, scale: torch.matmul(query, key.transpose(-2, -1)),
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

    def filled(score: Function, weigh: Function, fill: Function, unscaled: bool) -> Function:
        def scaled(query: Any, key: Any, value: Any, attn_mask: Any, scale: float = 1.0, fill_: float = 0.0) -> Any:
            return torch.matmul(weigh(fill(score(query, key, scale), attn_mask, fill_), query), value)

        def plain(query: Any, key: Any, value: Any, attn_mask: Any, fill_: float = 0.0) -> Any:
            return torch.matmul(weigh(fill(score(query, key, 1.0), attn_mask, fill_), query), value)

        return plain if unscaled else scaled

    def batched(weigh: Function, options: dict[str, Any]) -> Function:
        def attention(query: Any, key: Any, value: Any, attn_mask: Any, scale: float = 1.0) -> Any:
            scores = torch.baddbmm(attn_mask, query, key.transpose(-2, -1), alpha=scale, **options)
            return torch.matmul(weigh(scores, query), value)

        return attention

    spellings = {
        name: tuple(attention(s, w, masked, name == "none") for w in normalised for masked in (True, False))
        for name, s in scaled.items()
    }
    fills: dict[str, tuple[Function, ...]] = {
        "": (
            lambda scores, mask, fill: scores.masked_fill(mask, fill),
            lambda scores, mask, fill: torch.where(mask, fill, scores),
        ),
        "_keeps": (lambda scores, mask, fill: torch.where(mask, scores, fill),),
    }
    for polarity, ways in fills.items():
        for name, score in scaled.items():
            spellings[f"fill{polarity}_{name}"] = tuple(
                filled(score, w, fill, name == "none") for w in normalised for fill in ways
            )
    spellings["batched_scale"] = tuple(batched(w, beta) for w in normalised for beta in ({}, {"beta": 1.0}))
    return spellings


def _capped_spellings() -> tuple[Function, ...]:
    """The scores soft-capped before they are masked."""

    def capped(masked: bool, wide: bool, scaled: bool) -> Function:
        def weigh(scores: Any, query: Any, cap: Any, mask: Any) -> Any:
            scores = torch.tanh(scores / cap) * cap
            scores = scores if mask is None else scores + mask
            return F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) if wide else F.softmax(scores, dim=-1)

        def with_mask(query: Any, key: Any, value: Any, attn_mask: Any, scale: float = 1.0, cap: float = 30.0) -> Any:
            scores = torch.matmul(query, key.transpose(-2, -1)) * scale
            return torch.matmul(weigh(scores, query, cap, attn_mask), value)

        def without(query: Any, key: Any, value: Any, scale: float = 1.0, cap: float = 30.0) -> Any:
            return torch.matmul(weigh(torch.matmul(query, key.transpose(-2, -1)) * scale, query, cap, None), value)

        def unscaled(query: Any, key: Any, value: Any, attn_mask: Any, cap: float = 30.0) -> Any:
            return torch.matmul(weigh(torch.matmul(query, key.transpose(-2, -1)), query, cap, attn_mask), value)

        return (with_mask if masked else without) if scaled else unscaled

    kinds = ((True, True), (True, False), (False, True))  # masked, scaled
    return tuple(capped(masked, wide, scaled) for masked, scaled in kinds for wide in (True, False))


def _capped(found: Found) -> Attributes:
    cap = found.numbers["cap"]
    require(isinstance(cap, (int, float)) and cap > 0, f"its cap is {cap!r}")
    return {**_attention("capped")(found), "cap": float(cap)}


def _attention(name: str) -> Guard:
    def attributes(found: Found) -> Attributes:
        query, key, value = found["query"], found["key"], found["value"]
        floats(found, "query", "key", "value", "output")
        require(len(query.shape) == len(key.shape) == len(value.shape) in (3, 4), "it is over other dimensions")
        alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and key.shape[-2] == value.shape[-2]
        require(alike, f"{query}, {key} and {value} do not go together")
        scale = found.numbers.get("scale", 1.0)
        require(isinstance(scale, (int, float)), f"its scale is {scale!r}")
        result: dict[str, Any] = {"scale": float(1 / scale if name.endswith("divisor") else scale)}
        require(abs(result["scale"]) < _LARGE, f"its scale is {result['scale']!r}")
        if "attn_mask" in found:
            mask, scores = found["attn_mask"], (*query.shape[:-1], key.shape[-2])
            fits = len(mask.shape) > 1 and broadcasts(mask.shape, scores)
            require(fits, f"the mask {mask} does not broadcast over the scores")
            if "fill_" in found.numbers:
                require(query.device.type == "cpu", "torch's attention adds what is filled in here")
                result |= {**_fill(found.numbers["fill_"], query.dtype), **({"keeps": True} if "keeps" in name else {})}
            require(mask.dtype is (torch.bool if "fill" in result else query.dtype), f"the mask is {mask.dtype}")
            if name != "capped" and "fill" not in result:
                result["strict"] = True
        return result

    return attributes


_LARGE = 1e15  # scores that are scaled by more may be infinite on one way, and not on another


def _fill(fill: Any, dtype: torch.dtype) -> Attributes:
    """Adding `fill` to a score must give `fill`."""
    swallows = dtype is not torch.float16 and isinstance(fill, float) and fill < torch.finfo(dtype).min / 2
    require(fill == -math.inf or swallows, f"masked scores become {fill!r}, which is not low enough")
    return {"fill": float(fill)}


def _grouped(query: Any, key: Any, value: Any) -> Any:
    return F.scaled_dot_product_attention(query, _repeat_by_expand(key), _repeat_by_expand(value))


def _grouped_masked(query: Any, key: Any, value: Any, attn_mask: Any) -> Any:
    return F.scaled_dot_product_attention(query, _repeat_by_expand(key), _repeat_by_expand(value), attn_mask)


def _grouped_capped(query: Any, key: Any, value: Any, attn_mask: Any) -> Any:
    first, *_ = _capped_spellings()
    return first(query, _repeat_by_expand(key), _repeat_by_expand(value), attn_mask)


def _grouped_capped_attention(found: Found) -> Attributes:
    return {**dict(found.last.attrs), "enable_gqa": True}


def _grouped_tokens_first(query: Any, key: Any, value: Any) -> Any:
    return F.scaled_dot_product_attention(query, _repeat_tokens_first(key), _repeat_tokens_first(value))


def _grouped_masked_tokens_first(query: Any, key: Any, value: Any, attn_mask: Any) -> Any:
    return F.scaled_dot_product_attention(query, _repeat_tokens_first(key), _repeat_tokens_first(value), attn_mask)


def _grouped_attention_tokens_first(found: Found) -> Attributes:
    return {**_grouped_attention(found), "tokens_first": True}


def _grouped_attention(found: Found) -> Attributes:
    require(not found.last.attr("dropout_p"), "it has dropout")
    return {**dict(found.last.attrs), "enable_gqa": True}


_HEADS = ({"query": (2, 4, 3, 8), "key": (2, 4, 3, 8), "value": (2, 4, 3, 8), "attn_mask": (2, 1, 3, 3)},)
_PRODUCT = ({"input": (2, 3, 8), "other": (2, 8, 3)},)
_BATCHED = ({"query": (4, 3, 8), "key": (4, 3, 8), "value": (4, 3, 8), "attn_mask": (4, 1, 3)},)
_TOKENS_FIRST = ({"query": (2, 6, 4, 8), "key": (2, 4, 2, 8), "value": (2, 4, 2, 8), "attn_mask": (2, 1, 4, 4)},)
_ANY_CALL = frozenset({"repeats", "scale", "cap", "is_causal", "dropout_p", "fill", "keeps", "strict"})
_GROUPED = ({"query": (2, 6, 4, 8), "key": (2, 2, 4, 8), "value": (2, 2, 4, 8), "attn_mask": (2, 1, 4, 4)},)

RULES = (
    rule("matmul", (lambda input, other: torch.bmm(input, other),), lambda found: {}, shapes=_PRODUCT),
    rule(
        "repeat_kv",
        (_repeat_by_expand, _repeat_interleaved),
        _repeat_kv,
        shapes=({"input": (2, 2, 4, 8)},),
        ignore=frozenset({"size"}),
    ),
    rule(
        "repeat_kv",
        (_repeat_tokens_first,),
        _repeat_kv_tokens_first,
        shapes=({"input": (4, 2, 8)},),
        ignore=frozenset({"size"}),
    ),
    *(
        rule(
            "scaled_dot_product_attention",
            spellings,
            _attention(name),
            round=1,
            shapes=_BATCHED if name.startswith("batched") else _HEADS,
            dtypes=HALF,
            kinds={"attn_mask": torch.bool} if name.startswith("fill") else None,
            ignore=CASTS | {"device", "layout", "pin_memory"},
        )
        for name, spellings in _attention_spellings().items()
    ),
    rule(
        "capped_attention",
        _capped_spellings(),
        _capped,
        round=1,
        shapes=_HEADS,
        dtypes=HALF,
        ignore=CASTS,
    ),
    rule(
        "capped_attention",
        (_grouped_capped,),
        _grouped_capped_attention,
        round=2,
        shapes=_GROUPED,
        ignore=_ANY_CALL,
    ),
    rule(
        "scaled_dot_product_attention",
        (_grouped, _grouped_masked),
        _grouped_attention,
        round=2,
        shapes=_GROUPED,
        ignore=_ANY_CALL,
    ),
    rule(
        "scaled_dot_product_attention",
        (_grouped_tokens_first, _grouped_masked_tokens_first),
        _grouped_attention_tokens_first,
        round=2,
        shapes=_TOKENS_FIRST,
        ignore=_ANY_CALL,
    ),
)
