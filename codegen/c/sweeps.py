"""What each sweep over a row computes, and what it keeps for later ones: decided before anything is printed."""

from __future__ import annotations

from functools import cached_property

from graph_capture.codegen.c import printing as c_print
from graph_capture.codegen.spec.kernel import KernelSpec, Pass, Statement

WIDE = 8192  # columns of a row in a unit of work, where nothing is reduced
KEPT_BYTES = 65536  # of a row in buffers on the stack
COSTLY = 3  # from here on a value is kept rather than computed again


class Sweeps:
    """What is decided before printing: how rows are cut, and what is kept between sweeps."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.made = {statement.target: statement for statement in spec.statements}

    @property
    def blocks(self) -> int:
        """The units of work that a row is cut into."""
        columns = self.spec.columns
        return 1 if self.spec.reduces or columns is None else max(1, -(-columns // WIDE))

    @cached_property
    def kept(self) -> dict[str, int]:
        """Variable -> the sweep that keeps it for later ones."""
        spec, found = self.spec, dict[str, int]()
        room = KEPT_BYTES // max(1, spec.columns or 1)
        known: dict[str, int] = {}
        for number, sweep in enumerate(spec.passes):
            if number:
                for name in self._frontier(number, sweep, known):
                    size = c_print.VALUES[self.made[name].dtype]
                    room -= {"double": 8, "int64_t": 8}.get(size, 4)
                    if self._cost(name) >= COSTLY and name not in found and room >= 0:
                        found[name] = known[name]
            for statement in sweep.element:
                known.setdefault(statement.target, number)
        return found

    def _frontier(self, number: int, sweep: Pass, known: dict[str, int]) -> list[str]:
        """What a sweep has in common with earlier ones, as far as it uses that directly."""
        new = [s for s in sweep.element if s.target not in known]
        wanted = {a for s in (*new, *sweep.reductions) for a in s.arguments if isinstance(a, str)}
        if number == len(self.spec.passes) - 1:
            wanted |= set(self.spec.stores)
        return [name for name in known if name in wanted]

    def _cost(self, name: str) -> int:
        """Of a variable, from what is in memory or the same for the row."""
        statements, loads, pending, seen = [], 0, [name], set[str]()
        while pending:
            name = pending.pop()
            if name in seen or name in self.spec.per_row:
                continue
            seen.add(name)
            if name in self.made:
                statements.append(self.made[name])
                pending += [a for a in self.made[name].arguments if isinstance(a, str)]
            else:
                loads += 1
        return c_print.weight(statements, loads)

    def element(self, number: int) -> tuple[list[Statement], set[str]]:
        """The statements of a sweep over each element, given what is kept; and the variables that it reads."""
        spec, sweep, last = self.spec, self.spec.passes[number], number == len(self.spec.passes) - 1
        read = {a for s in sweep.reductions for a in s.arguments if isinstance(a, str)}
        if last:
            read |= {name for operand, name in zip(spec.outputs, spec.stores, strict=True) if not operand.per_row}
        read |= {name for name, when in self.kept.items() if when == number}
        statements = []
        for statement in reversed(sweep.element):
            if statement.target in read and self.kept.get(statement.target, number) >= number:
                statements.append(statement)
                read |= {a for a in statement.arguments if isinstance(a, str)}
        return statements[::-1], read
