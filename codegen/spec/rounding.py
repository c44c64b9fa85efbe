"""Which values of a kernel are rounded to their dtype, and how numbers come into a dtype as torch brings them there.

A kernel computes in float32 (float64 if one takes part) and rounds where a value leaves it. A value of less precision
is rounded before that where the code could see that it is not: at a cast, and where another dtype is made of it (a
comparison, an integer, a sum with a float32). float16 is rounded always, for its range is so small that arithmetic
beyond it shows; so is whatever is narrower in a kernel that computes in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graph_capture.errors import FusionError
from graph_capture.ir.graph import SubGraph
from graph_capture.ir.values import TensorMeta

ROUNDINGS = {torch.float16: "round_float16", torch.bfloat16: "round_bfloat16", torch.float32: "round_float32"}
ROUNDED = {name: dtype for dtype, name in ROUNDINGS.items()}  # function -> the dtype that it rounds to
SELECTIONS = ("neg", "abs", "maximum", "minimum", "where")  # functions that give one of their arguments, but for a sign
JUMPS = ("floor", "ceil", "trunc")  # ops that make much of a little


def shown(graph: SubGraph, values: Mapping[str, TensorMeta], working: torch.dtype) -> frozenset[str]:
    """The values of a kernel that computes in `working` of which the code could see whether they are rounded.

    That is what a cast made, what is made into another dtype, and what those were computed from.
    """
    narrow = ROUNDINGS if working is torch.float64 else (torch.float16,)
    found: set[str] = set()
    for node in reversed(graph.nodes):
        dtypes = {values[name].dtype for name in node.outputs}
        casts = node.op_type == "cast" and not node.inputs[0].startswith("%")  # a sum that no memory has held
        found.update(name for name in node.outputs if casts or values[name].dtype in narrow)
        shows = node.op_type in JUMPS or not found.isdisjoint(node.outputs)
        found.update(given for given in node.inputs if shows or {values[given].dtype} != dtypes)
    return frozenset(found)


def embeds(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of `source` is one of the floating-point dtype `target`."""
    if not source.is_floating_point:
        bits = 1 if source is torch.bool else torch.iinfo(source).bits
        return bits <= {torch.bfloat16: 8, torch.float16: 8, torch.float32: 16, torch.float64: 32}[target]
    return source is target or source.itemsize < target.itemsize


def number(value: Any, dtype: torch.dtype) -> Any:
    """A Python number as an element of `dtype`: integers wrap; floats are left as they are.

    Raises:
        FusionError: it has no such value.
    """
    try:
        if dtype is torch.bool:
            return bool(value)
        if dtype.is_floating_point:
            return float(value)
        whole, bits = int(value), torch.iinfo(dtype).bits
    except (TypeError, ValueError, OverflowError) as error:
        raise FusionError(f"{value!r} is no number of {dtype}") from error
    lowest = torch.iinfo(dtype).min
    return (whole - lowest) % 2**bits + lowest


def rounded(value: float, dtype: torch.dtype) -> float:
    """A number as memory of a floating-point dtype holds it."""
    return float(torch.tensor(value, dtype=torch.float64).to(dtype).item())
