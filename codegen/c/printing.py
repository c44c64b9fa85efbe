"""Scalar statements, loads and stores as C text; what the printers of all kinds of spec share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
import torch

from graph_capture.codegen.spec.kernel import INDEX, Operand, Statement

MEMORY = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "uint16_t",
    torch.bfloat16: "uint16_t",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "uint8_t",
}
HALVES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
VALUES = MEMORY | dict.fromkeys(HALVES, "float") | {torch.bool: "int32_t"}  # bools as wide as floats: masks fit lanes


def identifier(name: str, taken: Iterable[str], prefix: str) -> str:
    """A C identifier for a name from outside, of its harmless characters; unlike those that are `taken`."""
    plain = prefix + re.sub(r"[^A-Za-z0-9_]", "_", name)[:40]
    found, number = plain, 1
    while found in taken:
        number += 1
        found = f"{plain}_{number}"
    return found


def identifiers(operands: Sequence[Operand]) -> list[str]:
    """An identifier for each operand; a prefix keeps them apart from C's own words."""
    found: list[str] = []
    for operand in operands:
        found.append(identifier(operand.name, found, "p_"))
    return found


def variable(target: str) -> str:
    """What a statement's target is called."""
    return identifier(target.removeprefix("%"), (), "v")


def load(pointer: str, index: str, dtype: torch.dtype) -> str:
    """The value of an element in memory."""
    element = f"{pointer}[{index}]"
    if dtype in HALVES:
        return f"from_{HALVES[dtype]}({element})"
    return f"{element} != 0" if dtype is torch.bool else element


def store(pointer: str, index: str, dtype: torch.dtype, value: str) -> str:
    """The statement that writes a value to an element in memory."""
    if dtype in HALVES:
        value = f"to_{HALVES[dtype]}({value})"
    return f"{pointer}[{index}] = {value};"


def literal(value: Any, dtype: torch.dtype) -> str:
    """A number in arithmetic of a dtype."""
    if not dtype.is_floating_point:
        number = int(value)
        text = str(number) if number > -(2**63) else f"({number + 1} - 1)"
        return f"INT64_C({text})" if dtype is torch.int64 and number > -(2**63) else text
    if dtype is not torch.float64:
        with numpy.errstate(over="ignore"):
            value = numpy.float32(value)
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "-INFINITY" if value < 0 else "INFINITY"
    text = repr(float(value)) if dtype is torch.float64 else str(value)
    return text + ("" if dtype is torch.float64 else "f")


class Scalars:
    """The variables of one function: what they are called, and the dtype that each is computed in.

    Args:
        halves: whether all that is read and written has half precision.
    """

    float_type, one_plus_exp = "float", "float"

    def __init__(self, halves: bool = False) -> None:
        self.halves = halves
        if halves:
            self.one_plus_exp = "half"
        self.names: dict[str, str] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._wide: dict[str, str] = {}  # the float64 behind a float32 that is computed once a row
        self._exponents: dict[str, str] = {}  # of what was last defined as an exponential

    def vectors(self) -> Scalars:
        """These variables, for code in which those to come are vectors."""
        made = Scalars()
        made.float_type = made.one_plus_exp = "lanes"
        made.names, made.dtypes, made._wide = dict(self.names), dict(self.dtypes), self._wide
        return made

    def define(self, variable: str, name: str, dtype: torch.dtype) -> None:
        """From here on `variable` is called `name`."""
        self.names[variable], self.dtypes[variable] = name, dtype
        self._exponents.pop(variable, None)

    def declared(self, target: str, dtype: torch.dtype, value: str) -> str:
        """The declaration of a statement's target."""
        self.define(target, variable(target), dtype)
        kind = self.float_type if VALUES[dtype] == "float" else VALUES[dtype]
        return f"const {kind} {self.names[target]} = {value};"

    def assign(self, statement: Statement) -> str:
        """A statement that is no reduction."""
        line = self.declared(statement.target, statement.dtype, self._expression(statement, statement.dtype))
        if statement.function == "exp" and statement.dtype is torch.float32:
            self._exponents[statement.target] = self.value(statement.arguments[0], torch.float32)
        return line

    def assign_row(self, statement: Statement) -> list[str]:
        """`assign` once a row: in float64 what is float32, for its error would be that of all elements."""
        if statement.dtype is not torch.float32:
            return [self.assign(statement)]
        return self.widened(statement.target, self._expression(statement, torch.float64))

    def widened(self, target: str, value: str) -> list[str]:
        """The declarations of a float32 that is computed in float64."""
        wide = f"{variable(target)}_wide"
        narrow = self.declared(target, torch.float32, f"(float){wide}")
        self._wide[target] = wide
        return [f"const double {wide} = {value};", narrow]

    def value(self, argument: Any, dtype: torch.dtype) -> str:
        """A variable or a number as an expression."""
        if not isinstance(argument, str):
            return literal(argument, dtype)
        return self._wide.get(argument, self.names[argument]) if dtype is torch.float64 else self.names[argument]

    def _expression(self, statement: Statement, dtype: torch.dtype) -> str:
        """A statement's right side in arithmetic of a dtype."""
        function = statement.function
        known = [self.dtypes[a] for a in statement.arguments if isinstance(a, str)]
        compares = dtype is torch.bool and function in ("==", "!=", "<", "<=", ">", ">=")
        args = [self.value(a, known[0] if compares and known else dtype) for a in statement.arguments]
        if function == INDEX:
            return "(float)(int32_t)j"
        if function == "cast":
            return self._cast(args[0], known[0], dtype)
        if function == "neg":
            return f"-{args[0]}"
        if function == "~":
            return f"~{args[0]}"
        if function == "where":
            return f"{args[0]} ? {args[1]} : {args[2]}"
        if function in ("maximum", "minimum"):
            return pick(function, args[0], args[1], dtype)
        if function == "abs" and not dtype.is_floating_point:
            return f"{args[0]} < 0 ? -{args[0]} : {args[0]}"
        if function == "+" and dtype is torch.float32 and statement.arguments.count(1) == 1:
            (other,) = (a for a in statement.arguments if a != 1)
            if other in self._exponents:
                return f"one_plus_exp_{self.one_plus_exp}({self._exponents[other]})"
        if function[0].isalpha():
            return f"{function}_{'double' if dtype is torch.float64 else 'float'}({', '.join(args)})"
        return f"{args[0]} {function} {args[1]}"

    def _cast(self, value: str, source: torch.dtype, target: torch.dtype) -> str:
        narrow = target.itemsize < 4 and not target.is_floating_point
        if source.is_floating_point and narrow:  # as torch does; C leaves it open
            return f"({VALUES[target]})({'int64_t' if target is torch.uint8 else 'int32_t'}){value}"
        if self.float_type != "float" and VALUES[target] == VALUES[source]:  # vectors have no conversions
            return value
        return f"({VALUES[target]}){value}"


def pick(function: str, left: str, right: str, dtype: torch.dtype) -> str:
    """The larger or smaller of two values; NaN if one is."""
    sign = ">=" if function == "maximum" else "<="  # of two zeros the first, as torch's scalar loops
    either = f" || {left} != {left}" if dtype.is_floating_point else ""
    return f"{left} {sign} {right}{either} ? {left} : {right}"


def weight(statements: Iterable[Statement], loads: int) -> int:
    """What statements cost an element, in additions: rough, to tell much work from little."""
    costs: Mapping[str, int] = {
        "cast": 0,
        "/": 4,
        "sqrt": 4,
        "rsqrt": 8,
        "round_float16": 4,
        "round_bfloat16": 4,
        "power": 100,
        "sin": 60,
        "cos": 60,
    }
    heavy = ("exp", "log", "log1p", "tanh", "erf")
    return loads + sum(costs.get(s.function, 16 if s.function in heavy else 1) for s in statements)
