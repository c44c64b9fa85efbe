"""A `KernelSpec` as a ninetoothed arrangement and application.

One block holds elements of a flat kernel, or a few whole rows; a row that is too long for one is swept over in blocks,
once for each stage of its reductions. Block sizes are explicit powers of two.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from graph_capture.codegen.ninetoothed.host import GeneratedProgram
from graph_capture.codegen.ninetoothed.printing import print_arguments, print_number, print_statement
from graph_capture.codegen.spec.geometry import Geometry
from graph_capture.codegen.spec.kernel import INDEX, REDUCTIONS, KernelSpec, Operand, Statement

MAX_BLOCK = 32768  # elements of a row that one block holds
SWEEP = 4096  # elements of a longer row that are held at a time
FAR = 2**31 - 2**20  # offsets from here on do not fit 32 bits
IDENTITY = {"sum": 0.0, "mean": 0.0, "max": -math.inf, "min": math.inf}


@dataclass(frozen=True)
class RowBlocks:
    """How the iteration space is cut: rows x columns of a block, the warps that work on one, and whether it sweeps."""

    rows: int
    columns: int
    warps: int
    sweeps: bool = False

    def with_warps(self, least: int, enough: bool) -> RowBlocks:
        """No more warps than have 16 bytes a thread to move, unless there are `enough`."""
        return self if enough else replace(self, warps=max(1, min(self.warps, self.rows * self.columns // least)))


def choose_blocks(spec: KernelSpec, interpreted: bool, elements: int | None = None) -> RowBlocks:
    """Sizes that keep 16-byte accesses and a few thousand elements a block; the interpreter wants few blocks.

    With few `elements` (None: many) blocks are smaller, so that there are some for every multiprocessor.
    """
    least = _least(spec)
    if spec.columns is None:
        most = 65536 if interpreted else 8 * least
        return RowBlocks(1, most if interpreted else _enough(least, most, elements), 4).with_warps(least, interpreted)
    row = max(1, 1 << (spec.columns - 1).bit_length())
    if spec.reduces and row > MAX_BLOCK:
        return RowBlocks(1, SWEEP, 8, sweeps=True)
    most = 65536 if interpreted else _enough(least, 1024, elements)
    columns = row if spec.reduces or interpreted else min(row, most)
    rows = max(1, most // columns)
    return RowBlocks(rows, columns, min(16, max(4, rows * columns // 512))).with_warps(
        least, interpreted or spec.reduces
    )


def _least(spec: KernelSpec) -> int:
    """Elements that one warp moves at once."""
    return 32 * (4 if max(operand.dtype.itemsize for operand in spec.operands) > 2 else 8)


def _enough(least: int, most: int, elements: int | None) -> int:
    """The largest block of which there are four for each multiprocessor."""
    if elements is None:
        return most
    while most > least and elements < most * 4 * _multiprocessors():
        most //= 2
    return most


@cache
def _multiprocessors() -> int:
    """Of the GPU that is there, or of an H100."""
    return torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132


def program(spec: KernelSpec, interpreted: bool) -> GeneratedProgram:
    """The program of a spec."""
    return _program(spec, choose_blocks(spec, interpreted))


def candidates(spec: KernelSpec, tensors: Sequence[torch.Tensor]) -> list[GeneratedProgram]:
    """Programs for tensors (inputs, then outputs) of this size, at most four; first what `choose_blocks` takes."""
    blocks = choose_blocks(spec, False, spec.geometry(tensors).elements)
    return [_program(spec, each) for each in list(dict.fromkeys([blocks, *_variations(spec, blocks)]))[:4]]


def _variations(spec: KernelSpec, blocks: RowBlocks) -> list[RowBlocks]:
    """Other sizes that are worth a measurement, the most promising first."""
    least = _least(spec)
    more, fewer = (replace(blocks, warps=warps) for warps in (min(32, blocks.warps * 2), max(1, blocks.warps // 2)))
    if spec.reduces:
        row = max(1, 1 << ((spec.columns or 1) - 1).bit_length())
        if blocks.sweeps:
            return [more, replace(blocks, columns=blocks.columns // 2), replace(blocks, columns=blocks.columns * 2)]
        step = min(SWEEP, row // 2)
        sweep = RowBlocks(1, step, min(16, max(4, step // least)), sweeps=True)
        return [more, fewer, *([sweep] if row > SWEEP else [])]
    if blocks.rows * blocks.columns <= least:  # little work: the less each thread has of it, the sooner it is done
        sizes = ((blocks.columns // 2, 1), (2 * blocks.columns, 4), (4 * blocks.columns, 4))
        return [replace(blocks, columns=max(1, columns), warps=warps) for columns, warps in sizes]
    smaller = replace(blocks, columns=blocks.columns // 2) if blocks.columns >= 2 * least else blocks
    fits = spec.columns is None or blocks.columns < spec.columns
    larger = replace(blocks, columns=blocks.columns * 2) if fits else blocks
    return [each.with_warps(least, False) for each in (smaller, more, larger)]


def _program(spec: KernelSpec, blocks: RowBlocks) -> GeneratedProgram:
    rank = len(spec.operands[0].over)
    aligned = tuple(operand.over[-1] and (spec.columns or 16) % 16 == 0 for operand in spec.operands)
    return GeneratedProgram(
        print_source(spec, blocks),
        (rank,) * len(spec.operands),
        tuple(operand.dtype for operand in spec.operands),
        aligned,
        blocks.warps,
        light=True,
    )


def views(spec: KernelSpec, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The operands of each launch: views of `tensors` over the iteration space, cut where offsets pass 32 bits."""
    geometry = spec.geometry(tensors)
    launches = []
    for offsets, sizes in _near(geometry):
        launch = []
        for operand, tensor, steps, offset in zip(spec.operands, tensors, geometry.strides, offsets, strict=True):
            shape = [size if over else 1 for size, over in zip(sizes, operand.over, strict=True)]
            launch.append(tensor.as_strided(shape, steps, tensor.storage_offset() + offset))
        launches.append(launch)
    return launches


def _near(geometry: Geometry) -> list[tuple[list[int], list[int]]]:
    """The space in pieces (offset of each operand, sizes) within which no operand reaches too far."""
    pending = [([0] * len(geometry.strides), list(geometry.sizes))]
    done = []
    while pending:
        offsets, sizes = pending.pop()
        reach = max(
            sum(step * (size - 1) for step, size in zip(steps, sizes, strict=True)) for steps in geometry.strides
        )
        cut = next((dim for dim, size in enumerate(sizes[:-1] or sizes) if size > 1), None)
        if reach < FAR or cut is None:
            done.append((offsets, sizes))
            continue
        half = sizes[cut] // 2
        half -= half % 16 if half > 16 else 0  # keeps addresses aligned
        moved = [offset + half * steps[cut] for offset, steps in zip(offsets, geometry.strides, strict=True)]
        for start, size in ((moved, sizes[cut] - half), (offsets, half)):
            pending.append((start, [*sizes[:cut], size, *sizes[cut + 1 :]]))
    return done


# --- source


def print_source(spec: KernelSpec, blocks: RowBlocks) -> str:
    """The module that ninetoothed compiles: an arrangement and an application."""
    names = operand_names(spec.inputs, spec.outputs)
    parameters = ", ".join(names.values())
    printer = _ProgramPrinter(spec, blocks, names)
    lines = ["import ninetoothed.language as ntl", "", ""]
    lines += [f"def arrangement({parameters}):", *(f"    {line}" for line in printer.arrangement()), "", ""]
    body = printer.sweeping() if blocks.sweeps else printer.application()
    lines += [f"def application({parameters}):", *(f"    {line}" for line in body)]
    return "\n".join(lines) + "\n"


def operand_names(inputs: Sequence[Operand], outputs: Sequence[Operand]) -> dict[str, str]:
    """Operand names as identifiers that collide with nothing in the module (ninetoothed's renaming is textual)."""
    names: dict[str, str] = {}
    reserved = (
        r"v\d+.*|ntl|inside|grid|index|step|.*_(value|tiles|grid)|.*(application|arrangement|ninetoothed|triton).*"
    )
    for prefix, operands in (("x", inputs), ("out", outputs)):
        for index, operand in enumerate(operands):
            name = operand.name
            usable = re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,39}", name) and not keyword.iskeyword(name)
            free = not re.fullmatch(reserved, name) and name not in names.values()
            names[name] = name if usable and free else f"{prefix}{index}"
            while list(names.values()).count(names[name]) > 1:
                names[name] += "_"
    return names


def _carriers(spec: KernelSpec) -> list[Operand]:
    """For each dimension of the iteration space an operand that moves along it.

    It is the same for all where one moves along all, so that places in the grid are computed once.
    """
    full = max(spec.operands, key=lambda operand: sum(operand.over))
    found = []
    for dim in range(len(full.over)):
        moving = [operand for operand in (full, *spec.operands) if operand.over[dim]]
        found.append(moving[0] if moving else full)
    return found


class _ProgramPrinter:
    def __init__(self, spec: KernelSpec, blocks: RowBlocks, names: Mapping[str, str]) -> None:
        self.spec, self.blocks, self.names = spec, blocks, names
        self.padded = spec.columns is not None and spec.columns % blocks.columns != 0
        self.values: dict[str, str] = {}  # variable -> what it is called

    # --- the arrangement

    def arrangement(self) -> list[str]:
        """Every operand in tiles over one grid."""
        spec, blocks = self.spec, self.blocks
        rank = len(spec.operands[0].over)
        block = [blocks.columns] if spec.columns is None else [*[1] * (rank - 2), blocks.rows, blocks.columns]
        carriers = _carriers(spec)
        names = [self.names[carrier.name] for carrier in carriers]
        lines, tiles = [], []
        for operand in spec.operands:
            name = self.names[operand.name]
            shape = [f"{names[dim]}.shape[{dim}]" if over else "1" for dim, over in enumerate(operand.over)]
            if spec.columns is not None and operand.over[-1]:
                shape[-1] = str(spec.columns)
            if shape != [f"{name}.shape[{dim}]" for dim in range(rank)]:
                lines.append(f"{name}.shape = ({', '.join(shape)},)")
        grids = dict[str, str]()  # of each carrier: how many blocks it has along each dimension
        for name, carrier in dict(zip(names, carriers, strict=True)).items():
            tile = ", ".join(str(size) if over else "1" for size, over in zip(block, carrier.over, strict=True))
            form = f"{name}.tile(({tile},))"
            if blocks.sweeps:
                form += f".tile(({'1, ' * (rank - 1)}-1))"
            grids[name] = f"{name}_grid" if len(set(names)) > 1 else "grid"
            lines.append(f"{grids[name]} = {form}.shape")
        if len(grids) > 1:
            lines.append(f"grid = ({', '.join(f'{grids[name]}[{dim}]' for dim, name in enumerate(names))},)")
        for operand in spec.operands:
            sizes = ", ".join(str(size) if over else "1" for size, over in zip(block, operand.over, strict=True))
            form = f"{self.names[operand.name]}.tile(({sizes},))"
            if blocks.sweeps:
                form += f".tile(({'1, ' * (rank - 1)}-1))"
            if not all(operand.over[:-1] if blocks.sweeps else operand.over):
                moves = operand.over[:-1] + (True,) if blocks.sweeps else operand.over
                wide = ", ".join("-1" if over else f"grid[{dim}]" for dim, over in enumerate(moves))
                form += f".expand(({wide},))"
            if blocks.sweeps:
                tiles.append(f"{self.names[operand.name]}_tiles")
                lines.append(f"{tiles[-1]} = {form}")
                for _ in range(rank - 1):
                    lines.append(f"{tiles[-1]}.dtype = {tiles[-1]}.dtype.squeeze(0)")
            else:
                tiles.append(form)
        return [*lines, "return (", *(f"    {tile}," for tile in tiles), ")"]

    # --- the application

    def application(self) -> list[str]:
        """Each element once: a block holds whole rows."""
        spec = self.spec
        lines = []
        for operand in spec.inputs:  # each mention of a parameter is a load
            self.values[operand.name] = f"{self.names[operand.name]}_value"
            lines.append(f"{self.values[operand.name]} = {self.names[operand.name]}")
        uses_index = any(statement.function == INDEX for statement in spec.statements)
        if uses_index or (self.padded and spec.reduces):
            lines.append(f"index = {self._spread(f'ntl.arange(0, {self.blocks.columns})')}")
        if self.padded and spec.reduces:
            lines.append(f"inside = index < {spec.columns}")
        for statement in spec.statements:
            lines.append(self._assign(statement, self._reduced(statement)))
        for operand, stored in zip(spec.outputs, spec.stores, strict=True):
            lines.append(f"{self.names[operand.name]} = {self.values[stored]}")
        return lines

    def sweeping(self) -> list[str]:
        """A row in blocks, swept over once for each stage of reductions; what is per row stays in registers."""
        spec, columns = self.spec, self.blocks.columns
        lines = []
        for operand in spec.inputs:
            if operand.per_row:
                self.values[operand.name] = f"{self.names[operand.name]}_value"
                lines.append(f"{self.values[operand.name]} = {self.names[operand.name]}[0]")
        anchor = next(operand for operand in spec.operands if not operand.per_row)
        shape = f"({'1, ' * (len(anchor.over) - 1)}{columns})"
        for number, sweep in enumerate(spec.passes):
            lines += [self._assign(statement) for statement in sweep.row]
            sums = {s.target: f"v{s.target[1:]}_{s.function}" for s in sweep.reductions}
            for statement in sweep.reductions:
                start = print_number(IDENTITY[statement.function])
                dtype = str(statement.dtype).removeprefix("torch.")
                lines.append(f"{sums[statement.target]} = ntl.full({shape}, {start}, dtype=ntl.{dtype})")
            body = [f"index = {self._spread(f'(ntl.arange(0, {columns}) + step * {columns})')}"]
            body.append(f"inside = index < {spec.columns}")
            wanted = {a for s in (*sweep.element, *sweep.reductions) for a in s.arguments if isinstance(a, str)}
            last = number == len(spec.passes) - 1
            wanted |= set(spec.stores) if last else set()
            for operand in spec.inputs:
                if operand.name in wanted and not operand.per_row:
                    self.values[operand.name] = f"{self.names[operand.name]}_value"
                    body.append(f"{self.values[operand.name]} = {self.names[operand.name]}[step]")
            body += [self._assign(statement) for statement in sweep.element]
            for statement in sweep.reductions:
                body.append(f"{sums[statement.target]} = {self._accumulated(sums[statement.target], statement)}")
            if last:
                for operand, stored in zip(spec.outputs, spec.stores, strict=True):
                    if not operand.per_row:
                        body.append(f"{self.names[operand.name]}[step] = {self.values[stored]}")
            if len(body) > 2:
                lines.append(f"for step in range({self.names[anchor.name]}.shape[0]):")
                lines += [f"    {line}" for line in body]
            for statement in sweep.reductions:
                self.values[statement.target] = f"v{statement.target[1:]}"
                lines.append(f"{self.values[statement.target]} = {self._total(statement, sums[statement.target])}")
        for operand, stored in zip(spec.outputs, spec.stores, strict=True):
            if operand.per_row:
                lines.append(f"{self.names[operand.name]}[0] = {self.values[stored]}")
        return lines

    def _spread(self, columns: str) -> str:
        """A vector over the columns, in the rank of a block."""
        rank = len(self.spec.operands[0].over)
        return columns if rank == 1 else f"{columns}[{'None, ' * (rank - 1)}:]"

    def _accumulated(self, total: str, statement: Statement) -> str:
        (value,) = self._arguments(statement)
        inner = f"ntl.where(inside, {value}, {print_number(IDENTITY[statement.function])})" if self.padded else value
        if statement.function in ("max", "min"):
            return f"ntl.{statement.function}imum({total}, {inner})"
        return f"{total} + {inner}"

    def _reduced(self, statement: Statement) -> str | None:
        """A reduction of what a block holds."""
        if statement.function not in REDUCTIONS:
            return None
        (value,) = self._arguments(statement)
        if statement.arguments[0] in self.spec.per_row:  # an operand that does not move along the columns
            return f"{value} * {float(self.spec.columns or 1)!r}" if statement.function == "sum" else value
        inner = f"ntl.where(inside, {value}, {print_number(IDENTITY[statement.function])})" if self.padded else value
        return self._total(statement, inner)

    def _total(self, statement: Statement, value: str) -> str:
        axis = len(self.spec.operands[0].over) - 1
        function = "sum" if statement.function == "mean" else statement.function
        reduced = f"ntl.{function}({value}, axis={axis}, keep_dims=True)"
        return f"{reduced} / {self.spec.columns}" if statement.function == "mean" else reduced

    # --- statements

    def _assign(self, statement: Statement, value: str | None = None) -> str:
        value = value or print_statement(statement, self._arguments(statement))
        self.values[statement.target] = f"v{statement.target[1:]}"
        return f"{self.values[statement.target]} = {value}"

    def _arguments(self, statement: Statement) -> list[str]:
        return print_arguments(statement, self.values)
