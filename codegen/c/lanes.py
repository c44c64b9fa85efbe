"""Sweeps over bfloat16 by whole vectors, where the CPU rounds to it in registers: no buffers, and compilers see several
elements' chains of arithmetic at once.

Two vectors are what lies in as much memory: the first of each pair, and the second of each. In kept rows they follow
each other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from graph_capture.codegen.c import printing as c_print
from graph_capture.codegen.spec.kernel import KernelSpec, Statement

STEP = 32  # elements that two vectors hold, where they can be rounded (``CONVERTS``)
ARITHMETIC = frozenset({"+", "-", "*", "/", "neg", "cast"})
FLOATS = (torch.float32, *c_print.HALVES)


def fits(spec: KernelSpec, kept: Sequence[str]) -> bool:
    """Whether all of a kernel's sweeps are arithmetic of vectors; `kept` are variables that outlive theirs."""
    halves = all(operand.dtype in c_print.HALVES for operand in spec.operands)
    exponentials = {s.target for sweep in spec.passes for s in sweep.element if s.function == "exp"}
    for sweep in spec.passes:
        for statement in (*sweep.element, *sweep.reductions):
            if not any(isinstance(argument, str) for argument in statement.arguments):
                return False
            exponential = exponentials.intersection(a for a in statement.arguments if isinstance(a, str))
            if exponential and not (halves and statement.function == "+" and statement.arguments.count(1) == 1):
                return False
        if any(s.function not in ARITHMETIC and s.target not in exponentials for s in sweep.element):
            return False
        if any(s.function not in ("sum", "mean") for s in sweep.reductions):
            return False
    plain = all(operand.dtype in FLOATS for operand in spec.operands)
    return plain and all(s.dtype in FLOATS for s in spec.statements) and exponentials.isdisjoint((*kept, *spec.stores))


def loop(
    scalars: c_print.Scalars,
    loads: dict[str, str],
    kept: Sequence[str],
    statements: Sequence[Statement],
    keeps: Sequence[str],
    stores: dict[str, str],
    totals: dict[str, str],
) -> list[str]:
    """The loop from `start` as far as vectors fill what there is `until` the end of a piece.

    Args:
        scalars: the function's variables; those of a vector have the same names.
        loads: operand -> the pointer that it is read from.
        kept: variables that an earlier sweep has kept, and `keeps`: those that a later one needs.
        statements: in order.
        stores: pointer -> the variable that is stored there.
        totals: a running sum -> the expression that it adds up.
    """
    scalars = scalars.vectors()
    body = []
    for name, pointer in loads.items():
        scalars.define(name, f"{pointer}_value", torch.bfloat16)
        body.append(f"const lanes {pointer}_value = lanes_of_pairs({pointer} + start, side);")
    for name in kept:
        at = f"kept_{c_print.variable(name)} + start + side * LANES"
        body.append(scalars.declared(name, torch.float32, f"lanes_float({at})"))
    body += [scalars.assign(statement) for statement in statements]
    for name in keeps:
        body.append(f"store_lanes(kept_{c_print.variable(name)} + start + side * LANES, {scalars.names[name]}, 0);")
    body += [f"{pointer}_sides[side] = {scalars.names[name]};" for pointer, name in stores.items()]
    body += [f"{running}_lanes += {value};" for running, value in totals.items()]
    body = _alive(body)
    lines = [f"lanes {running}_lanes = {{0}};" for running in totals]
    lines += [f"const int {pointer}_streamed = streamed && aligned({pointer} + start);" for pointer in stores]
    lines.append("for (; start + 2 * LANES <= until; start += 2 * LANES) {")
    lines += [f"    lanes {pointer}_sides[2];" for pointer in stores]
    for side in (0, 1):
        lines += ["    {", f"        const int side = {side};", *(f"        {line}" for line in body), "    }"]
    lines += [f"    store_sides({pointer} + start, {pointer}_sides, {pointer}_streamed);" for pointer in stores]
    return [*lines, "}", *(f"{running} += lanes_sum({running}_lanes);" for running in totals)]


def _alive(lines: Sequence[str]) -> list[str]:
    """The lines without declarations that nothing uses: of a few, there is no vector form."""
    found: list[str] = []
    for line in reversed(lines):
        declared = re.match(r"const lanes (\w+) =", line)
        if declared is None or any(re.search(rf"\b{declared[1]}\b", later) for later in found):
            found.append(line)
    return found[::-1]
