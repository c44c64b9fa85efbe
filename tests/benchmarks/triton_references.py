"""Kernels written by hand in Triton, for one shape each: what the generated ones are held against.

Contiguous bfloat16 (or another float) in and out, float32 inside.
"""

import triton
import triton.language as tl


@triton.jit
def swiglu(gate, up, out, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    x = tl.load(gate + at, mask=inside).to(tl.float32)
    y = tl.load(up + at, mask=inside).to(tl.float32)
    tl.store(out + at, x / (1.0 + tl.exp(-x)) * y, mask=inside)


@triton.jit
def add_rms_norm(x, residual, weight, total, out, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    at = tl.program_id(0) * COLUMNS + columns
    added = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + at, added, mask=inside)
    scale = tl.rsqrt(tl.sum(added * added, axis=0) / COLUMNS + eps)
    tl.store(out + at, added * scale * tl.load(weight + columns, mask=inside).to(tl.float32), mask=inside)


@triton.jit
def layer_norm(x, weight, bias, out, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    at = tl.program_id(0) * COLUMNS + columns
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, row - tl.sum(row, axis=0) / COLUMNS, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / COLUMNS + eps)
    factor = tl.load(weight + columns, mask=inside).to(tl.float32)
    tl.store(out + at, centred * scale * factor + tl.load(bias + columns, mask=inside).to(tl.float32), mask=inside)


@triton.jit
def softmax(x, out, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    at = tl.program_id(0) * COLUMNS + columns
    row = tl.load(x + at, mask=inside, other=float("-inf")).to(tl.float32)
    raised = tl.exp(row - tl.max(row, axis=0))
    tl.store(out + at, raised / tl.sum(raised, axis=0), mask=inside)


@triton.jit
def rope(query, key, cos, sin, query_out, key_out, HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr):
    """[tokens, heads, 2 * half] and [tokens, groups, 2 * half] by tables [tokens, 2 * half]; one token a program."""
    token = tl.program_id(0)
    columns = tl.arange(0, HALF)[None, :]
    row = token * 2 * HALF + columns
    first_cos, second_cos = tl.load(cos + row).to(tl.float32), tl.load(cos + row + HALF).to(tl.float32)
    first_sin, second_sin = tl.load(sin + row).to(tl.float32), tl.load(sin + row + HALF).to(tl.float32)
    at = token * HEADS * 2 * HALF + tl.arange(0, HEADS)[:, None] * 2 * HALF + columns
    first, second = tl.load(query + at).to(tl.float32), tl.load(query + at + HALF).to(tl.float32)
    tl.store(query_out + at, first * first_cos - second * first_sin)
    tl.store(query_out + at + HALF, second * second_cos + first * second_sin)
    at = token * GROUPS * 2 * HALF + tl.arange(0, GROUPS)[:, None] * 2 * HALF + columns
    first, second = tl.load(key + at).to(tl.float32), tl.load(key + at + HALF).to(tl.float32)
    tl.store(key_out + at, first * first_cos - second * first_sin)
    tl.store(key_out + at + HALF, second * second_cos + first * second_sin)
