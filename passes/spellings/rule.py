"""How a rule is written, and what guards are made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch

from graph_capture.ir.binding import prepare as prepare_call
from graph_capture.ir.graph import OpNode
from graph_capture.ir.ops import op
from graph_capture.ir.values import freeze
from graph_capture.passes.canonicalize import Attributes, Found, Guard, Rule, Unfit
from graph_capture.passes.pattern import Function, Pattern

__all__ = ["CASTS", "HALF", "Attributes", "Found", "Guard", "broadcasts", "floats", "near", "require", "rule"]


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Unfit(reason)


def floats(found: Found, *names: str) -> None:
    dtypes = {found[name].dtype for name in names if name in found}
    require(len(dtypes) == 1, "dtypes are mixed: " + ", ".join(sorted(map(str, dtypes))))
    require(next(iter(dtypes)).is_floating_point, f"{next(iter(dtypes))} is not a floating-point dtype")


def near(found: Found, name: str, expected: float) -> None:
    number = found.numbers[name]
    close = isinstance(number, (int, float)) and math.isclose(number, expected, rel_tol=1e-6)
    require(close, f"its constant is {number!r}, not {expected:.7g}")


def broadcasts(shape: tuple[int, ...], over: tuple[int, ...]) -> bool:
    padded = (1,) * (len(over) - len(shape)) + tuple(shape)
    return len(padded) == len(over) and all(a in (1, b) for a, b in zip(padded, over, strict=True))


def rule(name: str, spellings: Iterable[Function], attributes: Guard, *, round: int = 0, **options: Any) -> Rule:
    """A row of the rules; `options` are those of `Pattern`."""
    first, *others = spellings
    return Rule(Pattern(name, first, tuple(others), **options), _careful(name, attributes), round)


def _careful(name: str, attributes: Guard) -> Guard:
    """A guard that also refuses what it cannot compute with, what rounds more than the op does, and what the op makes
    something else of."""

    def guard(found: Found) -> Attributes:
        output = found["output"]
        for meta in found.values.values():
            coarse = meta.dtype.is_floating_point and output.dtype.is_floating_point
            coarse = coarse and torch.promote_types(meta.dtype, output.dtype) is not meta.dtype
            require(not coarse, f"it rounds to {meta.dtype} on the way to {output}")
        try:
            result = attributes(found)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # 1 / 0, a dimension that is not there
            raise Unfit(f"its shapes or numbers are of another kind: {error}") from error
        names = ("input" if parameter.name == "self" else parameter.name for parameter in op(name).parameters)
        given = tuple((n, found[n].shape, found[n].stride, found[n].dtype) for n in names if n in found)
        made = _made(name, given, tuple((n, freeze(value)) for n, value in result.items()))
        require(made == (output.shape, output.dtype), f"{name} makes {made} of it, not {output}")
        return result

    return guard


@functools.lru_cache(maxsize=4096)
def _made(name: str, given: tuple[Any, ...], attributes: tuple[tuple[str, Any], ...]) -> Any:
    """Shape and dtype of what an op makes of tensors (name, shape, strides, dtype), or the error that it raises."""
    known = dict(attributes)
    inputs = [item for item in given if item[0] not in known]
    order = ("input" if parameter.name == "self" else parameter.name for parameter in op(name).parameters)
    names, skipped = {item[0] for item in inputs}, list[str]()
    for parameter in order:
        if parameter in names:
            known.update(dict.fromkeys(skipped))
            skipped = []
        elif parameter not in known:
            skipped.append(parameter)
    node = OpNode(name, tuple(item[0] for item in inputs), ("output",), tuple(known.items()))
    try:
        result = prepare_call(node)([torch.empty_strided(*item[1:3], dtype=item[3], device="meta") for item in inputs])
    except Exception as error:
        return f"an error, {error},"
    return tuple(result.shape), result.dtype


HALF = (torch.float32, torch.bfloat16)  # float16 is spelled as bfloat16 is; the guard compares dtypes
CASTS = frozenset({"dtype"})
