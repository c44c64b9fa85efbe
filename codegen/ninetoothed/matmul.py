"""A `LinearSpec` of more than two rows as a ninetoothed program: the tensor cores multiply.

A block computes a tile of the result, whose sums stay in registers until what follows the products is computed from
them. MatmulBlocks that share a tile of the weight run one after the other, so that the weight is read from memory once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graph_capture.codegen.ninetoothed.epilogue import LinearPrinter
from graph_capture.codegen.ninetoothed.matvec import power_of_two
from graph_capture.codegen.spec.linear import LinearSpec

MANY = 2112  # columns that give each multiprocessor of an H100 a block of 16


@dataclass(frozen=True)
class MatmulBlocks:
    """How a product is cut.

    Attributes:
        rows, columns: of the result, for each block.
        inner: elements of K that are multiplied at a time.
        warps: that work on one block.
        stages: steps along K that are loaded ahead.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


TILES = (  # up to so many rows: what measured fastest at Llama-3-8B's shapes on an H100, the most promising first
    (
        16,
        (
            MatmulBlocks(16, 16, 256, 2, 4),
            MatmulBlocks(16, 32, 256, 4, 3),
            MatmulBlocks(16, 64, 128, 4, 6),
            MatmulBlocks(16, 32, 512, 4, 3),
        ),
    ),
    (
        32,
        (
            MatmulBlocks(32, 32, 256, 4, 3),
            MatmulBlocks(32, 64, 128, 4, 3),
            MatmulBlocks(32, 32, 128, 4, 4),
            MatmulBlocks(32, 16, 256, 2, 3),
        ),
    ),
    (64, (MatmulBlocks(64, 64, 128, 4, 3), MatmulBlocks(64, 64, 64, 4, 5), MatmulBlocks(64, 32, 128, 4, 4))),
    (128, (MatmulBlocks(128, 64, 64, 8, 4), MatmulBlocks(128, 64, 128, 8, 3), MatmulBlocks(64, 128, 64, 4, 4))),
    (256, (MatmulBlocks(128, 128, 64, 8, 3), MatmulBlocks(128, 128, 64, 8, 4), MatmulBlocks(64, 128, 64, 4, 4))),
)


def fits(spec: LinearSpec) -> bool:
    """Whether this is the way to multiply."""
    few = spec.rows is not None and (spec.rows <= 2 or spec.columns < MANY)
    return spec.dtype.itemsize == 2 and not few


def choose_blocks(spec: LinearSpec, interpreted: bool, rows: int | None = None) -> list[MatmulBlocks]:
    """At most four, the most promising first, for so many `rows` (default: the spec's); the interpreter wants few."""
    along_k, along_n = max(16, power_of_two(spec.inner)), max(16, power_of_two(spec.columns))
    if interpreted:
        inner = min(along_k, 4096)
        return [MatmulBlocks(16 if spec.rows else 64, min(along_n, max(16, 65536 // inner)), inner, 4, 1)]
    rows = rows or spec.rows or 128
    tiles = next((tiles for most, tiles in TILES if rows <= most), TILES[-1][1])
    fitting = [replace(b, columns=min(b.columns, along_n), inner=min(b.inner, along_k)) for b in tiles]
    return list(dict.fromkeys(fitting))


class MatmulPrinter(LinearPrinter):
    """Prints a spec, cut in these blocks."""

    def __init__(self, spec: LinearSpec, blocks: MatmulBlocks, interpreted: bool) -> None:
        super().__init__(spec, interpreted)
        self.blocks = blocks

    def arrangement(self) -> list[str]:
        """Tiles of columns, and of rows within these; in each, x and the weights in steps along K."""
        spec, blocks = self.spec, self.blocks
        rows = "x.shape[0]" if spec.rows is None else str(spec.rows)
        columns = -(-spec.columns // blocks.columns)
        lines = [
            f"x.shape = ({rows}, {spec.inner})",
            f"x_tiles = x.tile(({blocks.rows}, {blocks.inner})).tile((1, -1)).permute((1, 0)).expand(({columns}, -1))",
            "x_tiles.dtype = x_tiles.dtype.squeeze(0)",
            "rows = x_tiles.shape[1]",
        ]
        lines += self.weight_tiles(blocks.columns, blocks.inner)
        lines += [f"{name}_tiles = {name}_tiles.expand((-1, rows))" for name in self.weights]
        return lines + [line for name, over in self.moves() for line in self._tiles(name, over, rows, columns)]

    def _tiles(self, name: str, over: Sequence[bool], rows: str, columns: int) -> list[str]:
        """An operand of the epilogue."""
        blocks = self.blocks
        shape = f"({rows if over[0] else 1}, {self.spec.columns if over[1] else 1})"
        tile = (blocks.rows if over[0] else 1, blocks.columns if over[1] else 1)
        wide = f"({-1 if over[1] else columns}, {-1 if over[0] else 'rows'})"
        return [f"{name}.shape = {shape}", f"{name}_tiles = {name}.tile({tile}).permute((1, 0)).expand({wide})"]

    def application(self) -> list[str]:
        """The products' sums, and what follows them."""
        spec, blocks = self.spec, self.blocks
        sums = [f"sum{index}" for index in range(len(spec.products))]
        lines = [f"{name} = ntl.full({blocks.rows, blocks.columns}, 0.0, dtype=ntl.float32)" for name in sums]
        lines.append(f"for step in range({-(-spec.inner // blocks.inner)}):")
        lines += [f"    {name} = {self._dot(index, name)}" for index, name in enumerate(sums)]
        return lines + self.epilogue(sums)

    def _dot(self, index: int, total: str) -> str:
        left, right = "x[step]", f"weight{index}[step]"
        if self.interpreted:  # which takes bfloat16 for integers
            left, right = f"ntl.cast({left}, ntl.float32)", f"ntl.cast({right}, ntl.float32)"
        right = f"ntl.trans({right})" if self.spec.products[index].unit else right
        return f"ntl.dot({left}, {right}, {total})"
