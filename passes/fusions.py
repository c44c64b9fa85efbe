"""The named fusions, as the PyTorch functions they are.

Any spelling that the canonicaliser knows is found as well, for patterns go through it as models do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from graph_capture.ir.graph import SubGraph
from graph_capture.passes.registry import DEFAULT, pattern

_VECTOR = ({"weight": (8,), "bias": (8,), "first": (8,), "second": (8,)},)
_NO_VALUE: frozenset[str] = frozenset({"offset"})

# --- gated linear units


@pattern("swiglu")
def swiglu(gate: Any, up: Any) -> Any:
    """Gated linear unit with SiLU (Shazeer, 2020)."""
    return F.silu(gate) * up


@pattern("geglu")
def geglu(gate: Any, up: Any) -> Any:
    """Gated linear unit with GELU (Shazeer, 2020)."""
    return F.gelu(gate) * up


@pattern("geglu_tanh")
def geglu_tanh(gate: Any, up: Any) -> Any:
    """Gated linear unit with GELU's tanh approximation."""
    return F.gelu(gate, approximate="tanh") * up


@pattern("relu_squared_glu")
def relu_squared_glu(gate: Any, up: Any) -> Any:
    """Gated linear unit with the squared ReLU (So et al., 2021)."""
    return F.relu(gate).square() * up


# --- a bias, or a residual, and what is next to it

_BIAS = ({"bias": (8,)},)


@pattern("bias_gelu", shapes=_BIAS)
def bias_gelu(x: Any, bias: Any) -> Any:
    """A bias and GELU."""
    return F.gelu(x + bias)


@pattern("bias_gelu_tanh", shapes=_BIAS)
def bias_gelu_tanh(x: Any, bias: Any) -> Any:
    """A bias and GELU's tanh approximation."""
    return F.gelu(x + bias, approximate="tanh")


@pattern("bias_silu", shapes=_BIAS)
def bias_silu(x: Any, bias: Any) -> Any:
    """A bias and SiLU."""
    return F.silu(x + bias)


@pattern("bias_relu", shapes=_BIAS)
def bias_relu(x: Any, bias: Any) -> Any:
    """A bias and ReLU."""
    return F.relu(x + bias)


@pattern("scaled_residual")
def scaled_residual(x: Any, residual: Any, scale: float = 0.5) -> Any:
    """A residual sum with a scaled branch (Granite, MiniCPM)."""
    return residual + x * scale


# --- norms


@pattern("norm_add_norm", outputs=("sum", "output"), shapes=_VECTOR, ignore=frozenset({"eps", "offset"}))
def norm_add_norm(x: Any, residual: Any, first: Any, second: Any) -> Any:
    """The norm of a branch, its residual sum, and the norm of that (Gemma 2)."""
    total = residual + F.rms_norm(x, (8,), first, 1e-6)
    return total, F.rms_norm(total, (8,), second, 1e-6)


@pattern("add_rms_norm", outputs=("sum", "output"), shapes=_VECTOR, ignore=_NO_VALUE)
def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float = 1e-6) -> Any:
    """Residual sum and the RMSNorm (Zhang and Sennrich, 2019) of it; both are results."""
    total = x + residual
    return total, F.rms_norm(total, (total.shape[-1],), weight, eps)


@pattern("add_layer_norm", outputs=("sum", "output"), shapes=_VECTOR, ignore=frozenset({"eps"}))
def add_layer_norm(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
    """Residual sum and the LayerNorm (Ba et al., 2016) of it; both are results."""
    total = x + residual
    return total, F.layer_norm(total, (8,), weight, bias)


@pattern(
    "bias_add_layer_norm", outputs=("sum", "output"), shapes=({**_VECTOR[0], "extra": (8,)},), ignore=frozenset({"eps"})
)
def bias_add_layer_norm(x: Any, extra: Any, residual: Any, weight: Any, bias: Any) -> Any:
    """A bias or a second branch, the residual sum, and the LayerNorm of it."""
    total = (x + extra) + residual
    return total, F.layer_norm(total, (8,), weight, bias)


@pattern(
    "add_two_layer_norms",
    outputs=("sum", "first_out", "second_out"),
    shapes=({**_VECTOR[0], "extra": (2, 8), "weight_2": (8,), "bias_2": (8,)},),
    ignore=frozenset({"eps"}),
)
def add_two_layer_norms(x: Any, extra: Any, residual: Any, weight: Any, bias: Any, weight_2: Any, bias_2: Any) -> Any:
    """The residual sum of two parallel branches, and the norms that open the next two (GPT-NeoX)."""
    total = (x + extra) + residual
    return total, F.layer_norm(total, (8,), weight, bias), F.layer_norm(total, (8,), weight_2, bias_2)


@pattern("rms_norm", shapes=_VECTOR, ignore=_NO_VALUE)
def rms_norm(x: Any, weight: Any, eps: float = 1e-6) -> Any:
    """RMSNorm on its own."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


@pattern("layer_norm", shapes=_VECTOR, ignore=frozenset({"eps"}))
def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    """LayerNorm on its own, where it was spelled out."""
    return F.layer_norm(x, (8,), weight, bias)


# --- attention: its inputs and its weights


def _rotated(x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _rotary(**others: tuple[int, ...]) -> tuple[dict[str, tuple[int, ...]], ...]:
    """Shapes by parameter: [batch, heads, length, width]; before the norm heads and length are still swapped."""
    heads = {"query": (2, 4, 3, 8), "key": (2, 2, 3, 8), "cos": (2, 1, 3, 8), "sin": (2, 1, 3, 8)}
    return (heads | others,)


_CACHES = {
    "value": (2, 2, 3, 8),
    "keys": (2, 2, 9, 8),
    "values": (2, 2, 9, 8),
    "position": (3,),
    "steps": (3,),
    "count": (),
}
_NORMS = {"query": (2, 3, 4, 8), "key": (2, 3, 2, 8), "first": (8,), "second": (8,)}
_INTEGERS = {"position": torch.int64, "steps": torch.int64, "count": torch.int64}
_ANY_ROPE = frozenset({"interleaved", "half_tables", "eps", "offset", "other"})


def _written(keys: Any, values: Any, position: Any, key: Any, value: Any) -> tuple[Any, Any]:
    return keys.index_copy_(2, position, key), values.index_copy_(2, position, value)


def _normed(query: Any, key: Any, first: Any, second: Any) -> tuple[Any, Any]:
    query, key = F.rms_norm(query, (8,), first, 1e-6), F.rms_norm(key, (8,), second, 1e-6)
    return query.transpose(1, 2), key.transpose(1, 2)


def _rope_by_complex_numbers(query: Any, key: Any, table: Any) -> Any:
    def turned(x: Any) -> Any:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table).flatten(3)

    return turned(query), turned(key)


@pattern(
    "rope",
    spellings=(_rope_by_complex_numbers,),
    outputs=("query_out", "key_out"),
    shapes=_rotary(table=(2, 1, 3, 4)),
    kinds={"table": torch.complex64},
    ignore=_ANY_ROPE,
    compound=True,
)
def rope(query: Any, key: Any, cos: Any, sin: Any) -> Any:
    """Rotary position embedding (Su et al., 2021) of query and key."""
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


@pattern("qk_norm_rope", outputs=("query_out", "key_out"), shapes=_rotary(**_NORMS), ignore=_ANY_ROPE, compound=True)
def qk_norm_rope(query: Any, key: Any, first: Any, second: Any, cos: Any, sin: Any) -> Any:
    """RMSNorm of each head of query and key, then their rotary embedding (Qwen 3)."""
    query, key = _normed(query, key, first, second)
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _rope_cache_counted(
    query: Any, key: Any, value: Any, cos: Any, sin: Any, keys: Any, values: Any, steps: Any, count: Any
) -> Any:
    """Where the cache counts its own positions (transformers' `StaticCache`)."""
    query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    position = steps + count
    count.add_(1)
    return query, *_written(keys, values, position, key, value)


def _rope_cache_put(query: Any, key: Any, value: Any, cos: Any, sin: Any, keys: Any, values: Any, position: Any) -> Any:
    """Where the caches are written by index (gpt-fast)."""
    query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    keys[:, :, position], values[:, :, position] = key, value
    return query, keys, values


@pattern(
    "rope_cache",
    spellings=(_rope_cache_counted, _rope_cache_put),
    outputs=("query_out", "keys_out", "values_out"),
    shapes=_rotary(**_CACHES),
    kinds=_INTEGERS,
    ignore=_ANY_ROPE,
    compound=True,
)
def rope_cache(query: Any, key: Any, value: Any, cos: Any, sin: Any, keys: Any, values: Any, position: Any) -> Any:
    """Rotary embedding of query and key, and the write of key and value into a static cache."""
    query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    return query, *_written(keys, values, position, key, value)


def _qk_norm_rope_cache_counted(
    query: Any,
    key: Any,
    first: Any,
    second: Any,
    value: Any,
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    steps: Any,
    count: Any,
) -> Any:
    query, key = _normed(query, key, first, second)
    return _rope_cache_counted(query, key, value, cos, sin, keys, values, steps, count)


@pattern(
    "qk_norm_rope_cache",
    spellings=(_qk_norm_rope_cache_counted,),
    outputs=("query_out", "keys_out", "values_out"),
    shapes=_rotary(**_CACHES | _NORMS),
    kinds=_INTEGERS,
    ignore=_ANY_ROPE,
    compound=True,
)
def qk_norm_rope_cache(
    query: Any, key: Any, first: Any, second: Any, value: Any, cos: Any, sin: Any, keys: Any, values: Any, position: Any
) -> Any:
    """`qk_norm_rope`, and the write of key and value into a static cache."""
    query, key = _normed(query, key, first, second)
    return rope_cache(query, key, value, cos, sin, keys, values, position)


def _divide_mask_softmax(scores: Any, mask: Any, divisor: float = 1.0) -> Any:
    return F.softmax(scores / divisor + mask, dim=-1)


@pattern(
    "scale_mask_softmax",
    spellings=(_divide_mask_softmax,),
    shapes=({"scores": (2, 4, 3, 3), "mask": (2, 1, 3, 3)},),
)
def scale_mask_softmax(scores: Any, mask: Any, scale: float = 1.0) -> Any:
    """Attention weights, where attention is spelled out and cannot be one op."""
    return F.softmax(scores * scale + mask, dim=-1)


# --- the ends of a model


def _embedded_by_tensor(table: Any, ids: Any, scale: Any) -> Any:
    return F.embedding(ids, table) * scale


@pattern(
    "embedding_scale",
    spellings=(_embedded_by_tensor,),
    shapes=({"table": (9, 8), "ids": (2,), "scale": ()},),
    kinds={"ids": torch.int64},
    ignore=frozenset({"padding_idx", "other"}),
    compound=True,
)
def embedding_scale(table: Any, ids: Any) -> Any:
    """A scaled embedding."""
    return F.embedding(ids, table) * 3.0


def _scaled_by_tensor(table: Any, ids: Any, weight: Any, scale: Any) -> Any:
    scaled = F.embedding(ids, table) * scale
    return scaled, F.rms_norm(scaled, (8,), weight, 1e-6)


@pattern(
    "embedding_scale_norm",
    spellings=(_scaled_by_tensor,),
    outputs=("scaled", "output"),
    shapes=({"table": (9, 8), "ids": (2,), "weight": (8,), "scale": ()},),
    kinds={"ids": torch.int64},
    ignore=frozenset({"padding_idx", "eps", "offset", "other"}),
    compound=True,
)
def embedding_scale_norm(table: Any, ids: Any, weight: Any) -> Any:
    """A scaled embedding and the RMSNorm of it (Gemma)."""
    scaled = F.embedding(ids, table) * 3.0
    return scaled, F.rms_norm(scaled, (8,), weight, 1e-6)


@pattern("softcap")
def softcap(logits: Any, cap: float = 30.0) -> Any:
    """Logits bounded by `cap` (Gemma 2)."""
    return torch.tanh(logits / cap) * cap


def _softmax_of_scaled(logits: Any, factor: float = 1.0) -> Any:
    return F.softmax(logits * factor, dim=-1)


@pattern("temperature_softmax", spellings=(_softmax_of_scaled,))
def temperature_softmax(logits: Any, temperature: float = 1.0) -> Any:
    """Sampling probabilities."""
    return F.softmax(logits / temperature, dim=-1)


def create_swiglu_pattern() -> SubGraph:
    """``silu(gate) * up``: inputs ``gate``, ``up``; output ``output``."""
    return DEFAULT["swiglu"].subgraph()


def create_geglu_pattern() -> SubGraph:
    """``gelu(gate) * up``: inputs ``gate``, ``up``; output ``output``."""
    return DEFAULT["geglu"].subgraph()


def create_add_rms_norm_pattern(eps: float = 1e-6) -> SubGraph:
    """``sum = x + residual; output = rms_norm(sum, weight, eps)``: inputs ``x``, ``residual``, ``weight``."""
    return DEFAULT["add_rms_norm"].subgraph(eps=eps)
