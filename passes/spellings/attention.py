"""Attention written out, and repeated key/value heads."""

from __future__ import annotations

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


def _repeat_kv(found: Found) -> Attributes:
    input, output = found["input"], found["output"]
    fits = len(input.shape) == 4 == len(output.shape) and input.shape[2:] == output.shape[2:]
    fits = fits and input.shape[0] == output.shape[0] and input.shape[1] > 0 == output.shape[1] % input.shape[1]
    require(fits, f"{input} becomes {output}")
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
        floats(found, "query", "key", "value", "output")
        require(len(query.shape) == len(key.shape) == len(value.shape) in (3, 4), "it is over other dimensions")
        alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and key.shape[-2] == value.shape[-2]
        require(alike, f"{query}, {key} and {value} do not go together")
        if "attn_mask" in found:
            mask, scores = found["attn_mask"], (*query.shape[:-1], key.shape[-2])
            require(mask.dtype is query.dtype, f"the mask is {mask.dtype}")
            require(broadcasts(mask.shape, scores), f"the mask {mask} does not broadcast over the scores")
        scale = found.numbers.get("scale", 1.0)
        require(isinstance(scale, (int, float)), f"its scale is {scale!r}")
        return {"scale": float(1 / scale if divides else scale)}

    return attributes


def _grouped(query: Any, key: Any, value: Any) -> Any:
    return F.scaled_dot_product_attention(query, _repeat_by_expand(key), _repeat_by_expand(value))


def _grouped_masked(query: Any, key: Any, value: Any, attn_mask: Any) -> Any:
    return F.scaled_dot_product_attention(query, _repeat_by_expand(key), _repeat_by_expand(value), attn_mask)


def _grouped_attention(found: Found) -> Attributes:
    require(not found.last.attr("dropout_p"), "it has dropout")
    return {**dict(found.last.attrs), "enable_gqa": True}


_HEADS = ({"query": (2, 4, 3, 8), "key": (2, 4, 3, 8), "value": (2, 4, 3, 8), "attn_mask": (2, 1, 3, 3)},)
_GROUPED = ({"query": (2, 6, 4, 8), "key": (2, 2, 4, 8), "value": (2, 2, 4, 8), "attn_mask": (2, 1, 4, 4)},)

RULES = (
    rule(
        "repeat_kv",
        (_repeat_by_expand, _repeat_interleaved),
        _repeat_kv,
        shapes=({"input": (2, 2, 4, 8)},),
        ignore=frozenset({"size"}),
    ),
    *(
        rule(
            "scaled_dot_product_attention",
            spellings,
            _attention(divides=name.endswith("divisor")),
            round=1,
            shapes=_HEADS,
            dtypes=HALF,
            ignore=CASTS,
        )
        for name, spellings in _attention_spellings().items()
    ),
    rule(
        "scaled_dot_product_attention",
        (_grouped, _grouped_masked),
        _grouped_attention,
        round=2,
        shapes=_GROUPED,
        ignore=frozenset({"repeats", "scale", "is_causal", "dropout_p"}),
    ),
)
