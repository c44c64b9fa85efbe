"""What a graph knows of its values and of where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class Arg:
    """Stands for ``inputs[index]`` inside an attribute, where tensors come in a list (``cat``, ``index``)."""

    index: int

    def __repr__(self) -> str:
        return f"${self.index}"


def arg_indices(value: Any) -> list[int]:
    """The inputs that an attribute value refers to."""
    if isinstance(value, Arg):
        return [value.index]
    if isinstance(value, tuple):
        return [index for item in value for index in arg_indices(item)]
    return []


def freeze(value: Any) -> Any:
    """`value` with lists as tuples and dicts as sorted tuples of pairs, so that it can be hashed."""
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((key, freeze(item)) for key, item in value.items()))
    return value


def typed(value: Any) -> Any:
    """A frozen value as something that equals only what is equal in value *and* type, signs of zeros included."""
    kind = type(value)
    if kind is tuple:
        return tuple([typed(item) for item in value])
    if kind is float or kind is complex:
        return kind, repr(value)
    return (kind, value) if kind is bool or kind is int else value


def same_value(left: Any, right: Any) -> bool:
    """Equal in value, type and sign: ``1``, ``1.0`` and ``True`` are three values, as 0.0 and -0.0 are two; NaN equals
    itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same_value, left, right))
    if isinstance(left, (float, complex)):
        return repr(left) == repr(right)
    return bool(left == right) or (left != left and right != right)


class Source(NamedTuple):
    """Where an op was called: the module path, and the file and line of the user's code."""

    module: str = ""
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        at = f"{self.file}:{self.line}" if self.file else ""
        return ", ".join(part for part in (self.module, at) if part)


class TensorMeta(NamedTuple):
    """What is known of a value without its data.

    `stride` and `offset` count elements. Values with the same non-negative `storage` share memory (an alias set);
    -1 means that nothing is known to share it. `bits` is not 0 for a view whose values are not what lies in its memory:
    1 for a conjugate one, 2 for a negative one, or their sum.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int = 0
    storage: int = -1
    bits: int = 0

    @classmethod
    def of(cls, tensor: torch.Tensor, storage: int = -1) -> TensorMeta:
        shape = tuple(tensor.shape)
        if tensor.layout is not torch.strided:
            return cls(shape, (), tensor.dtype, tensor.device, 0, storage)
        bits = int(tensor.is_conj()) + 2 * int(tensor.is_neg())
        return cls(shape, tensor.stride(), tensor.dtype, tensor.device, int(tensor.storage_offset()), storage, bits)

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{DTYPE_NAMES.get(self.dtype, str(self.dtype))}[{', '.join(map(str, self.shape))}]"


DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float64: "f64",
        torch.float32: "f32",
        torch.float16: "f16",
        torch.bfloat16: "bf16",
        torch.int64: "i64",
        torch.int32: "i32",
        torch.int16: "i16",
        torch.int8: "i8",
        torch.uint8: "u8",
        torch.bool: "b8",
        torch.complex64: "c64",
        torch.complex128: "c128",
    }
)
