"""What code can read outside a call's arguments, as it was when it was first seen.

A `State` goes over everything that hangs together with a value: what modules, objects, containers, closures and
classes hold, of any kind, absent names included. Each thing that can change is an `Entry`, which knows what it was and
finds what it is now. Functions count by identity until they run (see `graph_capture.record.reads`), and so do tensors,
whose data is read anew at each replay.
"""

from __future__ import annotations

import array
import collections
import contextvars
import enum
import functools
import gc
import io
import operator
import os
import random
import sys
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy
import torch

from graph_capture.calls.foreign import LIBRARIES, is_module
from graph_capture.calls.structure import VALUES, slots_of
from graph_capture.record.entries import MISSING, Cell, Entry, Function, Instance, Items, Probe, Table, contents_of

LARGE = 10_000  # a dict that holds more (a vocabulary) counts by identity and length
BUDGET = 200_000  # values that are looked at in all
_ATOMS = frozenset(
    {*VALUES, float, slice, range, type(...), types.BuiltinFunctionType, types.CodeType, types.ModuleType}
)
_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_HOOKS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_INTERNAL = frozenset(vars(torch.nn.Module()))
_BUFFERS = (bytearray, array.array, memoryview)
# Their instances change by themselves, or nothing that is computed depends on them.
_CLOSED = {"torch", "logging", "threading", "_thread", "io", "_io", "socket", "asyncio", "multiprocessing"}
_CLOSED |= {
    "concurrent",
    "queue",
    "abc",
    "typing",
    "ast",
    "inspect",
    "re",
    "warnings",
    "unittest",
    "builtins",
    "ctypes",
}
_CLOSED |= (
    LIBRARIES.keys()
    | {"numpy", "triton", "ninetoothed", "graph_capture"}
    | {"weakref", "_weakref", "importlib", "_frozen_importlib", "_frozen_importlib_external"}
)


def package_of(kind: Any) -> str:
    """The top-level package that a class or a function comes from."""
    return str(getattr(kind, "__module__", "")).partition(".")[0]


class State:
    """What was seen.

    Args:
        skipped: ids of objects that a call brings along, and of cells and names that are part of its signature.

    Attributes:
        entries: what can change.
        tensors: the tensors that were met, by their ids, and where.
        generators: of random numbers; what is drawn from them no replay draws.
        seen: everything that was gone over, by id.
    """

    def __init__(self, skipped: Iterable[Any] = ()) -> None:
        self.entries: list[Entry] = []
        self.generators: list[Entry] = []
        self.frames: dict[int, types.GeneratorType[Any, Any, Any]] = {}  # of Python's generators, by the frame's id
        self.tensors: dict[int, tuple[torch.Tensor, str]] = {}
        self.seen: dict[int, Any] = {}
        self._skipped = set(skipped)
        self._budget = BUDGET
        self._names: set[tuple[int, Any]] = set()
        self._read: set[Any] = set()  # names of attributes, of objects and in the code that ran

    def differences(self) -> list[tuple[str, Any, Any]]:
        """What has changed since it was seen: its name, what it was and what it is."""
        return [found for entry in self.entries if (found := entry.difference()) is not None]

    def without(self, names: Collection[tuple[int, str]]) -> None:
        """Do not look at these names, given as (the id of a dict, the name), any more."""
        for entry in self.entries:
            if isinstance(entry, Table):
                dropped = [name for table, name in names if table == id(entry.table)]
                if dropped:
                    entry.without(dropped)

    def see(self, value: Any, path: str) -> None:
        """Go over `value` and what hangs together with it."""
        pending = [(value, path)]
        while pending and self._budget > 0:
            value, path = pending.pop()
            if type(value) in _ATOMS or id(value) in self.seen or id(value) in self._skipped:
                continue
            self.seen[id(value)] = value
            self._budget -= 1
            pending += reversed([*self._parts(value, path)])

    def name(self, table: dict[str, Any], name: str, path: str | None = None) -> Any:
        """Note what lies under one name of a large table (globals); returns it, or `MISSING`."""
        value = dict.get(table, name, MISSING)
        if (id(table), name) not in self._names and (id(table), name) not in self._skipped:
            self._names.add((id(table), name))
            self.entries.append(Table(table, path or "", (name,), (value,), whole=False))
        return value

    def is_signed(self, name: Any) -> bool:
        """Whether a cell (by its id) or a name (by the id of its dict, and itself) is part of the call's signature."""
        return name in self._skipped

    def function(self, function: types.FunctionType, path: str) -> None:
        """Note what a function that runs is made of: its code, its defaults, its closure, its attributes."""
        self.seen[id(function)] = function
        self._read.update(function.__code__.co_names, [c for c in function.__code__.co_consts if type(c) is str])
        self.entries.append(Function(function, path))
        for index, default in enumerate(function.__defaults__ or ()):
            self.see(default, f"default {index} of {path}")
        if function.__kwdefaults__:
            self.see(function.__kwdefaults__, f"defaults of {path}")
        if vars(function):
            self.see(vars(function), path)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            if id(cell) not in self.seen and id(cell) not in self._skipped:
                self.seen[id(cell)] = cell
                entry = Cell(cell, name)
                self.entries.append(entry)
                self.see(entry.value, name)

    def probe(self, read: Any, path: str) -> None:
        """Note what `read()` gives."""
        self.entries.append(Probe(read, path))

    # --- what a value is made of

    def _parts(self, value: Any, path: str) -> Iterable[tuple[Any, str]]:
        """Note what of `value` itself can change; gives what it holds."""
        kind: Any = type(value)
        if isinstance(value, os._Environ):  # the variables that are read are noted where they are
            return ()
        if isinstance(value, torch.Tensor):
            self.tensors[id(value)] = (value, path)
            return self._table(vars(value), path) if vars(value) else ()
        if isinstance(value, torch.nn.Module) or is_module(value):
            return self._module(value, path)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, (list, tuple, collections.deque, set, frozenset)):
            return self._items(value, path)
        if isinstance(value, dict):
            return self._dict(value, path)
        if isinstance(value, types.MethodType):
            return [(value.__self__, path), (value.__func__, path)]
        if isinstance(value, functools.partial):
            return [(value.func, path), (value.args, path), (value.keywords, path)]
        if isinstance(value, types.FunctionType):
            return self._wrapped(value, path)
        if isinstance(value, enum.Enum):
            return ()
        if isinstance(value, contextvars.ContextVar):
            self.probe(functools.partial(value.get, MISSING), path)
        elif isinstance(value, (numpy.ndarray, *_BUFFERS)):
            self.probe(functools.partial(content, value), path)
        elif isinstance(value, weakref.ref):
            return [(value(), path)]
        elif isinstance(value, types.MappingProxyType):
            return self._dict(gc.get_referents(value)[0], path)
        elif isinstance(value, io.IOBase):
            self.probe(functools.partial(place_in, value), f"the position of {path}")
        elif isinstance(value, types.GeneratorType):
            self.frames[id(value.gi_frame)] = value
        elif hasattr(kind, "__next__") and not kind.__dictoffset__:
            self.probe(functools.partial(position, value), f"the position of {path}")
        elif (drawn := drawn_from(value)) is not None:
            self.generators.append(Probe(drawn, f"the random numbers of {path}"))
        elif package_of(kind) not in _CLOSED:
            return self._instance(value, path)
        return ()

    def _table(self, table: dict[Any, Any], path: str, internal: bool = False) -> list[tuple[Any, str]]:
        keys, values = tuple(dict.keys(table)), tuple(dict.values(table))
        self._read.update(keys)
        self.entries.append(Table(table, path, keys, values, whole=True))
        if type(table) is collections.OrderedDict and keys:  # its order is kept beside the dict
            self.probe(functools.partial(tuple, table), f"the order of {path}")
        return [] if internal else [(part, join(path, key)) for key, part in zip(keys, values, strict=True)]

    def _dict(self, value: dict[Any, Any], path: str) -> list[tuple[Any, str]]:
        if len(value) > LARGE:
            self.probe(value.__len__, f"the length of {path}")
            return []
        more = [] if type(value) in (dict, collections.OrderedDict) else [*self._own(value, path)]
        return self._table(value, path) + more

    def _items(self, value: Any, path: str) -> list[tuple[Any, str]]:
        if len(value) > LARGE:
            self.probe(value.__len__, f"the length of {path}")
            return []
        items = tuple(value)
        if not isinstance(value, (tuple, frozenset)):
            self.entries.append(Items(value, items, path))
        more = [] if type(value) in (list, tuple, collections.deque, set, frozenset) else [*self._own(value, path)]
        return [(item, f"{path}[{index}]") for index, item in enumerate(items)] + more

    def _instance(self, value: Any, path: str) -> list[tuple[Any, str]]:
        return [*self._own(value, path), (type(value), "")]

    def _own(self, value: Any, path: str) -> list[tuple[Any, str]]:
        """The attributes of an instance."""
        kind: Any = type(value)
        own = getattr(value, "__dict__", None) if kind.__dictoffset__ else None
        own = own if type(own) is dict else None
        self.entries.append(Instance(value, own, path))
        parts = self._table(own, path) if own is not None else []
        if slots := slots_of(kind):
            self.probe(functools.partial(_slotted, value, slots), f"the slots of {path}")
            parts += [(part, join(path, slot)) for slot, part in zip(slots, _slotted(value, slots), strict=True)]
        return parts

    def _wrapped(self, function: types.FunctionType, path: str) -> list[tuple[Any, str]]:
        """What a function of the standard library holds that stands for the user's (a dispatcher, a wrapper)."""
        if package_of(function) not in sys.stdlib_module_names and not hasattr(function, "__wrapped__"):
            return []
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
        return [(contents_of(cell), join(path, name)) for name, cell in cells]

    def namespace(self, table: dict[str, Any], path: str) -> None:
        """Note all names of a Python module: the code finds some of them at run time."""
        if id(table) not in self.seen:
            self.seen[id(table)] = table
            keys = tuple(key for key in dict.keys(table) if not key.startswith("__"))
            values = tuple(table[key] for key in keys)
            dunder = {key for key in dict.keys(table) if key.startswith("__")}
            self.entries.append(Table(table, path, keys, values, whole=True, ignored=dunder))

    def _module(self, module: Any, path: str) -> list[tuple[Any, str]]:
        own = vars(module)
        self.entries.append(Instance(module, own, path))
        parts = [item for item in self._table(own, path) if item[1].rpartition(".")[2] not in _INTERNAL]
        for name in _TABLES:
            table = own.get(name)
            if isinstance(table, dict) and id(table) not in self.seen:
                self.seen[id(table)] = table
                hooks = name.endswith("hooks")
                parts += self._table(table, f"{name.strip('_')} of {path!r}" if hooks else path)
                if hooks and table:
                    for more in _HOOKS:
                        if isinstance(own.get(more), dict):
                            parts += self._table(own[more], f"{more.strip('_')} of {path!r}")
        if isinstance(module, torch.jit.ScriptModule):
            self.probe(functools.partial(scripted, module), f"what the script {path!r} holds")
        return [*parts, (type(module), "")]

    def _class(self, kind: type) -> list[tuple[Any, str]]:
        """What a class and its bases hold; of torch's own classes only what lies in them."""
        parts: list[tuple[Any, str]] = [(type(kind), "")] if type(kind) is not type else []
        for base in kind.__mro__:
            own = package_of(base) not in _CLOSED
            ours = own or (package_of(base) == "torch" and issubclass(base, torch.nn.Module))
            if not ours or (base is not kind and id(base) in self.seen):
                continue
            self.seen[id(base)] = base
            table = gc.get_referents(base.__dict__)[0]
            if type(table) is not dict:
                continue
            ignored = _OF_CLASSES if own else _OF_CLASSES | _PATCHED
            keys = tuple(key for key in table if key not in ignored)
            values = tuple(table[key] for key in keys)
            if not own:
                ignored = _Unread(ignored, self._read, tuple(other for other in kind.__mro__ if other is not base))
            self.entries.append(Table(table, base.__qualname__, keys, values, whole=True, ignored=ignored))
            for key in keys:
                part = table[key]
                if isinstance(part, types.FunctionType):
                    self.seen[id(part)] = part
                elif own and not key.startswith("__") and not isinstance(part, (property, staticmethod, classmethod)):
                    parts.append((part, f"{base.__qualname__}.{key}"))
        return parts


class _Unread(frozenset[str]):
    """Names that nobody misses in a class of torch's, and all that nobody reads: other libraries add helpers to it."""

    _read: set[Any]
    _others: tuple[type, ...]

    def __new__(cls, names: Iterable[str], read: set[Any], others: tuple[type, ...]) -> _Unread:
        made = super().__new__(cls, names)
        made._read, made._others = read, others
        return made

    def __contains__(self, name: object) -> bool:
        known = name in self._read or any(name in other.__dict__ for other in self._others)
        return not known or super().__contains__(name)


_OF_CLASSES = frozenset({"__slotnames__", "__annotations__", "__annotate__", "__doc__", "__weakref__", "__dict__"})
# What torch.compile changes of torch's modules; no forward looks at it.
_PATCHED = frozenset({"__init__", "__setstate__", "___needs_generation_tag_patch"})
_OF_CLASSES |= {"__abstractmethods__", "_abc_impl", "__annotations_cache__", "__static_attributes__"}


def _slotted(value: Any, slots: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple([getattr(value, slot, MISSING) for slot in slots])


def join(path: str, name: Any) -> str:
    """How a part of what lies at `path` is called."""
    if isinstance(name, str) and name.isidentifier():
        return f"{path}.{name}" if path else name
    return f"{path}[{name!r}]" if not isinstance(name, str) else f"{path}.{name}" if path else name


def content(value: Any) -> tuple[Any, ...]:
    """What an array or a buffer holds."""
    if isinstance(value, numpy.ndarray):
        plain = value.dtype.hasobject
        return (value.shape, value.strides, value.dtype.str, tuple(value.flat) if plain else value.tobytes())
    return (bytes(value),)


def place_in(file: io.IOBase) -> Any:
    """Where in a file the next read or write is; what lies in it where that is in memory."""
    if isinstance(file, (io.StringIO, io.BytesIO)) and not file.closed:
        return file.tell(), file.getvalue()
    try:
        return file.tell() if file.seekable() else None
    except (OSError, ValueError):
        return None


def position(iterator: Any) -> Any:
    """How far an iterator is, as far as that can be told without moving it."""
    left = operator.length_hint(iterator, -1)
    return left if left >= 0 else repr(iterator)


def drawn_from(value: Any) -> Callable[[], Any] | None:
    """How to read the state of a generator of random numbers that is not torch's; None for anything else."""
    if isinstance(value, random.Random):
        return value.getstate
    if isinstance(value, numpy.random.Generator):
        value = value.bit_generator
    if isinstance(value, numpy.random.RandomState):
        return lambda: repr(value.get_state())
    return (lambda: repr(value.state)) if isinstance(value, numpy.random.BitGenerator) else None


def scripted(module: Any) -> tuple[Any, ...]:
    """What a TorchScript module holds: plain values, and where tensors lie."""
    found: list[Any] = []
    core: Any = torch._C
    for name, value in core._jit_debug_module_iterators(module._c).get("named_attributes_r", ()):
        if isinstance(value, torch.Tensor):
            found += [name, value.data_ptr() if value.layout == torch.strided else 0]
        elif isinstance(value, (*VALUES, tuple, list)):
            found += [name, repr(value)]
    return tuple(found)


def chained(value: Any, names: Iterable[str]) -> Iterable[tuple[Any, Any]]:
    """The values that a chain of attributes leads to, as far as it can be followed without running code; and what has
    each."""
    for name in names:
        own: Mapping[str, Any] = vars(value) if hasattr(value, "__dict__") else {}
        found = own.get(name, MISSING)
        if found is MISSING:
            kinds = value.__mro__ if isinstance(value, type) else type(value).__mro__
            found = next((vars(kind)[name] for kind in kinds if name in vars(kind)), MISSING)
        if found is MISSING:
            return
        yield found, value
        value = found


def builtins_of(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The builtins that go with some globals."""
    found = table.get("__builtins__", sys.modules["builtins"])
    return vars(found) if isinstance(found, types.ModuleType) else found
