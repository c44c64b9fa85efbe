"""A `KernelSpec` as a C function: loops over rows, and one loop over columns for each sweep.

The columns are walked through by a loop that the compiler vectorises. What a later sweep needs of an earlier one is
kept in a buffer on the stack where it costs more than reading it again. Results go through buffers as well, a piece of
a row at a time: so they are rounded by instructions that compilers do not find, and large ones written past the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from graph_capture.codegen.c import lanes as c_lanes
from graph_capture.codegen.c import printing as c_print
from graph_capture.codegen.c.host import Layout, Place, reach
from graph_capture.codegen.c.sweeps import WIDE, Sweeps
from graph_capture.codegen.spec.kernel import INDEX, KernelSpec, Operand, Statement

FLAT = 1024  # elements in a unit of work of a flat kernel
PIECE = 256  # columns whose results are brought to memory at a time
STREAMED = 2**24  # bytes of results from where on they are written past the caches


def layout(spec: KernelSpec, tensors: Sequence[torch.Tensor], thread_work: int) -> tuple[Layout, ...]:
    """How a call on these tensors (inputs, then outputs) runs; a thread takes at least `thread_work` (see `weight`).

    Raises:
        FusionError: they lie in another way than the kernel's.
    """
    geometry = spec.geometry(tensors)
    streamed = sum(tensor.nbytes for tensor in tensors[len(spec.inputs) :]) >= STREAMED
    numbers = (*geometry.sizes, *(step for steps in geometry.strides for step in steps), int(streamed))
    blocks = Sweeps(spec).blocks
    if spec.columns is None:
        units, elements = -(-geometry.sizes[0] // FLAT), FLAT
    else:
        units = blocks
        for size in geometry.sizes[:-1]:
            units *= size
        elements = min(spec.columns, WIDE) if blocks > 1 else spec.columns
    work = sum(c_print.weight(sweep.element, len(spec.operands)) for sweep in spec.passes)
    operands = tuple(
        Place(
            index,
            0,
            reach(
                [n if moves else 1 for n, moves in zip(geometry.sizes, operand.over, strict=True)], steps, operand.dtype
            ),
        )
        for index, (operand, steps) in enumerate(zip(spec.operands, geometry.strides, strict=True))
    )
    return (Layout(numbers, units, max(1, thread_work // max(1, work * elements)), operands),)


def source(spec: KernelSpec, name: str) -> str:
    """The function's text."""
    return _RowPrinter(spec).function(name)


class _RowPrinter:
    def __init__(self, spec: KernelSpec) -> None:
        self.spec, self.sweeps = spec, Sweeps(spec)
        self.rank = len(spec.operands[0].over)
        self.pointers = dict(zip((o.name for o in spec.operands), c_print.identifiers(spec.operands), strict=True))
        self.scalars = c_print.Scalars(all(operand.dtype in c_print.HALVES for operand in spec.operands))

    def function(self, name: str) -> str:
        """The whole of it."""
        spec = self.spec
        made = {statement.target: statement.function for statement in spec.statements}
        sums = [s for s in spec.statements if s.function in ("+", "-")]
        apart = "APART " if any(made.get(a) == "*" for s in sums for a in s.arguments) else ""
        head = f"void {name}(void *const *operands, const int64_t *geometry, int64_t begin, int64_t end)"
        lines = [f"{apart}{head} {{"]
        body = self._flat() if spec.columns is None else self._rows()
        if self._staged():
            flag = f"const int streamed = (int)geometry[{self.rank * (1 + len(spec.operands))}];"
            body = [flag, *body, "if (streamed) fence();"]
        return "\n".join([*lines, *(f"    {line}" for line in body), "}", ""])

    # --- loops over rows

    def _flat(self) -> list[str]:
        (sweep,) = self.spec.passes
        lines = [self._pointer(index, []) for index in range(len(self.spec.operands))]
        lines.append(f"const int64_t first = begin * {FLAT};")
        lines.append(f"const int64_t stop = end * {FLAT} < geometry[0] ? end * {FLAT} : geometry[0];")
        lines += self._per_row_loads()
        lines += [line for statement in sweep.row for line in self.scalars.assign_row(statement)]
        lines += self._sweep(0, "first", "stop")
        return lines + self._per_row_stores("begin == 0")

    def _rows(self) -> list[str]:
        spec, outer, blocks = self.spec, self.rank - 1, self.sweeps.blocks
        names = [f"i{dim}" for dim in range(outer)]
        sizes = [f"geometry[{dim}]" for dim in range(outer)]
        if blocks > 1:
            names, sizes = [*names, "block"], [*sizes, str(blocks)]
        lines, rest = ["int64_t rest = begin;"], []
        for dim in reversed(range(len(names))):
            lines.append(f"int64_t {names[dim]} = rest % {sizes[dim]};" if dim else f"int64_t {names[0]} = rest;")
            if dim:
                lines.append(f"rest /= {sizes[dim]};")
                step = f"if (++{names[dim]} == {sizes[dim]}) {{"
                rest.append((step, f"{names[dim]} = 0;"))
        body = [self._pointer(index, [f"i{dim}" for dim in range(outer)]) for index in range(len(spec.operands))]
        body += self._steps()
        first, stop = "0", str(spec.columns)
        if blocks > 1:
            first, stop = "first", "stop"
            body.append(f"const int64_t first = block * {WIDE};")
            body.append(f"const int64_t stop = first + {WIDE} < {spec.columns} ? first + {WIDE} : {spec.columns};")
        body += self._per_row_loads()
        for name in self.sweeps.kept:
            dtype = self.sweeps.made[name].dtype
            size = max(1, spec.columns or 0)
            body.append(f"{c_print.VALUES[dtype]} kept_{c_print.variable(name)}[{size}] __attribute__((aligned(64)));")
        for number, sweep in enumerate(spec.passes):
            body += [line for statement in sweep.row for line in self.scalars.assign_row(statement)]
            body += self._sweep(number, first, stop)
        body += self._per_row_stores("block == 0" if blocks > 1 else "")
        for depth, (step, reset) in enumerate(rest):
            body.append("    " * depth + step)
            body.append("    " * (depth + 1) + reset)
        body.append("    " * len(rest) + f"++{names[0]};")
        body += ["    " * depth + "}" for depth in reversed(range(len(rest)))]
        return [
            *lines,
            "for (int64_t unit = begin; unit < end; unit++) {",
            *(f"    {line}" for line in body),
            "}",
        ]

    def _pointer(self, index: int, dims: Sequence[str]) -> str:
        operand = self.spec.operands[index]
        output = index >= len(self.spec.inputs)
        kind = ("" if output else "const ") + c_print.MEMORY[operand.dtype]
        base = self.rank + index * self.rank
        moves = [f"{i} * geometry[{base + dim}]" for dim, i in enumerate(dims) if operand.over[dim]]
        offset = "".join(f" + {move}" for move in moves)
        return f"{kind} *const {self.pointers[operand.name]} = ({kind} *)operands[{index}]{offset};"

    def _steps(self) -> list[str]:
        """The strides of columns that lie apart."""
        lines = []
        for index, operand in enumerate(self.spec.operands):
            if not operand.unit and not operand.per_row:
                number = self.rank + index * self.rank + self.rank - 1
                lines.append(f"const int64_t {self.pointers[operand.name]}_step = geometry[{number}];")
        return lines

    def _at(self, operand: Operand) -> str:
        if operand.per_row:
            return "0"
        return "j" if operand.unit else f"j * {self.pointers[operand.name]}_step"

    def _load(self, operand: Operand, paired: bool = False) -> str:
        pointer = self.pointers[operand.name]
        value = c_print.load(pointer, self._at(operand), operand.dtype)
        if paired:
            value = f"from_pair({pointer}_pair, side)"
        name = f"{pointer}_value"
        self.scalars.define(operand.name, name, operand.dtype)
        return f"const {c_print.VALUES[operand.dtype]} {name} = {value};"

    def _store(self, operand: Operand, variable: str) -> str:
        value = self.scalars.names[variable]
        return c_print.store(self.pointers[operand.name], self._at(operand), operand.dtype, value)

    def _per_row_loads(self) -> list[str]:
        read = {a for s in self.spec.statements for a in s.arguments} | set(self.spec.stores)
        return [self._load(operand) for operand in self.spec.inputs if operand.per_row and operand.name in read]

    def _per_row_stores(self, condition: str) -> list[str]:
        lines = []
        for operand, stored in zip(self.spec.outputs, self.spec.stores, strict=True):
            if operand.per_row:
                line = self._store(operand, stored)
                lines.append(f"if ({condition}) {line}" if condition else line)
        return lines

    # --- loops over columns

    def _sweep(self, number: int, first: str, stop: str) -> list[str]:
        """One pass over the columns: its loop, and its reductions' results."""
        spec, sweep = self.spec, self.spec.passes[number]
        before: list[str] = []
        after: list[str] = []
        body = self._body(number, before, after)
        totals = [_Total(s, self.scalars) for s in sweep.reductions]
        body += [total.add() for total in totals]
        if not body:
            return []
        lines = [total.start() for total in totals]
        around: tuple[list[str], list[str]] = ([], [])  # a piece
        for total in totals:
            total.piece(*around)
        around[0].extend(self._ahead(number))
        if self.paired:
            before.append("const int64_t half = (until - start) / 2;")
            if spec.columns is None:
                tail = ["const int64_t j = until - 1;", *self._body(number)]
                after += ["if ((until - start) % 2) {", *(f"    {line}" for line in tail), "}"]
            loop = [*before, *_loop("i", "0", "half", self._pairs(number, body), totals), *after]
            if self.vectorised:
                loop = self._by_vectors(number, totals, loop)
            lines += _pieces(first, stop, [*around[0], *loop, *around[1]])
        elif before or after or any(around):
            loop = [*before, *_loop("j", "start", "until", body, totals), *after]
            lines += _pieces(first, stop, [*around[0], *loop, *around[1]])
        else:
            lines += _loop("j", first, stop, body, totals)
        for total in totals:
            lines += total.result(self.scalars, spec.columns or 0)
        return lines

    def _body(self, number: int, before: list[str] | None = None, after: list[str] | None = None) -> list[str]:
        """What a sweep does with one element; what comes `before` and `after` a piece, unless it is one by itself."""
        sweeps = self.sweeps
        statements, read = sweeps.element(number)
        body = [self._load(o, self.paired and before is not None) for o in self._full_inputs(read)]
        for name, when in sweeps.kept.items():
            if when < number and name in read:
                dtype = sweeps.made[name].dtype
                body.append(self.scalars.declared(name, dtype, f"kept_{c_print.variable(name)}[j]"))
        body += [self.scalars.assign(statement) for statement in statements]
        for name, when in sweeps.kept.items():
            if when == number:
                body.append(f"kept_{c_print.variable(name)}[j] = {self.scalars.names[name]};")
        for operand, stored in self._stored(number):
            if before is not None and after is not None and operand.name in self._staged():
                body += self._stage(operand, stored, before, after)
            elif not operand.per_row:
                body.append(self._store(operand, stored))
        return body

    def _full_inputs(self, read: set[str]) -> list[Operand]:
        return [operand for operand in self.spec.inputs if operand.name in read and not operand.per_row]

    def _ahead(self, number: int) -> list[str]:
        """What fetches a part of the next row, of which each sweep has as much: memory is never idle."""
        lines, outer, parts = [], self.rank - 1, len(self.spec.passes)
        part = [f"({number * (self.spec.columns or 0)} + {bound}) / {parts}" for bound in ("start", "until")]
        for index, operand in enumerate(self.spec.inputs if self._staged() and parts > 1 else ()):
            if outer and operand.unit and not operand.per_row and operand.over[outer - 1]:
                next_row = f"{self.pointers[operand.name]} + geometry[{(index + 2) * self.rank - 2}]"
                lines.append(f"if (streamed) fetch_ahead({next_row} + {part[0]}, {next_row} + {part[1]});")
        return lines

    def _pairs(self, number: int, body: Sequence[str]) -> list[str]:
        """A sweep's body for two elements that are neighbours in memory; in buffers they are half a piece apart."""
        names = [self.pointers[operand.name] for operand in self._full_inputs(self.sweeps.element(number)[1])]
        lines = [f"const uint32_t {name}_pair = pair_at({name} + start, i);" for name in names]
        for side in (0, 1):
            head = f"const int64_t side = {side}, j = start + side * half + i;"
            lines += ["{", f"    {head}", *(f"    {line}" for line in body), "}"]
        return lines

    @cached_property
    def paired(self) -> bool:
        """Whether bfloat16 is taken apart two elements at a time: half the instructions of widening."""
        columns, statements = self.spec.columns, self.spec.statements
        full = [operand for operand in self.spec.operands if not operand.per_row]
        plain = all(operand.unit and operand.dtype is torch.bfloat16 for operand in full)
        return plain and (columns or 0) % 2 == 0 and all(statement.function != INDEX for statement in statements)

    @cached_property
    def vectorised(self) -> bool:
        """Whether there is a form by whole vectors, for CPUs that round them to bfloat16."""
        return self.paired and c_lanes.fits(self.spec, list(self.sweeps.kept))

    def _by_vectors(self, number: int, totals: Sequence[_Total], loop: Sequence[str]) -> list[str]:
        """A sweep over a piece by vectors, where that can be, and `loop` over what is left, or elsewhere."""
        spec, sweeps = self.spec, self.sweeps
        statements, read = sweeps.element(number)
        vectors = c_lanes.loop(
            self.scalars,
            {operand.name: self.pointers[operand.name] for operand in self._full_inputs(read)},
            [name for name, when in sweeps.kept.items() if when < number and name in read],
            statements,
            [name for name, when in sweeps.kept.items() if when == number],
            {self.pointers[operand.name]: name for operand, name in self._stored(number) if not operand.per_row},
            {total.running: total.value for total in totals},
        )
        guarded = ["#if defined(CONVERTS)", *vectors]
        if spec.columns is not None and spec.columns % c_lanes.STEP == 0:
            return [*guarded, "#else", *loop, "#endif"]
        return [*guarded, "#endif", "if (start < until) {", *(f"    {line}" for line in loop), "}"]

    def _stored(self, number: int) -> list[tuple[Operand, str]]:
        """The outputs that a sweep brings to memory, and the variables that hold them.

        What is kept is stored at once, if no later sweep reads what it may overwrite: so writes are spread out as well.
        """
        spec, last, found = self.spec, len(self.spec.passes) - 1, []
        for operand, name in zip(spec.outputs, spec.stores, strict=True):
            when = self.sweeps.kept.get(name, last)
            reads = [o for later in range(when + 1, last + 1) for o in self._full_inputs(self.sweeps.element(later)[1])]
            early = operand.name in self._staged() and not any(any(o.over[:-1]) for o in reads)
            if number == (when if early else last):
                found.append((operand, name))
        return found

    def _staged(self) -> set[str]:
        """The outputs that come from float32, and whose elements lie next to each other."""
        floats = (torch.float32, *c_print.HALVES)
        return {o.name for o in self.spec.outputs if o.unit and not o.per_row and o.dtype in floats}

    def _stage(self, operand: Operand, stored: str, before: list[str], after: list[str]) -> list[str]:
        """What stores a piece of an output: before the loop over it, in it (the result), and after it."""
        to, when = self.pointers[operand.name], ""
        kind, value = c_print.HALVES.get(operand.dtype, "float"), self.scalars.names[stored]
        source, inside = f"{to}_stage", [f"{to}_to[j - start] = {value};"]
        kept = self.sweeps.kept.get(stored, len(self.spec.passes)) < len(self.spec.passes) - 1
        if kept and c_print.VALUES[self.sweeps.made[stored].dtype] == "float":
            source, inside = f"kept_{c_print.variable(stored)} + start", []
        else:
            before.append(f"float {source}[{PIECE}] __attribute__((aligned(64)));")
            direct = f"streamed ? {source} : {to} + start" if kind == "float" else source
            before.append(f"float *const {to}_to = {direct};")
            when = "if (streamed) " if kind == "float" else ""
        what, count = ("pairs", "half") if self.paired else (kind, "until - start")
        after.append(f"{when}store_{what}({to} + start, {source}, {count}, streamed);")
        return inside


def _loop(index: str, first: str, stop: str, body: Sequence[str], totals: Sequence[_Total]) -> list[str]:
    clauses = "".join(f" reduction({total.clause}:{total.running})" for total in totals)
    extremes = any(total.clause != "+" for total in totals)
    pragma = f'EXTREMES("omp simd{clauses}")' if extremes else f"#pragma omp simd{clauses}"
    lines = [pragma, f"for (int64_t {index} = {first}; {index} < {stop}; {index}++) {{"]
    return [*lines, *(f"    {line}" for line in body), "}"]


def _pieces(first: str, stop: str, body: Sequence[str]) -> list[str]:
    return [
        f"for (int64_t piece = {first}; piece < {stop}; piece += {PIECE}) {{",
        f"    const int64_t until = piece + {PIECE} < {stop} ? piece + {PIECE} : {stop};",
        "    int64_t start = piece;",
        *(f"    {line}" for line in body),
        "}",
    ]


class _Total:
    """One reduction while a row is walked through; sums in float64, for their error would be that of all elements.

    Where all that is read and written has half precision, pieces are summed in float32, a few elements to a lane.
    """

    def __init__(self, statement: Statement, scalars: c_print.Scalars) -> None:
        self.statement = statement
        self.clause = {"sum": "+", "mean": "+"}.get(statement.function, statement.function)
        self.name = f"{c_print.variable(statement.target)}_{statement.function}"
        self.value = scalars.value(statement.arguments[0], statement.dtype)
        self.in_pieces = scalars.halves and self.clause == "+"
        self.running = f"{self.name}_piece" if self.in_pieces else self.name

    def start(self) -> str:
        if self.clause == "+":
            return f"double {self.name} = 0;"
        zero = "-INFINITY" if self.clause == "max" else "INFINITY"
        return f"{c_print.VALUES[self.statement.dtype]} {self.name} = {zero};"

    def add(self) -> str:
        if self.clause == "+":
            return f"{self.running} += {self.value};"
        sign = ">" if self.clause == "max" else "<"  # false for NaN, which is passed over
        return f"{self.name} = {self.value} {sign} {self.name} ? {self.value} : {self.name};"

    def piece(self, before: list[str], after: list[str]) -> None:
        """What comes before the loop over a piece, and after it."""
        if self.in_pieces:
            before.append(f"float {self.running} = 0;")
            after.append(f"{self.name} += {self.running};")

    def result(self, scalars: c_print.Scalars, columns: int) -> list[str]:
        value = f"{self.name} / {float(columns)!r}" if self.statement.function == "mean" else self.name
        if self.statement.dtype is torch.float32:
            return scalars.widened(self.statement.target, value)
        return [scalars.declared(self.statement.target, self.statement.dtype, value)]
