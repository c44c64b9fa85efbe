"""A `LinearSpec` of one or two rows (more, where the tensor cores do not fit) as a ninetoothed program.

A block computes a few columns of the result. Its warps lie side by side along K: each thread loads 16 bytes of every
one of these rows of the weight, multiplies them with the same 16 bytes of the input, and adds up in float32; the warps'
sums are added once, after the loop. So the bytes in flight do not depend on the number of columns, and K need not be
split over blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graph_capture.codegen.ninetoothed.epilogue import LinearPrinter
from graph_capture.codegen.spec.linear import LinearSpec

WIDTH = 16  # bytes of a load


@dataclass(frozen=True)
class MatvecBlocks:
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
    stages: int = 1


def choose_blocks(spec: LinearSpec, interpreted: bool) -> list[MatvecBlocks]:
    """What measured fastest at Llama-3-8B's shapes on an H100, the most promising first; the interpreter wants few."""
    width = WIDTH // spec.dtype.itemsize
    along_k, along_n = power_of_two(spec.inner), power_of_two(spec.columns)
    if interpreted:
        inner = max(16, min(along_k, 4096))
        return [MatvecBlocks(max(16, min(along_n, 65536 // inner)), inner, width, 4)]
    if not all(product.unit for product in spec.products):
        return [MatvecBlocks(min(along_n, 64), min(along_k, 32), width, 4)]
    warp = 32 * width  # elements of K
    if spec.few == 1:
        columns, steps, warps = 2, 8, [8]
    elif spec.few == 2:
        columns, steps, warps = 2, 8, [4, 8]
    else:
        columns, steps, warps = 2 if spec.few <= 4 else 4, 4, [4]
    inner = min(steps * warp, max(warp, along_k))
    found = [MatvecBlocks(min(along_n, columns), inner, width, min(count, inner // warp)) for count in warps]
    return list(dict.fromkeys(found))


def power_of_two(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


class MatvecPrinter(LinearPrinter):
    """Prints a spec, cut in these blocks."""

    def __init__(self, spec: LinearSpec, blocks: MatvecBlocks, interpreted: bool) -> None:
        super().__init__(spec, interpreted)
        self.blocks = blocks

    def arrangement(self) -> list[str]:
        """One block for each tile of columns; within it, all rows, and the weights in steps along K."""
        spec, blocks = self.spec, self.blocks
        grid = -(-spec.columns // blocks.columns)
        lines = [
            f"x.shape = ({spec.few}, {spec.inner})",
            f"x_tiles = x.tile((1, {blocks.inner})).tile(({spec.few}, -1)).expand(({grid}, -1))",
        ]
        lines += self.weight_tiles(blocks.columns, blocks.inner)
        return lines + [line for name, over in self.moves() for line in self._tiles(name, over, grid)]

    def _tiles(self, name: str, over: Sequence[bool], grid: int) -> list[str]:
        """An operand of the epilogue: rows in each block."""
        shape = (self.spec.few if over[0] else 1, self.spec.columns if over[1] else 1)
        tile = (1, self.blocks.columns if over[1] else 1)
        lines = [
            f"{name}.shape = {shape}",
            f"{name}_tiles = {name}.tile({tile}).tile(({shape[0]}, 1)).permute((1, 0))",
            f"{name}_tiles.dtype = {name}_tiles.dtype.squeeze(1)",
        ]
        return lines if over[1] else [*lines, f"{name}_tiles = {name}_tiles.expand(({grid}, -1))"]

    def application(self) -> list[str]:
        """The products' sums, and what follows them, row by row."""
        spec, products, rows = self.spec, range(len(self.spec.products)), range(self.spec.few)
        lines = [
            f"sum{index}_{row} = ntl.full({self._partial(index)}, 0.0, dtype=ntl.float32)"
            for index in products
            for row in rows
        ]
        lines.append(f"for step in range({-(-spec.inner // self.blocks.inner)}):")
        lines += [f"    tile{index} = ntl.cast(weight{index}[step], ntl.float32)" for index in products]
        for row in rows:
            lines.append(f"    row = ntl.cast(x[{row}, step], ntl.float32)")
            lines += [f"    sum{index}_{row} += {self._multiplied(index)}" for index in products]
        for row in rows:
            axes = [1 if product.unit else 0 for product in spec.products]
            totals = [f"ntl.sum(sum{index}_{row}, axis={axis})[None, :]" for index, axis in enumerate(axes)]
            lines += self.epilogue(totals, row)
        return lines

    def _partial(self, index: int) -> tuple[int, int]:
        """The shape of the sums that the loop carries."""
        blocks = self.blocks
        unit = self.spec.products[index].unit
        return (blocks.columns, blocks.inner // blocks.width) if unit else (blocks.inner, blocks.columns)

    def _multiplied(self, index: int) -> str:
        """A step's products, already added up over what one thread has loaded."""
        blocks = self.blocks
        if not self.spec.products[index].unit:
            return f"tile{index} * ntl.trans(row)"
        apart = (blocks.columns, blocks.inner // blocks.width, blocks.width)
        return f"ntl.sum(ntl.reshape(tile{index} * row, {apart}), axis=2)"
