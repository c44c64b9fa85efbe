"""Scalar statements as ninetoothed's expressions; what the printers of several kinds of spec share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch

from graph_capture.codegen.spec.kernel import INDEX, Statement
from graph_capture.codegen.spec.rounding import ROUNDED


def print_arguments(statement: Statement, values: Mapping[str, str]) -> list[str]:
    """The arguments of a statement, given what its variables are called."""
    return [values[a] if isinstance(a, str) else print_number(a, statement.dtype) for a in statement.arguments]


def print_statement(statement: Statement, args: Sequence[str]) -> str:
    """A statement that is no reduction as an expression over its printed arguments."""
    function, args = statement.function, list(args)
    if function == INDEX:
        return "ntl.cast(index, ntl.float32)"
    if function == "cast":
        name = "int1" if statement.dtype is torch.bool else str(statement.dtype).removeprefix("torch.")
        return f"ntl.cast({args[0]}, ntl.{name})"
    if function in ROUNDED:
        narrow = str(ROUNDED[function]).removeprefix("torch.")
        return f"ntl.cast(ntl.cast({args[0]}, ntl.{narrow}), ntl.{str(statement.dtype).removeprefix('torch.')})"
    if function == "neg":  # Triton subtracts from 0, which loses the sign of a zero
        return f"{args[0]} * -1.0" if statement.dtype.is_floating_point else f"-{args[0]}"
    if function == "~":
        return f"~{args[0]}"
    if function in ("maximum", "minimum"):
        if statement.dtype.is_floating_point:
            args.append("propagate_nan=ntl.PropagateNan.ALL")
        return f"ntl.{function}({', '.join(args)})"
    if function == "where":
        return f"ntl.where({', '.join(args)})"
    if function == "tanh":
        return print_tanh(args[0], statement.dtype)
    if function == "log1p":
        return _log1p(args[0])
    if function == "power":
        base, exponent = (f"ntl.cast({arg}, ntl.float64)" for arg in args)
        name = str(statement.dtype).removeprefix("torch.")
        return f"ntl.cast(ntl.exp({exponent} * ntl.log({base})), ntl.{name})"
    if not function[0].isalpha():
        return f"{args[0]} {function} {args[1]}"
    return f"ntl.{function}({args[0]})"


def print_tanh(x: str, dtype: torch.dtype) -> str:
    """From exp, which cancels near 0; there by its series, as far as the next term is below the dtype's rounding."""
    near = 0.02 if dtype is torch.float64 else 0.25
    square, series = f"({x} * {x})", f"{62 / 2835}"
    for coefficient in (17 / 315, 2 / 15, 1 / 3, 1.0):
        series = f"({coefficient} - {square} * {series})"
    series = f"{x} * {series}"
    return f"ntl.where(ntl.abs({x}) < {near}, {series}, 1.0 - 2.0 / (ntl.exp(2.0 * {x}) + 1.0))"


def _log1p(x: str) -> str:
    """``log(1 + x)`` without the rounding of ``1 + x`` (Kahan; in Goldberg, 1991, theorem 4)."""
    rounded = f"(1.0 + {x})"
    far = f"({rounded} == 1.0) | ({rounded} == float('inf'))"
    return f"ntl.where({far}, {x}, ntl.log({rounded}) * ({x} / ({rounded} - 1.0)))"


def print_number(value: Any, dtype: torch.dtype = torch.float32) -> str:
    """A number in arithmetic of a dtype as an expression."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, float) and value == 0 and math.copysign(1, value) < 0:  # Triton up to 3.6 makes 0.0 of it
        wide = "float64" if dtype is torch.float64 else "float32"
        return f'(1.0 / ntl.full((1,), float("-inf"), dtype=ntl.{wide}))'
    if isinstance(value, float) and dtype is not torch.float64:
        with numpy.errstate(over="ignore"):
            narrow = float(numpy.float32(value))
        return repr(value) if math.isfinite(narrow) and (narrow or not value) else print_number(narrow)
    if isinstance(value, float) and float(numpy.float32(value)) != value:  # Triton would take it for a float32
        return f"ntl.full((1,), {value!r}, dtype=ntl.float64)"
    return repr(value)
