"""What a Python value is made of: its tensors, plain values, containers and objects, as something hashable.

A `Walk` goes over a value once and describes it by *specs*, nested tuples that start with a tag:

- ``("tensor", i)``: the i-th distinct tensor;
- ``("value", type, value)``: a number, a string, None, ...; floats as text, so that NaN equals itself and -0.0 not 0.0;
- ``("ref", k)``: the k-th mutable object (list, dict, set, instance); what it holds is ``contents[k]``;
- ``("node", type, context, children)``: an immutable container (tuple, namedtuple, registered pytree node);
- ``("foreign", form, children)``: another library's tensor, device, ..., by its parts (`graph_capture.calls.foreign`);
- ``("is", id)``: anything else (a module, a function), by identity.

Instances are opened, so that a cache or a dataclass counts by what it holds; those of the standard library and torch's
own, modules, functions and classes are not.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch.utils import _pytree as pytree

from graph_capture.calls.foreign import LIBRARIES, Exposures, Form

VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum)
_SCALARS = frozenset({type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.Size})
_MUTABLE = frozenset({list, dict, set, collections.OrderedDict, collections.defaultdict, collections.deque})
_CLOSED = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, torch.nn.Module)
_CLOSED_PACKAGES = sys.stdlib_module_names - {"types"} | {"torch", "numpy"} | LIBRARIES.keys()

Spec = tuple[Any, ...]
Path = tuple[Any, ...] | None  # (the parent's path, the step from it)


class ByIdentity:
    """Marks a value that counts by identity although it could be opened."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Walk:
    """One pass over values; numbers each distinct tensor and each mutable object as it is first met.

    Attributes:
        tensors: the distinct tensors.
        paths: where each tensor was first met.
        objects: the mutable objects.
        contents: what each of `objects` holds, as a spec.
        closed: the objects that count by identity; whoever keeps a spec must keep them alive.
        exposures: the torch tensors that stand for other libraries'.
    """

    def __init__(self, exposures: Exposures | None = None) -> None:
        self.exposures = exposures or Exposures()
        self.tensors: list[torch.Tensor] = []
        self.paths: list[Path] = []
        self.objects: list[Any] = []
        self.contents: list[Spec] = []
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
            return ("tensor", number)
        if kind is ByIdentity:
            return self.spec_of_identity(value.value)
        if kind is float or kind is complex:
            return ("value", kind, repr(value))
        if kind is tuple:
            return ("node", tuple, None, tuple([self.spec(v, (path, i)) for i, v in enumerate(value)]))
        if kind in _MUTABLE:
            return self._reference(value, path)
        if isinstance(value, (*VALUES, numpy.generic)):
            return ("value", kind, value)
        if kind in pytree.SUPPORTED_NODES and isinstance(value, (tuple, list, dict)):
            children, context = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
            return ("node", kind, _Context(context), self._children(children, context, path))
        if isinstance(value, tuple):  # namedtuples, torch.return_types
            names = getattr(value, "_fields", None)
            return ("node", kind, None, self._children(tuple(value), names, path))
        if isinstance(value, numpy.ndarray):
            return ("array", value.dtype.str, value.shape, value.tobytes())
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
        if isinstance(value, (list, collections.deque)):
            keys: tuple[Any, ...] = tuple(range(len(value)))
            children: Sequence[Any] = value
        elif isinstance(value, dict):
            keys, children = tuple(value), list(value.values())
        elif isinstance(value, set):
            return (type(value), frozenset(value), ())
        else:
            state = state_of(value)
            keys, children = tuple(state), list(state.values())
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


class _Context:
    """A pytree node's context: compared by value, whatever it is."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and bool(self.value == other.value)

    def __hash__(self) -> int:
        return 0


def _is_open(value: Any) -> bool:
    if isinstance(value, _CLOSED) or callable(value):
        return False
    kind: Any = type(value)
    return kind.__module__.partition(".")[0] not in _CLOSED_PACKAGES and (
        hasattr(value, "__dict__") or slots_of(kind) != ()
    )


@functools.cache
def slots_of(kind: Any) -> tuple[str, ...]:
    """The attributes that instances of a class hold outside their ``__dict__``."""
    names = [slot for base in kind.__mro__ for slot in _as_names(base.__dict__.get("__slots__", ()))]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _as_names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def state_of(value: Any) -> Mapping[str, Any]:
    """The attributes that an instance holds."""
    kind: Any = type(value)
    slots = slots_of(kind)
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)} if slots else {}
    return {**held, **value.__dict__} if hasattr(value, "__dict__") else held


def items_of(value: Any) -> tuple[Any, ...] | None:
    """What a container or an opened instance holds itself, flat; None for anything else."""
    if isinstance(value, dict):
        return (*value, *value.values())
    if isinstance(value, (list, tuple, set, collections.deque)):
        return tuple(value)
    if not isinstance(value, (*VALUES, torch.Tensor)) and _is_open(value):
        state = state_of(value)
        return (*state, *state.values())
    return None


@dataclasses.dataclass(frozen=True)
class ResultTemplate:
    """How to make a value again from new tensors, and how to bring a call's own objects up to date.

    Attributes:
        root: the spec of the value.
        contents: object number -> what the object must hold; objects not in it are left as they are.
        known: how many objects the call brings along; those numbered higher are made.
        closed: the objects that count by identity.
        tensors: the numbers of the tensors that are needed, in the order in which `build` gets them.
    """

    root: Spec
    contents: Mapping[int, Spec]
    known: int
    closed: Mapping[int, Any]
    tensors: tuple[int, ...]

    @classmethod
    def of(cls, value: Any, before: Walk, after: Walk) -> ResultTemplate:
        """The template of `value` and of every change between `before` and `after` (made by ``before.again()``)."""
        root = after.spec(value)
        contents = {
            number: content
            for number, content in enumerate(after.contents)
            if number >= len(before.objects) or content != before.contents[number]
        }
        needed: dict[int, None] = {}
        _tensors_in(root, needed)
        for content in contents.values():
            _tensors_in(content[2], needed)
        return cls(root, contents, len(before.objects), after.closed, tuple(needed))

    @functools.cached_property
    def forms(self) -> Mapping[int, Form]:
        """The numbers of the tensors that become another library's."""
        found: dict[int, Form] = {}
        for spec in (self.root, *(content[2] for content in self.contents.values())):
            _foreign_in(spec, found)
        return found

    @property
    def changes(self) -> bool:
        """Whether `build` alters an object that the call brings along."""
        return any(number < self.known for number in self.contents)

    def build(self, tensors: Sequence[torch.Tensor], objects: Sequence[Any]) -> Any:
        """The value, from one tensor for each of `self.tensors` and the call's own mutable objects."""
        if self.root[0] == "tensor" and not self.contents:
            return tensors[0]
        by_number = dict(zip(self.tensors, tensors, strict=True))
        made = [*objects]
        for number, (kind, _, _) in self.contents.items():
            if number >= self.known:
                made.append(kind() if kind in _MUTABLE else kind.__new__(kind))
        for number, content in self.contents.items():
            self._fill(made[number], content, by_number, made)
        return self._make(self.root, by_number, made)

    def _fill(self, target: Any, content: Spec, tensors: Mapping[int, Any], objects: Sequence[Any]) -> None:
        _, keys, children = content
        values = [self._make(child, tensors, objects) for child in children]
        if isinstance(target, (list, collections.deque)):
            target.clear()
            target.extend(values)
        elif isinstance(target, set):
            target.clear()
            target.update(keys)
        elif isinstance(target, dict):
            target.clear()
            target.update(zip(keys, values, strict=True))
        else:
            for name in set(state_of(target)) - set(keys):
                object.__delattr__(target, name)
            for name, value in zip(keys, values, strict=True):
                object.__setattr__(target, name, value)

    def _make(self, spec: Spec, tensors: Mapping[int, Any], objects: Sequence[Any]) -> Any:
        tag = spec[0]
        if tag == "tensor":
            return tensors[spec[1]]
        if tag == "value":
            return spec[1](spec[2]) if spec[1] in (float, complex) else spec[2]
        if tag == "ref":
            return objects[spec[1]]
        if tag == "is":
            return self.closed[spec[1]]
        if tag == "array":
            return numpy.frombuffer(spec[3], dtype=spec[1]).reshape(spec[2]).copy()
        if tag == "foreign":
            return spec[1].whole([self._make(child, tensors, objects) for child in spec[2]])
        _, kind, context, children = spec
        values = [self._make(child, tensors, objects) for child in children]
        if isinstance(context, _Context):
            return pytree.SUPPORTED_NODES[kind].unflatten_fn(values, context.value)
        return kind(*values) if hasattr(kind, "_fields") else kind(values)


def _tensors_in(spec: Any, found: dict[int, None]) -> None:
    """The tensor numbers in a spec, or in a tuple of specs."""
    if not spec or not isinstance(spec, tuple):
        return
    tag = spec[0]
    if tag == "tensor":
        found[spec[1]] = None
    elif tag in ("node", "foreign"):
        _tensors_in(spec[-1], found)
    elif isinstance(tag, tuple):
        for child in spec:
            _tensors_in(child, found)


def _foreign_in(spec: Any, found: dict[int, Form]) -> None:
    """The tensors in a spec, or in a tuple of specs, that become another library's."""
    if not spec or not isinstance(spec, tuple):
        return
    if spec[0] == "foreign":
        found.update({child[1]: spec[1] for child in spec[2] if child[0] == "tensor"})
    elif spec[0] == "node" or isinstance(spec[0], tuple):
        for child in spec[3] if spec[0] == "node" else spec:
            _foreign_in(child, found)
