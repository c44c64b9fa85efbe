"""Making Triton source that ninetoothed generated say each thing once.

ninetoothed writes every access out: where it is, from the program's id on, and every condition of its tiling, that an
index is not negative, that ``arange(0, 64)`` is below 64. Compiling that takes half as long again. Here the arithmetic
of integers is worked out, each of them gets the interval that it lies in, as far as that is known, a condition that
always holds is dropped, and an expression that is there more than once gets a name.

Sizes and strides are not negative, divisors are positive (else a grid would have no blocks), and no index overflows:
launches are cut so that they do not. Imports neither the package nor torch (see `aot_worker`).
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

_ARGUMENT = re.compile(r"ninetoothed_.*_(size|stride)_\d+")
_BLOCKS = ("body", "orelse")
_INDEX = re.compile(r"ninetoothed_(pid|.*_index_\d+|.*_pointers)")


class Interval(NamedTuple):
    """Integers from `low` to `high`, both included."""

    low: float
    high: float


ANY = Interval(-math.inf, math.inf)
NATURAL = Interval(0, math.inf)


def simplify(tree: ast.Module) -> None:
    """Simplify the kernel of a module that ninetoothed generated, in place; the function that launches it stays."""
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.decorator_list:
            folded = _Folder(function)
            function.body = folded.block(function.body)
            function.body = _Namer(folded, function.body).block(function.body)


class _Value(ast.expr):
    """An expression of integers, of names that do not change; equal ones are one object.

    Attributes:
        interval: where it, or each element of it, lies.
        leaf: its form, if it has no parts.
        op: what is done with its `parts`, two values, if it has any.
        ranged: whether it has more than one element.
    """

    def __init__(
        self,
        interval: Interval,
        leaf: ast.expr | None = None,
        op: ast.operator | ast.cmpop | None = None,
        parts: tuple[_Value, ...] = (),
        ranged: bool = False,
    ) -> None:
        super().__init__()
        self.interval, self.leaf, self.op, self.parts, self.ranged = interval, leaf, op, parts, ranged

    @property
    def constant(self) -> int | None:
        """What it always is, if that is known."""
        match self.leaf:
            case ast.Constant(value=int(number)):
                return number
        return None

    def printed(self, parts: Sequence[ast.expr]) -> ast.expr:
        """Its form, of parts that are printed."""
        if isinstance(self.op, ast.operator):
            return ast.BinOp(parts[0], self.op, parts[1])
        if isinstance(self.op, ast.cmpop):
            return ast.Compare(parts[0], [self.op], [parts[1]])
        assert self.leaf is not None
        return self.leaf


class _Rewriter(ast.NodeTransformer):
    """Rewrites statements block by block."""

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Statements, rewritten."""
        raise NotImplementedError

    def parts(self, statement: ast.stmt) -> None:
        """Rewrite what a statement itself says."""
        for field, part in ast.iter_fields(statement):
            if isinstance(part, ast.AST):
                setattr(statement, field, self.visit(part))
            elif isinstance(part, list) and field not in _BLOCKS:
                part[:] = map(self.visit, part)

    def blocks(self, statement: ast.stmt) -> None:
        """Rewrite the statements inside of one."""
        for field in _BLOCKS:
            if hasattr(statement, field):
                setattr(statement, field, self.block(getattr(statement, field)))


class _Folder(_Rewriter):
    """Replaces what is computed of indices, and the pointers and masks of accesses, by values."""

    def __init__(self, function: ast.FunctionDef) -> None:
        stored = Counter(_stored(function.body))
        self.names = set(stored)
        self.changing = {name for name, count in stored.items() if count > 1}
        self._values: dict[Hashable, _Value] = {}
        self._known: dict[str, Interval] = {}  # of names that are not computed of others
        self._meaning: dict[str, _Value] = {}
        self._single = True  # whether ``arange(0, 1)`` is taken for 0

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Statements; an assignment of an index to a name is a `_Value` of its own."""
        done: list[ast.stmt] = []
        for statement in body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if name not in self.changing:
                    found = self.value(value) if _INDEX.fullmatch(name) else None
                    if found is not None:
                        self._meaning[name] = found
                        done.append(ast.Expr(found))
                        continue
                case ast.For(target=ast.Name(id=name), iter=ast.Call(func=ast.Name(id="range"), args=[stop])):
                    if name not in self.changing and (last := self.value(stop)) is not None:
                        self._known[name] = Interval(0, last.interval.high - 1)
            self.parts(statement)
            self.blocks(statement)
            done.append(statement)
        return done

    # --- expressions that need not be integers

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._meaning.get(node.id, node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not (isinstance(node.func, ast.Attribute) and node.func.attr in ("load", "store")):
            return self.generic_visit(node)
        node.args = [self._pointer(node.args[0]), *map(self.visit, node.args[1:])]
        node.keywords = [kept for keyword in node.keywords for kept in self._keyword(keyword)]
        if all(keyword.arg != "mask" for keyword in node.keywords):  # `other` is what is read where it is False
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "other"]
        return node

    def _pointer(self, node: ast.expr) -> ast.expr:
        found = self.value(node)
        if found is not None and not found.ranged:  # of a single element: its shape is that of the ranges
            self._single = False
            found = self.value(node)
            self._single = True
        return found or self.visit(node)

    def _keyword(self, keyword: ast.keyword) -> list[ast.keyword]:
        if keyword.arg != "mask":
            return [self.generic_visit(keyword)]  # type: ignore[list-item]
        needed = list(dict.fromkeys(self._needed(keyword.value)))
        # As ninetoothed begins: without it Triton's interpreter takes a mask for integers.
        result: ast.expr = self._constant(True)
        for condition in needed:
            if isinstance(result, _Value) and isinstance(condition, _Value):
                result = self._made(result, ast.BitAnd(), condition, ANY)
            else:
                result = ast.BinOp(result, ast.BitAnd(), condition)
        return [ast.keyword("mask", result)] if needed else []

    def _needed(self, node: ast.expr) -> list[ast.expr]:
        """The conditions of a conjunction that may fail."""
        match node:
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return self._needed(left) + self._needed(right)
            case ast.Constant(value=True):
                return []
        found = self.value(node)
        return [] if found is not None and _holds(found) else [found or self.visit(node)]

    # --- integers

    def value(self, node: ast.expr) -> _Value | None:
        """The value of an expression of integers; None where it has parts that change, or are loaded."""
        match node:
            case _Value():
                return node
            case ast.Constant(value=int(number)):
                return self._constant(number)
            case ast.Name(id=name):
                if name in self._meaning:
                    return self._meaning[name]
                natural = _ARGUMENT.fullmatch(name) and name not in self.names
                interval = NATURAL if natural else self._known.get(name, ANY)
                return None if name in self.changing else self._leaf(name, node, interval)
            case ast.BinOp(left=left, op=op, right=right):
                first, second = self.value(left), self.value(right)
                return None if first is None or second is None else self._combined(first, op, second)
            case ast.Compare(left=left, ops=[comparison], comparators=[right]):
                first, second = self.value(left), self.value(right)
                return None if first is None or second is None else self._made(first, comparison, second, ANY)
            case ast.Call(func=ast.Attribute(attr="program_id")):
                return self._leaf(ast.unparse(node), node, NATURAL)
            case ast.Call() | ast.Subscript(value=ast.Call()) if (bounds := _range(node)) is not None:
                if bounds == Interval(0, 0) and self._single:
                    return self._constant(0)
                return self._leaf(ast.unparse(node), node, bounds, ranged=bounds.low < bounds.high)
        return None

    def _constant(self, number: int) -> _Value:
        return self._leaf((type(number), number), ast.Constant(number), Interval(number, number))

    def _leaf(self, key: Hashable, node: ast.expr, interval: Interval, *, ranged: bool = False) -> _Value:
        found = self._values.get(key)
        if found is None:
            found = self._values[key] = _Value(interval, node, ranged=ranged)
        return found

    def _made(self, left: _Value, op: ast.operator | ast.cmpop, right: _Value, interval: Interval) -> _Value:
        key = type(op), left, right
        found = self._values.get(key)
        if found is None:
            found = self._values[key] = _Value(interval, None, op, (left, right), left.ranged or right.ranged)
        return found

    def _combined(self, left: _Value, op: ast.operator, right: _Value) -> _Value:
        """The value of ``left op right``; nothing that has more than one element is left out, for its shape."""
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
                return self._constant(first * second)
            case ast.Add() | ast.Sub(), _, int(number):
                return self._plus(left, number if isinstance(op, ast.Add) else -number)
            case ast.Mod(), _, _ if _below(left, right):
                return left
        if not (left.ranged or right.ranged):
            distance = _distance(left, right)
            match op:
                case ast.Sub() if distance is not None:
                    return self._constant(distance)
                case ast.FloorDiv() if distance == -1 or _below(left, right):
                    return self._constant(0)
                case ast.Mod() if right.constant == 1:
                    return self._constant(0)
        return self._made(left, op, right, _interval(left.interval, op, right.interval))

    def _plus(self, value: _Value, number: int) -> _Value:
        base, already = _split(value)
        total = already + number
        if base is None:
            return self._constant(total)
        if total == 0:
            return base
        low, high = base.interval
        op = ast.Add() if total > 0 else ast.Sub()
        return self._made(base, op, self._constant(abs(total)), Interval(low + total, high + total))


class _Namer(_Rewriter):
    """Prints values, those that are used more than once under a name from where they are first."""

    def __init__(self, folder: _Folder, body: list[ast.stmt]) -> None:
        self._taken = folder.names
        self._uses: Counter[_Value] = Counter()
        self._count(body)
        self._names: dict[_Value, str] = {}
        self._pending: list[ast.stmt] = []
        self._number = 0

    def _count(self, body: Iterable[ast.AST]) -> None:
        pending = list(body)
        while pending:
            node = pending.pop()
            if isinstance(node, _Value):
                self._uses[node] += 1
                if self._uses[node] == 1:
                    pending += node.parts
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, _Value)):  # is used where its name is
                pending += ast.iter_child_nodes(node)

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Statements; a name is known to the end of the block that it is given in."""
        before, done = dict(self._names), []
        for statement in body:
            index = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(index, _Value) and not self._uses[index]:
                continue
            outer, self._pending = self._pending, []
            self.parts(statement)
            done += self._pending
            self._pending = outer
            self.blocks(statement)
            if not isinstance(index, _Value):
                done.append(statement)
        self._names = before
        return done

    def visit(self, node: ast.AST) -> Any:
        if not isinstance(node, _Value):
            return super().generic_visit(node)
        if node in self._names:
            return ast.Name(self._names[node], ast.Load())
        printed = node.printed([self.visit(part) for part in node.parts])
        if self._uses[node] < 2 or isinstance(printed, (ast.Name, ast.Constant)):
            return printed
        while f"shared_{self._number}" in self._taken:
            self._number += 1
        name = self._names[node] = f"shared_{self._number}"
        self._number += 1
        self._pending.append(ast.Assign([ast.Name(name, ast.Store())], printed, lineno=0))
        return ast.Name(name, ast.Load())


def _stored(body: Iterable[ast.stmt]) -> Iterator[str]:
    """The names that statements assign to, as often as they do."""
    for statement in body:
        for target in (*getattr(statement, "targets", ()), getattr(statement, "target", None)):
            if target is not None:
                yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
        for field in _BLOCKS:
            yield from _stored(getattr(statement, field, ()))


def _range(node: ast.expr) -> Interval | None:
    """Where the elements of an ``arange`` lie, or of one that has been given more dimensions of size 1."""
    match node:
        case ast.Subscript(value=call, slice=index) if _only_widens(index):
            return _range(call)
        case ast.Call(
            func=ast.Attribute(attr="arange"), args=[ast.Constant(value=int(first)), ast.Constant(value=int(last))]
        ):
            return Interval(first, last - 1)
    return None


def _only_widens(index: ast.AST) -> bool:
    """Whether a subscript does nothing but add dimensions of size 1: ``[None, ::]``."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return all(
        (isinstance(part, ast.Constant) and part.value is None)
        or (isinstance(part, ast.Slice) and part.lower is part.upper is part.step is None)
        for part in parts
    )


def _holds(condition: _Value) -> bool:
    """Whether a condition always holds."""
    match condition.op, condition.parts:
        case ast.Lt(), (left, right):
            remainder = isinstance(left.op, ast.Mod) and left.parts[1] is right
            return remainder or left.interval.high < right.interval.low
        case ast.GtE(), (left, right):
            return left.interval.low >= right.interval.high
    return False


def _below(left: _Value, right: _Value) -> bool:
    """Whether ``0 <= left < right``."""
    return left.interval.low >= 0 and left.interval.high < right.interval.low


def _split(value: _Value) -> tuple[_Value | None, int]:
    """What a number is added to, and the number."""
    if value.constant is not None:
        return None, value.constant
    match value.op, value.parts:
        case ast.Add() | ast.Sub() as op, (base, right) if right.constant is not None:
            return base, right.constant if isinstance(op, ast.Add) else -right.constant
    return value, 0


def _distance(left: _Value, right: _Value) -> int | None:
    """``left - right``, if that is known."""
    (first, more), (second, less) = _split(left), _split(right)
    return more - less if first is second else None


def _interval(left: Interval, op: ast.operator, right: Interval) -> Interval:
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
