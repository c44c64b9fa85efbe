"""An `AttentionSpec` as ninetoothed programs.

The first has a block for each batch element, key head and *split* of the keys; a split has every so-manieth block of
keys, so that a cache that is filled in part still keeps all splits busy. A block of keys that the mask leaves out is
passed over before anything of it is read. The second program adds up the splits (Flash-Decoding: Dao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graph_capture.codegen.ninetoothed.host import GeneratedProgram
from graph_capture.codegen.ninetoothed.printing import print_tanh
from graph_capture.codegen.spec.attention import MAX_ROWS, AttentionSpec

BLOCK = 64  # keys that are read at a time, at most
ALONE = {2: 128, 4: 32}  # bytes of an element -> keys up to which one block does, and nothing is to be added up
BLOCK_BYTES = 32768  # of keys, at most
BUSY = 48  # programs from where on smaller blocks did not pay on an H100
PROGRAMS = 1056  # eight for each multiprocessor of an H100


@dataclass(frozen=True)
class Splits:
    """How the keys are divided: how many parts, blocks of keys in each, and keys in a block."""

    count: int
    blocks: int
    block: int


def choose_splits(spec: AttentionSpec, interpreted: bool) -> Splits:
    """Enough parts to keep the device busy; the interpreter wants few."""
    widest = _wide(max(spec.width, spec.out_width)) * spec.dtype.itemsize
    alone = interpreted or spec.length <= ALONE[spec.dtype.itemsize]
    block = max(16, min(128 if alone else BLOCK, BLOCK_BYTES // widest, _power(spec.length)))
    while not alone and block > 16 and spec.batch * spec.heads * (spec.length // block) < BUSY:
        block //= 2
    blocks = -(-spec.length // block)
    wanted = max(1, (4 if interpreted else PROGRAMS) // (spec.batch * spec.heads))
    each = -(-blocks // min(wanted, blocks))
    return Splits(-(-blocks // each), each, block)


def programs(spec: AttentionSpec, interpreted: bool) -> list[GeneratedProgram]:
    """Attention to each split, and the sum over the splits if there are several."""
    splits = choose_splits(spec, interpreted)
    dtypes = [operand.dtype for operand in spec.inputs]
    if splits.count == 1:
        dtypes += [spec.dtype]
    else:
        dtypes += [torch.float32] * 3
    ranks = [4] * len(spec.inputs) + ([4] if splits.count == 1 else [5, 4, 4])
    even = all(_wide(width) == width for width in (spec.width, spec.out_width))
    aligned = [spec.width % 16 == 0, spec.width % 16 == 0, spec.out_width % 16 == 0]
    aligned += [spec.length % 16 == 0] * (len(spec.inputs) - 3) + [spec.out_width % 16 == 0, False, False]
    first = GeneratedProgram(
        _module(*_attend(spec, splits, interpreted)),
        tuple(ranks),
        tuple(dtypes),
        tuple(aligned[: len(ranks)]),
        warps=4,
        other=None if even and splits.count * splits.blocks * splits.block == spec.length else 0,
    )
    if splits.count == 1:
        return [first]
    second = GeneratedProgram(
        _module(*_combine(spec, splits)),
        (5, 4, 4, 4),
        (torch.float32, torch.float32, torch.float32, spec.dtype),
        (spec.out_width % 16 == 0, False, False, spec.out_width % 16 == 0),
        warps=4,
    )
    return [first, second]


def views(spec: AttentionSpec, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The operands of each launch, with memory of their own between the two."""
    *inputs, out = spec.operands(tensors)
    splits = choose_splits(spec, out.device.type == "cpu")
    if splits.count == 1:
        return [[*inputs, out]]
    shape = (spec.batch, spec.heads, splits.count, spec.rows)
    parts = torch.empty((*shape, spec.out_width), dtype=torch.float32, device=out.device)
    peaks, totals = (torch.empty(shape, dtype=torch.float32, device=out.device) for _ in range(2))
    return [[*inputs, parts, peaks, totals], [parts, peaks, totals, out]]


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def _wide(size: int) -> int:
    """The elements of a head as tensor cores take them."""
    return max(16, _power(size))


def _module(names: Sequence[str], arrangement: Sequence[str], application: Sequence[str]) -> str:
    parameters = ", ".join(names)
    lines = ["import ninetoothed.language as ntl", "", ""]
    lines += [f"def arrangement({parameters}):", *(f"    {line}" for line in arrangement), "", ""]
    lines += [f"def application({parameters}):", *(f"    {line}" for line in application)]
    return "\n".join(lines) + "\n"


def _attend(spec: AttentionSpec, splits: Splits, interpreted: bool) -> tuple[list[str], list[str], list[str]]:
    masked, several = len(spec.inputs) > 3, splits.count > 1
    names = ["query", "key", "value", *(["mask"] if masked else []), "out", *(["peak", "sum"] if several else [])]
    shape = f"{spec.batch}, {spec.heads}"
    lines = [f"query.shape = ({shape}, {spec.rows}, {spec.width})"]
    lines += _tiled("query", (1, 1, MAX_ROWS, _wide(spec.width)), (0, 1))
    lines.append(f"query_tiles = query_tiles.expand((-1, -1, {splits.count}, -1))")
    for name, width in (("key", spec.width), ("value", spec.out_width)):
        lines.append(f"{name}.shape = ({shape}, {spec.length}, {width})")
        lines += [*_tiled(name, (1, 1, splits.block, _wide(width)), (0, 1)), *_split(name, spec, splits)]
    if masked:
        sizes = zip(spec.mask, (spec.batch, spec.heads, spec.rows), strict=True)
        lines.append(f"mask.shape = ({', '.join(str(size if moves else 1) for moves, size in sizes)}, {spec.length})")
        lines += _tiled("mask", (1, 1, MAX_ROWS if spec.mask[2] else 1, splits.block), (0, 1))
        lines += ["mask_tiles = mask_tiles.permute((0, 1, 3, 2))", *_split("mask", spec, splits)]
        if not all(spec.mask[:2]):
            wide = (-1 if moves else size for moves, size in zip(spec.mask[:2], (spec.batch, spec.heads), strict=True))
            lines.append(f"mask_tiles = mask_tiles.expand(({', '.join(map(str, wide))}, -1, -1))")
    if several:
        lines.append(f"out.shape = ({shape}, {splits.count}, {spec.rows}, {spec.out_width})")
        lines += _tiled("out", (1, 1, 1, MAX_ROWS, _wide(spec.out_width)), (0, 1, 2))
        for name in ("peak", "sum"):
            lines.append(f"{name}.shape = ({shape}, {splits.count}, {spec.rows})")
            lines += _tiled(name, (1, 1, 1, MAX_ROWS), (0, 1, 2))
    else:
        lines.append(f"out.shape = ({shape}, {spec.rows}, {spec.out_width})")
        lines += _tiled("out", (1, 1, MAX_ROWS, _wide(spec.out_width)), (0, 1))
    lines += ["return (", *(f"    {name}_tiles," for name in names), ")"]
    return names, lines, _attention(spec, splits, interpreted)


def _tiled(name: str, tile: tuple[int, ...], squeezed: tuple[int, ...]) -> list[str]:
    return [f"{name}_tiles = {name}.tile({tile})", f"{name}_tiles.dtype = {name}_tiles.dtype.squeeze({squeezed})"]


def _split(name: str, spec: AttentionSpec, splits: Splits) -> list[str]:
    """Blocks of keys, the third dimension, as splits of every so-manieth."""
    missing = splits.count * splits.blocks - -(-spec.length // splits.block)
    lines = [f"{name}_tiles = {name}_tiles.pad(((0, 0), (0, 0), (0, {missing}), (0, 0)))"] if missing else []
    tile = f"(1, 1, {splits.blocks}, 1), strides=(-1, -1, 1, -1), dilation=(1, 1, {splits.count}, 1)"
    return [
        *lines,
        f"{name}_tiles = {name}_tiles.tile({tile})",
        f"{name}_tiles.dtype = {name}_tiles.dtype.squeeze((0, 1, 3))",
    ]


def _attention(spec: AttentionSpec, splits: Splits, interpreted: bool) -> list[str]:
    """The softmax runs along (Milakov and Gimelshein, 2018): its maximum, its sum, and the weighted values so far."""
    masked = len(spec.inputs) > 3
    mask_dtype = spec.inputs[3].dtype if masked else None
    padded = splits.count * splits.blocks * splits.block != spec.length
    exact = ', input_precision="ieee"' if spec.dtype is torch.float32 else ""
    wide = (lambda text: f"ntl.cast({text}, ntl.float32)") if interpreted else str  # it takes bfloat16 for integers
    name = "float32" if interpreted else str(spec.dtype).removeprefix("torch.")
    low = 'float("-inf")'
    lines = [
        f"rows = {wide('query')}",
        f"top = ntl.full(({MAX_ROWS},), {low}, dtype=ntl.float32)",
        f"total = ntl.full(({MAX_ROWS},), 0.0, dtype=ntl.float32)",
        f"mean = ntl.full(({MAX_ROWS}, {_wide(spec.out_width)}), 0.0, dtype=ntl.float32)",
        f"for step in range({splits.blocks}):",
    ]
    body: list[str] = []
    condition = ""
    if padded:
        body.append(f"inside = (key[step].offsets(2) < {spec.length})[None, :]")
    if masked:
        body.append("allowed = mask[step]" if mask_dtype is torch.bool else f"bias = {_cast('mask[step]')}")
        kept = "allowed" if mask_dtype is torch.bool else f"(bias > {low})"
        kept = f"({kept} & inside)" if padded else kept
        condition = f"if ntl.max(ntl.cast({kept}, ntl.int32)) > 0:"
    inner = [
        f"keys = {wide('key[step]')}",
        f"values = {wide('value[step]')}",
        f"scores = ntl.dot(rows, ntl.trans(keys){exact}) * {spec.scale!r}",
    ]
    if spec.cap is not None:
        inner.append(f"capped = scores / {spec.cap!r}")
        inner.append(f"scores = {spec.cap!r} * {print_tanh('capped', torch.float32)}")
    if mask_dtype is torch.bool:
        inner.append(f"scores = ntl.where(allowed, scores, {low})")
    elif masked:
        inner.append("scores = scores + bias")
    if padded:
        inner.append(f"scores = ntl.where(inside, scores, {low})")
    inner += [
        "highest = ntl.maximum(top, ntl.max(scores, axis=1))",
        f"base = ntl.where(highest == {low}, 0.0, highest)",  # nothing is allowed yet
        "weights = ntl.exp(scores - base[:, None])",
        "decay = ntl.exp(top - base)",
        "total = total * decay + ntl.sum(weights, axis=1)",
        f"mean = mean * decay[:, None] + ntl.dot(ntl.cast(weights, ntl.{name}), values{exact})",
        "top = highest",
    ]
    body += [condition, *(f"    {line}" for line in inner)] if condition else inner
    lines += [f"    {line}" for line in body]
    empty = not spec.strict or splits.count > 1  # what a split has nothing of, others may have
    lines.append(f"out = {_divided('(total == 0.0)[:, None]', 'mean / total[:, None]', empty)}")
    if splits.count > 1:
        lines += ["peak = top", "sum = total"]
    return lines


def _cast(text: str) -> str:
    return f"ntl.cast({text}, ntl.float32)"


def _divided(nothing: str, quotient: str, zero: bool) -> str:
    """A quotient that is 0 (rather than NaN) where there is nothing to divide."""
    return f"ntl.where({nothing}, 0.0, {quotient})" if zero else quotient


def _combine(spec: AttentionSpec, splits: Splits) -> tuple[list[str], list[str], list[str]]:
    """A block for each row: the splits' results, weighted by their sums of exponentials."""
    names = ["part", "peak", "sum", "out"]
    shape = f"{spec.batch}, {spec.heads}"
    count, low = _power(splits.count), 'float("-inf")'
    lines = [
        f"part.shape = ({shape}, {splits.count}, {spec.rows}, {spec.out_width})",
        *_tiled("part", (1, 1, count, 1, _wide(spec.out_width)), (0, 1, 3)),
        f"peak.shape = ({shape}, {splits.count}, {spec.rows})",
        *_tiled("peak", (1, 1, count, 1), (0, 1, 3)),
        f"sum.shape = ({shape}, {splits.count}, {spec.rows})",
        *_tiled("sum", (1, 1, count, 1), (0, 1, 3)),
        f"out.shape = ({shape}, {spec.rows}, {spec.out_width})",
        *_tiled("out", (1, 1, 1, _wide(spec.out_width)), (0, 1, 2)),
        "return (part_tiles, peak_tiles, sum_tiles, out_tiles)",
    ]
    peaks, sums, parts = "peak", "sum", "part"
    if count > splits.count:
        inside = f"(ntl.arange(0, {count}) < {splits.count})"
        peaks, sums = f"ntl.where({inside}, peak, {low})", f"ntl.where({inside}, sum, 0.0)"
        parts = f"ntl.where({inside}[:, None], part, 0.0)"
    body = [
        f"tops = {peaks}",
        "highest = ntl.max(tops, axis=0)",
        f"shares = ntl.exp(tops - ntl.where(highest == {low}, 0.0, highest)) * {sums}",
        "total = ntl.sum(shares, axis=0)",
        f"mean = ntl.sum({parts} * shares[:, None], axis=0)",
        f"out = {_divided('total == 0.0', 'mean / total', not spec.strict)}",
    ]
    return names, lines, body
