"""Integers that a kernel computes with, as expressions: equal ones are one object, and it is known where they lie.

Sizes and strides are not negative, divisors are positive (else a grid would have no blocks), and no index overflows:
launches are cut so that they do not.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """Integers from `low` to `high`, both included."""

    low: float
    high: float


ANY = Interval(-math.inf, math.inf)
NATURAL = Interval(0, math.inf)


class Term(NamedTuple):
    """A number times values, which are sorted."""

    number: int
    values: tuple[Value, ...] = ()

    def over(self, divisor: Term) -> Term | None:
        """The quotient, where every factor of `divisor` is one of these."""
        left = list(self.values)
        for value in divisor.values:
            if value not in left:
                return None
            left.remove(value)
        return None if self.number % divisor.number else Term(self.number // divisor.number, tuple(left))


class Value(ast.expr):
    """An expression of integers, of names that do not change.

    Attributes:
        interval: where it, or each element of it, lies.
        leaf: its form, if it has no parts.
        op: what is done with its `parts`, two values, if it has any.
        ranged: whether it has more than one element.
        bound: what it is less than, if that is a known product.
    """

    def __init__(
        self,
        interval: Interval,
        leaf: ast.expr | None = None,
        op: ast.operator | ast.cmpop | None = None,
        parts: tuple[Value, ...] = (),
        ranged: bool = False,
        bound: Term | None = None,
    ) -> None:
        super().__init__()
        if bound is not None and not bound.values:
            interval = Interval(interval.low, min(interval.high, bound.number - 1))
        self.interval, self.leaf, self.op, self.parts, self.ranged = interval, leaf, op, parts, ranged
        self.bound = bound

    @property
    def constant(self) -> int | None:
        """What it always is, if that is known."""
        match self.leaf:
            case ast.Constant(value=int(number)):
                return number
        return None

    @property
    def factors(self) -> Term:
        """The product that it is, perhaps of itself alone."""
        if self.constant:
            return Term(self.constant)
        if not isinstance(self.op, ast.Mult):
            return Term(1, (self,))
        (number, values), (other, more) = (part.factors for part in self.parts)
        return Term(number * other, tuple(sorted((*values, *more), key=id)))

    def printed(self, parts: Sequence[ast.expr]) -> ast.expr:
        """Its form, of parts that are printed."""
        if isinstance(self.op, ast.operator):
            return ast.BinOp(parts[0], self.op, parts[1])
        if isinstance(self.op, ast.cmpop):
            return ast.Compare(parts[0], [self.op], [parts[1]])
        assert self.leaf is not None
        return self.leaf

    @property
    def holds(self) -> bool:
        """Whether it is a condition that always holds."""
        match self.op, self.parts:
            case ast.Lt(), (left, right):
                return left.interval.high < right.interval.low or left.bound == right.factors
            case ast.GtE(), (left, right):
                return left.interval.low >= right.interval.high
        return False


class Values:
    """The values of one kernel."""

    def __init__(self) -> None:
        self._values: dict[Hashable, Value] = {}

    def constant(self, number: int) -> Value:
        """A number."""
        return self.leaf((type(number), number), ast.Constant(number), Interval(number, number))

    def leaf(
        self,
        key: Hashable,
        node: ast.expr,
        interval: Interval,
        *,
        ranged: bool = False,
        bound: Term | None = None,
    ) -> Value:
        """What has no parts, as `node` says it."""
        found = self._values.get(key)
        if found is None:
            found = self._values[key] = Value(interval, node, ranged=ranged, bound=bound)
        return found

    def made(self, left: Value, op: ast.operator | ast.cmpop, right: Value) -> Value:
        """``left op right``, as it is said."""
        key = type(op), left, right
        found = self._values.get(key)
        if found is None:
            ranged = left.ranged or right.ranged
            known = _interval(left.interval, op, right.interval), None, op, (left, right), ranged
            found = self._values[key] = Value(*known, bound=_bound(left, op, right))
        return found

    def combined(self, left: Value, op: ast.operator, right: Value) -> Value:
        """``left op right``, worked out; nothing that has more than one element is left out, for its shape."""
        match op, left.constant, right.constant:
            case (ast.Mult(), _, 0) if not left.ranged:
                return right
            case (ast.Mult(), 0, _) if not right.ranged:
                return left
            case (ast.Add(), 0, _) | (ast.Mult(), 1, _):
                return right
            case (ast.Mult() | ast.FloorDiv(), _, 1) | (ast.Add() | ast.Sub(), _, 0):
                return left
            case ast.Mult(), int(first), int(second):
                return self.constant(first * second)
            case ast.Add() | ast.Sub(), _, int(number):
                return self._plus(left, number if isinstance(op, ast.Add) else -number)
            case ast.Mod(), _, _ if _below(left, right):
                return left
        if not (left.ranged or right.ranged):
            distance = _distance(left, right)
            match op:
                case ast.Sub() if distance is not None:
                    return self.constant(distance)
                case ast.FloorDiv() if distance == -1 or _below(left, right):
                    return self.constant(0)
                case ast.Mod() if right.constant == 1:
                    return self.constant(0)
        return self.made(left, op, right)

    def _plus(self, value: Value, number: int) -> Value:
        base, already = _split(value)
        total = already + number
        if base is None:
            return self.constant(total)
        if total == 0:
            return base
        return self.made(base, ast.Add() if total > 0 else ast.Sub(), self.constant(abs(total)))


def _below(left: Value, right: Value) -> bool:
    """Whether ``0 <= left < right``."""
    return left.interval.low >= 0 and (left.interval.high < right.interval.low or left.bound == right.factors)


def _split(value: Value) -> tuple[Value | None, int]:
    """What a number is added to, and the number."""
    if value.constant is not None:
        return None, value.constant
    match value.op, value.parts:
        case ast.Add() | ast.Sub() as op, (base, right) if right.constant is not None:
            return base, right.constant if isinstance(op, ast.Add) else -right.constant
    return value, 0


def _distance(left: Value, right: Value) -> int | None:
    """``left - right``, if that is known."""
    (first, more), (second, less) = _split(left), _split(right)
    return more - less if first is second else None


def _bound(left: Value, op: ast.operator | ast.cmpop, right: Value) -> Term | None:
    """What ``left op right`` is less than."""
    match op:
        case ast.FloorDiv() if left.bound is not None:
            return left.bound.over(right.factors)
        case ast.Mod():
            return right.factors
    return None


def _interval(left: Interval, op: ast.operator | ast.cmpop, right: Interval) -> Interval:
    """The interval of ``left op right``. Triton divides towards zero, so that is followed for natural numbers alone."""
    match op:
        case ast.Add():
            return Interval(left.low + right.low, left.high + right.high)
        case ast.Sub():
            return Interval(left.low - right.high, left.high - right.low)
        case ast.Mult() if left.low >= 0 and right.low >= 0:
            return Interval(left.low * right.low, 0 if 0 in (left.high, right.high) else left.high * right.high)
        case ast.FloorDiv() if left.low >= 0:
            return Interval(0, left.high if math.isinf(left.high) else left.high // max(right.low, 1))
        case ast.Mod() if left.low >= 0:
            return Interval(0, min(left.high, right.high - 1))
    return ANY
