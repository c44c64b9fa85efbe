"""Graphs as JSON and back, for saved files and caches: plain data, every op checked against the op table or ATen."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graph_capture.errors import CacheError, CaptureError
from graph_capture.ir.binding import arguments
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import FUSED
from graph_capture.ir.savable import advice, is_savable
from graph_capture.ir.values import Arg, Source, TensorMeta, arg_indices

# torch's enumerations in attributes, by a tag; each is a public name of torch.
_NAMED: Mapping[str, type] = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}

Extra = Mapping[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]]  # tag -> type, to JSON, from JSON


class Encoder:
    """Graphs as JSON values. Nodes go into one table, so that graphs may share them.

    Attributes:
        nodes: the table so far; what an entry refers to comes before it.
    """

    def __init__(self, extra: Extra | None = None) -> None:
        self.nodes: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._kept: list[OpNode] = []  # their ids must stay theirs
        self._extra = extra or {}

    def graph(self, graph: SubGraph) -> dict[str, Any]:
        """A graph.

        Raises:
            CaptureError: it holds something that cannot be written down.
        """
        return {
            "nodes": [self.node(node) for node in graph.nodes],
            "inputs": list(graph.input_names),
            "outputs": list(graph.output_names),
            "values": {name: encode_meta(meta) for name, meta in graph.values.items()},
        }

    def node(self, node: OpNode) -> int:
        """A node's number in the table."""
        known = self._numbers.get(id(node))
        if known is not None:
            return known
        if not node.op_type.startswith(FUSED) and not is_savable(node.op_type):
            raise CaptureError(f"{node.op_type} at {node.source} cannot be saved: {advice(node.op_type)}")
        origin = [self.node(inner) for inner in node.origin]
        attrs = {key: self.value(value) for key, value in node.attrs}
        source = None if node.source is None else list(node.source)
        self.nodes.append([node.op_type, list(node.inputs), list(node.outputs), attrs, source, origin])
        self._kept.append(node)
        self._numbers[id(node)] = len(self.nodes) - 1
        return len(self.nodes) - 1

    def value(self, value: Any) -> Any:
        """An attribute's value."""
        if value is None or isinstance(value, (bool, str)) or type(value) is int:
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, tuple):
            return [self.value(item) for item in value]
        if isinstance(value, Arg):
            return {"arg": value.index}
        if isinstance(value, complex):
            return {"complex": [self.value(value.real), self.value(value.imag)]}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, SubGraph):
            return {"graph": self.graph(value)}
        for tag, kind in _NAMED.items():
            if isinstance(value, kind):
                return {tag: str(value).removeprefix("torch.")}
        for tag, (kind, encode, _) in self._extra.items():
            if isinstance(value, kind):
                return {tag: encode(value)}
        raise CaptureError(f"a {type(value).__name__} in the graph cannot be saved")


class Decoder:
    """The graphs back from `Encoder`'s JSON. Everything is checked; nothing in it is run.

    Args:
        nodes: the table.

    Raises (also from its methods):
        CacheError: something is not what an `Encoder` writes.
    """

    def __init__(self, nodes: Any, extra: Extra | None = None) -> None:
        self.nodes: list[OpNode] = []
        self._extra = extra or {}
        for entry in as_list(nodes):
            op_type, inputs, outputs, attrs, source, origin = as_list(entry, 6)
            found = {text(key): self.value(value) for key, value in as_dict(attrs).items()}
            node = OpNode(
                text(op_type),
                tuple(map(text, as_list(inputs))),
                tuple(map(text, as_list(outputs))),
                tuple(found.items()),
                None if source is None else _source(source),
                tuple(map(self.node, as_list(origin))),
            )
            _check_op(node)
            self.nodes.append(node)

    def node(self, number: Any) -> OpNode:
        """The node of a number."""
        if integer(number) >= len(self.nodes):
            raise CacheError(f"there is no node {number}")
        return self.nodes[number]

    def graph(self, value: Any) -> SubGraph:
        """A graph."""
        table = as_dict(value)
        try:
            return SubGraph(
                tuple(map(self.node, as_list(table.get("nodes")))),
                tuple(map(text, as_list(table.get("inputs")))),
                tuple(map(text, as_list(table.get("outputs")))),
                {text(name): decode_meta(meta) for name, meta in as_dict(table.get("values")).items()},
            )
        except CacheError:
            raise
        except CaptureError as error:
            raise CacheError(f"a graph is malformed: {error}") from error

    def value(self, value: Any) -> Any:
        """An attribute's value."""
        if value is None or isinstance(value, (bool, str, int, float)):
            return value
        if isinstance(value, list):
            return tuple(map(self.value, value))
        ((tag, inner),) = as_dict(value, 1).items()
        if tag == "float":
            return _float(inner)
        if tag == "arg":
            return Arg(integer(inner))
        if tag == "complex":
            real, imaginary = (_real(self.value(part)) for part in as_list(inner, 2))
            return complex(real, imaginary)
        if tag == "device":
            return decode_device(inner)
        if tag == "graph":
            return self.graph(inner)
        if tag in _NAMED:
            return named(tag, inner)
        if tag in self._extra:
            return self._extra[tag][2](inner)
        raise CacheError(f"{tag!r} is not a kind of value")


def _check_op(node: OpNode) -> None:
    if node.op_type.startswith(FUSED):
        if not isinstance(node.attr("body"), SubGraph) or not node.origin:
            raise CacheError(f"{node.op_type} lacks what it stands for")
        return
    if not is_savable(node.op_type):
        raise CacheError(f"{node.op_type!r} is no op of the op table or of ATen that a file may name")
    if node.op_type.startswith("aten.") and node.attr("dropout_p"):
        raise CacheError(f"{node.op_type} with dropout draws random numbers")
    try:
        given = arguments(node)
    except CaptureError as error:
        raise CacheError(str(error)) from error
    if any(index >= len(node.inputs) for value in given.values() for index in arg_indices(value)):
        raise CacheError(f"{node.op_type} refers to an input that it does not have")


# --- layouts and names


def encode_meta(meta: TensorMeta) -> list[Any]:
    """A layout."""
    return [
        list(meta.shape),
        list(meta.stride),
        str(meta.dtype).removeprefix("torch."),
        str(meta.device),
        meta.offset,
        meta.storage,
        meta.bits,
    ]


def decode_meta(value: Any) -> TensorMeta:
    """The layout back.

    Raises:
        CacheError: it is none.
    """
    shape, stride, dtype, device, offset, storage, bits = as_list(value, 7)
    sizes, steps = tuple(map(integer, as_list(shape))), tuple(map(integer, as_list(stride)))
    if len(steps) not in (0, len(sizes)):
        raise CacheError(f"{len(sizes)} dimensions with {len(steps)} strides")
    if type(storage) is not int:
        raise CacheError(f"{storage!r} is not a storage")
    if bits not in (0, 1, 2, 3):
        raise CacheError(f"{bits!r} are not a view's bits")
    return TensorMeta(sizes, steps, named("dtype", dtype), decode_device(device), integer(offset), storage, bits)


def named(tag: str, name: Any) -> Any:
    """torch's dtype, memory format or layout of a name."""
    found = getattr(torch, text(name), None) if re.fullmatch(r"[a-z]\w*", text(name)) else None
    if not isinstance(found, _NAMED[tag]):
        raise CacheError(f"{name!r} is not a {tag}")
    return found


def decode_device(name: Any) -> torch.device:
    """torch's device of a name."""
    try:
        return torch.device(text(name))
    except RuntimeError as error:
        raise CacheError(f"{name!r} is not a device") from error


def _source(value: Any) -> Source:
    module, file, line = as_list(value, 3)
    return Source(text(module), text(file), integer(line))


# --- plain JSON, checked


def text(value: Any) -> str:
    """`value`, which must be a string."""
    if not isinstance(value, str):
        raise CacheError(f"expected a string, found {_short(value)}")
    return value


def integer(value: Any) -> int:
    """`value`, which must be an integer that a size can have."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise CacheError(f"expected a size, found {_short(value)}")
    return value


def as_list(value: Any, length: int | None = None) -> Sequence[Any]:
    """`value`, which must be a list (of this length)."""
    if not isinstance(value, list) or length not in (None, len(value)):
        raise CacheError(f"expected a list{'' if length is None else f' of {length}'}, found {_short(value)}")
    return value


def as_dict(value: Any, length: int | None = None) -> Mapping[str, Any]:
    """`value`, which must be an object (of this many members)."""
    if not isinstance(value, dict) or length not in (None, len(value)):
        raise CacheError(f"expected an object{'' if length is None else f' of {length}'}, found {_short(value)}")
    return value


def _real(value: Any) -> float:
    if type(value) not in (int, float):
        raise CacheError(f"expected a number, found {_short(value)}")
    return float(value)


def _float(value: Any) -> float:
    try:
        return float(text(value))
    except ValueError as error:
        raise CacheError(f"{_short(value)} is not a number") from error


def _short(value: Any) -> str:
    found = repr(value) if not isinstance(value, (list, dict)) else f"a {type(value).__name__} of {len(value)}"
    return found if len(found) <= 60 else found[:57] + "..."
