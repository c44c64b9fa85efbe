"""A `RotarySpec` as a ninetoothed arrangement and application.

A block has one token and a group of heads, as many of each track as belong together. A cache is a list of its slots,
one of which is chosen by the position that the block reads. Halves of a head are operands of their own, so
that nothing moves between threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from graph_capture.codegen.ninetoothed.host import GeneratedProgram
from graph_capture.codegen.spec.rotary import RotarySpec, Track


def program(spec: RotarySpec, interpreted: bool) -> GeneratedProgram:
    """The program of a spec."""
    return _program(spec, *_cut(spec)[0])


def candidates(spec: RotarySpec, tensors: Sequence[torch.Tensor]) -> list[GeneratedProgram]:
    """Programs for any tensors; the first one executes the fewest instructions."""
    return [_program(spec, groups, warps) for groups, warps in _cut(spec)]


def _cut(spec: RotarySpec) -> list[tuple[int, int]]:
    """Groups of heads, and warps that work on one: as many as have 16 bytes a thread, or more."""
    least = min(track.heads for track in spec.tracks)
    alone = bool(spec.count) and spec.single
    groups = 1 if alone else max(1, min(least, least * spec.half // _swept(spec)))
    warps = max(1, min(8, min(_grouped(spec, groups)) * spec.half // _swept(spec)))
    ways = [(groups, warps), (1, 4), *([(1, 8)] if alone else [(groups, 4), (least, 2)])]
    return list(dict.fromkeys(ways))


def _swept(spec: RotarySpec) -> int:
    """Elements that a warp moves at once, 16 bytes a thread."""
    widest = max(operand.dtype.itemsize for operand in spec.outputs if operand.dtype.is_floating_point)
    return 32 * max(1, 16 // widest)


def _program(spec: RotarySpec, groups: int, warps: int) -> GeneratedProgram:
    printer = _RotaryProgram(spec, groups)
    dtypes = {operand.name: operand.dtype for operand in (*spec.inputs, *spec.outputs)}
    operands = list(_operands(spec))
    return GeneratedProgram(
        printer.source(),
        (4,) * len(operands),
        tuple(_real(dtypes.get(operand.tensor, torch.complex64)) for operand in operands),
        tuple(operand.tensor not in (*spec.positions, spec.count) and spec.width % 16 == 0 for operand in operands),
        warps=warps,
        light=True,
    )


def views(spec: RotarySpec, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The operands of the launch."""
    seen = spec.seen(tensors)
    launch = []
    for operand in _operands(spec):
        view = seen[operand.tensor]
        if operand.part is not None:
            parts = spec.table_parts if operand.tensor in (spec.cos, spec.sin) else spec.parts
            view = view if operand.part == _WHOLE else parts(view)[operand.part]
        launch.append(view)
    return [launch]


def after(spec: RotarySpec, tensors: Sequence[torch.Tensor]) -> Callable[[], Any] | None:
    """What follows the launch: a counter that several blocks read is added to when all are done."""
    if not spec.count or spec.single:
        return None
    names = [operand.name for operand in spec.inputs]
    counter = tensors[names.index(spec.count)]
    return lambda: counter.add_(spec.step)


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype is torch.complex64 else dtype


_WHOLE = 3  # after the first elements, the second ones, and the rest


class _Operand(NamedTuple):
    parameter: str  # of the program
    tensor: str  # that it is of
    part: int | None = None  # of the tensor's width


def _parts(spec: RotarySpec, track: Track) -> Sequence[int]:
    """The parts that a track's heads are taken in: whole, where they are only moved."""
    return range(3 if spec.rest else 2) if track.rotates or track.norm is not None else (_WHOLE,)


def _operands(spec: RotarySpec) -> Iterator[_Operand]:
    for number, track in enumerate(spec.tracks):
        yield from (_Operand(f"x{number}_{part}", track.source, part) for part in _parts(spec, track))
    for table, name in (("cos", spec.cos), ("sin", spec.sin)):
        yield from (_Operand(f"{table}_{part}", name, part) for part in range(1 if spec.half_tables else 2))
    for number, track in enumerate(spec.tracks):
        if track.norm is not None and track.norm.weight:
            yield from (_Operand(f"weight{number}_{part}", track.norm.weight, part) for part in _parts(spec, track))
    yield from (_Operand(f"position{number}", name) for number, name in enumerate(spec.positions))
    for number, track in enumerate(spec.tracks):
        yield from (_Operand(f"out{number}_{part}", track.target, part) for part in _parts(spec, track))
    if spec.count and spec.single:
        yield _Operand("counter", spec.count)


class _RotaryProgram:
    def __init__(self, spec: RotarySpec, groups: int) -> None:
        self.spec = spec
        self.sizes = [spec.half, spec.half, spec.rest, spec.width]
        self.blocks = [_power(size) for size in self.sizes]
        self.heads = _grouped(spec, groups)
        doubles = {operand.dtype for operand in spec.inputs} & {torch.float64}
        self.float = "float64" if doubles else "float32"

    def source(self) -> str:
        """The module that ninetoothed compiles."""
        parameters = ", ".join(operand.parameter for operand in _operands(self.spec))
        lines = ["import ninetoothed.language as ntl", "", ""]
        lines += [f"def arrangement({parameters}):", *(f"    {line}" for line in self._arrangement()), "", ""]
        lines += [f"def application({parameters}):", *(f"    {line}" for line in self._application())]
        return "\n".join(lines) + "\n"

    def _arrangement(self) -> list[str]:
        """The grid is batch x length x groups of heads; a cache's slots are a list inside.

        Batch and length are those of the first operand for all, so that places in the grid are computed once, and not
        at all where they are 1.
        """
        spec = self.spec
        first = next(_operands(spec)).parameter
        batch = "1" if spec.unbatched else f"{first}.shape[0]"
        length = "1" if spec.single else f"{first}.shape[1]"
        lines: list[str] = []
        tiles: list[str] = []
        for operand in _operands(spec):
            name, kind = operand.parameter, operand.parameter.rstrip("0123456789").split("_")[0].rstrip("0123456789")
            block = self.blocks[operand.part] if operand.part is not None else 1
            size = self.sizes[operand.part] if operand.part is not None else 1
            if kind in ("x", "out"):
                number = int(name.removeprefix(kind).split("_")[0])
                track, heads = spec.tracks[number], self.heads[number]
                slots = f"out{number}_{_parts(spec, track)[0]}.shape[1]" if kind == "out" and track.cached else length
                lines.append(f"{name}.shape = ({batch}, {slots}, {track.heads}, {size})")
                lines += self._tile(name, heads, block)
                tile = f"{name}_tile"
                if kind == "out" and track.cached:
                    lines.append(f"{name}_slots = {tile}.tile((1, -1, 1, 1)).expand((-1, grid[1], -1, -1))")
                    lines += [f"{name}_slots.dtype = {name}_slots.dtype.squeeze({dim})" for dim in (0, 1, 1)]
                    tile = f"{name}_slots"
            else:
                table, moves = kind in ("cos", "sin"), kind in ("cos", "sin", "position")
                lines.append(f"{name}.shape = ({batch if table else 1}, {length if moves else 1}, 1, {size})")
                lines += self._tile(name, 1, block)
                wide = ("-1" if table else "grid[0]", "-1" if moves else "grid[1]", "grid[2]", "-1")
                tile = f"{name}_tile.expand(({', '.join(wide)}))"
            if not tiles:
                lines.append(f"grid = {tile}.shape")
            tiles.append(tile)
        return [*lines, "return (", *(f"    {tile}," for tile in tiles), ")"]

    def _tile(self, name: str, heads: int, block: int) -> list[str]:
        """The tiles of an operand: heads x width, of one token."""
        return [
            f"{name}_tile = {name}.tile((1, 1, {heads}, {block}))",
            f"{name}_tile.dtype = {name}_tile.dtype.squeeze((0, 1))",
        ]

    def _application(self) -> list[str]:
        spec, lines = self.spec, []
        for operand in _operands(spec):  # each mention of a parameter is a load
            if not operand.parameter.startswith(("out", "position", "counter")) and operand.part != _WHOLE:
                lines.append(f"{operand.parameter}_value = ntl.cast({operand.parameter}, ntl.{self.float})")
        if spec.positions:
            lines.append("slot = " + " + ".join(f"position{number}" for number in range(len(spec.positions))))
        if spec.half_tables:
            lines += ["cos_1_value = cos_0_value", "sin_1_value = sin_0_value"]
        for number, track in enumerate(spec.tracks):
            lines += self._track(number, track)
        if spec.count and spec.single:
            position = f"position{spec.positions.index(spec.count)}"
            lines.append(f"counter = {position} + {spec.step}")
        return lines

    def _track(self, number: int, track: Track) -> list[str]:
        spec = self.spec
        parts = _parts(spec, track)
        values = [f"x{number}_{part}" + ("" if part == _WHOLE else "_value") for part in parts]
        lines = []
        if track.norm is not None:
            squares = [
                f"ntl.sum({self._inside(part, f'{value} * {value}')}, axis=1, keep_dims=True)"
                for part, value in zip(parts, values, strict=True)
            ]
            lines.append(f"scale{number} = ntl.rsqrt(({' + '.join(squares)}) / {spec.width} + {track.norm.eps!r})")
            for part, value in zip(parts, values, strict=True):
                lines.append(f"{value} = {value} * scale{number}")
                if track.norm.weight:
                    weight = f"weight{number}_{part}_value"
                    weight = f"({weight} + {track.norm.offset!r})" if track.norm.offset else weight
                    lines.append(f"{value} = {value} * {weight}")
        results = list(values)
        if track.rotates:
            results[0] = f"{values[0]} * cos_0_value - {values[1]} * sin_0_value"
            results[1] = f"{values[1]} * cos_1_value + {values[0]} * sin_1_value"
        for part, result in zip(parts, results, strict=True):
            if not track.cached:
                lines.append(f"out{number}_{part} = {result}")
                continue
            slot = "slot"
            if spec.wraps:
                slot = f"wrapped{number}"
                lines.append(f"{slot} = ntl.where(slot < 0, slot + out{number}_{part}.shape[0], slot)")
            lines.append(f"out{number}_{part}[{slot}] = {result}")
        return lines

    def _inside(self, part: int, value: str) -> str:
        """`value`, with 0 in the place of padding."""
        if self.blocks[part] == self.sizes[part]:
            return value
        columns = f"ntl.arange(0, {self.blocks[part]})[None, :]"
        return f"ntl.where({columns} < {self.sizes[part]}, {value}, 0.0)"


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()


def _grouped(spec: RotarySpec, groups: int) -> list[int]:
    """The heads of each track in one of `groups` groups; all in one group where they do not divide."""
    heads = [track.heads for track in spec.tracks]
    sizes = [_power(math.ceil(count / groups)) for count in heads]
    if any(math.ceil(count / size) != groups for count, size in zip(heads, sizes, strict=True)):
        return [_power(count) for count in heads]
    return sizes
