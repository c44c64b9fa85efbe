"""Between nodes and calls: a call's arguments as a node, and a node's arguments as a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from graph_capture.errors import CaptureError
from graph_capture.ir.ops import Op, op, plain
from graph_capture.ir.values import Arg, arg_indices, same_value

if TYPE_CHECKING:
    from graph_capture.ir.graph import OpNode

_EMPTY = inspect.Parameter.empty


def pack(
    target: Op, args: Sequence[Any], kwargs: Mapping[str, Any], name_of: Callable[[torch.Tensor], str]
) -> tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]:
    """The ``(inputs, attrs)`` of a node for this call; `name_of` gives the value name of a tensor.

    Raises:
        TypeError: the arguments do not fit the op's parameters.
    """
    parameters = target.parameters
    given = len(args)
    if given > len(parameters):
        raise TypeError(f"{target.name} takes {len(parameters)} arguments, got {given}")
    inputs: list[str] = []
    attrs: dict[str, Any] = {}
    skipped: dict[str, Any] = {}  # defaults, spelled out only where a tensor follows them

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            inputs.append(name_of(value))
            return Arg(len(inputs) - 1)
        if isinstance(value, (list, tuple)):
            return tuple([convert(item) for item in value])
        return value

    for index, parameter in enumerate(parameters):
        default = parameter.default
        value = args[index] if index < given else kwargs.get(parameter.name, default)
        if isinstance(value, torch.Tensor):
            inputs.append(name_of(value))
        elif value is default or (default is not _EMPTY and same_value(plain(value), default)):
            if value is _EMPTY:
                raise TypeError(f"{target.name} misses its argument {parameter.name!r}")
            skipped[parameter.name] = default
            continue
        elif type(value) in (list, tuple):
            before = len(inputs)
            attrs[parameter.name] = convert(value)
            if len(inputs) == before:
                continue
        else:
            attrs[parameter.name] = value
            continue
        if skipped:
            attrs |= skipped
            skipped = {}
    return tuple(inputs), tuple(sorted(attrs.items())) if attrs else ()


def arguments(node: OpNode) -> dict[str, Any]:
    """Parameter name -> value of this call, tensors as ``Arg(i)``; parameters left at their default are absent.

    Raises:
        CaptureError: the node has more inputs than its op has tensor parameters.
    """
    target = op(node.op_type)
    attrs = dict(node.attrs)
    listed = [index for value in attrs.values() if isinstance(value, (Arg, tuple)) for index in arg_indices(value)]
    positional = iter([index for index in range(len(node.inputs)) if index not in listed])
    bound: dict[str, Any] = {}
    for parameter in target.parameters:
        if parameter.name in attrs:
            bound[parameter.name] = attrs.pop(parameter.name)
        elif (index := next(positional, None)) is not None:
            bound[parameter.name] = Arg(index)
    if attrs or next(positional, None) is not None:
        extra = ", ".join(attrs) or f"{len(node.inputs)} inputs"
        raise CaptureError(f"{node.op_type} takes ({', '.join(p.name for p in target.parameters)}), got also: {extra}")
    return bound


def template(node: OpNode) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a node's call, by position as far as that goes, then by name; inputs as ``Arg(i)``."""
    given = arguments(node)
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    in_order = True
    for parameter in op(node.op_type).parameters:
        if parameter.name not in given:
            in_order = False
        elif parameter.keyword_only or not in_order:
            keywords[parameter.name] = given[parameter.name]
        else:
            positional.append(given[parameter.name])
    return positional, keywords


def call_of(node: OpNode, inputs: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a node's call on these inputs, by position and by name."""
    positional, keywords = template(node)
    return [filled(value, inputs) for value in positional], {k: filled(v, inputs) for k, v in keywords.items()}


def filled(value: Any, inputs: Sequence[Any]) -> Any:
    """`value` with its ``Arg(i)`` replaced, and lists as torch takes them."""
    if isinstance(value, Arg):
        return inputs[value.index]
    if isinstance(value, tuple):
        return [filled(item, inputs) for item in value] if arg_indices(value) else list(value)
    return value


def prepare(node: OpNode) -> Callable[[Sequence[torch.Tensor]], Any]:
    """A function that runs the node's op on its input tensors, with everything else bound beforehand."""
    target = op(node.op_type)
    function = target.function
    if not node.attrs and len(node.inputs) <= target.positional:
        return lambda tensors: function(*tensors)
    positional, keywords = template(node)
    count = len(node.inputs)
    if positional[:count] == [Arg(index) for index in range(count)]:  # the tensors first, then what is known
        known = tuple([_thawed(value) for value in positional[count:]])
        options = {name: _thawed(value) for name, value in keywords.items()}
        return lambda tensors: function(*tensors, *known, **options)
    fill_args = [_filler(value) for value in positional]
    fill_kwargs = [(name, _filler(value)) for name, value in keywords.items()]
    return lambda tensors: function(*[fill(tensors) for fill in fill_args], **{k: f(tensors) for k, f in fill_kwargs})


def _filler(value: Any) -> Callable[[Sequence[torch.Tensor]], Any]:
    if isinstance(value, Arg):
        index = value.index
        return lambda tensors: tensors[index]
    if isinstance(value, tuple) and arg_indices(value):
        items = [_filler(item) for item in value]
        return lambda tensors: [item(tensors) for item in items]
    value = _thawed(value)
    return lambda tensors: value


def _thawed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def expression(node: OpNode, dtype: torch.dtype) -> str | None:
    """The scalar expression of this call (see `Op.expression`), or None where it has none."""
    found = op(node.op_type).expression
    return found(arguments(node), dtype) if callable(found) else found


def flatten_outputs(result: Any) -> list[torch.Tensor]:
    """The tensors of an op's result in order: of one tensor, or of nested tuples and lists of them."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [tensor for item in result for tensor in flatten_outputs(item)]
    return []
