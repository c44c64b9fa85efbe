"""How to make a value again from new tensors, and how to bring a call's own objects up to date."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch.utils import _pytree as pytree

from graph_capture.calls.foreign import Form
from graph_capture.calls.structure import CONTAINERS, NAMES, Context, Extra, Spec, Walk, state_of
from graph_capture.errors import CaptureError


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
                made.append(_empty(kind, self.contents[number]))
        for number, content in self.contents.items():
            self._fill(made[number], content, by_number, made)
        return self._make(self.root, by_number, made)

    def _fill(self, target: Any, content: Spec, tensors: Mapping[int, Any], objects: Sequence[Any]) -> None:
        _, keys, children = content
        values = [self._make(child, tensors, objects) for child in children]
        if isinstance(target, NAMES):
            target.cell_contents = values[0]
            return
        if isinstance(target, set):
            set.clear(target)
            set.update(target, keys)
            return
        if isinstance(target, CONTAINERS):
            count = next((place for place, key in enumerate(keys) if type(key) is Extra), len(keys))
            parts = dict(zip(keys[count:], values[count:], strict=True))
            keys, values = keys[:count], values[:count]
            if isinstance(target, dict):
                ordered = isinstance(target, collections.OrderedDict)
                (collections.OrderedDict if ordered else dict).clear(target)
                put = collections.OrderedDict.__setitem__ if ordered else dict.__setitem__
                for key, value in zip(keys, values, strict=True):
                    put(target, key, value)
            else:
                kind: Any = list if isinstance(target, list) else collections.deque
                kind.clear(target)
                kind.extend(target, values)
            if isinstance(target, collections.defaultdict):
                target.default_factory = parts.pop(Extra("default_factory"))
            parts.pop(Extra("maxlen"), None)
            parts.pop(Extra("kinds of keys"), None)
            keys = tuple(key.removeprefix("attribute ") for key in parts)
            values = [*parts.values()]
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
            flat = numpy.frombuffer(spec[3], dtype=spec[1])
            return flat[0] if spec[2] is None else flat.reshape(spec[2]).copy()
        if tag == "foreign":
            return spec[1].whole([self._make(child, tensors, objects) for child in spec[2]])
        _, kind, context, children = spec
        values = [self._make(child, tensors, objects) for child in children]
        if isinstance(context, Context):
            return pytree.SUPPORTED_NODES[kind].unflatten_fn(values, context.value)
        if kind is functools.partial:
            return kind(values[0], *values[1], **values[2])
        return kind(*values) if hasattr(kind, "_fields") or kind in (slice, types.MethodType) else kind(values)


def _empty(kind: Any, content: Spec) -> Any:
    """A new object, to be filled."""
    if issubclass(kind, collections.deque):
        bound = dict(zip(content[1], content[2], strict=True))[Extra("maxlen")][2]
        made = kind.__new__(kind)
        collections.deque.__init__(made, (), bound)
        return made
    if kind in NAMES:
        raise CaptureError("a variable of a function that the code made is part of the result")
    made = kind.__new__(kind)
    if issubclass(kind, (dict, list, set)):
        base: Any = next(base for base in (collections.OrderedDict, dict, list, set) if issubclass(kind, base))
        base.__init__(made)
    return made


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
