"""Weights in blocks of few bits: the table of formats, and the ops that read them.

A packed weight is a uint8 matrix [N, bytes of a row]; a row is blocks, one after the other. A format is a row of the
table: the fields of a block, and the expressions that decode a weight. The reference here, and the code of kernels,
are made from these expressions, so that a format is stated in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F

from graph_capture.errors import CaptureError

TILE = 2**20  # weights that are decoded at a time, for a product of many rows: they stay in a core's cache
BYTES = {torch.float16: 2, torch.uint8: 1, torch.int8: 1, torch.int32: 4}


@dataclass(frozen=True)
class Field:
    """A part of a block: `count` elements of `dtype`, from the byte `offset` on."""

    name: str
    dtype: torch.dtype
    count: int
    offset: int


@dataclass(frozen=True)
class Format:
    """How weights are packed: weight ``i`` of a block is ``scale * value - minimum``, in float32.

    The expressions are Python over integers (``+ - * // % >> & |``, ``where``) and the fields: one with several
    elements is read by an index. Runs of 16 weights, counted from the block's first, lie next to each other in each
    field or share its element.

    Attributes:
        name: what ops call it.
        size: weights of a block.
        group: weights that share a scale; it divides `size`.
        fields: in memory's order.
        value: the integer of weight ``i``.
        scale, minimum: of group ``j``; no minimum if empty.
        levels: what ``levels[...]`` in `value` looks up.
    """

    name: str
    size: int
    group: int
    fields: tuple[Field, ...]
    value: str
    scale: str = "d"
    minimum: str = ""
    levels: tuple[int, ...] = ()

    @cached_property
    def bytes(self) -> int:
        """Of a block."""
        last = self.fields[-1]
        return last.offset + last.count * BYTES[last.dtype]

    def row_bytes(self, inner: int) -> int:
        """Of a row of so many weights.

        Raises:
            CaptureError: blocks do not divide it.
        """
        if inner % self.size:
            raise CaptureError(
                f"a row of {inner} weights is not blocks of {self.size}, as {self.name} has; use another"
            )
        return inner // self.size * self.bytes

    def inner(self, row_bytes: int) -> int:
        """The weights of a row of so many bytes.

        Raises:
            CaptureError: they are not whole blocks.
        """
        if row_bytes % self.bytes:
            raise CaptureError(f"a row of {row_bytes} bytes is not blocks of {self.bytes}, as {self.name} has")
        return row_bytes // self.bytes * self.size


def _format(name: str, size: int, group: int, fields: str, **expressions: Any) -> Format:
    """A row; `fields` are ``name:type`` or ``name:type*count``, in memory's order."""
    types = {"f16": torch.float16, "u8": torch.uint8, "i8": torch.int8, "i32": torch.int32}
    made, offset = [], 0
    for text in fields.split():
        field, kind = text.split(":")
        kind, _, count = kind.partition("*")
        made.append(Field(field, types[kind], int(count or 1), offset))
        offset += made[-1].count * BYTES[made[-1].dtype]
    return Format(name, size, group, tuple(made), **expressions)


_NIBBLE = "(q[i % 16] >> i // 16 * 4 & 15)"
_FIFTH = f"({_NIBBLE} | (h >> i & 1) << 4)"
_K_NIBBLE = "(q[i // 64 * 32 + i % 32] >> i // 32 % 2 * 4 & 15)"
_K_SCALES = {
    "scale": "d * where(j < 4, s[j] & 63, s[j + 4] & 15 | (s[j - 4] >> 6) << 4)",
    "minimum": "m * where(j < 4, s[j + 4] & 63, s[j + 4] >> 4 | (s[j] >> 6) << 4)",
}
_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# GGUF's, under its names.
FORMATS = {
    row.name: row
    for row in (
        _format("Q8_0", 32, 32, "d:f16 q:i8*32", value="q[i]"),
        _format("Q4_0", 32, 32, "d:f16 q:u8*16", value=f"{_NIBBLE} - 8"),
        _format("Q4_1", 32, 32, "d:f16 m:f16 q:u8*16", value=_NIBBLE, minimum="-m"),
        _format("Q5_0", 32, 32, "d:f16 h:i32 q:u8*16", value=f"{_FIFTH} - 16"),
        _format("Q5_1", 32, 32, "d:f16 m:f16 h:i32 q:u8*16", value=_FIFTH, minimum="-m"),
        _format("IQ4_NL", 32, 32, "d:f16 q:u8*16", value=f"levels[{_NIBBLE}]", levels=_NL),
        _format(
            "Q2_K",
            256,
            16,
            "s:u8*16 q:u8*64 d:f16 m:f16",
            value="q[i // 128 * 32 + i % 32] >> i // 32 % 4 * 2 & 3",
            scale="d * (s[j] & 15)",
            minimum="m * (s[j] >> 4)",
        ),
        _format(
            "Q3_K",
            256,
            16,
            "h:u8*32 q:u8*64 s:u8*12 d:f16",
            value="(q[i // 128 * 32 + i % 32] >> i // 32 % 4 * 2 & 3) + (h[i % 32] >> i // 32 & 1) * 4 - 4",
            scale="d * ((s[j % 8] >> j // 8 * 4 & 15 | (s[8 + j % 4] >> j // 4 * 2 & 3) << 4) - 32)",
        ),
        _format("Q4_K", 256, 32, "d:f16 m:f16 s:u8*12 q:u8*128", value=_K_NIBBLE, **_K_SCALES),
        _format(
            "Q5_K",
            256,
            32,
            "d:f16 m:f16 s:u8*12 h:u8*32 q:u8*128",
            value=f"{_K_NIBBLE} | (h[i % 32] >> i // 32 & 1) << 4",
            **_K_SCALES,
        ),
        _format(
            "Q6_K",
            256,
            16,
            "q:u8*128 h:u8*64 s:i8*16 d:f16",
            value="(q[i // 128 * 64 + i % 64] >> i // 64 % 2 * 4 & 15"
            " | (h[i // 128 * 32 + i % 32] >> i // 32 % 4 * 2 & 3) << 4) - 32",
            scale="d * s[j]",
        ),
    )
}


@cache
def format_of(name: str) -> Format:
    """The format of that name: a row of `FORMATS`, or ours with its group, as in "int8:32" and "int4:128".

    Raises:
        CaptureError: there is none.
    """
    if name in FORMATS:
        return FORMATS[name]
    kind, _, group = name.partition(":")
    if kind in ("int8", "int4") and group.isdecimal():
        size = int(group)
        if size % 32 or not 32 <= size <= 1024:
            raise CaptureError(f"a group of {size} weights: take a multiple of 32, at most 1024")
        if kind == "int8":
            return _format(name, size, size, f"d:f16 q:i8*{size}", value="q[i]")
        half = size // 2
        nibble = f"q[i % {half}] >> i // {half} * 4 & 15"
        return _format(name, size, size, f"d:f16 m:f16 q:u8*{half}", value=nibble, minimum="-m")
    raise CaptureError(f"there is no format {name!r}; there are {', '.join(FORMATS)}, int8:GROUP and int4:GROUP")


# --- the reference


class _Elements:
    """The elements of a field for each block, read by indices."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self._tensor[..., index]


def decoded(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Packed rows [..., bytes] as float32 [..., K], by the format's expressions: all else is held against it."""
    row = format_of(name)
    inner = row.inner(weight.shape[-1])
    blocks = weight.reshape(*weight.shape[:-1], -1, row.bytes)
    scope: dict[str, Any] = {"where": torch.where}
    for field in row.fields:
        part = blocks[..., field.offset : field.offset + field.count * BYTES[field.dtype]].clone(
            memory_format=torch.contiguous_format
        )
        typed = part.view(field.dtype).to(torch.float32 if field.dtype.is_floating_point else torch.int32)
        scope[field.name] = typed if field.count == 1 else _Elements(typed)
    scope["levels"] = torch.tensor(row.levels, device=weight.device)
    scope["i"] = torch.arange(row.size, device=weight.device)
    scope["j"] = torch.arange(row.size // row.group, device=weight.device)

    def value(text: str) -> torch.Tensor:
        result = eval(text, {"__builtins__": {}}, scope)
        assert isinstance(result, torch.Tensor)
        return result

    found = value(row.value).to(torch.float32).unflatten(-1, (-1, row.group)) * value(row.scale)[..., None]
    if row.minimum:
        found = found - value(row.minimum)[..., None]
    return found.reshape(*weight.shape[:-1], inner)


# What decodes faster on a kind of device, and gives the same bits; None where it cannot.
Decoder = Callable[[torch.Tensor, str, torch.dtype], "torch.Tensor | None"]
DECODERS: dict[str, Decoder] = {}


def _dequantize(weight: torch.Tensor, *, format: str, dtype: torch.dtype) -> torch.Tensor:
    decoder = DECODERS.get(weight.device.type)
    made = None if decoder is None or dtype is torch.float64 else decoder(weight, format, dtype)
    return decoded(weight, format).to(dtype) if made is None else made


def _quant_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, format: str
) -> torch.Tensor:
    row = format_of(format)
    inner, columns = row.inner(weight.shape[-1]), weight.shape[0]
    if inner != input.shape[-1]:
        raise CaptureError(f"quant_linear: {list(input.shape)} times packed rows of {inner} weights")
    step = max(1, TILE // inner)
    if columns <= step:
        return F.linear(input, _dequantize(weight, format=format, dtype=input.dtype), bias)
    out = input.new_empty(*input.shape[:-1], columns)
    for first in range(0, columns, step):
        part = slice(first, first + step)
        tile = _dequantize(weight[part], format=format, dtype=input.dtype)
        out[..., part] = F.linear(input, tile, None if bias is None else bias[part])
    return out


_library = torch.library.Library("graph_capture", "DEF")
_library.define("quant_linear(Tensor input, Tensor weight, Tensor? bias=None, *, str format) -> Tensor")
_library.define("dequantize(Tensor weight, *, str format, ScalarType dtype) -> Tensor")
_library.impl("quant_linear", _quant_linear, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_library.impl(
    "quant_linear",
    lambda input, weight, bias=None, *, format: input.new_empty(*input.shape[:-1], weight.shape[0]),
    "Meta",
)
_library.impl(
    "dequantize",
    lambda weight, *, format, dtype: weight.new_empty(
        *weight.shape[:-1], format_of(format).inner(weight.shape[-1]), dtype=dtype
    ),
    "Meta",
)

quant_linear: Any = torch.ops.graph_capture.quant_linear.default
dequantize: Any = torch.ops.graph_capture.dequantize.default
