"""A `LinearSpec` as a C function: a unit of work is a block of columns, for all rows.

Each piece of the rows that are multiplied is brought to float32 once for a block; then the block's part of the weight
is read through once, and decoded on the way where it is packed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graph_capture.codegen.c import decoding
from graph_capture.codegen.c import printing as c_print
from graph_capture.codegen.c.host import Layout, place
from graph_capture.codegen.spec.linear import LinearSpec, Product
from graph_capture.errors import FusionError
from graph_capture.ir.quantised import format_of

ALONG_INNER = 32  # columns of a block where the weight's elements lie next to each other along K
ALONG_COLUMNS = 512  # and where along N
PIECE = 16384  # bytes of the multiplied rows, as float32, that are worked on at a time


def layout(spec: LinearSpec, tensors: Sequence[torch.Tensor], thread_work: int) -> tuple[Layout, ...]:
    """How a call on these tensors (inputs, then outputs) runs.

    Raises:
        FusionError: they do not fit the kernel.
    """
    seen = spec.matrices(tensors)
    names = [operand.name for operand in (*spec.inputs, *spec.outputs)]
    views = [*seen["x"], *seen["weights"], *seen["biases"], *seen["extras"], *seen["outputs"]]
    numbers: list[int] = []
    operands = []
    for name, view in zip(_views(spec), views, strict=True):
        index = names.index(name)
        if view.untyped_storage().data_ptr() != tensors[index].untyped_storage().data_ptr():
            raise FusionError(f"{name} lies so that it would have to be copied")
        steps = [step if size > 1 else 0 for size, step in zip(view.shape, view.stride(), strict=True)]
        numbers += [0, *steps] if len(steps) == 1 else steps
        operands.append(place(index, view, tensors[index]))
    block = _block(spec)
    work = block * spec.inner * len(spec.products) * (1 + spec.few)
    units = -(-spec.columns // block)
    return (Layout(tuple(numbers), units, max(1, thread_work // max(1, work)), tuple(operands)),)


def source(spec: LinearSpec, name: str) -> str:
    """The function's text."""
    return _MatvecPrinter(spec).function(name)


def _views(spec: LinearSpec) -> list[str]:
    """The tensor behind each operand of the function, in order."""
    biases = [product.bias for product in spec.products if product.bias]
    extras = [operand.name for operand in spec.extras]
    weights = [product.weight for product in spec.products]
    return [spec.x, *weights, *biases, *extras, *(operand.name for operand in spec.outputs)]


def _block(spec: LinearSpec) -> int:
    unit = all(product.unit for product in spec.products)
    return min(ALONG_INNER if unit else ALONG_COLUMNS, max(1, spec.columns))


class _MatvecPrinter:
    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec
        self.block = _block(spec)
        schemes = {product.scheme for product in spec.products if product.scheme}
        step = math.lcm(*(format_of(scheme).size for scheme in schemes))
        self.piece = max(1, min(spec.inner, PIECE // (4 * spec.few) // step * step or step))
        self.helpers = "".join(map(decoding.text_of, sorted(schemes)))
        self.dtype = spec.dtype
        self.scalars = c_print.Scalars()

    def function(self, name: str) -> str:
        """The whole of it."""
        spec, block = self.spec, self.block
        lines = []
        for index in range(len(_views(spec))):
            lines.append(f"const int64_t s{index} = numbers[{2 * index}], t{index} = numbers[{2 * index + 1}];")
        body = [
            f"const int64_t first = unit * {block};",
            f"const int64_t count = first + {block} < {spec.columns} ? {block} : {spec.columns} - first;",
            *(f"float total{number}[{spec.few}][{block + 4}];" for number in range(len(spec.products))),
            *(f"memset(total{number}, 0, sizeof total{number});" for number in range(len(spec.products))),
            f"for (int64_t start = 0; start < {spec.inner}; start += {self.piece}) {{",
            *(f"    {line}" for line in self._piece()),
            "}",
            *self._epilogue(),
        ]
        lines += ["for (int64_t unit = begin; unit < end; unit++) {", *(f"    {line}" for line in body), "}"]
        head = f"void {name}(void *const *operands, const int64_t *numbers, int64_t begin, int64_t end) {{"
        return self.helpers + "\n".join([head, *(f"    {line}" for line in lines), "}", ""])

    def _piece(self) -> list[str]:
        """Multiply a piece of the rows."""
        spec, kind = self.spec, c_print.MEMORY[self.dtype]
        inner, piece = spec.inner, self.piece
        value = c_print.load("from", "k * t0", self.dtype)
        lines = [
            f"const int64_t length = start + {piece} < {inner} ? {piece} : {inner} - start;",
            f"float x[{spec.few}][{piece + 16}] __attribute__((aligned(64)));",
            f"for (int64_t m = 0; m < {spec.few}; m++) {{",
            f"    const {kind} *const from = (const {kind} *)operands[0] + m * s0 + start * t0;",
            f"    for (int64_t k = 0; k < length; k++) x[m][k] = {value};",
            "    for (int64_t k = length; k % LANES; k++) x[m][k] = 0;",
            "}",
        ]
        for number, product in enumerate(spec.products):
            if product.scheme:
                lines += self._decoded(number, product)
            else:
                lines += self._along_inner(number) if product.unit else self._along_columns(number, product)
        return lines

    def _along_inner(self, number: int) -> list[str]:
        """A few columns at a time, in one sweep over the piece, two vectors of each in a step."""
        spec, kind, index = self.spec, c_print.MEMORY[self.dtype], 1 + number
        columns, rows = range(4 if spec.few == 1 else 2), range(spec.few)
        column = f"(const {kind} *)operands[{index}] + (first + (n + {{0}} < count ? n + {{0}} : n)) * s{index} + start"
        loads = f"lanes_{c_print.HALVES.get(self.dtype, 'float')}"

        def multiplied(weight: str, part: int) -> list[str]:
            lines = [f"const lanes x{m} = lanes_float(&x[{m}][k + {part} * LANES]);" for m in rows]
            for c in columns:
                lines.append(f"const lanes w{c} = {loads}({weight.format(c)} + {part} * LANES);")
                lines += [f"sum{c}_{part}_{m} += w{c} * x{m};" for m in rows]
            return ["{", *(f"    {line}" for line in lines), "}"]

        # The columns after these: the hardware takes each row of the weight for a new stream.
        lines_of_cache = range(2 if self.dtype is torch.float32 else 1)
        step = [
            f"__builtin_prefetch(from{c} + {len(columns)} * s{index} + k + {line} * LANES, 0, 2);"
            for line in lines_of_cache
            for c in columns
        ]
        step += [*multiplied("from{0} + k", 0), *multiplied("from{0} + k", 1)]
        tails = [f"memcpy(tail{c}, from{c} + k, (size_t)(length - k) * sizeof *tail{c});" for c in columns]
        sums = [
            f"total{number}[{m}][n + {c}] += lanes_sum(sum{c}_0_{m} + sum{c}_1_{m});" for c in columns for m in rows
        ]
        return [
            f"for (int64_t n = 0; n < count; n += {len(columns)}) {{",
            *(f"    const {kind} *const from{c} = {column.format(c)};" for c in columns),
            *(f"    lanes sum{c}_{part}_{m} = {{0}};" for c in columns for part in (0, 1) for m in rows),
            "    int64_t k = 0;",
            "    for (; k + 2 * LANES <= length; k += 2 * LANES) {",
            *(f"        {line}" for line in step),
            "    }",
            "    for (; k + LANES <= length; k += LANES)",
            *(f"        {line}" for line in multiplied("from{0} + k", 0)),
            "    if (k < length) {",
            *(f"        {kind} tail{c}[LANES] = {{0}};" for c in columns),
            *(f"        {line}" for line in (*tails, *multiplied("tail{0}", 0))),
            "    }",
            *(f"    {line}" for line in sums),
            "}",
        ]

    def _decoded(self, number: int, product: Product) -> list[str]:
        """A few columns at a time, block by block, the weights decoded in registers."""
        row, own, index = format_of(product.scheme), decoding.symbol(product.scheme), 1 + number
        columns, rows = range(4 if self.spec.few == 1 else 2 if self.spec.few <= 8 else 1), range(self.spec.few)
        column = f"(const uint8_t *)operands[{index}] + (first + (n + {{0}} < count ? n + {{0}} : n)) * s{index}"
        step = [f"const lanes x{m} = lanes_float(&x[{m}][k + c]);" for m in rows]
        for c in columns:
            step.append(f"const lanes w{c} = weights_{own}(&block{c}, c);")
            step += [f"sum{c}_{m} += w{c} * x{m};" for m in rows]
        return [
            f"for (int64_t n = 0; n < count; n += {len(columns)}) {{",
            *(f"    const uint8_t *from{c} = {column.format(c)} + start / {row.size} * {row.bytes};" for c in columns),
            *(f"    lanes sum{c}_{m} = {{0}};" for c in columns for m in rows),
            f"    for (int64_t k = 0; k < length; k += {row.size}) {{",
            *(f"        const struct block_{own} block{c} = begin_{own}(from{c});" for c in columns),
            *(f"        from{c} += {row.bytes};" for c in columns),
            *(f"        __builtin_prefetch(from{c} + {len(columns)} * s{index}, 0, 2);" for c in columns),
            "        #pragma GCC unroll 64",
            f"        for (int c = 0; c < {row.size}; c += LANES) {{",
            *(f"            {line}" for line in step),
            "        }",
            "    }",
            *(f"    total{number}[{m}][n + {c}] += lanes_sum(sum{c}_{m});" for c in columns for m in rows),
            "}",
        ]

    def _along_columns(self, number: int, product: Product) -> list[str]:
        spec, kind, index = self.spec, c_print.MEMORY[self.dtype], 1 + number
        return [
            "for (int64_t k = 0; k < length; k++) {",
            f"    const {kind} *const w = (const {kind} *)operands[{index}] + (start + k) * t{index} + first;",
            "    #pragma omp simd",
            "    for (int64_t n = 0; n < count; n++) {",
            f"        const float value = {c_print.load('w', 'n', self.dtype)};",
            *(f"        total{number}[{m}][n] += value * x[{m}][k];" for m in range(spec.few)),
            "    }",
            "}",
        ]

    def _epilogue(self) -> list[str]:
        """What follows the products, element by element."""
        spec = self.spec
        index = 1 + len(spec.products)
        body = []
        for number, product in enumerate(spec.products):
            value = f"total{number}[m][n]"
            if product.bias:
                bias = f"({self._pointer(index, self.dtype, const=True)})"
                value += f" + {c_print.load(bias, f'(first + n) * t{index}', self.dtype)}"
                index += 1
            body.append(self.scalars.declared(product.target, torch.float32, value))
        for operand in spec.extras:
            pointer = f"({self._pointer(index, operand.dtype, const=True)})"
            value = c_print.load(pointer, f"m * s{index} + (first + n) * t{index}", operand.dtype)
            name = f"e{index}"
            self.scalars.define(operand.name, name, operand.dtype)
            body.append(f"const {c_print.VALUES[operand.dtype]} {name} = {value};")
            index += 1
        body += [self.scalars.assign(statement) for statement in spec.statements]
        for operand, stored in zip(spec.outputs, spec.stores, strict=True):
            place = f"m * s{index} + (first + n) * t{index}"
            pointer = f"({self._pointer(index, operand.dtype, const=False)})"
            body.append(c_print.store(pointer, place, operand.dtype, self.scalars.names[stored]))
            index += 1
        return [
            f"for (int64_t m = 0; m < {spec.few}; m++) {{",
            "    #pragma omp simd",
            "    for (int64_t n = 0; n < count; n++) {",
            *(f"        {line}" for line in body),
            "    }",
            "}",
        ]

    def _pointer(self, index: int, dtype: torch.dtype, *, const: bool) -> str:
        return f"({'const ' if const else ''}{c_print.MEMORY[dtype]} *)operands[{index}]"
