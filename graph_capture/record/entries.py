"""The things that a recording relies on and that can change: what each was, and how to see what it is."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import numpy
import torch

from graph_capture.calls.structure import VALUES
from graph_capture.record.words import Words


class _Missing:
    def __repr__(self) -> str:
        return "absent"


MISSING = _Missing()


class Entry(Protocol):
    """One thing that can change.

    Attributes:
        path: what it is called.
    """

    path: str

    def difference(self) -> tuple[str, Any, Any] | None:
        """What changed: its name, what it was and what it is; None where it is as it was."""

    def watch(self, words: Words) -> None:
        """Let `words` show whether it was touched; an entry for which none can is compared at each call."""

    def lines(self) -> list[tuple[str, Any]]:
        """What it holds, by name."""


def equal(now: Any, before: Any) -> bool:
    """Whether a value can stand for another: it is the same object, or a plain value of the same type that is equal."""
    if now is before:
        return True
    kind = type(before)
    if type(now) is not kind:
        return False
    if kind is float or kind is complex:
        return repr(now) == repr(before)
    if kind is tuple or kind is frozenset:
        return len(now) == len(before) and all(map(equal, now, before))
    if kind is slice:
        return all(map(equal, (now.start, now.stop, now.step), (before.start, before.stop, before.step)))
    if isinstance(before, (*VALUES, numpy.generic, range)):
        return bool(now == before)
    if kind is types.MethodType:
        return now.__self__ is before.__self__ and now.__func__ is before.__func__
    return False


class Table:
    """What lies under the keys of a dict: under all of them (`whole`), in their order, or under some."""

    __slots__ = ("ignored", "keys", "path", "table", "values", "whole")

    def __init__(
        self,
        table: dict[Any, Any],
        path: str,
        keys: tuple[Any, ...],
        values: tuple[Any, ...],
        *,
        whole: bool,
        ignored: Collection[Any] = (),
    ) -> None:
        self.table, self.path, self.keys, self.values = table, path, keys, values
        self.whole, self.ignored = whole, ignored

    def changes(self) -> Iterator[tuple[Any, Any, Any]]:
        """The keys under which something else lies, with what it was and what it is."""
        table = self.table
        for key, before in zip(self.keys, self.values, strict=True):
            now = dict.get(table, key, MISSING)
            if now is not before and not equal(now, before):
                yield key, before, now
        if self.whole and dict.__len__(table) != len(self.keys):
            for key in tuple(dict.keys(table)):
                if key not in self.keys and key not in self.ignored:
                    yield key, MISSING, dict.get(table, key)

    def difference(self) -> tuple[str, Any, Any] | None:
        table = self.table
        found = next(self.changes(), None)
        if found is not None:
            return self.named(found[0]), *found[1:]
        if self.whole and not self.ignored and tuple(dict.keys(table)) != self.keys:
            return f"the order in {self.path or 'a dict'}", self.keys, tuple(dict.keys(table))
        return None

    def watch(self, words: Words) -> None:
        words.table(self.table)

    def without(self, keys: Collection[Any]) -> None:
        """Do not look at these keys any more."""
        kept = [(key, value) for key, value in zip(self.keys, self.values, strict=True) if key not in keys]
        self.keys, self.values = tuple(key for key, _ in kept), tuple(value for _, value in kept)
        self.ignored = {*self.ignored, *keys}

    def named(self, key: Any) -> str:
        """What lies under a key, in words."""
        if not isinstance(key, str):
            return f"{self.path}[{key!r}]"
        return f"{self.path}.{key}" if self.path else key

    def lines(self) -> list[tuple[str, Any]]:
        return [(self.named(key), value) for key, value in zip(self.keys, self.values, strict=True)]


class Instance:
    """The class of an object, and the dict of its attributes as a whole."""

    __slots__ = ("kind", "own", "path", "value")

    def __init__(self, value: Any, own: dict[str, Any] | None, path: str) -> None:
        self.value, self.kind, self.own, self.path = value, type(value), own, path

    def difference(self) -> tuple[str, Any, Any] | None:
        if type(self.value) is not self.kind:
            return f"the class of {self.path or 'the module'!r}", self.kind, type(self.value)
        if self.own is not None and object.__getattribute__(self.value, "__dict__") is not self.own:
            return f"the attributes of {self.path!r} as a whole", self.own, vars(self.value)
        return None

    def watch(self, words: Words) -> None:
        words.instance(self.value, self.own)

    def lines(self) -> list[tuple[str, Any]]:
        return []


class Cell:
    """A variable of a closure."""

    __slots__ = ("cell", "path", "value")

    def __init__(self, cell: types.CellType, path: str) -> None:
        self.cell, self.path, self.value = cell, path, contents_of(cell)

    def difference(self) -> tuple[str, Any, Any] | None:
        now = contents_of(self.cell)
        return None if equal(now, self.value) else (self.path, self.value, now)

    def watch(self, words: Words) -> None:
        words.cell(self.cell)

    def lines(self) -> list[tuple[str, Any]]:
        return [(self.path, self.value)]


class Function:
    """What a function is made of."""

    __slots__ = ("function", "parts", "path")

    def __init__(self, function: types.FunctionType, path: str) -> None:
        self.function, self.path, self.parts = function, path, _made_of(function)

    def difference(self) -> tuple[str, Any, Any] | None:
        now = _made_of(self.function)
        what = next((what for what in now if now[what] is not self.parts[what]), None)
        if what is None or (what != "code" and equal(now[what], self.parts[what])):
            return None
        return f"the {what} of {self.path}", self.parts[what], now[what]

    def watch(self, words: Words) -> None:
        words.function(self.function)

    def lines(self) -> list[tuple[str, Any]]:
        return [(f"the code of {self.path}", self.parts["code"])]


class Items:
    """What a list, a deque or a set holds."""

    __slots__ = ("items", "path", "value")

    def __init__(self, value: Any, items: tuple[Any, ...], path: str) -> None:
        self.value, self.items, self.path = value, items, path

    def difference(self) -> tuple[str, Any, Any] | None:
        value, items = self.value, self.items
        if len(value) == len(items) and all(map(operator.is_, value, items)):
            return None
        if isinstance(value, set):
            return None if value == set(items) else (f"what {self.path} holds", items, tuple(value))
        for index, (now, before) in enumerate(zip(value, items, strict=False)):
            if not equal(now, before):
                return f"{self.path}[{index}]", before, now
        if len(value) != len(items):
            return f"the length of {self.path}", len(items), len(value)
        return None

    def watch(self, words: Words) -> None:
        words.unsure = True

    def lines(self) -> list[tuple[str, Any]]:
        return [(f"the length of {self.path}", len(self.items))]


class Probe:
    """What a function of ours reads."""

    __slots__ = ("path", "read", "value")

    def __init__(self, read: Callable[[], Any], path: str) -> None:
        self.read, self.path, self.value = read, path, read()

    def difference(self) -> tuple[str, Any, Any] | None:
        now = self.read()
        return None if equal(now, self.value) else (self.path, self.value, now)

    def watch(self, words: Words) -> None:
        words.unsure = True

    def lines(self) -> list[tuple[str, Any]]:
        return [(self.path, self.value)]


def contents_of(cell: types.CellType) -> Any:
    """What a cell holds; `MISSING` for an empty one."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _made_of(function: types.FunctionType) -> dict[str, Any]:
    return {
        "code": function.__code__,
        "defaults": function.__defaults__,
        "keyword defaults": function.__kwdefaults__,
    }


def text(value: Any) -> str:
    """A value in a message: short, and without running code of the user's for its text."""
    if isinstance(value, torch.Tensor):
        address = value.data_ptr() if value.layout == torch.strided and not value.is_meta else 0
        return f"a {type(value).__name__} at {address:#x}"
    if value is MISSING or isinstance(value, (*VALUES, numpy.generic, slice, range)):
        shown = repr(value)
        return shown if len(shown) <= 80 else shown[:77] + "..."
    if isinstance(value, tuple) and len(value) <= 8:
        return f"({', '.join(map(text, value))})"
    name = getattr(value, "__qualname__", None)
    return f"{name}" if isinstance(name, str) else f"a {type(value).__name__}"
