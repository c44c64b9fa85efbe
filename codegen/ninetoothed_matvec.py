"""A `MatvecSpec` as a ninetoothed arrangement and application.

A block computes a few columns of the result. Its warps lie side by side along K: each thread loads 16 bytes of every
one of these rows of the weight, multiplies them with the same 16 bytes of the input, and adds up in float32; the
warps' sums are added once, after the loop. So the bytes in flight do not depend on the number of columns, and K need
not be split over blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from graph_capture.codegen.matvec import MatvecSpec
from graph_capture.codegen.ninetoothed_host import Program
from graph_capture.codegen.ninetoothed_rows import print_number, print_statement

WIDTH = 16  # bytes of a load


@dataclass(frozen=True)
class Blocks:
    """How a product is cut.

    Attributes:
        columns: of the result, for each block.
        inner: elements of K that are multiplied at a time.
        width: neighbours along the weight's fast dimension that one thread loads.
        warps: that work on one block.
    """

    columns: int
    inner: int
    width: int
    warps: int


def choose_blocks(spec: MatvecSpec, interpreted: bool) -> Blocks:
    """Sizes that keep 16-byte loads and several of them in flight; the interpreter wants few blocks."""
    width = WIDTH // spec.dtype.itemsize
    along_k, along_n = _power(spec.inner), _power(spec.columns)
    if interpreted:
        inner = max(width, min(along_k, 4096))
        return Blocks(max(1, min(along_n, 65536 // inner)), inner, width, 4)
    if not all(product.unit for product in spec.products):
        return Blocks(min(along_n, 64), min(along_k, 32), width, 4)
    warps = min(4, max(1, along_k // (32 * width)))
    columns = 2 if len(spec.products) > 1 or spec.rows > 4 else 4
    return Blocks(min(along_n, columns), 32 * width * warps, width, warps)


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def program(spec: MatvecSpec, interpreted: bool) -> Program:
    """The program of a spec."""
    printer = _Printer(spec, choose_blocks(spec, interpreted))
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
        other=0 if printer.padded else None,
    )


def views(spec: MatvecSpec, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The operands of the launch: matrices whose last dimension is the fast one."""
    seen = spec.matrices(tensors)
    weights = [w if p.unit else w.t() for p, w in zip(spec.products, seen["weights"], strict=True)]
    return [[*seen["x"], *weights, *(bias[None] for bias in seen["biases"]), *seen["extras"], *seen["outputs"]]]


class _Printer:
    def __init__(self, spec: MatvecSpec, blocks: Blocks) -> None:
        self.spec, self.blocks = spec, blocks
        self.padded = spec.inner % blocks.inner != 0
        self.steps = -(-spec.inner // blocks.inner)
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

    def _arrangement(self) -> list[str]:
        """One block for each tile of columns; within it, x and the weights in steps along K."""
        spec, blocks = self.spec, self.blocks
        grid = -(-spec.columns // blocks.columns)
        lines = [
            f"x.shape = ({spec.rows}, {spec.inner})",
            f"x_tiles = x.tile((1, {blocks.inner})).tile(({spec.rows}, -1)).expand(({grid}, -1))",
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
        biases = [(name, (False, True)) for name in self.biases.values()]
        extras = [(name, operand.over) for name, operand in zip(self.extras, spec.extras, strict=True)]
        outputs = [(name, (True, True)) for name in self.outputs]
        for name, over in (*biases, *extras, *outputs):
            height, width = spec.rows if over[0] else 1, spec.columns if over[1] else 1
            tile = blocks.columns if over[1] else 1
            lines += [
                f"{name}.shape = ({height}, {width})",
                f"{name}_tiles = {name}.tile((1, {tile})).tile(({height}, 1)).permute((1, 0))",
                f"{name}_tiles.dtype = {name}_tiles.dtype.squeeze(1)",
            ]
            if not over[1]:
                lines.append(f"{name}_tiles = {name}_tiles.expand(({grid}, -1))")
        names = ("x", *self.weights, *self.biases.values(), *self.extras, *self.outputs)
        return [*lines, "return (", *(f"    {name}_tiles," for name in names), ")"]

    def _application(self) -> list[str]:
        spec, blocks = self.spec, self.blocks
        count = range(len(spec.products))
        lines, body = [], []
        for index in count:
            partial = (blocks.columns, blocks.inner // blocks.width)
            shape = partial if spec.products[index].unit else (blocks.inner, blocks.columns)
            lines += [f"sum{index}_{row} = ntl.full({shape}, 0.0, dtype=ntl.float32)" for row in range(spec.rows)]
            body.append(f"tile{index} = ntl.cast(weight{index}[step], ntl.float32)")
        for row in range(spec.rows):
            body.append(f"row = ntl.cast(x[{row}, step], ntl.float32)")
            body += [f"sum{index}_{row} += {self._multiplied(index)}" for index in count]
        lines += [f"for step in range({self.steps}):", *(f"    {line}" for line in body)]
        for row in range(spec.rows):
            lines += self._epilogue(row)
        return lines

    def _multiplied(self, index: int) -> str:
        """A step's products, already added up over what one thread has loaded."""
        blocks = self.blocks
        if not self.spec.products[index].unit:
            return f"tile{index} * ntl.trans(row)"
        apart = (blocks.columns, blocks.inner // blocks.width, blocks.width)
        return f"ntl.sum(ntl.reshape(tile{index} * row, {apart}), axis=2)"

    def _epilogue(self, row: int) -> list[str]:
        """The rest of one row, over [1, columns of a block]."""
        spec = self.spec
        values: dict[str, str] = {}
        lines = []
        for index, product in enumerate(spec.products):
            values[product.target] = f"product{index}"
            total = f"ntl.sum(sum{index}_{row}, axis={1 if product.unit else 0})[None, :]"
            if product.bias:
                total += f" + ntl.cast({self.biases[product.target]}[0], ntl.float32)"
            lines.append(f"product{index} = {total}")
        for name, operand in zip(self.extras, spec.extras, strict=True):
            values[operand.name] = f"{name}_value"
            lines.append(f"{name}_value = {name}[{row if operand.over[0] else 0}]")
        for statement in spec.statements:
            values[statement.target] = f"v{statement.target[1:]}"
            arguments = [values[a] if isinstance(a, str) else print_number(a) for a in statement.arguments]
            lines.append(f"{values[statement.target]} = {print_statement(statement, arguments)}")
        for name, stored in zip(self.outputs, spec.stores, strict=True):
            lines.append(f"{name}[{row}] = {values[stored]}")
        return lines
