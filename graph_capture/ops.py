"""What an op is: its reference function, its parameters, how a call becomes a node and a node a call.

The rows are in `graph_capture.optable`. An op that has no row there is still recorded and replayed: its name is then
the full ATen (or custom) overload name, such as ``aten.index_copy_.default``, and its kind is ``opaque``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from graph_capture.errors import CaptureError, DataDependentError
from graph_capture.graph import Arg, OpNode, SubGraph, freeze

FUSED = "fused."  # prefix of the ops that a pass makes from a region; attribute ``body`` is its SubGraph
ATTENTION_OPS = ("scaled_dot_product_attention", "capped_attention")
EXTERNAL = "external"  # the op that calls a kernel which is not torch's
GUARD = "guard."  # prefix of the ops that run another op and compare what it gives Python with the recorded value


class Kind(Enum):
    """How an op's output depends on its inputs, which decides what may be fused with it."""

    POINTWISE = "pointwise"  # each element from the elements at the same (broadcast) place
    ROW = "row"  # each element from one row: the last dimension
    VIEW = "view"  # shares its input's memory
    OPAQUE = "opaque"  # anything else


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    default: Any = inspect.Parameter.empty
    keyword_only: bool = False


Expression = str | Callable[[Mapping[str, Any], torch.dtype], "str | None"]


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """A row of the op table.

    `expression` is what codegen needs to fuse the op: Python syntax over the op's parameter names, numbers, arithmetic,
    comparisons, and these functions: exp log sqrt rsqrt sin cos tanh erf sigmoid abs floor where maximum minimum
    and, over the last dimension, sum mean max min (reductions, kept as a column). It may be a function of the call's
    `arguments` and its first input's dtype, and returns None where the call cannot be expressed.
    """

    name: str
    function: Callable[..., Any]
    kind: Kind
    parameters: tuple[Parameter, ...]
    expression: Expression | None = None
    commutative: bool = False
    composed: bool = False

    @property
    def library(self) -> bool:
        """Whether `function` is one call of a library, rather than `composed` of several."""
        return not self.composed and self.kind is not Kind.VIEW

    @property
    def overload(self) -> OpOverload | None:
        """The dispatcher's op that `function` is, if it is one."""
        return self.function if isinstance(self.function, OpOverload) else None

    @property
    def positional(self) -> int:
        """How many parameters can be given by position."""
        return sum(not parameter.keyword_only for parameter in self.parameters)

    @property
    def may_write(self) -> bool:
        """Whether the op writes any of its inputs in place."""
        return self.name == EXTERNAL or bool(_written_parameters(self.name))

    @property
    def returns_values(self) -> bool:
        """False for an op that is called for its effect only."""
        return self.overload is None or bool(self.overload._schema.returns)


def parameters_of(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The parameters of a dispatcher op (from its schema) or of a Python function (from its signature)."""
    if isinstance(function, OpOverload):
        return tuple(
            Parameter(arg.name, _plain(arg.default_value) if arg.has_default_value() else _EMPTY, arg.kwarg_only)
            for arg in function._schema.arguments
        )
    return tuple(
        Parameter(p.name, p.default, p.kind is inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(function).parameters.values()
    )


_EMPTY = inspect.Parameter.empty


def _not_callable(*args: Any, **kwargs: Any) -> Any:
    raise CaptureError("a fused op runs as a kernel, or as the nodes of its body")


def _plain(value: Any) -> Any:
    return freeze(value) if isinstance(value, (list, tuple)) else value


@cache
def op(name: str) -> Op:
    """The op called `name`.

    Raises:
        CaptureError: neither the op table nor torch's dispatcher has an op of that name.
    """
    from graph_capture.optable import TABLE

    if name in TABLE:
        return TABLE[name]
    if name.startswith(FUSED):
        return Op(name, _not_callable, Kind.OPAQUE, ())
    if name.startswith(GUARD):
        return _guard(op(name.removeprefix(GUARD)))
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    try:
        function = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    except (AttributeError, RuntimeError) as error:
        raise CaptureError(f"no op named {name!r} in the op table or in torch.ops") from error
    kind = Kind.VIEW if _is_view(function) else Kind.OPAQUE
    return Op(name, function, kind, parameters_of(function))


@cache
def op_of(function: OpOverload) -> Op:
    """The op that a dispatcher call is recorded as."""
    from graph_capture.optable import TABLE

    for row in TABLE.values():
        if row.overload is function:
            return row
    namespace, name = function._schema.name.split("::")
    return op(f"{namespace}.{name}.{function._overloadname}")


def _guard(target: Op) -> Op:
    """The op that runs `target` and raises where its Python result is not the recorded one."""

    def check(*args: Any, expected: Any, **kwargs: Any) -> None:
        found = target.function(*args, **kwargs)
        if not same_value(freeze(found), freeze(expected)):
            raise DataDependentError(
                f"{target.name} gave Python {_short(expected)} when it was recorded and gives {_short(found)} now: the "
                "recorded ops may not be those that the code would run. Record again"
            )

    return Op(GUARD + target.name, check, Kind.OPAQUE, (*target.parameters, Parameter("expected", keyword_only=True)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_view(function: OpOverload) -> bool:
    return any(a.alias_info is not None and not a.alias_info.is_write for a in function._schema.arguments)


# Older ops that write in training mode although their schema does not say so.
_UNDECLARED_WRITES = dict.fromkeys(
    [
        *(f"aten.{name}_batch_norm.default" for name in ("native", "cudnn", "miopen")),
        "aten.batch_norm_update_stats.default",
    ],
    frozenset({"running_mean", "running_var"}),
)


@cache
def _written_parameters(op_type: str) -> frozenset[str]:
    overload = op(op_type).overload
    if overload is None:
        return frozenset()
    declared = (a.name for a in overload._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return frozenset(declared) | _UNDECLARED_WRITES.get(op_type, frozenset())


def written_inputs(node: OpNode) -> list[int]:
    """Positions in ``node.inputs`` of the tensors that the op writes in place."""
    if node.op_type == EXTERNAL:  # what a foreign kernel writes is not known
        return list(range(len(node.inputs)))
    if node.op_type.startswith(FUSED):
        return _written_by_body(node.attr("body"))
    if node.op_type in _UNDECLARED_WRITES and node.attr("training") is False:
        return []
    written = _written_parameters(node.op_type)
    if not written:
        return []
    return [index for name, value in arguments(node).items() if name in written for index in arg_indices(value)]


def _written_by_body(body: SubGraph) -> list[int]:
    """Positions of the inputs whose memory a region writes."""
    storages = {body.values[n.inputs[i]].storage for n in body.nodes for i in written_inputs(n)}
    return [index for index, name in enumerate(body.input_names) if storages and body.values[name].storage in storages]


@cache
def _random(op_type: str) -> bool:
    overload = op(op_type).overload
    return overload is not None and torch.Tag.nondeterministic_seeded in overload.tags


def is_random(node: OpNode) -> bool:
    """Whether the op draws from the global random number generator."""
    return _random(node.op_type) or (
        node.op_type == "scaled_dot_product_attention" and bool(node.attr("dropout_p", 0.0))
    )


def arg_indices(value: Any) -> list[int]:
    """The inputs that an attribute value refers to."""
    if isinstance(value, Arg):
        return [value.index]
    if isinstance(value, tuple):
        return [index for item in value for index in arg_indices(item)]
    return []


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
        elif value is default or (default is not _EMPTY and same_value(_plain(value), default)):
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


def same_value(left: Any, right: Any) -> bool:
    """Equal in value *and* type: ``1``, ``1.0`` and ``True`` are three values; NaN equals itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same_value, left, right))
    return bool(left == right) or (left != left and right != right)


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


def prepare(node: OpNode) -> Callable[[Sequence[torch.Tensor]], Any]:
    """A function that runs the node's op on its input tensors, with everything else bound beforehand."""
    target = op(node.op_type)
    function = target.function
    if not node.attrs and len(node.inputs) <= target.positional:
        return lambda tensors: function(*tensors)
    bound = arguments(node)
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    in_order = True
    for parameter in target.parameters:
        if parameter.name not in bound:
            in_order = False
        elif parameter.keyword_only or not in_order:
            keywords[parameter.name] = bound[parameter.name]
        else:
            positional.append(bound[parameter.name])
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
