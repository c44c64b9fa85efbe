"""A recorded signature as one straight piece of Python, which is how replays check their arguments.

It takes a call apart as `structure.Walk` does, but makes no specs. What it accepts fits; what it refuses may still fit
(strides of dimensions of size 1 do not count), and is walked over as before.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from graph_capture.calls.structure import NAMES, Extra, Spec, is_bound, slots_of, state_of
from graph_capture.ir.values import TensorMeta

Matcher = Callable[[tuple[Any, ...], Mapping[str, Any], Mapping[str, Any]], "FastCall | None"]
LIMIT = 20_000  # lines; a call that holds more is walked over


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class FastCall(NamedTuple):
    """The distinct tensors and the mutable objects of a call that fits, numbered as in the recording."""

    tensors: list[torch.Tensor]
    objects: list[Any]


class _TooUnusual(Exception):
    """A value for which there is no line."""


def matcher(
    arguments: Sequence[tuple[str, Spec]],
    contents: Sequence[Spec],
    sharing: Sequence[tuple[int, int]],
    metas: Sequence[TensorMeta],
    closed: Mapping[int, Any],
    kinds: Sequence[tuple[Any, ...]] | None = None,
) -> Matcher | None:
    """A function of a call's ``args``, ``kwargs`` and surroundings; None where the signature is too unusual for one.

    Args:
        kinds: class, bits and attributes of each tensor; None where they do not count.
    """
    try:
        return _Matcher(arguments, contents, sharing, metas, closed, kinds).compiled()
    except _TooUnusual:
        return None


class _Matcher:
    def __init__(
        self,
        arguments: Sequence[tuple[str, Spec]],
        contents: Sequence[Spec],
        sharing: Sequence[tuple[int, int]],
        metas: Sequence[TensorMeta],
        closed: Mapping[int, Any],
        kinds: Sequence[tuple[Any, ...]] | None,
    ) -> None:
        self._contents, self._metas, self._closed, self._kinds = contents, metas, closed, kinds
        self._lines: list[str] = []
        self._globals: dict[str, Any] = {
            "FastCall": FastCall,
            "state_of": state_of,
            "is_bound": is_bound,
            "plain": _PLAIN,
            "strided": torch.strided,
            "dict_of": object.__getattribute__,
        }
        self._tensors: set[int] = set()
        self._objects: set[int] = set()
        self._count = 0
        by_position = sum(label == f"arg{index}" for index, (label, _) in enumerate(arguments))
        self._refuse_unless(f"len(args) == {by_position}")
        named = [label for label, _ in arguments[by_position:]]
        names = self._constant(frozenset(named))
        self._refuse_unless(f"len(kwargs) + len(around) == {len(named)}")
        self._refuse_unless(f"{names} == kwargs.keys() | around.keys()" if named else "True")
        for index, (label, spec) in enumerate(arguments):
            if index < by_position:
                self._check(spec, f"args[{index}]")
            else:
                self._check(spec, f"(kwargs if {label!r} in kwargs else around)[{label!r}]")
        self._distinct(sharing)

    def compiled(self) -> Matcher:
        tensors = ", ".join(f"t{i}" for i in sorted(self._tensors))
        objects = ", ".join(f"o{i}" for i in sorted(self._objects))
        lines = ["def match(args, kwargs, around):", *self._lines, f"    return FastCall([{tensors}], [{objects}])"]
        exec(compile("\n".join(lines), "<signature>", "exec"), self._globals)
        return self._globals.pop("match")

    def _check(self, spec: Spec, text: str) -> None:
        """The lines that check the value of the expression `text`."""
        if len(self._lines) > LIMIT:
            raise _TooUnusual
        tag = spec[0]
        if tag == "tensor":
            self._tensor(spec[1], text)
        elif tag == "ref":
            self._object(spec[1], text)
        elif tag == "value":
            self._plain(spec[1], spec[2], text)
        elif tag == "node" and spec[1] is tuple:
            name = self._variable(text)
            self._refuse_unless(f"type({name}) is tuple and len({name}) == {len(spec[3])}")
            self._all(spec[3], name)
        elif tag == "is":
            self._refuse_unless(f"{text} is {self._constant(self._closed[spec[1]])}")
        else:
            raise _TooUnusual

    def _tensor(self, number: int, text: str) -> None:
        if number in self._tensors:
            return self._refuse_unless(f"{text} is t{number}")
        self._tensors.add(number)
        meta, name = self._metas[number], f"t{number}"
        if meta.shape and not meta.stride:  # not strided
            raise _TooUnusual
        self._lines.append(f"    {name} = {text}")
        shape, stride = self._constant(meta.shape), self._constant(meta.stride)
        self._refuse_unless(f"type({name}) in plain and {name}.layout is strided and {name}.shape == {shape}")
        if self._kinds is not None:
            kind, conjugate, negative, attributes = self._kinds[number]
            if conjugate or negative or attributes is not None or kind not in _PLAIN:
                raise _TooUnusual
            self._refuse_unless(f"type({name}) is {self._constant(kind)}")
            self._refuse_unless(f"not ({name}.__dict__ or {name}.is_neg() or {name}.is_conj())")
        dtype, device = self._constant(meta.dtype), self._constant(meta.device)
        self._refuse_unless(f"{name}.stride() == {stride} and {name}.dtype is {dtype} and {name}.device == {device}")
        return None

    def _object(self, number: int, text: str) -> None:
        if number in self._objects:
            return self._refuse_unless(f"{text} is o{number}")
        self._objects.add(number)
        kind, keys, children = self._contents[number]
        name = f"o{number}"
        self._lines.append(f"    {name} = {text}")
        self._refuse_unless(f"type({name}) is {self._constant(kind)}")
        if kind in NAMES:
            self._refuse_unless(f"is_bound({name})" if keys else f"not is_bound({name})")
            return self._check(children[0], f"{name}.cell_contents") if keys else None
        if any(type(key) is Extra for key in keys):
            raise _TooUnusual
        if issubclass(kind, list):
            self._refuse_unless(f"len({name}) == {len(children)}")
            return self._all(children, name)
        if issubclass(kind, set):
            return self._refuse_unless(f"{name} == {self._constant(keys)}")
        if issubclass(kind, collections.deque):
            raise _TooUnusual
        if issubclass(kind, dict):
            held = name
        else:
            held = self._variable(f"state_of({name})" if slots_of(kind) else f"dict_of({name}, '__dict__')")
        self._refuse_unless(f"tuple({held}) == {self._constant(keys)}")
        if not all(type(key) is str for key in keys):  # 1, True and 1.0 are equal
            self._refuse_unless(f"[*map(type, {held})] == {self._constant([*map(type, keys)])}")
        return self._all(children, f"{held}.values()")

    def _plain(self, kind: type, value: Any, text: str) -> None:
        if value is None:
            return self._refuse_unless(f"{text} is None")
        if kind in (int, bool, str, bytes, torch.dtype, torch.device, torch.Size):
            name = self._variable(text)
            return self._refuse_unless(f"type({name}) is {self._constant(kind)} and {name} == {self._constant(value)}")
        if kind in (float, complex):
            name = self._variable(text)
            return self._refuse_unless(f"type({name}) is {self._constant(kind)} and repr({name}) == {value!r}")
        raise _TooUnusual

    def _all(self, specs: Sequence[Spec], text: str) -> None:
        if not specs:
            return
        names = [self._fresh() for _ in specs]
        self._lines.append(f"    {', '.join(names)}, = {text}")
        for name, spec in zip(names, specs, strict=True):
            self._check(spec, name)

    def _distinct(self, sharing: Sequence[tuple[int, int]]) -> None:
        if len(self._objects) > 1:
            ids = ", ".join(f"id(o{i})" for i in sorted(self._objects))
            self._refuse_unless(f"len({{{ids}}}) == {len(self._objects)}")
        if any(first != index for index, (first, _) in enumerate(sharing)):
            raise _TooUnusual
        if len(self._tensors) > 1:
            storages = ", ".join(f"t{i}.untyped_storage()._cdata" for i in sorted(self._tensors))
            self._refuse_unless(f"len({{{storages}}}) == {len(self._tensors)}")

    def _refuse_unless(self, condition: str) -> None:
        self._lines.append(f"    if not ({condition}): return None")

    def _variable(self, text: str) -> str:
        if text.isidentifier():
            return text
        name = self._fresh()
        self._lines.append(f"    {name} = {text}")
        return name

    def _fresh(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def _constant(self, value: Any) -> str:
        if type(value) in (int, bool, str):
            return repr(value)
        self._count += 1
        name = f"c{self._count}"
        self._globals[name] = value
        return name
