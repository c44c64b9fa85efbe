"""Making Triton source that ninetoothed generated say each thing once, and nothing that is not needed.

ninetoothed writes every access out: where it is, from the program's id on, and every condition of its tiling, that an
index is not negative, that ``arange(0, 64)`` is below 64, that a program is one of the grid. Compiling that takes half
as long again. Here the arithmetic of integers is worked out (see `values`), a condition that always holds is dropped,
so is an argument that nothing needs any more, and an expression that is there more than once gets a name.
"""

from __future__ import annotations

import ast
import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from .values import ANY, NATURAL, Interval, Term, Value, Values

_ARGUMENT = re.compile(r"ninetoothed_.*_(size|stride)_\d+")
_BLOCKS = ("body", "orelse")
_INDEX = re.compile(r"ninetoothed_(pid|.*_index_\d+|.*_pointers)")


def simplify(tree: ast.Module) -> None:
    """Simplify the kernel of a module that ninetoothed generated, in place, and what its launch hands to it."""
    kernel, launch = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    (call,) = (node for node in ast.walk(launch) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript))
    folder = _Folder(kernel, call)
    kernel.body = folder.block(kernel.body)
    kernel.body = _Namer(folder, kernel.body).block(kernel.body)
    _drop_arguments(kernel, call)


def _drop_arguments(kernel: ast.FunctionDef, call: ast.Call) -> None:
    """Drop the sizes and strides that a kernel does not look at."""
    used = {node.id for statement in kernel.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    arguments = zip(kernel.args.args, call.args, strict=True)
    kept = [pair for pair in arguments if pair[0].arg in used or not _ARGUMENT.fullmatch(pair[0].arg)]
    kernel.args.args, call.args = [argument for argument, _ in kept], [value for _, value in kept]


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

    def __init__(self, function: ast.FunctionDef, call: ast.Call) -> None:
        stored = Counter(_stored(function.body))
        self.names = set(stored)
        self.changing = {name for name, count in stored.items() if count > 1}
        self._values = Values()
        self._known: dict[str, Interval] = {}  # of names that are not computed of others
        self._meaning: dict[str, Value] = {}
        self._single = True  # whether ``arange(0, 1)`` is taken for 0
        self._programs = self._grid(call)

    def _grid(self, call: ast.Call) -> Term | None:
        """How many programs `call` starts, if that is known: ``kernel[lambda meta: (x.size(0),)](...)``."""
        match call.func:
            case ast.Subscript(slice=ast.Lambda(body=ast.Tuple(elts=[programs]))):
                found = self.value(_Sizes().visit(copy.deepcopy(programs)))
                return None if found is None else found.factors
        return None

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Statements; an assignment of an index to a name is a `Value` of its own."""
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
        result: ast.expr = self._values.constant(True)
        for condition in needed:
            if isinstance(result, Value) and isinstance(condition, Value):
                result = self._values.made(result, ast.BitAnd(), condition)
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
        return [] if found is not None and found.holds else [found or self.visit(node)]

    # --- integers

    def value(self, node: ast.expr) -> Value | None:
        """The value of an expression of integers; None where it has parts that change, or are loaded."""
        match node:
            case Value():
                return node
            case ast.Constant(value=int(number)):
                return self._values.constant(number)
            case ast.Name(id=name):
                if name in self._meaning:
                    return self._meaning[name]
                natural = _ARGUMENT.fullmatch(name) and name not in self.names
                interval = NATURAL if natural else self._known.get(name, ANY)
                return None if name in self.changing else self._values.leaf(name, node, interval)
            case ast.BinOp(left=left, op=op, right=right):
                first, second = self.value(left), self.value(right)
                return None if first is None or second is None else self._values.combined(first, op, second)
            case ast.Compare(left=left, ops=[comparison], comparators=[right]):
                first, second = self.value(left), self.value(right)
                return None if first is None or second is None else self._values.made(first, comparison, second)
            case ast.Call(func=ast.Attribute(attr="program_id")):
                bound = self._programs if ast.unparse(node.args[0]) == "0" else None
                if bound == Term(1):
                    return self._values.constant(0)
                return self._values.leaf(ast.unparse(node), node, NATURAL, bound=bound)
            case ast.Call() | ast.Subscript(value=ast.Call()) if (bounds := _range(node)) is not None:
                if bounds == Interval(0, 0) and self._single:
                    return self._values.constant(0)
                return self._values.leaf(ast.unparse(node), node, bounds, ranged=bounds.low < bounds.high)
        return None


class _Sizes(ast.NodeTransformer):
    """Calls by the name that a kernel knows a size or a stride by: ``x.size(0)`` is ``ninetoothed_x_size_0``."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        match node:
            case ast.Call(func=ast.Attribute(ast.Name(tensor), method), args=[ast.Constant(int(dim))]):
                return ast.Name(f"ninetoothed_{tensor}_{method}_{dim}", ast.Load())
        return node


class _Namer(_Rewriter):
    """Prints values, those that are used more than once under a name from where they are first."""

    def __init__(self, folder: _Folder, body: list[ast.stmt]) -> None:
        self._taken = folder.names
        self._uses: Counter[Value] = Counter()
        self._count(body)
        self._names: dict[Value, str] = {}
        self._pending: list[ast.stmt] = []
        self._number = 0

    def _count(self, body: Iterable[ast.AST]) -> None:
        pending = list(body)
        while pending:
            node = pending.pop()
            if isinstance(node, Value):
                self._uses[node] += 1
                if self._uses[node] == 1:
                    pending += node.parts
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, Value)):  # is used where its name is
                pending += ast.iter_child_nodes(node)

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Statements; a name is known to the end of the block that it is given in."""
        before, done = dict(self._names), []
        for statement in body:
            index = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(index, Value) and not self._uses[index]:
                continue
            outer, self._pending = self._pending, []
            self.parts(statement)
            done += self._pending
            self._pending = outer
            self.blocks(statement)
            if not isinstance(index, Value):
                done.append(statement)
        self._names = before
        return done

    def visit(self, node: ast.AST) -> Any:
        if not isinstance(node, Value):
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
