"""What a call looks like: the structure of its arguments, each tensor's layout, which of them share memory.

Structures are torch pytrees. Tensors count by shape, stride, dtype, device and aliasing; Python values by equality and
type; any other object by identity.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graph_capture.errors import CaptureError, SignatureMismatchError
from graph_capture.graph import TensorMeta
from graph_capture.ops import same_value

_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of a pytree: a tensor known by `name`, or a Python `value`."""

    label: str
    name: str | None = None
    value: Any = None
    meta: TensorMeta | None = None

    def mismatch(self, value: Any) -> str | None:
        """How `value` differs from this leaf, or None."""
        if self.meta is None:
            same = same_value(value, self.value) if isinstance(self.value, _VALUES) else value is self.value
            return None if same else f"expected {self.value!r}, got {_describe(value)}"
        if not isinstance(value, torch.Tensor):
            return f"expected {_layout(self.meta)}, got {_describe(value)}"
        meta = TensorMeta.of(value)
        same = (
            meta.shape == self.meta.shape
            and meta.dtype == self.meta.dtype
            and meta.device == self.meta.device
            and _strides(meta) == _strides(self.meta)
        )
        return None if same else f"expected {_layout(self.meta)}, got {_layout(meta)}"


@dataclass(frozen=True)
class InputSpec:
    """The recorded arguments, without their data."""

    spec: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    sharing: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[InputSpec, dict[str, torch.Tensor]]:
        """The spec of a call, and its distinct tensors by name."""
        paths, spec = pytree.tree_flatten_with_path((args, kwargs))
        leaves: list[Leaf] = []
        tensors: dict[str, torch.Tensor] = {}
        names: dict[int, str] = {}
        for path, value in paths:
            label, name = _label(path)
            if not isinstance(value, torch.Tensor):
                leaves.append(Leaf(label, value=value))
                continue
            if id(value) not in names:
                while name in tensors:
                    name += "_"
                names[id(value)] = name
                tensors[name] = value
            leaves.append(Leaf(label, names[id(value)], meta=TensorMeta.of(value)))
        return cls(spec, tuple(leaves), _sharing(list(tensors.values()))), tensors

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the distinct tensors, in order."""
        return tuple(dict.fromkeys(leaf.name for leaf in self.leaves if leaf.name is not None))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The distinct tensors of a call that fits this spec, in the order of `tensor_names`.

        Raises:
            SignatureMismatchError: the call does not fit; the message names the argument, what was expected, and
                what came.
        """
        values, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec:
            raise SignatureMismatchError(self._structure_mismatch(args, kwargs))
        tensors: dict[str, torch.Tensor] = {}
        for leaf, value in zip(self.leaves, values, strict=True):
            difference = leaf.mismatch(value)
            if difference is not None:
                raise SignatureMismatchError(f"argument {leaf.label}: {difference}; record again for this signature")
            if leaf.name is not None and tensors.setdefault(leaf.name, value) is not value:
                raise SignatureMismatchError(
                    f"argument {leaf.label}: the recording was given one tensor here and as {leaf.name!r}; "
                    "this call gives two"
                )
        bound = list(tensors.values())
        if _sharing(bound) != self.sharing:
            raise SignatureMismatchError(
                "the arguments share memory in another way than the recorded ones did "
                f"(recorded: {self._sharing_text(self.sharing)}; now: {self._sharing_text(_sharing(bound))})"
            )
        return bound

    def __str__(self) -> str:
        return f"({', '.join(f'{leaf.label}: {leaf.meta or repr(leaf.value)}' for leaf in self.leaves)})"

    def _sharing_text(self, sharing: tuple[tuple[int, int], ...]) -> str:
        names = self.tensor_names
        pairs = [f"{names[i]} with {names[first]}" for i, (first, _) in enumerate(sharing) if first != i]
        return ", ".join(pairs) or "no two share memory"

    def _structure_mismatch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        expected = [leaf.label for leaf in self.leaves]
        got = [_label(path)[0] for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]]
        missing = [label for label in expected if label not in got]
        extra = [label for label in got if label not in expected]
        parts = [f"expected the arguments ({', '.join(expected)}), got ({', '.join(got)})"]
        if missing:
            parts.append(f"missing: {', '.join(missing)}")
        if extra:
            parts.append(f"unexpected: {', '.join(extra)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class OutputSpec:
    """The structure of what a recording returns."""

    spec: pytree.TreeSpec
    leaves: tuple[Leaf, ...]

    @classmethod
    def of(cls, value: Any, name_of: Callable[[torch.Tensor], str]) -> OutputSpec:
        """The spec of a result whose tensors have the names that `name_of` gives."""
        flat, spec = pytree.tree_flatten(value)
        return cls(
            spec,
            tuple(
                Leaf(f"output[{i}]", name_of(leaf))
                if isinstance(leaf, torch.Tensor)
                else Leaf(f"output[{i}]", value=leaf)
                for i, leaf in enumerate(flat)
            ),
        )

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """One name for each tensor leaf; a name may come twice."""
        return tuple(leaf.name for leaf in self.leaves if leaf.name is not None)

    def check_objects(self, known: Sequence[Any]) -> None:
        """Refuse a result that holds an object whose tensors a replay could not renew.

        Raises:
            CaptureError: a leaf is neither a tensor, nor a plain value, nor one of the `known` objects.
        """
        for leaf in self.leaves:
            if leaf.name is None and not isinstance(leaf.value, _VALUES) and not any(leaf.value is v for v in known):
                raise CaptureError(
                    f"{leaf.label} is a {type(leaf.value).__name__}, which is not a pytree: a replay would return the "
                    "recorded object. Return its tensors, register it with torch.utils._pytree, or leave it out "
                    "(for transformers: use_cache=False, or pass the cache in)"
                )

    def build(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The result, from one tensor for each of `tensor_names`."""
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if leaf.name else leaf.value for leaf in self.leaves], self.spec)


def signature_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """A hashable key; two calls with equal keys fit one recording.

    Objects count by identity, so the caller must keep those of a kept key alive.
    """
    values, spec = pytree.tree_flatten((args, kwargs))
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    order = {id(tensor): index for index, tensor in reversed(list(enumerate(tensors)))}
    parts: list[Any] = [str(spec), _sharing(tensors)]
    for value in values:
        if isinstance(value, torch.Tensor):
            meta = TensorMeta.of(value)
            parts.append((order[id(value)], meta.shape, _strides(meta), meta.dtype, meta.device))
        elif isinstance(value, _VALUES):
            # NaN != NaN, so floats go by their text; the type keeps 1, 1.0 and True apart
            parts.append((type(value), repr(value) if isinstance(value, float | complex) else value))
        else:
            parts.append((type(value), id(value)))
    return tuple(parts)


def _sharing(tensors: list[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """For each tensor: the first one with the same memory, and its byte offset from that one."""
    first: dict[int, tuple[int, int]] = {}
    result = []
    for index, tensor in enumerate(tensors):
        if tensor.layout != torch.strided:
            result.append((index, 0))
            continue
        start = int(tensor.storage_offset()) * tensor.itemsize
        owner, base = first.setdefault(tensor.untyped_storage()._cdata, (index, start))
        result.append((owner, start - base))
    return tuple(result)


def _strides(meta: TensorMeta) -> tuple[int, ...]:
    """Strides with those of dimensions of size 1 left out: they address nothing."""
    return tuple(stride for size, stride in zip(meta.shape, meta.stride, strict=False) if size != 1)


def _label(path: tuple[Any, ...]) -> tuple[str, str]:
    """A key path into ``(args, kwargs)`` as text for people (``mask['a'][0]``) and as a value name (``mask_a_0``)."""
    positional = path[0].idx == 0
    if len(path) < 2:
        raise CaptureError("the arguments of a recording must be ordinary positional and keyword arguments")
    root = f"arg{path[1].idx}" if positional else str(path[1].key)
    rest = path[2:]
    label = root + pytree.keystr(rest)
    words = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in rest]
    name = "_".join([root, *words])
    return label, "".join(char if char.isalnum() or char in "_." else "_" for char in name)


def _layout(meta: TensorMeta) -> str:
    return f"{meta} with strides {list(meta.stride)} on {meta.device}"


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {_layout(TensorMeta.of(value))}"
    return f"{value!r} ({type(value).__name__})"
