"""What a call looks like: the structure of its arguments, each tensor's layout, which of them share memory.

Tensors count by shape, stride, dtype, device, aliasing, class, attributes, and bits (of conjugate and negative views);
Python values by equality and type; containers and objects by what they hold; modules and functions by identity (see
`graph_capture.calls.structure`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from graph_capture.calls.fast_check import FastCall, Matcher, matcher
from graph_capture.calls.structure import Path, Spec, Walk
from graph_capture.errors import SignatureMismatchError
from graph_capture.ir.values import TensorMeta

Surroundings = Callable[[], Mapping[str, Any]]  # what a call uses besides its arguments, by name


class Call:
    """The arguments of one call (and its surroundings), walked over once.

    Attributes:
        key: hashable; two calls with equal keys fit one recording. Closed objects count in it by identity, so whoever
            keeps a key must keep ``walk.closed`` alive.
        walk: the tensors and objects of the arguments.
    """

    __slots__ = ("arguments", "key", "walk")

    def __init__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], surroundings: Surroundings | None = None
    ) -> None:
        walk = self.walk = Walk()
        named = [(f"arg{index}", value) for index, value in enumerate(args)]
        named += kwargs.items()
        if surroundings is not None:
            named += surroundings().items()
        self.arguments = tuple([(label, walk.spec(value, (None, label))) for label, value in named])
        walk.unify()
        more = walk.attributes
        layouts = tuple([(*_layout(t), *_kind(t), more.get(i)) for i, t in enumerate(walk.tensors)])
        self.key = (self.arguments, tuple(walk.contents), layouts, _sharing(walk.tensors))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The distinct tensors."""
        return self.walk.tensors

    @property
    def objects(self) -> list[Any]:
        """The mutable objects, which a replay brings up to date."""
        return self.walk.objects


Bound = Call | FastCall  # a call that fits, with its tensors and objects


class Signature:
    """The recorded arguments, without their data.

    Attributes:
        key: see `Call.key`.
        names: a value name for each distinct tensor.
        metas: their layouts.
        closed: the objects that count by identity, by their ids.
    """

    def __init__(self, call: Call) -> None:
        self.key = call.key
        self._order = dict.fromkeys(label for label, _ in call.arguments)
        self.names: tuple[str, ...] = _names(call.walk.paths)
        self.metas = tuple(TensorMeta.of(tensor) for tensor in call.tensors)
        self.closed = call.walk.closed  # kept alive: the key holds their ids
        self.strict = True  # otherwise, of a tensor only shape, strides, dtype and device count

    @classmethod
    def restored(
        cls,
        arguments: tuple[tuple[str, Spec], ...],
        contents: tuple[Spec, ...],
        sharing: tuple[tuple[int, int], ...],
        names: tuple[str, ...],
        metas: tuple[TensorMeta, ...],
    ) -> Signature:
        """A signature from its parts, with nothing in it that counts by identity."""
        self = cls.__new__(cls)
        self.key = (arguments, contents, tuple(map(_layout_of, metas)), sharing)
        self.strict = False
        self._order = dict.fromkeys(label for label, _ in arguments)
        self.names, self.metas, self.closed = names, metas, {}
        return self

    @cached_property
    def _matcher(self) -> Matcher | None:
        arguments, contents, layouts, sharing = self.key
        kinds = [layout[-4:] for layout in layouts] if self.strict else None
        return matcher(arguments, contents, sharing, self.metas, self.closed, kinds)

    def match(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], surroundings: Surroundings | None
    ) -> FastCall | None:
        """The call's tensors and objects if it is seen at once to fit; None means that it may not."""
        return self._matcher(args, kwargs, surroundings() if surroundings else {}) if self._matcher else None

    def ordered(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments in the order of the recording: it numbers what they hold."""
        return {**{name: kwargs[name] for name in self._order if name in kwargs}, **kwargs}

    def check(self, call: Call) -> None:
        """Refuse a call that does not fit.

        Raises:
            SignatureMismatchError: the message names the argument, what was expected, and what came.
        """
        key = call.key
        if not self.strict:
            key = (*key[:2], tuple([layout[:-4] for layout in key[2]]), key[3])
        if key != self.key:
            raise SignatureMismatchError(self.difference(call))

    def difference(self, call: Call) -> str:
        """The first difference between the recorded arguments and those of `call`."""
        recorded, _, _, sharing = self.key
        found = dict(call.arguments)
        missing = [label for label, _ in recorded if label not in found]
        extra = [label for label in found if label not in dict(recorded)]
        if missing or extra:
            parts = [f"expected the arguments ({', '.join(dict(recorded))}), got ({', '.join(found)})"]
            parts += [f"missing: {', '.join(missing)}"] if missing else []
            parts += [f"unexpected: {', '.join(extra)}"] if extra else []
            return "; ".join(parts)
        compare = _Comparison(self, call)
        for label, spec in recorded:
            difference = compare.specs(spec, found[label], label)
            if difference is not None:
                return f"argument {difference}; record again for this signature"
        now = _sharing(call.tensors)
        return (
            "the arguments share memory in another way than the recorded ones did "
            f"(recorded: {self._sharing_text(sharing)}; now: {self._sharing_text(now)})"
        )

    def __str__(self) -> str:
        return f"({', '.join(f'{label}: {self._text(spec)}' for label, spec in self.key[0])})"

    def _text(self, spec: Spec, depth: int = 0) -> str:
        if spec[0] == "tensor":
            return str(self.metas[spec[1]])
        if spec[0] == "ref":
            kind, keys, children = self.key[1][spec[1]]
            if depth > 1 or len(children) > 8:
                return f"{kind.__name__}({len(children)})"
            inner = (f"{key}: {self._text(child, depth + 1)}" for key, child in zip(keys, children, strict=False))
            return f"{kind.__name__}({', '.join(inner)})"
        if spec[0] == "node":
            return f"({', '.join(self._text(child, depth + 1) for child in spec[3])})"
        if spec[0] == "foreign":
            return f"{spec[1].kind.__name__} {' '.join(self._text(child, depth + 1) for child in spec[2])}"
        return _describe(spec)

    def _sharing_text(self, sharing: tuple[tuple[int, int], ...]) -> str:
        pairs = [f"{self.names[i]} with {self.names[first]}" for i, (first, _) in enumerate(sharing) if first != i]
        return ", ".join(pairs) or "no two share memory"


class _Comparison:
    """Finds where a call departs from a signature."""

    def __init__(self, signature: Signature, call: Call) -> None:
        self._signature, self._call = signature, call
        self._seen: set[int] = set()

    def specs(self, old: Spec, new: Spec, label: str) -> str | None:
        if old[0] == "tensor" and new[0] == "tensor":
            given, wanted = self._call.key[2][new[1]], self._signature.key[2][old[1]]
            if given[: len(wanted)] != wanted:
                return f"{label}: {self._other_tensor(old[1], self._call.tensors[new[1]], given, wanted)}"
            if old[1] != new[1]:
                return f"{label}: the recording was given one tensor here and elsewhere; this call gives two"
            return None
        if old[0] != new[0]:
            return self._unlike(old, new, label)
        if old[0] == "ref":
            if old[1] != new[1]:
                return f"{label}: the recording was given one object here and elsewhere; this call gives two"
            if old[1] in self._seen:
                return None
            self._seen.add(old[1])
            contents = self._signature.key[1]
            return self._children(contents[old[1]], self._call.walk.contents[new[1]], old, new, label)
        if old[0] == "node":
            return self._children((old[1], old[2], old[3]), (new[1], new[2], new[3]), old, new, label)
        if old[0] == "foreign" and old[1] is new[1]:
            parts = zip(old[2], new[2], strict=True)
            return next(filter(None, (self.specs(before, after, label) for before, after in parts)), None)
        return None if old == new else self._unlike(old, new, label)

    def _other_tensor(self, number: int, tensor: torch.Tensor, given: tuple[Any, ...], wanted: tuple[Any, ...]) -> str:
        if self._signature.strict and given[:-4] == wanted[:-4]:
            kinds = zip(_KINDS, wanted[-4:], given[-4:], strict=True)
            what, before, now = next((what, b, n) for what, b, n in kinds if b != n)
            return f"its {what} was {before} and is now {now}"
        return f"expected {_full(self._signature.metas[number])}, got {_full(TensorMeta.of(tensor))}"

    def _children(self, old: Spec, new: Spec, whole_old: Spec, whole_new: Spec, label: str) -> str | None:
        if old[0] is not new[0] or old[1] != new[1] or len(old[2]) != len(new[2]):
            if old[0] is new[0] and isinstance(old[1], tuple) and isinstance(new[1], tuple):
                keys = [*(k for k in old[1] if k not in new[1]), *(k for k in new[1] if k not in old[1])]
                if keys:
                    return f"{label}: {keys[0]!r} is in only one of the recorded and the given {old[0].__name__}"
            return self._unlike(whole_old, whole_new, label)
        steps = old[1] if isinstance(old[1], tuple) else range(len(old[2]))
        for key, before, after in zip(steps, old[2], new[2], strict=True):
            difference = self.specs(before, after, f"{label}{_step(key)}")
            if difference is not None:
                return difference
        return None

    def _unlike(self, old: Spec, new: Spec, label: str) -> str:
        expected = self._text(old, self._signature.metas, self._signature.key[1])
        metas = [TensorMeta.of(tensor) for tensor in self._call.tensors]
        return f"{label}: expected {expected}, got {self._text(new, metas, self._call.walk.contents)}"

    def _text(self, spec: Spec, metas: Sequence[TensorMeta], contents: Sequence[Spec]) -> str:
        if spec[0] == "tensor":
            return _full(metas[spec[1]])
        if spec[0] == "ref":
            kind, _, children = contents[spec[1]]
            return f"a {kind.__name__} of {len(children)}"
        return _describe(spec)


def _describe(spec: Spec) -> str:
    if spec[0] == "value":
        kind, value = spec[1], spec[2]
        return f"{value if kind in (float, complex) else repr(value)} ({kind.__name__})"
    if spec[0] == "node":
        return f"a {spec[1].__name__} of {len(spec[3])}"
    if spec[0] == "array":
        return "a number of numpy's" if spec[2] is None else f"an array {list(spec[2])}"
    if spec[0] == "foreign":
        return f"a {spec[1].kind.__module__.partition('.')[0]}.{spec[1].kind.__name__}"
    return "an object that counts by identity"


def _sharing(tensors: list[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """For each tensor: the first one with the same memory, and its byte offset from that one."""
    first: dict[int, tuple[int, int]] = {}
    result = []
    for index, tensor in enumerate(tensors):
        if tensor.layout != torch.strided or tensor.is_nested:
            result.append((index, 0))
            continue
        start = int(tensor.storage_offset()) * tensor.itemsize
        owner, base = first.setdefault(tensor.untyped_storage()._cdata, (index, start))
        result.append((owner, start - base))
    return tuple(result)


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A tensor's shape, strides, dtype and device; strides of dimensions of size 1 address nothing and do not count."""
    if tensor.is_nested:  # it has no shape, and is not recorded
        return (tensor.dim(), "nested", tensor.dtype, tensor.device)
    if tensor.layout != torch.strided:
        return (tensor.shape, tensor.layout, tensor.dtype, tensor.device)
    return (tensor.shape, _counting(tensor.shape, tensor.stride()), tensor.dtype, tensor.device)


_KINDS = ("class", "conjugate bit", "negative bit", "attributes")


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What Python code, or an op, can tell of a tensor besides its layout."""
    if tensor.layout != torch.strided:
        return (type(tensor), False, False)
    return (type(tensor), tensor.is_conj(), tensor.is_neg())


def _layout_of(meta: TensorMeta) -> tuple[Any, ...]:
    """What `_layout` gives for a tensor laid out like that."""
    return (meta.shape, _counting(meta.shape, meta.stride), meta.dtype, meta.device)


def _counting(shape: Sequence[int], stride: tuple[int, ...]) -> tuple[int, ...]:
    if 1 not in shape:
        return stride
    return tuple([step for size, step in zip(shape, stride, strict=True) if size != 1])


def _steps(path: Path) -> list[Any]:
    steps: list[Any] = []
    while path is not None:
        path, step = path
        steps.append(step)
    return steps[::-1]


def _step(key: Any) -> str:
    if key is None:  # what a variable holds
        return ""
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"


def _names(paths: Sequence[Path]) -> tuple[str, ...]:
    """A distinct value name for each path: ``mask_a_0``."""
    names: dict[str, None] = {}
    for path in paths:
        name = "_".join(str(step) for step in _steps(path))
        name = "".join(char if char.isalnum() or char in "_." else "_" for char in name)
        while name in names:
            name += "_"
        names[name] = None
    return tuple(names)


def _full(meta: TensorMeta) -> str:
    return f"{meta} with strides {list(meta.stride)} on {meta.device}"
