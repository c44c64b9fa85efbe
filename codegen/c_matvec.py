"""A `LinearSpec` as a C function: a unit of work is a block of columns, for all rows.

Each piece of the rows that are multiplied is brought to float32 once for a block; then the block's part of the weight
is read through once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from graph_capture.codegen import c_print
from graph_capture.codegen.c_host import Layout
from graph_capture.codegen.linear import LinearSpec, Product

from graph_capture.errors import FusionError

ALONG_INNER = 32  # columns of a block where the weight's elements lie next to each other along K
ALONG_COLUMNS = 512  # and where along N
ACCUMULATORS = 8  # vectors
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
        operands.append((index, view.data_ptr() - tensors[index].data_ptr()))
    block = _block(spec)
    work = block * spec.inner * len(spec.products) * (1 + spec.few)
    units = -(-spec.columns // block)
    return (Layout(tuple(numbers), units, max(1, thread_work // max(1, work)), tuple(operands)),)


def source(spec: LinearSpec, name: str) -> str:
    """The function's text."""
    return _Printer(spec).function(name)


def _views(spec: LinearSpec) -> list[str]:
    """The tensor behind each operand of the function, in order."""
    biases = [product.bias for product in spec.products if product.bias]
    extras = [operand.name for operand in spec.extras]
    weights = [product.weight for product in spec.products]
    return [spec.x, *weights, *biases, *extras, *(operand.name for operand in spec.outputs)]


def _block(spec: LinearSpec) -> int:
    unit = all(product.unit for product in spec.products)
    return min(ALONG_INNER if unit else ALONG_COLUMNS, max(1, spec.columns))


class _Printer:
    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec
        self.block = _block(spec)
        self.piece = max(1, min(spec.inner, PIECE // (4 * spec.few)))
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
            *(f"float sum{number}[{spec.few}][{block + 4}];" for number in range(len(spec.products))),
            *(f"memset(sum{number}, 0, sizeof sum{number});" for number in range(len(spec.products))),
            f"for (int64_t start = 0; start < {spec.inner}; start += {self.piece}) {{",
            *(f"    {line}" for line in self._piece()),
            "}",
            *self._epilogue(),
        ]
        lines += ["for (int64_t unit = begin; unit < end; unit++) {", *(f"    {line}" for line in body), "}"]
        head = f"void {name}(void *const *operands, const int64_t *numbers, int64_t begin, int64_t end) {{"
        return "\n".join([head, *(f"    {line}" for line in lines), "}", ""])

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
            lines += self._along_inner(number) if product.unit else self._along_columns(number, product)
        return lines

    def _along_inner(self, number: int) -> list[str]:
        """A few columns at a time, in one sweep over the piece."""
        spec, kind, index = self.spec, c_print.MEMORY[self.dtype], 1 + number
        side = max(1, min(4, ACCUMULATORS // spec.few))
        column = f"(const {kind} *)operands[{index}] + (first + (n + {{0}} < count ? n + {{0}} : n)) * s{index} + start"
        loads = f"lanes_{c_print.HALVES.get(self.dtype, 'float')}"

        def multiplied(column: int, weight: str) -> list[str]:
            lines = [f"const lanes w = {loads}({weight});"]
            return lines + [f"a{column}_{m} += w * x{m};" for m in range(spec.few)]

        body = [f"const lanes x{m} = lanes_float(&x[{m}][k]);" for m in range(spec.few)]
        last = list(body)
        # The columns after these: the hardware takes each row of the weight for a new stream.
        body += [f"__builtin_prefetch(w{r} + {side} * s{index} + k, 0, 2);" for r in range(side)]
        for r in range(side):
            body += ["{", *(f"    {line}" for line in multiplied(r, f"w{r} + k")), "}"]
            last += ["{", f"    memcpy(tail, w{r} + k, (length - k) * sizeof *tail);"]
            last += [*(f"    {line}" for line in multiplied(r, "tail")), "}"]
        sums = [f"sum{number}[{m}][n + {r}] += lanes_sum(a{r}_{m});" for r in range(side) for m in range(spec.few)]
        return [
            f"for (int64_t n = 0; n < count; n += {side}) {{",
            *(f"    const {kind} *const w{r} = {column.format(r)};" for r in range(side)),
            *(f"    lanes a{r}_{m} = {{0}};" for r in range(side) for m in range(spec.few)),
            "    int64_t k = 0;",
            "    for (; k + LANES <= length; k += LANES) {",
            *(f"        {line}" for line in body),
            "    }",
            "    if (k < length) {",
            f"        {kind} tail[LANES] = {{0}};",
            *(f"        {line}" for line in last),
            "    }",
            *(f"    {line}" for line in sums),
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
            *(f"        sum{number}[{m}][n] += value * x[{m}][k];" for m in range(spec.few)),
            "    }",
            "}",
        ]

    def _epilogue(self) -> list[str]:
        """What follows the products, element by element."""
        spec = self.spec
        index = 1 + len(spec.products)
        body = []
        for number, product in enumerate(spec.products):
            value = f"sum{number}[m][n]"
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
