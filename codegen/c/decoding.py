"""Packed weights in C: the expressions of a format as vectors of `LANES` weights, decoded as they are read.

For a format there are ``begin_F(block)``, what is the same for a block, and ``weights_F(&begun, c)``, weights c to
c + LANES of it. What changes within a vector is a vector; all else are numbers that a compiler works out.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch

from graph_capture.cache import DiskCache
from graph_capture.codegen.c import host
from graph_capture.errors import FusionError
from graph_capture.ir.quantised import DECODERS, Format, format_of

RUN = 16  # weights that lie next to each other, or share an element; LANES divides it
GRAIN = 2**15  # weights that are worth a thread
STORES = {torch.float32: "store_float", torch.bfloat16: "store_bfloat16", torch.float16: "store_float16"}
MEMORY = {torch.float32: "float", torch.bfloat16: "uint16_t", torch.float16: "uint16_t"}
_OPERATORS = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "/",
    ast.Mod: "%",
    ast.RShift: ">>",
    ast.LShift: "<<",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.Lt: "<",
}


def symbol(name: str) -> str:
    """What a format's functions end in."""
    return name.replace(":", "_")


@functools.cache
def text_of(name: str) -> str:
    """The functions of a format, once in a file."""
    row, own = format_of(name), symbol(name)
    groups = row.size // row.group
    padded = -(-groups // RUN) * RUN
    factors = {"scale": row.scale} | ({"minimum": row.minimum} if row.minimum else {})
    members = [("lanes" if f.dtype is torch.float16 else "int32_t", f) for f in row.fields if f.count == 1]
    held = [f"{kind} {field.name};" for kind, field in members]
    held += [f"lanes {factor};" if groups == 1 else f"float {factor}[{padded}];" for factor in factors]
    lines = [f"    struct block_{own} at;", "    at.from = from;"]
    lines += [
        f"    at.{field.name} = {'spread_float16' if kind == 'lanes' else 'int_at'}(from + {field.offset});"
        for kind, field in members
    ]
    for factor, expression in factors.items():
        value = _VectorPrinter(row, "j", padded).floats(expression, "at")
        if groups == 1:
            lines.append(f"    at.{factor} = {value};")
        else:
            lines.append(f"    for (int c = 0; c < {groups}; c += LANES) store_lanes(at.{factor} + c, {value}, 0);")
    shared = "" if groups == 1 else f"[c / {row.group}]"
    decoded = f"{_VectorPrinter(row, 'i', row.size).floats(row.value, '(*block)')} * block->scale{shared}"
    decoded += f" - block->minimum{shared}" if row.minimum else ""
    levels = ", ".join(map(str, row.levels))
    return "\n".join(
        [
            f"#ifndef DECODES_{own}",
            f"#define DECODES_{own}",
            *([f"static const int32_t levels_{own}[] = {{{levels}}};"] if row.levels else []),
            f"struct block_{own} {{ const uint8_t *from; {' '.join(held)} }};",
            f"INLINE struct block_{own} begin_{own}(const uint8_t *from) {{",
            *lines,
            "    return at;",
            "}",
            f"INLINE lanes weights_{own}(const struct block_{own} *block, const int c) {{",
            f"    return {decoded};",
            "}",
            "#endif",
            "",
        ]
    )


class _Part(NamedTuple):
    """A subexpression in C, a vector or not; and what it is for each index, where it depends on nothing else."""

    text: str
    vector: bool
    known: numpy.ndarray | None = None
    floating: bool = False


class _VectorPrinter(ast.NodeVisitor):
    """Prints an expression for the indices (``i`` or ``j``, of which there are `count`) from ``c`` on."""

    def __init__(self, row: Format, index: str, count: int) -> None:
        self.row, self.index = row, index
        self.fields = {field.name: field for field in row.fields}
        self.numbers = numpy.arange(count)

    def floats(self, text: str, block: str) -> str:
        """As a vector of floats; what is begun is called `block`."""
        self.block = block
        value = self.visit(ast.parse(text, mode="eval").body)
        return value.text if value.floating else f"floats_of({self._vector(value)})"

    def _known(self, text: str, vector: str, numbers: numpy.ndarray) -> _Part:
        """What depends on the index alone; a number where it is one for each run."""
        runs = numbers.reshape(-1, RUN)
        shared = (runs == runs[:, :1]).all()
        return _Part(text if shared else vector, not shared, numbers)

    def _vector(self, value: _Part) -> str:
        return value.text if value.vector else f"((ints){{0}} + {value.text})"

    def visit_Constant(self, node: ast.Constant) -> _Part:
        return _Part(str(node.value), False, numpy.full(len(self.numbers), node.value))

    def visit_Name(self, node: ast.Name) -> _Part:
        if node.id == self.index:
            return _Part("(c + counted())", True, self.numbers)
        floating = self.fields[node.id].dtype is torch.float16
        return _Part(f"{self.block}.{node.id}", floating, floating=floating)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> _Part:
        return self.visit(node.operand)._replace(text=f"-{self.visit(node.operand).text}")

    def visit_BinOp(self, node: ast.BinOp) -> _Part:
        return self._binary(self.visit(node.left), node.op, self.visit(node.right), node)

    def visit_Compare(self, node: ast.Compare) -> _Part:
        return self._binary(self.visit(node.left), node.ops[0], self.visit(node.comparators[0]), node)

    def _binary(self, left: _Part, operator: ast.AST, right: _Part, node: ast.expr) -> _Part:
        sign = _OPERATORS[type(operator)]
        if left.floating or right.floating:
            sides = [v.text if v.floating else f"floats_of({self._vector(v)})" for v in (left, right)]
            return _Part(f"({sides[0]} {sign} {sides[1]})", True, floating=True)
        vector = f"({self._vector(left)} {sign} {self._vector(right)})"
        if left.known is not None and right.known is not None:
            numbers = self._evaluated(node)
            return self._known(f"({self._at(node)})", vector, numbers)
        either = left.vector or right.vector
        return _Part(vector if either else f"({left.text} {sign} {right.text})", either)

    def visit_Call(self, node: ast.Call) -> _Part:
        condition, one, other = map(self.visit, node.args)
        if not condition.vector:
            return _Part(f"({condition.text} ? {self._vector(one)} : {self._vector(other)})", True)
        return _Part(f"either({condition.text}, {self._vector(one)}, {self._vector(other)})", True)

    def visit_Subscript(self, node: ast.Subscript) -> _Part:
        assert isinstance(node.value, ast.Name)
        if node.value.id == "levels":
            return _Part(f"looked_up(levels_{symbol(self.row.name)}, {self._vector(self.visit(node.slice))})", True)
        field, places = self.fields[node.value.id], self._evaluated(node.slice)
        runs = places.reshape(-1, RUN)
        kind = "signed_" if field.dtype is torch.int8 else ""
        memory = f"{self.block}.from + {field.offset}"
        if (runs == runs[:, :1] + numpy.arange(RUN)).all():
            first, last = field.offset + places.min(), field.offset + places.max()
            if first < 0 or last >= self.row.bytes:
                raise FusionError(f"{self.row.name} reads beyond its block")
            return _Part(f"{kind}bytes_at({memory} + ({self._at(node.slice)}))", True)
        return _Part(f"{kind}bytes_from({memory}, {self._vector(self.visit(node.slice))})", True)

    def _evaluated(self, node: ast.expr) -> numpy.ndarray:
        """An expression of the index alone, for each."""
        found = eval(ast.unparse(node), {"__builtins__": {}}, {self.index: self.numbers})
        return numpy.broadcast_to(numpy.asarray(found), self.numbers.shape)

    def _at(self, node: ast.expr) -> str:
        """An expression of the index alone, at the vector's first."""

        def printed(part: ast.expr) -> str:
            if isinstance(part, ast.BinOp):
                return f"({printed(part.left)} {_OPERATORS[type(part.op)]} {printed(part.right)})"
            if isinstance(part, ast.Compare):
                return f"({printed(part.left)} {_OPERATORS[type(part.ops[0])]} {printed(part.comparators[0])})"
            return "c" if isinstance(part, ast.Name) else ast.unparse(part)

        return printed(node)


# --- whole rows


@functools.cache
def _source(name: str, dtype: torch.dtype) -> str:
    row, own = format_of(name), symbol(name)
    return text_of(name) + "\n".join(
        [
            "APART void kernel(void *const *operands, const int64_t *numbers, int64_t begin, int64_t end) {",
            f"    float values[{row.size}] __attribute__((aligned(64)));",
            "    for (int64_t unit = begin; unit < end; unit++) {",
            "        const uint8_t *from = (const uint8_t *)operands[0] + unit * numbers[0];",
            f"        {MEMORY[dtype]} *to = ({MEMORY[dtype]} *)operands[1] + unit * numbers[1] * {row.size};",
            f"        for (int64_t at = 0; at < numbers[1]; at++, from += {row.bytes}, to += {row.size}) {{",
            f"            const struct block_{own} block = begin_{own}(from);",
            f"            for (int c = 0; c < {row.size}; c += LANES)",
            f"                store_lanes(values + c, weights_{own}(&block, c), 0);",
            f"            {STORES[dtype]}(to, values, {row.size}, 0);",
            "        }",
            "    }",
            "}",
            "",
        ]
    )


@functools.cache
def _compiled(name: str, dtype: torch.dtype) -> object | None:
    try:
        return host.library(_source(name, dtype), DiskCache("dequantize")).kernel
    except FusionError:
        return None


def dequantized(weight: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor | None:
    """Packed rows [..., bytes] as `dtype`, with the reference's bits; None without a C compiler."""
    function = _compiled(name, dtype) if dtype in STORES else None
    if function is None:
        return None
    row = format_of(name)
    out = weight.new_empty(*weight.shape[:-1], row.inner(weight.shape[-1]), dtype=dtype)
    rows = weight.reshape(-1, weight.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if out.numel():
        numbers: Sequence[int] = (rows.stride(0), weight.shape[-1] // row.bytes)
        grain = max(1, GRAIN // out.shape[-1])
        host.call(function, [rows.data_ptr(), out.data_ptr()], numbers, rows.shape[0], grain)()
    return out


DECODERS["cpu"] = dequantized
