"""What an op is: its reference function, its parameters, its kind.

The rows are in `graph_capture.ir.op_table`. An op that has no row there is still recorded and replayed: its name is
then the full ATen (or custom) overload name, such as ``aten.index_copy_.default``, and its kind is ``opaque``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from graph_capture.errors import CaptureError, DataDependentError
from graph_capture.ir.values import freeze, same_value

TABLE: dict[str, Op] = {}  # the rows, by name; `graph_capture.ir.op_table` and `register_op` fill it
FUSED = "fused."  # prefix of the ops that a pass makes from a region; attribute ``body`` is its SubGraph
ATTENTION_OPS = ("scaled_dot_product_attention", "capped_attention")
LINEARS = frozenset({"linear", "quant_linear"})
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

    @property
    def required(self) -> bool:
        """Whether a call must give it."""
        return self.default is inspect.Parameter.empty


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
        return self.name == EXTERNAL or bool(written_parameters(self.name))

    @property
    def returns_values(self) -> bool:
        """False for an op that is called for its effect only."""
        return self.overload is None or bool(self.overload._schema.returns)


def parameters_of(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The parameters of a dispatcher op (from its schema) or of a Python function (from its signature)."""
    if isinstance(function, OpOverload):
        return tuple(
            Parameter(arg.name, plain(arg.default_value) if arg.has_default_value() else _EMPTY, arg.kwarg_only)
            for arg in function._schema.arguments
        )
    return tuple(
        Parameter(p.name, p.default, p.kind is inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(function).parameters.values()
    )


_EMPTY = inspect.Parameter.empty


def _not_callable(*args: Any, **kwargs: Any) -> Any:
    raise CaptureError("a fused op runs as a kernel, or as the nodes of its body")


def plain(value: Any) -> Any:
    return freeze(value) if isinstance(value, (list, tuple)) else value


@cache
def op(name: str) -> Op:
    """The op called `name`.

    Raises:
        CaptureError: neither the op table nor torch's dispatcher has an op of that name.
    """
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
    for row in TABLE.values():
        if row.overload is function:
            return row
    namespace, name = function._schema.name.split("::")
    return op(f"{namespace}.{name}.{function._overloadname}")


def add_row(row: Op) -> None:
    """Add a row to the table.

    Raises:
        CaptureError: there is one of that name, or the name is not free to choose.
    """
    if row.name in TABLE:
        raise CaptureError(f"an op named {row.name!r} is in the table already; choose another name")
    if row.name.startswith((FUSED, GUARD)) or not row.name.replace(".", "_").isidentifier():
        raise CaptureError(f"{row.name!r} cannot be an op's name: use letters, digits and underscores")
    TABLE[row.name] = row
    _forget()


def remove_row(name: str) -> None:
    """Take a row out of the table.

    Raises:
        CaptureError: there is none of that name.
    """
    if TABLE.pop(name, None) is None:
        raise CaptureError(f"there is no op named {name!r} in the table")
    _forget()


def _forget() -> None:
    for known in (op, op_of, written_parameters):
        known.cache_clear()


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
UNDECLARED_WRITES = dict.fromkeys(
    [
        *(f"aten.{name}_batch_norm.default" for name in ("native", "cudnn", "miopen")),
        "aten.batch_norm_update_stats.default",
    ],
    frozenset({"running_mean", "running_var"}),
)


@cache
def written_parameters(op_type: str) -> frozenset[str]:
    overload = op(op_type).overload
    if overload is None:
        return frozenset()
    declared = (a.name for a in overload._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return frozenset(declared) | UNDECLARED_WRITES.get(op_type, frozenset())
