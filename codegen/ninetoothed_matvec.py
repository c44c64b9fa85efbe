"""A `MatvecSpec` as a ninetoothed arrangement and application.

A block computes a few columns of the result. With one or two rows its warps lie side by side along K: each thread loads
16 bytes of every one of these rows of the weight, multiplies them with the same 16 bytes of the input, and adds up in
float32; the warps' sums are added once, after the loop. So the bytes in flight do not depend on the number of columns,
and K need not be split over blocks. With more rows the tensor cores multiply, on weights that are loaded ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from graph_capture.codegen.matvec import MatvecSpec
from graph_capture.codegen.ninetoothed_host import Program
from graph_capture.codegen.ninetoothed_rows import print_number, print_statement

WIDTH = 16  # bytes of a load
MANY = 2112  # columns that give each multiprocessor of an H100 a block of 16


@dataclass(frozen=True)
class Blocks:
    """How a product is cut.

    Attributes:
        rows: that are multiplied at a time: 1, or 16 by tensor cores, however many there are.
        columns: of the result, for each block.
        inner: elements of K that are multiplied at a time.
        width: neighbours along the weight's fast dimension that one thread loads.
        warps: that work on one block.
        stages: steps along K that are loaded ahead of the tensor cores.
    """

    rows: int
    columns: int
    inner: int
    width: int
    warps: int
    stages: int = 1


def choose_blocks(spec: MatvecSpec, interpreted: bool) -> Blocks:
    """What measured fastest at Llama-3-8B's shapes on an H100; the interpreter wants few blocks."""
    width = WIDTH // spec.dtype.itemsize
    along_k, along_n = _power(spec.inner), _power(spec.columns)
    dot = spec.rows > 2 and spec.columns >= MANY and width == 8
    if interpreted:
        inner = max(16, min(along_k, 4096))
        return Blocks(16 if dot else 1, max(16, min(along_n, 65536 // inner)), inner, width, 4)
    if dot:
        return Blocks(16, 16, min(max(16, along_k), 256), width, 1, 4 if len(spec.products) == 1 else 3)
    if not all(product.unit for product in spec.products):
        return Blocks(1, min(along_n, 64), min(along_k, 32), width, 4)
    warp = 32 * width  # elements of K
    if spec.rows == 1:
        columns, warps, inner = 2, 8, 8 * warp
    elif spec.rows == 2:
        columns, warps, inner = 2, 4, 8 * warp
    else:
        columns, warps, inner = 2 if spec.rows <= 4 else 4, 4, 4 * warp
    inner = min(inner, max(warp, along_k))
    return Blocks(1, min(along_n, columns), inner, width, min(warps, inner // warp))


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def program(spec: MatvecSpec, interpreted: bool) -> Program:
    """The program of a spec."""
    printer = _Printer(spec, choose_blocks(spec, interpreted), interpreted)
    extras, outputs = ([operand.dtype for operand in operands] for operands in (spec.extras, spec.outputs))
    biases = [product for product in spec.products if product.bias]
    products = [spec.dtype] * (1 + len(spec.products) + len(biases))
    rows = [spec.inner % 16 == 0] + [(spec.inner if p.unit else spec.columns) % 16 == 0 for p in spec.products]
    others = [spec.columns % 16 == 0] * (len(biases) + len(extras) + len(outputs))
    return Program(
        printer.source(),
        (2,) * (len(products) + len(extras) + len(outputs)),
        (*products, *extras, *outputs),
        (*rows, *others),
        printer.blocks.warps,
        printer.blocks.stages,
        other=0 if spec.inner % printer.blocks.inner else None,
    )


def views(spec: MatvecSpec, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The operands of the launch: matrices whose last dimension is the fast one."""
    seen = spec.matrices(tensors)
    weights = [w if p.unit else w.t() for p, w in zip(spec.products, seen["weights"], strict=True)]
    return [[*seen["x"], *weights, *(bias[None] for bias in seen["biases"]), *seen["extras"], *seen["outputs"]]]


class _Printer:
    def __init__(self, spec: MatvecSpec, blocks: Blocks, interpreted: bool) -> None:
        self.spec, self.blocks, self.interpreted = spec, blocks, interpreted
        self.steps = -(-spec.inner // blocks.inner)
        self.groups = -(-spec.rows // blocks.rows)  # of rows
        self.weights = [f"weight{index}" for index in range(len(spec.products))]
        self.biases = {p.target: f"bias{index}" for index, p in enumerate(spec.products) if p.bias}
        self.extras = [f"extra{index}" for index in range(len(spec.extras))]
        self.outputs = [f"out{index}" for index in range(len(spec.outputs))]

    def source(self) -> str:
        """The module that ninetoothed compiles."""
        parameters = ", ".join(("x", *self.weights, *self.biases.values(), *self.extras, *self.outputs))
        lines = ["import ninetoothed.language as ntl", "", ""]
        lines += [f"def arrangement({parameters}):", *(f"    {line}" for line in self._arrangement()), "", ""]
        lines += [f"def application({parameters}):", *(f"    {line}" for line in self._application())]
        return "\n".join(lines) + "\n"

    # --- the arrangement

    def _arrangement(self) -> list[str]:
        """One block for each tile of columns; within it, x and the weights in steps along K."""
        spec, blocks = self.spec, self.blocks
        grid = -(-spec.columns // blocks.columns)
        lines = [
            f"x.shape = ({spec.rows}, {spec.inner})",
            f"x_tiles = x.tile(({blocks.rows}, {blocks.inner})).tile(({self.groups}, -1)).expand(({grid}, -1))",
        ]
        for name, product in zip(self.weights, spec.products, strict=True):
            if product.unit:
                lines += [
                    f"{name}.shape = ({spec.columns}, {spec.inner})",
                    f"{name}_tiles = {name}.tile(({blocks.columns}, {blocks.inner})).tile((1, -1))",
                    f"{name}_tiles.dtype = {name}_tiles.dtype.squeeze(0)",
                ]
            else:
                lines += [
                    f"{name}.shape = ({spec.inner}, {spec.columns})",
                    f"{name}_tiles = {name}.tile(({blocks.inner}, {blocks.columns})).tile((-1, 1)).permute((1, 0))",
                    f"{name}_tiles.dtype = {name}_tiles.dtype.squeeze(1)",
                ]
        lines += [line for name in self.biases.values() for line in self._tiles(name, (False, True), grid)]
        for name, operand in zip(self.extras, spec.extras, strict=True):
            lines += self._tiles(name, operand.over, grid)
        lines += [line for name in self.outputs for line in self._tiles(name, (True, True), grid)]
        names = ("x", *self.weights, *self.biases.values(), *self.extras, *self.outputs)
        return [*lines, "return (", *(f"    {name}_tiles," for name in names), ")"]

    def _tiles(self, name: str, over: Sequence[bool], grid: int) -> list[str]:
        """An operand of the epilogue: groups of rows in each block."""
        blocks = self.blocks
        shape = (self.spec.rows if over[0] else 1, self.spec.columns if over[1] else 1)
        tile = (blocks.rows if over[0] else 1, blocks.columns if over[1] else 1)
        lines = [
            f"{name}.shape = {shape}",
            f"{name}_tiles = {name}.tile({tile}).tile(({self.groups if over[0] else 1}, 1)).permute((1, 0))",
            f"{name}_tiles.dtype = {name}_tiles.dtype.squeeze(1)",
        ]
        return lines if over[1] else [*lines, f"{name}_tiles = {name}_tiles.expand(({grid}, -1))"]

    # --- the application

    def _application(self) -> list[str]:
        products, groups = range(len(self.spec.products)), range(self.groups)
        lines = [
            f"sum{index}_{group} = ntl.full({self._partial(index)}, 0.0, dtype=ntl.float32)"
            for index in products
            for group in groups
        ]
        if self.blocks.rows > 1:
            body = [f"sum{index}_0 = {self._dot(index)}" for index in products]
        else:
            body = [f"tile{index} = ntl.cast(weight{index}[step], ntl.float32)" for index in products]
            for group in groups:
                body.append(f"row = ntl.cast(x[{group}, step], ntl.float32)")
                body += [f"sum{index}_{group} += {self._multiplied(index)}" for index in products]
        lines += [f"for step in range({self.steps}):", *(f"    {line}" for line in body)]
        for group in groups:
            lines += self._epilogue(group)
        return lines

    def _partial(self, index: int) -> tuple[int, int]:
        """The shape of the sums that the loop carries."""
        blocks = self.blocks
        if blocks.rows > 1:
            return blocks.rows, blocks.columns
        if self.spec.products[index].unit:
            return blocks.columns, blocks.inner // blocks.width
        return blocks.inner, blocks.columns

    def _dot(self, index: int) -> str:
        left, right = "x[0, step]", f"weight{index}[step]"
        if self.interpreted:  # which takes bfloat16 for integers
            left, right = f"ntl.cast({left}, ntl.float32)", f"ntl.cast({right}, ntl.float32)"
        right = f"ntl.trans({right})" if self.spec.products[index].unit else right
        return f"ntl.dot({left}, {right}, sum{index}_0)"

    def _multiplied(self, index: int) -> str:
        """A step's products, already added up over what one thread has loaded."""
        blocks = self.blocks
        if not self.spec.products[index].unit:
            return f"tile{index} * ntl.trans(row)"
        apart = (blocks.columns, blocks.inner // blocks.width, blocks.width)
        return f"ntl.sum(ntl.reshape(tile{index} * row, {apart}), axis=2)"

    def _total(self, index: int, group: int) -> str:
        """A product of a group of rows, [rows, columns of a block]."""
        if self.blocks.rows > 1:
            return f"sum{index}_{group}"
        return f"ntl.sum(sum{index}_{group}, axis={1 if self.spec.products[index].unit else 0})[None, :]"

    def _epilogue(self, group: int) -> list[str]:
        """What follows the products, over [rows, columns of a block]."""
        spec = self.spec
        values: dict[str, str] = {}
        lines = []
        for index, product in enumerate(spec.products):
            values[product.target] = f"product{index}"
            total = self._total(index, group)
            if product.bias:
                total += f" + ntl.cast({self.biases[product.target]}[0], ntl.float32)"
            lines.append(f"product{index} = {total}")
        for name, operand in zip(self.extras, spec.extras, strict=True):
            values[operand.name] = f"{name}_value"
            lines.append(f"{name}_value = {name}[{group if operand.over[0] else 0}]")
        for statement in spec.statements:
            values[statement.target] = f"v{statement.target[1:]}"
            arguments = [values[a] if isinstance(a, str) else print_number(a) for a in statement.arguments]
            lines.append(f"{values[statement.target]} = {print_statement(statement, arguments)}")
        for name, stored in zip(self.outputs, spec.stores, strict=True):
            lines.append(f"{name}[{group}] = {values[stored]}")
        return lines
