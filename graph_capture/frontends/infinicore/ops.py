"""InfiniCore's ops as torch's: a row for each, from which recording, checks, replays and the documentation come.

A row is a function of torch tensors. What it calls is recorded, so an op becomes the ops of the table that passes and
kernels know. Arguments are checked first: InfiniCore itself takes mixed dtypes silently, and some wrong shapes end the
process. The in-place form ``X_(out, ...)`` is the same function and a copy into ``out``.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from graph_capture.errors import CaptureError
from graph_capture.record.recorder import emit

Tensor = torch.Tensor


class UnfitOperands(Exception):
    """Arguments that the op does not take."""


@dataclass(frozen=True)
class Operator:
    """An op of the extension module.

    Attributes:
        name: what the module calls it, without the underscore of the in-place form.
        function: what it computes, of torch tensors.
        becomes: what it is recorded as, for people.
        outs: how many tensors the in-place form takes in front; what the function returns goes there.
        deferred: whether native recording of January 2026 puts it off until ``run()``.
        writes: whether `function` writes into its arguments itself.
    """

    name: str
    function: Callable[..., Any]
    becomes: str
    outs: int = 1
    deferred: bool = True
    writes: bool = False

    @functools.cached_property
    def parameters(self) -> inspect.Signature:
        """The parameters of the out-of-place form."""
        return inspect.signature(self.function)


OPS: dict[str, Operator] = {}


def _op(becomes: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.strip("_")
        OPS[name] = Operator(name, function, becomes, **options)
        return function

    return register


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnfitOperands(reason)


def _text(*tensors: Tensor | None) -> str:
    return " and ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors if t is not None)


def _alike(*tensors: Tensor) -> None:
    """One dtype, one device."""
    _require(len({t.dtype for t in tensors}) == 1, f"the dtypes of {_text(*tensors)} differ")
    _require(len({t.device for t in tensors}) == 1, f"{_text(*tensors)} are on different devices")


def _floats(*tensors: Tensor) -> None:
    _alike(*tensors)
    _require(tensors[0].is_floating_point(), f"{_text(tensors[0])} does not hold floating-point numbers")


def _same_shape(*tensors: Tensor) -> None:
    _alike(*tensors)
    _require(len({t.shape for t in tensors}) == 1, f"the shapes of {_text(*tensors)} differ, and nothing is broadcast")


def _indices(*tensors: Tensor) -> None:
    for t in tensors:
        _require(
            not t.is_floating_point() and not t.is_complex() and t.dtype is not torch.bool, f"{_text(t)} no indices"
        )


# --- what torch computes


@_op("`add`")
def _add(a: Tensor, b: Tensor) -> Tensor:
    _same_shape(a, b)
    return a + b


@_op("`mul`")
def _mul(a: Tensor, b: Tensor) -> Tensor:
    _same_shape(a, b)
    return a * b


@_op("`matmul`, and `mul.Scalar` where `alpha` is not 1")
def _matmul(a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    _floats(a, b)
    fits = a.dim() == b.dim() in (2, 3) and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]
    _require(fits, f"{_text(a, b)} cannot be multiplied: two matrices, or as many on either side")
    product = torch.matmul(a, b)
    return product if alpha == 1 else product * alpha


@_op("`linear`")
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _floats(input, weight, *(() if bias is None else (bias,)))
    fits = weight.dim() == 2 and input.dim() > 0 and input.shape[-1] == weight.shape[1]
    _require(fits, f"{_text(input, weight)} do not go together")
    _require(bias is None or bias.shape == weight.shape[:1], f"{_text(weight, bias)} do not go together")
    return F.linear(input, weight, bias)


@_op("`silu`", deferred=False)
def _silu(input: Tensor) -> Tensor:
    _floats(input)
    return F.silu(input)


@_op("`silu`, `mul` (of the second operand: `a * silu(b)`)")
def _swiglu(a: Tensor, b: Tensor) -> Tensor:
    _floats(a, b)
    _same_shape(a, b)
    return F.silu(b) * a


@_op("`rms_norm`")
def _rms_norm(x: Tensor, weight: Tensor, epsilon: float = 1e-5) -> Tensor:
    _floats(x)
    _require(weight.dim() == 1 and weight.shape == x.shape[-1:], f"{_text(x, weight)} do not go together")
    if weight.dtype is x.dtype:
        return F.rms_norm(x, (x.shape[-1],), weight, epsilon)
    half = (torch.float16, torch.bfloat16)
    fits = x.dtype in half and weight.dtype in (*half, torch.float32)
    _require(fits, f"the dtypes of {_text(x, weight)} do not go together")
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), epsilon).to(x.dtype)


@_op("`add`, `rms_norm`; both are results", outs=2)
def _add_rms_norm(a: Tensor, b: Tensor, weight: Tensor, epsilon: float = 1e-5) -> tuple[Tensor, Tensor]:
    _same_shape(a, b)
    total = a + b
    return _rms_norm(total, weight, epsilon), total


@_op("`embedding` of both tables, `rope`")
def _rope(x: Tensor, pos: Tensor, sin_table: Tensor, cos_table: Tensor, algo: Any) -> Tensor:
    _floats(x, sin_table, cos_table)
    _require(x.dim() in (3, 4), f"{_text(x)} is not [batch, length, heads, width] or [length, heads, width]")
    fits = sin_table.shape == cos_table.shape and sin_table.dim() == 2 and 2 * sin_table.shape[1] == x.shape[-1]
    _require(fits, f"the tables {_text(sin_table, cos_table)} do not span half the width of {_text(x)}")
    _indices(pos)
    rows = x.shape[:-2] if pos.dim() == 2 else x.shape[-3:-2]
    _require(pos.shape == rows, f"positions {_text(pos)} do not go with {_text(x)}")
    index = pos if pos.dtype in (torch.int32, torch.int64) else pos.long()
    cos, sin = (F.embedding(index, table).unsqueeze(-2) for table in (cos_table, sin_table))
    if getattr(algo, "name", algo) == "GPT_NEOX":
        return emit("rope", x, cos, sin, False, True)
    wide = (cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1))
    return emit("rope", x, *wide, True, False)


@_op("`masked_fill` of what lies ahead, `softmax`; one query: `softmax`")
def _causal_softmax(input: Tensor) -> Tensor:
    _floats(input)
    _require(input.dim() in (2, 3, 4), f"{_text(input)} is not [..., queries, keys]")
    queries, keys = input.shape[-2:]
    _require(queries <= keys, f"{_text(input)} has more queries than keys")
    if queries > 1:
        ahead = torch.ones(queries, keys, dtype=torch.bool, device=input.device).triu(keys - queries + 1)
        input = input.masked_fill(ahead, -math.inf)
    return F.softmax(input, dim=-1)


@_op("`embedding`")
def _embedding(input: Tensor, weight: Tensor) -> Tensor:
    _indices(input)
    _require(weight.dim() == 2, f"the table {_text(weight)} is not a matrix")
    return F.embedding(input if input.dtype in (torch.int32, torch.int64) else input.long(), weight)


@_op("`clone`")
def _rearrange(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@_op("`copy_` into the caches, `scaled_dot_product_attention`", deferred=False, writes=True)
def _attention(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pos: int) -> Tensor:
    _floats(q, k, v, k_cache, v_cache)
    fits = q.dim() == k.dim() == k_cache.dim() == 3 and k.shape == v.shape and k_cache.shape == v_cache.shape
    fits = fits and q.shape[1:] == k.shape[1:] and k.shape[0] == k_cache.shape[0] and k.shape[2] == k_cache.shape[2]
    fits = fits and k.shape[0] > 0 == q.shape[0] % k.shape[0]
    _require(fits, f"{_text(q, k, v)} and the caches {_text(k_cache, v_cache)} do not go together")
    length, keys = q.shape[1], pos + q.shape[1]
    _require(pos >= 0 and keys <= k_cache.shape[1], f"positions {pos} to {keys} do not fit into {_text(k_cache)}")
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache.narrow(1, pos, length).copy_(new)
    mask = None
    if length > 1:
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    key, value = (cache.narrow(1, 0, keys).unsqueeze(0) for cache in (k_cache, v_cache))
    grouped = q.shape[0] != k.shape[0]
    result = F.scaled_dot_product_attention(q.unsqueeze(0), key, value, mask, enable_gqa=grouped)
    return result.squeeze(0).transpose(0, 1).contiguous()


# --- what only InfiniCore computes: ops of torch's dispatcher that call it

_LIBRARY = torch.library.Library("infinicore", "FRAGMENT")


def _own(name: str, schema: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An op that replays through InfiniCore's own in-place form; the function gives its out-of-place form."""
    _LIBRARY.define(f"{name}_({schema}) -> ()")
    _LIBRARY.impl(f"{name}_", functools.partial(_call_own, name), "CompositeExplicitAutograd")
    return _op(f"`infinicore.{name}_`", **options)


CALLERS: list[Callable[[str, tuple[Any, ...]], None]] = []  # of frontends in use; the last one is asked


def _call_own(name: str, *args: Any) -> None:
    if not CALLERS:
        raise CaptureError(f"infinicore.{name} replays through InfiniCore itself: import infinicore first")
    CALLERS[-1](name, args)


_PAGED = "Tensor(a!) out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor cache_lens"


@_own("paged_attention", f"{_PAGED}, Tensor? alibi_slopes, float scale")
def _paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cache_lens: Tensor,
    alibi_slopes: Tensor | None,
    scale: float,
) -> Tensor:
    _floats(q, k_cache, v_cache)
    _indices(block_tables, cache_lens)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    torch.ops.infinicore.paged_attention_(out, q, k_cache, v_cache, block_tables, cache_lens, alibi_slopes, scale)
    return out


@_own(
    "paged_attention_prefill",
    f"{_PAGED.replace('cache_lens', 'history_lens')}, Tensor cu_seqlens_q, Tensor? alibi_slopes, float scale",
    deferred=False,
)
def _paged_attention_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    history_lens: Tensor,
    cu_seqlens_q: Tensor,
    alibi_slopes: Tensor | None,
    scale: float,
) -> Tensor:
    _floats(q, k_cache, v_cache)
    _indices(block_tables, history_lens, cu_seqlens_q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    given = (q, k_cache, v_cache, block_tables, history_lens, cu_seqlens_q, alibi_slopes, scale)
    torch.ops.infinicore.paged_attention_prefill_(out, *given)
    return out


@_own(
    "flash_attention",
    "Tensor(a!) out, Tensor query, Tensor key, Tensor value, Tensor total_kv_len, float scale, bool is_causal",
)
def _flash_attention(q: Tensor, k: Tensor, v: Tensor, total_kv_len: Tensor, scale: float, is_causal: bool) -> Tensor:
    _floats(q, k, v)
    _indices(total_kv_len)
    _require(q.dim() == k.dim() == v.dim() and q.shape[-1] == k.shape[-1], f"{_text(q, k, v)} do not go together")
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    torch.ops.infinicore.flash_attention_(out, q, k, v, total_kv_len, scale, is_causal)
    return out


_CACHES = "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor"


@_own("paged_caching", f"{_CACHES} slot_mapping", outs=0, writes=True)
def _paged_caching(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    _alike(k_cache, v_cache, k, v)
    _indices(slot_mapping)
    torch.ops.infinicore.paged_caching_(k_cache, v_cache, k, v, slot_mapping)


@_own("kv_caching", f"{_CACHES} past_kv_lengths", outs=0, writes=True)
def _kv_caching(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, past_kv_lengths: Tensor) -> None:
    _alike(k_cache, v_cache, k, v)
    _indices(past_kv_lengths)
    torch.ops.infinicore.kv_caching_(k_cache, v_cache, k, v, past_kv_lengths)


@_own(
    "random_sample",
    "Tensor(a!) indices, Tensor logits, float random_val, float topp, int topk, float temperature",
    deferred=False,
)
def _random_sample(logits: Tensor, random_val: float, topp: float, topk: int, temperature: float) -> Tensor:
    _floats(logits)
    _require(logits.dim() == 1, f"the logits {_text(logits)} are not one row")
    indices = torch.empty((), dtype=torch.int32, device=logits.device)
    torch.ops.infinicore.random_sample_(indices, logits, random_val, topp, topk, temperature)
    return indices
