"""Signatures and templates as JSON and back: tensors, plain values, tuples, lists and dicts, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graph_capture.calls.signature import Signature
from graph_capture.calls.structure import NAMES, Spec
from graph_capture.calls.template import ResultTemplate
from graph_capture.errors import CacheError, CaptureError
from graph_capture.ir.graph_json import (
    as_dict,
    as_list,
    decode_device,
    decode_meta,
    encode_meta,
    integer,
    named,
    text,
)
from graph_capture.record.recorded import RecordedGraph

_CONTAINERS: Mapping[str, type] = {"list": list, "dict": dict}
_KEYS = (str, int, bool, type(None))


def encode_structure(graph: RecordedGraph) -> dict[str, Any]:
    """The signature and the template of a recording.

    Raises:
        CaptureError: they hold something that only the process that recorded can know.
    """
    signature, template = graph.signature, graph.template
    if graph.rebindings:
        raise CaptureError(f"the code assigns {graph.rebindings[0].path}, which a saved graph cannot")
    arguments, contents, _, sharing = signature.key
    changes, root, known = template.contents, template.root, template.known
    if graph.surroundings is not None:
        around = set(graph.surroundings())
        variables = 0  # the last of the objects: what the function has around it
        for label, spec in arguments:
            held = contents[spec[1]] if spec[0] == "ref" else None
            variable = held is not None and held[0] in NAMES
            if label not in around:
                continue
            if not all(map(_is_plain, held[2] if variable and held is not None else (spec,))):
                raise CaptureError(f"{label!r}, which the captured function uses from around it, cannot be saved")
            if variable and spec[1] in changes:
                raise CaptureError(f"{label!r}, which the captured function assigns, cannot be saved")
            variables += variable
        arguments = tuple(item for item in arguments if item[0] not in around)
        contents = contents[: len(contents) - variables]
        root = _renumbered(root, known, variables)
        changes = {n - variables * (n >= known): _renumbered(c, known, variables) for n, c in changes.items()}
        known -= variables
    return {
        "arguments": [[label, _encode(spec, f"argument {label}")] for label, spec in arguments],
        "contents": [_encode_content(content, "an argument") for content in contents],
        "sharing": [list(pair) for pair in sharing],
        "names": list(signature.names),
        "metas": [encode_meta(meta) for meta in signature.metas],
        "result": _encode(root, "the result"),
        "changes": [[number, _encode_content(c, "the result")] for number, c in changes.items()],
        "known": known,
        "tensors": list(template.tensors),
    }


def decode_structure(value: Any) -> tuple[Signature, ResultTemplate]:
    """The signature and the template back, consistent in themselves.

    Raises:
        CacheError: they are not what `encode_structure` writes.
    """
    table = as_dict(value)
    names = tuple(map(text, as_list(table.get("names"))))
    metas = tuple(map(decode_meta, as_list(table.get("metas"), len(names))))
    contents = as_list(table.get("contents"))
    decode = _Decoder(range(len(names)), len(contents))
    arguments = []
    for pair in as_list(table.get("arguments")):
        label, spec = as_list(pair, 2)
        arguments.append((text(label), decode.spec(spec)))
    made = tuple(map(decode.content, contents))
    sharing = []
    for index, pair in enumerate(as_list(table.get("sharing"), len(names))):
        first, offset = as_list(pair, 2)
        if integer(first) > index or type(offset) is not int:
            raise CacheError("the arguments' sharing of memory is damaged")
        sharing.append((first, offset))
    signature = Signature.restored(tuple(arguments), made, tuple(sharing), names, metas)
    return signature, _template(table, made)


def _template(table: Mapping[str, Any], contents: Sequence[Spec]) -> ResultTemplate:
    known = len(contents)
    changes = [as_list(pair, 2) for pair in as_list(table.get("changes"))]
    new = [integer(number) for number, _ in changes if integer(number) >= known]
    tensors = tuple(map(integer, as_list(table.get("tensors"))))
    if table.get("known") != known or new != list(range(known, known + len(new))) or len({*tensors}) < len(tensors):
        raise CacheError("the result's structure is damaged")
    decode = _Decoder(tensors, known + len(new))
    made = {number: decode.content(content) for number, content in changes}
    if any(contents[number][0] is not content[0] for number, content in made.items() if number < known):
        raise CacheError("a replay would turn an argument into something else")
    return ResultTemplate(decode.spec(table.get("result")), made, known, {}, tensors)


def _is_plain(spec: Spec) -> bool:
    return spec[0] in ("value", "is")


def _renumbered(spec: Any, known: int, by: int) -> Any:
    """A spec, or a tuple of specs, in which the objects from number `known` on have lower numbers."""
    if not isinstance(spec, tuple) or not by:
        return spec
    if len(spec) == 2 and spec[0] == "ref":
        return ("ref", spec[1] - by * (spec[1] >= known))
    return tuple(_renumbered(part, known, by) for part in spec)


def _encode(spec: Spec, where: str) -> list[Any]:
    tag = spec[0]
    if tag in ("tensor", "ref"):
        return [tag, spec[1]]
    if tag == "value" and (plain := _encode_value(spec[1], spec[2])) is not None:
        return [tag, *plain]
    if tag == "node" and spec[1] is tuple:
        return [tag, [_encode(child, where) for child in spec[3]]]
    kind = spec[1].__name__ if tag in ("value", "node") else "an array" if tag == "array" else "an object"
    if tag == "foreign":
        kind = f"a {spec[1].kind.__name__} of another library"
    raise CaptureError(f"{where} holds {kind}, which cannot be saved; use tensors, plain values, tuples, lists, dicts")


def _encode_value(kind: Any, value: Any) -> tuple[str, Any] | None:
    if kind in (type(None), bool, int, str) or kind in (float, complex):  # the latter are texts already
        return kind.__name__, value
    if kind is bytes:
        return "bytes", value.hex()
    if kind is torch.dtype:
        return "dtype", str(value).removeprefix("torch.")
    if kind is torch.device:
        return "device", str(value)
    return ("Size", list(value)) if kind is torch.Size else None


def _encode_content(content: Spec, where: str) -> list[Any]:
    kind, keys, children = content
    if kind not in _CONTAINERS.values() or not all(type(key) in _KEYS for key in keys):
        raise CaptureError(
            f"{where} holds a {kind.__name__}, which cannot be saved; use lists, and dicts with strings or ints as keys"
        )
    return [kind.__name__, list(keys), [_encode(child, where) for child in children]]


class _Decoder:
    """Specs back from JSON, for so many objects and these tensors."""

    def __init__(self, tensors: Sequence[int], objects: int) -> None:
        self._tensors, self._objects = frozenset(tensors), objects

    def spec(self, value: Any) -> Spec:
        tag, *rest = as_list(value) or [None]
        if tag == "tensor" and len(rest) == 1 and integer(rest[0]) in self._tensors:
            return ("tensor", rest[0])
        if tag == "ref" and len(rest) == 1 and integer(rest[0]) < self._objects:
            return ("ref", rest[0])
        if tag == "node" and len(rest) == 1:
            return ("node", tuple, None, tuple(map(self.spec, as_list(rest[0]))))
        if tag == "value" and len(rest) == 2:
            return ("value", *_decode_value(text(rest[0]), rest[1]))
        raise CacheError(f"{str(value)[:60]!r} does not describe a value")

    def content(self, value: Any) -> Spec:
        name, keys, children = as_list(value, 3)
        kind = _CONTAINERS.get(text(name))
        if kind is None or not all(type(key) in _KEYS for key in as_list(keys, len(as_list(children)))):
            raise CacheError(f"{str(name)[:60]!r} is not a container that can be saved")
        if (kind is list and list(keys) != list(range(len(keys)))) or len({*keys}) < len(keys):
            raise CacheError("a container's keys are damaged")
        return (kind, tuple(keys), tuple(map(self.spec, children)))


def _decode_value(name: str, value: Any) -> tuple[Any, Any]:
    plain = {"NoneType": type(None), "bool": bool, "int": int, "str": str}
    if name in plain and type(value) is plain[name]:
        return plain[name], value
    try:
        if name in ("float", "complex"):
            kind: Any = float if name == "float" else complex
            return kind, repr(kind(text(value)))
        if name == "bytes":
            return bytes, bytes.fromhex(text(value))
    except ValueError as error:
        raise CacheError(f"{str(value)[:60]!r} is not a {name}") from error
    if name == "dtype":
        return torch.dtype, named("dtype", value)
    if name == "device":
        return torch.device, decode_device(value)
    if name == "Size":
        return torch.Size, torch.Size(map(integer, as_list(value)))
    raise CacheError(f"{name[:60]!r} is not a kind of value")
