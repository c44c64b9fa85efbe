"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch

from graph_capture.passes.pattern import Function
from graph_capture.passes.spellings.rule import CASTS, HALF, Attributes, Found, broadcasts, floats, require, rule


def _rotated(rotate: Function) -> Function:
    return lambda input, cos, sin: input * cos + rotate(input) * sin


def _rotate_half(x: Any) -> Any:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _rotate_half_chunked(x: Any) -> Any:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotate_every_two(x: Any) -> Any:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _rotate_every_two_viewed(x: Any) -> Any:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), dim=-1).flatten(-2)


def _rope(found: Found) -> Attributes:
    input, cos, sin, output = (found[name] for name in ("input", "cos", "sin", "output"))
    floats(found, "input", "cos", "sin", "output")
    require(input.shape == output.shape, f"{input} becomes {output}")
    require(cos.shape == sin.shape, f"cos {cos} and sin {sin} differ")
    require(cos.shape[-1:] == input.shape[-1:], f"cos {cos} does not span the rows of {input}")
    require(broadcasts(cos.shape, input.shape), f"cos {cos} does not broadcast over {input}")
    half = input.shape[-1] // 2
    require(half > 0 == input.shape[-1] % 2, f"the rows of {input} have no halves")
    if "slice" in found:  # the negated one
        _sliced(found, "slice", half, half)
        _sliced(found, "slice_1", 0, half)
    elif "split" in found:
        require(found["split"].shape[-1] == half, "it is not cut in halves")
    return {}


def _interleaved_rope(found: Found) -> Attributes:
    input = found["input"]
    floats(found, "input", "cos", "sin", "output")
    require(input.shape == found["output"].shape, f"{input} becomes {found['output']}")
    require(found["cos"].shape == found["sin"].shape, f"cos {found['cos']} and sin {found['sin']} differ")
    require(found["cos"].shape[-1:] == input.shape[-1:], f"cos {found['cos']} does not span the rows of {input}")
    require(broadcasts(found["cos"].shape, input.shape), f"cos {found['cos']} does not broadcast over {input}")
    return {"interleaved": True}


def _by_halves(input: Any, cos: Any, sin: Any) -> Any:
    first, second = input.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _half_tables(found: Found) -> Attributes:
    input, cos, sin = (found[name] for name in ("input", "cos", "sin"))
    floats(found, "input", "cos", "sin", "output")
    require(input.shape == found["output"].shape, f"{input} becomes {found['output']}")
    require(cos.shape == sin.shape, f"cos {cos} and sin {sin} differ")
    require(2 * cos.shape[-1] == input.shape[-1] > 0, f"cos {cos} does not span half the rows of {input}")
    require(broadcasts(cos.shape[:-1], input.shape[:-1]), f"cos {cos} does not broadcast over {input}")
    require(found["split"].shape[-1] == cos.shape[-1], "it is not cut in halves")
    return {"half_tables": True}


def _of_complex_numbers(input: Any, cos: Any) -> Any:
    pairs = torch.view_as_complex(input.float().reshape(*input.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * cos).flatten(-2).type_as(input)


def _complex_table(found: Found) -> Attributes:
    input, table, pairs = found["input"], found["cos"], found["view_as_complex"]
    floats(found, "input", "output")
    require(input.shape == found["output"].shape, f"{input} becomes {found['output']}")
    require(pairs.shape == (*input.shape[:-1], input.shape[-1] // 2), f"{input} is not taken in pairs")
    require(table.dtype is pairs.dtype, f"the table is {table.dtype}")
    require(broadcasts(table.shape, pairs.shape), f"{table} does not broadcast over {pairs}")
    return {"interleaved": True, "half_tables": True}


def _sliced(found: Found, name: str, start: int, size: int) -> None:
    part, whole = found[name], found["input"]
    begins = part.offset - whole.offset == start * whole.stride[-1]
    require(begins and part.shape == (*whole.shape[:-1], size), f"{part} is another part of {whole}")


def _partial_rope(input: Any, cos: Any, sin: Any) -> Any:
    width = cos.shape[-1]
    return torch.cat((_rotated(_rotate_half)(input[..., :width], cos, sin), input[..., width:]), -1)


def _partial(found: Found) -> Attributes:
    input, width = found["input"], found["cos"].shape[-1]
    require(input.shape == found["output"].shape and 0 < width < input.shape[-1], f"{input} becomes {found['output']}")
    _sliced(found, "slice", 0, width)
    _sliced(found, "slice_3", width, input.shape[-1] - width)
    return {}


def _whole_rope(input: Any, cos: Any, sin: Any) -> Any:
    return torch.cat((_rotated(_rotate_half)(input, cos, sin), input[..., 5:]), -1)  # no slice of its halves


def _nothing_left(found: Found) -> Attributes:
    require(found["slice_2"].numel == 0, f"{found['slice_2']} is not empty")
    return {}


_ROTARY = ({"input": (2, 3, 4, 8), "cos": (2, 1, 4, 8), "sin": (2, 1, 4, 8)},)
_NARROW = ({"input": (2, 3, 4, 8), "cos": (2, 1, 4, 4), "sin": (2, 1, 4, 4)},)
_CUT = frozenset({"start", "end"})

RULES = (
    rule(
        "rope",
        (_rotated(_rotate_half), _rotated(_rotate_half_chunked)),
        _rope,
        shapes=_ROTARY,
        ignore=_CUT | {"split_size"},
    ),
    rule(
        "rope",
        (_rotated(_rotate_every_two), _rotated(_rotate_every_two_viewed)),
        _interleaved_rope,
        shapes=_ROTARY,
        ignore=frozenset({"end", "size"}),
    ),
    rule("rope", (_by_halves,), _half_tables, shapes=_NARROW, ignore=frozenset({"split_size"})),
    rule(
        "rope",
        (_of_complex_numbers,),
        _complex_table,
        shapes=({"input": (2, 3, 4, 8), "cos": (2, 1, 4, 4)},),
        dtypes=HALF,
        kinds={"cos": torch.complex64},
        ignore=CASTS | {"size"},
    ),
    rule("rope", (_partial_rope,), _partial, round=1, shapes=_NARROW, ignore=_CUT),
    rule("rope", (_whole_rope,), _nothing_left, round=1, shapes=_ROTARY, ignore=_CUT),
)
