"""Scalar expressions of ops on tensors: run by torch, and held against the op's own function; and `register_op`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from graph_capture.codegen.spec.rows import FUNCTIONS
from graph_capture.errors import CaptureError
from graph_capture.ir.ops import TABLE, Expression, Kind, Op, add_row, op_of, parameters_of, remove_row
from graph_capture.ir.values import Arg

RTOL = 1e-5  # some roundings of float32


def evaluate(text: str, names: Mapping[str, Any], columns: int) -> torch.Tensor:
    """A scalar expression on tensors, by torch; `names` are its operands, `columns` the elements of a row."""
    scope: dict[str, Any] = {name: getattr(torch, name) for name in FUNCTIONS if hasattr(torch, name)}
    scope |= {name: _on_tensors(getattr(torch, name)) for name in ("maximum", "minimum", "where", "exp", "log")}
    scope |= {
        "power": _on_tensors(torch.pow),
        "index": lambda: torch.arange(columns, dtype=torch.float32),
        "sum": lambda x: x.sum(-1, keepdim=True),
        "mean": lambda x: x.mean(-1, keepdim=True),
        "max": lambda x: x.amax(-1, keepdim=True),
        "min": lambda x: x.amin(-1, keepdim=True),
        "columns": columns,
    }
    return eval(compile(text, "<expression>", "eval"), {"__builtins__": {}} | scope | dict(names))


def _on_tensors(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args: function(*(torch.as_tensor(arg) for arg in args))


def probes(count: int, rows: bool) -> list[torch.Tensor]:
    """float32 operands that show what is wrong: all pairs of hard numbers, or rows of several magnitudes."""
    generator = torch.Generator().manual_seed(0)
    if rows:
        matrix = torch.randn(6, 48, generator=generator) * torch.tensor([1e-3, 1.0, 30.0, 1.0, 1.0, 1.0])[:, None]
        matrix[3, 5], matrix[4, 6], matrix[5] = math.inf, math.nan, 2.0
        return [matrix, *(torch.randn(48, generator=generator) for _ in range(count - 1))]
    hard = [0.0, 1e-4, 0.1, 0.5, 1.0, 3.0, 17.0, 100.0, 1e4, 1e30, math.inf]
    numbers = torch.tensor([*hard, *(-x for x in hard), math.nan])
    size = len(numbers)
    operands = [numbers.repeat(size), numbers.repeat_interleave(size)]
    while len(operands) < count:
        operands.append(numbers[torch.randint(size, (size * size,), generator=generator)])
    return operands[:count]


def agree(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Where two results are the same but for some roundings of float32."""
    return torch.isclose(left.float(), right.float(), rtol=RTOL, atol=1e-30, equal_nan=True)


def register_op(
    name: str,
    function: Callable[..., Any],
    expression: str | None = None,
    *,
    kind: str = "pointwise",
    commutative: bool = False,
    probe: Mapping[str, Any] | None = None,
) -> Op:
    """Add an op to the table, so that recordings name it and, where it has an expression, kernels compute it.

    Args:
        name: what graphs call it.
        function: an op of torch's dispatcher (``torch.ops.mine.gate.default``), whose calls are recorded as this op; or
            a Python function of torch's ops, which a spelling makes this op (`graph_capture.spelling`). Parameters
            without a default, and a dispatcher op's tensors, are tensors; the others are numbers.
        expression: what it computes for each element, over the parameters' names: arithmetic, comparisons, and the
            functions that `graph_capture.ir.ops.Op` lists. Without one it is recorded whole and never fused.
        kind: "pointwise", or "row" where the expression reduces over the last dimension.
        commutative: its two tensors may be given in either order.
        probe: values for numbers without a default, to try the expression with.

    Returns:
        The row of the table. `unregister_op` takes it away again.

    Raises:
        CaptureError: the name or the dispatcher's op has a row already; or the expression is none, or disagrees with
            the function on float32 probes, which have zeros, infinities and NaN among them. The message names the op
            and gives the first difference.
    """
    if kind not in ("pointwise", "row"):
        raise CaptureError(f"op {name!r}: kind is 'pointwise' or 'row', not {kind!r}")
    if isinstance(function, OpOverload) and (known := op_of(function)).name in TABLE:
        raise CaptureError(f"op {name!r}: {function} is in the table already, as {known.name!r}")
    composed = not isinstance(function, OpOverload)
    chosen = Kind(kind) if expression is not None else Kind.OPAQUE
    row = Op(name, function, chosen, parameters_of(function), expression, commutative, composed)
    if expression is not None:
        reason = _disagreement(row, expression, probe or {})
        if reason is not None:
            raise CaptureError(f"op {name!r}: {reason}")
    add_row(row)
    return row


def unregister_op(name: str) -> None:
    """Take an op that `register_op` added out of the table.

    Raises:
        CaptureError: there is none of that name.
    """
    remove_row(name)


def _tensor_parameters(row: Op, given: Mapping[str, Any]) -> Sequence[str]:
    if isinstance(row.function, OpOverload):
        return [a.name for a in row.function._schema.arguments if str(a.type) == "Tensor"]
    return [p.name for p in row.parameters if p.required and p.name not in given]


def _disagreement(row: Op, expression: Expression, given: Mapping[str, Any]) -> str | None:
    """Where `expression` is not what the op's function computes; None where both agree."""
    names = _tensor_parameters(row, given)
    missing = [p.name for p in row.parameters if p.required and p.name not in (*names, *given)]
    if not names or missing:
        return f"the probe needs a value for {', '.join(missing)}" if missing else "it takes no tensor"
    tensors = dict(zip(names, probes(len(names), rows=row.kind is Kind.ROW), strict=True))
    numbers = {p.name: p.default for p in row.parameters if not p.required} | dict(given)
    try:
        want = row.function(**tensors, **given)
    except Exception as error:
        return f"its function does not take float32 probes: {type(error).__name__}: {error}"
    if not isinstance(want, torch.Tensor):
        return f"its function gives a {type(want).__name__}, and an expression one tensor"
    symbols = {name: Arg(number) for number, name in enumerate(names)} | dict(given)
    text = expression(symbols, torch.float32) if callable(expression) else expression
    if text is None:
        return None
    columns = next(iter(tensors.values())).shape[-1]
    try:
        got = evaluate(text, numbers | tensors, columns).expand(want.shape)
    except Exception as error:
        return f"its expression {text!r} cannot be evaluated: {type(error).__name__}: {error}"
    wrong = ~agree(got, want)
    if not wrong.any():
        return None
    at = int(wrong.reshape(-1).to(torch.int8).argmax())
    operands = ", ".join(f"{n}={t.expand(want.shape).reshape(-1)[at].item():g}" for n, t in tensors.items())
    pair = got.reshape(-1)[at].item(), want.reshape(-1)[at].item()
    return f"its expression gives {pair[0]:g} at {operands}, where its function gives {pair[1]:g}"
