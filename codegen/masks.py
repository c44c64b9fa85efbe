"""Leaving out of generated Triton source what its masks test in vain.

ninetoothed masks every access by every condition of its tiling: that an index is not negative, that ``arange(0, 64)``
is below 64. Here each integer gets the interval that it lies in, as far as that is known, and a condition that always
holds is dropped. A third of the time to compile a kernel goes into such conditions. Sizes and strides are not negative,
and no index overflows: launches are cut so that they do not. Imports neither the package nor torch (see `aot_worker`).
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from typing import NamedTuple

_ARGUMENT = re.compile(r"ninetoothed_.*_(size|stride)_\d+")


class Interval(NamedTuple):
    """Integers from `low` to `high`, both included."""

    low: float
    high: float


ANY = Interval(-math.inf, math.inf)
NATURAL = Interval(0, math.inf)


def simplify(source: str) -> str:
    """`source`, the text of a module that ninetoothed generated, with the masks that are needed."""
    tree = ast.parse(source)
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.decorator_list:  # a kernel, not its launch
            _Simplifier(function).visit(function)
    return ast.unparse(tree) + "\n"


class _Simplifier(ast.NodeTransformer):
    def __init__(self, function: ast.FunctionDef) -> None:
        self.known: dict[str, Interval] = {}
        stored = (n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        self.once = {name for name, count in Counter(stored).items() if count == 1}
        for argument in function.args.args:
            if _ARGUMENT.fullmatch(argument.arg) and argument.arg not in self.once:
                self.known[argument.arg] = NATURAL

    # --- what is known of names

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        match node.targets:
            case [ast.Name(id=name)] if name in self.once:
                self.known[name] = self.interval(node.value)
        return node

    def visit_For(self, node: ast.For) -> ast.AST:
        match node:
            case ast.For(
                target=ast.Name(id=name), iter=ast.Call(func=ast.Name(id="range"), args=[stop], keywords=[])
            ) if name in self.once:
                self.known[name] = Interval(0, self.interval(stop).high - 1)
        self.generic_visit(node)
        return node

    # --- expressions

    def interval(self, node: ast.AST) -> Interval:
        """Where an integer expression, or each element of one, lies."""
        match node:
            case ast.Constant(value=int(value)) if not isinstance(value, bool):
                return Interval(value, value)
            case ast.Name(id=name):
                return self.known.get(name, ANY)
            case ast.Subscript(value=ast.Call() as call, slice=index) if _only_widens(index):
                return self.interval(call)
            case ast.Call(func=ast.Attribute(attr="program_id")):
                return NATURAL
            case ast.Call(
                func=ast.Attribute(attr="arange"), args=[ast.Constant(value=int(first)), ast.Constant(value=int(last))]
            ):
                return Interval(first, last - 1)
            case ast.BinOp(left=left, op=op, right=right):
                return _combined(op, self.interval(left), self.interval(right))
        return ANY

    def _holds(self, node: ast.AST) -> bool:
        """Whether a condition always holds."""
        match node:
            case ast.Constant(value=True):
                return True
            case ast.Compare(left=left, ops=[ast.Lt()], comparators=[right]):
                return self.interval(left).high < self.interval(right).low
            case ast.Compare(left=left, ops=[ast.GtE()], comparators=[right]):
                return self.interval(left).low >= self.interval(right).high
        return False

    def _needed(self, node: ast.expr) -> list[ast.expr]:
        """The conditions of a conjunction that may fail, each once."""
        pending: list[ast.expr] = [node]
        found: dict[str, ast.expr] = {}
        while pending:
            match pending.pop():
                case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                    pending += [right, left]
                case condition:
                    condition = _Folded().visit(condition)
                    if not self._holds(condition):
                        found.setdefault(ast.dump(condition), condition)
        return list(found.values())

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node.func:
            case ast.Attribute(attr="load" | "store"):
                keywords = {keyword.arg: keyword for keyword in node.keywords}
                if "mask" in keywords:
                    needed = self._needed(keywords["mask"].value)
                    if needed:
                        keywords["mask"].value = _conjunction(needed)
                    else:  # `other` is what is read where the mask is False
                        node.keywords = [each for each in node.keywords if each.arg not in ("mask", "other")]
        return node


class _Folded(ast.NodeTransformer):
    """Integers with what is added, and what is multiplied by 0 or 1, worked out: ``size - 1 + 1`` is ``size``."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.BinOp(op=ast.Mult(), left=left, right=ast.Constant(value=int(number))) if number in (0, 1):
                return left if number else node.right
            case ast.BinOp(op=ast.Mult(), left=ast.Constant(value=0)):
                return node.left
            case ast.BinOp(op=ast.Add(), left=ast.Constant(value=0), right=right):
                return right
            case ast.BinOp(op=ast.Add() | ast.Sub() as op, left=left, right=ast.Constant(value=int(number))):
                total = number if isinstance(op, ast.Add) else -number
                match left:
                    case ast.Constant(value=int(other)):
                        return ast.Constant(other + total)
                    case ast.BinOp(op=ast.Add() | ast.Sub() as op, left=inner, right=ast.Constant(value=int(other))):
                        left, total = inner, total + (other if isinstance(op, ast.Add) else -other)
                if total == 0:
                    return left
                return ast.BinOp(left, ast.Add() if total > 0 else ast.Sub(), ast.Constant(abs(total)))
        return node


def _only_widens(index: ast.AST) -> bool:
    """Whether a subscript does nothing but add dimensions of size 1: ``[None, ::]``."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return all(
        (isinstance(part, ast.Constant) and part.value is None)
        or (isinstance(part, ast.Slice) and part.lower is part.upper is part.step is None)
        for part in parts
    )


def _combined(op: ast.operator, left: Interval, right: Interval) -> Interval:
    """The interval of ``left op right``. Triton divides towards zero, so that is followed for natural numbers alone."""
    natural = left.low >= 0 and right.low >= 0
    match op:
        case ast.Add():
            return Interval(left.low + right.low, left.high + right.high)
        case ast.Sub():
            return Interval(left.low - right.high, left.high - right.low)
        case ast.Mult() if natural:
            return Interval(left.low * right.low, _times(left.high, right.high))
        case ast.FloorDiv() if natural:
            return Interval(0, left.high if math.isinf(left.high) else left.high // max(right.low, 1))
        case ast.Mod() if natural:
            return Interval(0, min(left.high, right.high - 1))
    return ANY


def _times(left: float, right: float) -> float:
    return 0 if 0 in (left, right) else left * right


def _conjunction(conditions: list[ast.expr]) -> ast.expr:
    result: ast.expr = ast.Constant(
        True
    )  # as ninetoothed begins: without it Triton's interpreter takes a mask for integers
    for condition in conditions:
        result = ast.BinOp(result, ast.BitAnd(), condition)
    return result
