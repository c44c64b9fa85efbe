"""What a Python value is made of: its tensors, plain values, containers and objects, as something hashable.

A `Walk` goes over a value once and describes it by *specs*, nested tuples that start with a tag:

- ``("tensor", i)``: the i-th distinct tensor;
- ``("value", type, value)``: a number, a string, None, ...; floats as text, so that NaN equals itself and -0.0 not 0.0;
- ``("ref", k)``: the k-th mutable object (list, dict, set, instance); what it holds is ``contents[k]``;
- ``("node", type, context, children)``: an immutable container (tuple, namedtuple, slice, partial, bound method,
  registered pytree node);
- ``("foreign", form, children)``: another library's tensor, device, ..., by its parts (`graph_capture.calls.foreign`);
- ``("is", id)``: anything else (a module, a function), by identity.

Instances are opened, so that a cache, a dataclass or a callable object counts by what it holds; most of the standard
library's and torch's own, modules, functions and classes are not. Variables of a closure and names in globals (`NAMES`)
count as objects that hold one value.
"""

from __future__ import annotations

import collections
import enum
import functools
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch.utils import _pytree as pytree

from graph_capture.calls.foreign import LIBRARIES, Exposures
from graph_capture.errors import CaptureError

VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum)
_SCALARS = frozenset({type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.Size})
_MUTABLE = frozenset({list, dict, set, collections.OrderedDict, collections.defaultdict, collections.deque})
_CLOSED = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, torch.nn.Module)
_OPEN_STANDARD = {"types", "argparse", "dataclasses", "collections", "configparser", "string"}
_OTHERS = {"torch", "numpy", "triton", "ninetoothed", "graph_capture"}
_CLOSED_PACKAGES = sys.stdlib_module_names - _OPEN_STANDARD | _OTHERS | LIBRARIES.keys()
CONTAINERS = (dict, list, set, collections.deque)

Spec = tuple[Any, ...]
Path = tuple[Any, ...] | None  # (the parent's path, the step from it)


class Extra(str):
    """The name of something that a container holds besides its entries: a factory, a bound, an attribute."""

    __slots__ = ()


class GlobalName:
    """A name in a function's globals, as something that holds a value.

    Attributes:
        table: the globals.
        name: the name.
    """

    __slots__ = ("name", "table")

    def __init__(self, table: dict[str, Any], name: str) -> None:
        self.table, self.name = table, name

    @property
    def cell_contents(self) -> Any:
        """What lies under the name.

        Raises:
            ValueError: nothing does.
        """
        if self.name not in self.table:
            raise ValueError(self.name)
        return self.table[self.name]

    @cell_contents.setter
    def cell_contents(self, value: Any) -> None:
        self.table[self.name] = value


NAMES = (types.CellType, GlobalName)


class Walk:
    """One pass over values; numbers each distinct tensor and each mutable object as it is first met.

    Attributes:
        tensors: the distinct tensors.
        paths: where each tensor was first met.
        attributes: number of a tensor -> the attributes that Python code has set on it, where it has.
        objects: the mutable objects.
        contents: what each of `objects` holds, as a spec.
        arrays: the numpy arrays, with their specs.
        closed: the objects that count by identity; whoever keeps a spec must keep them alive.
        exposures: the torch tensors that stand for other libraries'.
    """

    def __init__(self, exposures: Exposures | None = None) -> None:
        self.exposures = exposures or Exposures()
        self.tensors: list[torch.Tensor] = []
        self.paths: list[Path] = []
        self.attributes: dict[int, Spec] = {}
        self.objects: list[Any] = []
        self.contents: list[Spec] = []
        self.arrays: list[tuple[numpy.ndarray, Spec]] = []
        self.closed: dict[int, Any] = {}
        self._tensor_numbers: dict[int, int] = {}
        self._object_numbers: dict[int, int] = {}

    def spec(self, value: Any, path: Path = None) -> Spec:
        """The spec of `value`."""
        kind = type(value)
        if kind in _SCALARS:
            return ("value", kind, value)
        if isinstance(value, torch.Tensor):
            number = self._tensor_numbers.get(id(value))
            if number is None:
                number = self._tensor_numbers[id(value)] = len(self.tensors)
                self.tensors.append(value)
                self.paths.append(path)
                if value.__dict__ and (own := attributes_of(value)):
                    keys = tuple(own)
                    self.attributes[number] = (keys, self._children(tuple(own.values()), keys, path))
            return ("tensor", number)
        if kind is float or kind is complex:
            return ("value", kind, repr(value))
        if kind is tuple:
            return ("node", tuple, None, tuple([self.spec(v, (path, i)) for i, v in enumerate(value)]))
        if kind in _MUTABLE or kind in NAMES:
            return self._reference(value, path)
        if isinstance(value, VALUES) and not isinstance(value, enum.Enum) and getattr(value, "__dict__", None):
            raise CaptureError(f"a {kind.__name__} has attributes of its own; pass them as arguments")
        if isinstance(value, (*VALUES, range)) or (kind is frozenset and all(type(item) in _SCALARS for item in value)):
            return ("value", kind, value)
        if isinstance(value, numpy.generic):
            return ("array", value.dtype.str, None, value.tobytes())
        if kind is slice:
            return ("node", kind, None, self._children((value.start, value.stop, value.step), None, path))
        if kind is functools.partial:
            parts = (value.func, value.args, value.keywords)
            return ("node", kind, None, self._children(parts, ("func", "args", "keywords"), path))
        if kind is types.MethodType:
            return ("node", kind, None, self._children((value.__func__, value.__self__), ("func", "self"), path))
        if kind in pytree.SUPPORTED_NODES and isinstance(value, (tuple, list, dict)):
            children, context = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
            return ("node", kind, Context(context), self._children(children, context, path))
        if isinstance(value, tuple):  # namedtuples, torch.return_types
            names = getattr(value, "_fields", None)
            return ("node", kind, None, self._children(tuple(value), names, path))
        if isinstance(value, numpy.ndarray):
            self.arrays.append((value, ("array", value.dtype.str, value.shape, value.tobytes())))
            return self.arrays[-1][1]
        if self.exposures.adapters and (foreign := self.exposures.parts(value)) is not None:
            return ("foreign", foreign[0], tuple([self.spec(part, path) for part in foreign[1]]))
        if isinstance(value, tuple(_MUTABLE)) or _is_open(value):
            return self._reference(value, path)
        return self.spec_of_identity(value)

    def spec_of_identity(self, value: Any) -> Spec:
        """The spec of a value that counts by identity."""
        self.closed[id(value)] = value
        return ("is", id(value))

    def content(self, number: int, path: Path = None) -> Spec:
        """What the object `number` holds now."""
        value = self.objects[number]
        if isinstance(value, NAMES):
            held = [value.cell_contents] if is_bound(value) else []
            keys: tuple[Any, ...] = (None,) * len(held)
            children: Sequence[Any] = held
        elif isinstance(value, (list, collections.deque)):
            keys = tuple(range(len(value)))
            children = list(value)
        elif isinstance(value, dict):
            keys, children = tuple(dict.keys(value)), list(dict.values(value))
            _check_plain(keys, "key", value)
        elif isinstance(value, set):
            _check_plain(value, "member", value)
            return (type(value), frozenset(value), ())
        else:
            state = state_of(value)
            keys, children = tuple(state), list(state.values())
        if type(value) not in _SIMPLE or (type(value) in _DICTS and not all(type(key) in _KEYS for key in keys)):
            parts = parts_of(value)
            keys, children = (*keys, *parts), [*children, *parts.values()]
        return (type(value), keys, self._children(children, keys, path))

    def unify(self) -> None:
        """Let other libraries' tensors that overlap share a storage, as torch's do."""
        if not self.exposures.adapters:
            return
        before = list(self.tensors)
        self.exposures.unify(self.tensors)
        if any(old is not new for old, new in zip(before, self.tensors, strict=True)):
            self._tensor_numbers = {id(tensor): number for number, tensor in enumerate(self.tensors)}

    def again(self) -> Walk:
        """A walk over the same objects as they are now; tensors and objects keep their numbers, new ones follow."""
        walk = Walk(self.exposures)
        walk.tensors, walk.paths = list(self.tensors), list(self.paths)
        walk._tensor_numbers = dict(self._tensor_numbers)
        walk.objects, walk._object_numbers = list(self.objects), dict(self._object_numbers)
        walk.contents = [()] * len(self.objects)
        for number in range(len(self.objects)):
            walk.contents[number] = walk.content(number)
        return walk

    def _reference(self, value: Any, path: Path) -> Spec:
        number = self._object_numbers.get(id(value))
        if number is None:
            number = self._object_numbers[id(value)] = len(self.objects)
            self.objects.append(value)
            self.contents.append(())
            self.contents[number] = self.content(number, path)
        return ("ref", number)

    def _children(self, children: Sequence[Any], keys: Any, path: Path) -> tuple[Spec, ...]:
        if not isinstance(keys, (list, tuple)) or len(keys) != len(children):
            keys = range(len(children))
        return tuple([self.spec(child, (path, key)) for key, child in zip(keys, children, strict=True)])


def signed(walk: Walk) -> set[Any]:
    """What of the objects that a walk has met is part of its specs: ids; names in globals with their dicts' ids."""
    found: set[Any] = {id(value) for value in walk.objects}
    return found | {(id(value.table), value.name) for value in walk.objects if type(value) is GlobalName}


class Context:
    """A pytree node's context: compared by value, whatever it is."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Context) and bool(self.value == other.value)

    def __hash__(self) -> int:
        return 0


_KEYS = (str, int)  # keys that are told apart by being equal
_DICTS = (dict, collections.OrderedDict)
_SIMPLE = frozenset({list, dict, set, collections.OrderedDict, *NAMES})


def parts_of(value: Any) -> dict[Extra, Any]:
    """What a container holds besides its entries."""
    found: dict[Extra, Any] = {}
    if isinstance(value, CONTAINERS):
        if isinstance(value, collections.defaultdict):
            found[Extra("default_factory")] = value.default_factory
        if isinstance(value, collections.deque):
            found[Extra("maxlen")] = value.maxlen
        if isinstance(value, dict) and not all(type(key) in _KEYS for key in value):  # 1, True and 1.0 are one key
            kinds = [(type(key), repr(key) if isinstance(key, float) else "") for key in value]
            found[Extra("kinds of keys")] = tuple([f"{kind.__qualname__} {shown}" for kind, shown in kinds])
        found |= {Extra(f"attribute {name}"): held for name, held in state_of(value).items()}
    return found


def attributes_of(tensor: torch.Tensor) -> dict[str, Any]:
    """What Python code has set on a tensor; torch.compile's own marks do not count."""
    return {name: value for name, value in tensor.__dict__.items() if not name.startswith("_dynamo")}


def is_bound(name: Any) -> bool:
    """Whether a variable of a closure, or a name in globals, holds a value."""
    try:
        return name.cell_contents is not name
    except ValueError:
        return False


def _check_plain(keys: Any, what: str, holder: Any) -> None:
    """Refuse keys and members of sets that a replay could not renew.

    Raises:
        CaptureError: one is a tensor.
    """
    for key in keys:
        if isinstance(key, torch.Tensor):
            raise CaptureError(f"a {type(holder).__name__} has a tensor as a {what}; a replay could not renew it")


def _is_open(value: Any) -> bool:
    if isinstance(value, _CLOSED):
        return False
    kind: Any = type(value)
    return kind.__module__.partition(".")[0] not in _CLOSED_PACKAGES and (
        hasattr(value, "__dict__") or slots_of(kind) != ()
    )


@functools.cache
def slots_of(kind: Any) -> tuple[str, ...]:
    """The attributes that instances of a class hold outside their ``__dict__``."""
    names = [_mangled(base, s) for base in kind.__mro__ for s in _as_names(base.__dict__.get("__slots__", ()))]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _mangled(kind: type, name: str) -> str:
    private = name.startswith("__") and not name.endswith("__")
    return f"_{kind.__name__.lstrip('_')}{name}" if private else name


def _as_names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def state_of(value: Any) -> Mapping[str, Any]:
    """The attributes that an instance holds."""
    kind: Any = type(value)
    slots = slots_of(kind)
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)} if slots else {}
    return {**held, **value.__dict__} if hasattr(value, "__dict__") else held
