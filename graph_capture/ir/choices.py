"""Integers that ops choose by floats (argmax, top-k, comparisons, casts), where the floats differ by noise or rounding.

Two candidates that lie as near to each other as runs lie apart are both right, and everything after the choice depends
on which one it was. So another run is not compared as it is: it is made to choose as the first one did, and where it
would have chosen otherwise, the candidates have to lie within noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from graph_capture.ir.binding import arguments, flatten_outputs, prepare
from graph_capture.ir.effects import written_inputs
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.interpreter import Call, Executor
from graph_capture.ir.numerics import SAME, Spread, apart, rounding
from graph_capture.ir.ops import FUSED
from graph_capture.ir.values import Arg

KEPT = 2**28  # bytes of choices that one run keeps


class Choices:
    """What a run chose, by value name.

    Attributes:
        made: the choices, copied: ops may write into them later.
    """

    def __init__(self) -> None:
        self.made: dict[str, torch.Tensor] = {}
        self._bytes = 0

    def keep(self, node: OpNode, outputs: Sequence[torch.Tensor]) -> None:
        """An op has made `outputs`, some of them by choosing."""
        for name, tensor in zip(node.outputs, outputs, strict=True):
            if _is_choice(node, tensor) and self._bytes + tensor.nbytes <= KEPT:
                self.made[name] = tensor.clone()
                self._bytes += tensor.nbytes

    def watch(self, nodes: Sequence[OpNode]) -> Callable[[int, list[torch.Tensor], Any], None]:
        """What `Executor.run` over these nodes is to call."""

        def watch(number: int, given: list[torch.Tensor], result: Any) -> None:
            outputs = flatten_outputs(result)
            if chooses(nodes[number], [tensor.dtype for tensor in given], outputs):
                self.keep(nodes[number], outputs)

        return watch


def chooses(node: OpNode, reads: Iterable[torch.dtype], outputs: Sequence[torch.Tensor]) -> bool:
    """Whether an op has chosen by floats, of these dtypes: gives integers, booleans, or floats in steps."""
    return any(_is_choice(node, tensor) for tensor in outputs) and any(dtype.is_floating_point for dtype in reads)


class Gaps(NamedTuple):
    """Where two choices differ: how far the floats lie apart that they stand for, how large these are (lists of
    float64), and one rounding of their dtype."""

    between: torch.Tensor
    size: torch.Tensor
    unit: float


@dataclass
class _Choosing:
    """One choosing op in several runs.

    Attributes:
        names: of the choices.
        inputs: its floats, by position.
        own: what it would have chosen.
        first: what it would have chosen in the first run.
        apart: for each run, how far the candidates lay apart where the choice was another one, and how large they were;
            None where that is not known of this op.
    """

    names: tuple[str, ...]
    inputs: dict[int, Spread] = field(default_factory=dict)
    own: list[Spread] = field(default_factory=list)
    first: list[torch.Tensor] = field(default_factory=list)
    apart: list[Gaps | None] = field(default_factory=list)

    def allowed(self, known: _Choosing) -> bool:
        """Whether the choice may have been made from the same floats, but for rounding and the noise that is known."""
        return any(self._allows(apart, known) for apart in self.apart)

    def _allows(self, apart: Gaps | None, known: _Choosing) -> bool:
        if apart is None:
            return any(spread.noise > 0 for spread in (*known.inputs.values(), *known.own))
        if not apart.between.numel():
            return True
        around = torch.zeros_like(apart.size)
        for spread in known.inputs.values():
            around += 2 * spread.around(apart.size)  # both candidates have moved
        return bool((apart.between <= around).all())


class Forced:
    """Runs of ops that choose as another run did.

    Args:
        choices: what it chose.
        roundings: what the floats may differ by in any case.
        known: runs from which their noise is known (default: these); it may be given later.
    """

    def __init__(
        self, choices: Mapping[str, torch.Tensor], roundings: float = SAME, known: Forced | None = None
    ) -> None:
        self._choices, self._roundings = choices, roundings
        self.known = known
        self._seen: dict[tuple[str, ...], _Choosing] = {}

    def steps(self, steps: Iterable[tuple[OpNode, Call | None]]) -> Iterator[tuple[OpNode, Call | None]]:
        """These steps, with the choices taken."""
        for node, call in steps:
            if any(name in self._choices for name in node.outputs):
                yield node, self._forced(node, call or prepare(node))
            else:
                yield node, call

    @property
    def noisy(self) -> bool:
        """Whether runs differed in what they chose by, or would have chosen."""
        return any(s.noise > 0 for seen in self._seen.values() for s in (*seen.inputs.values(), *seen.own))

    def refused(self) -> dict[str, torch.Tensor]:
        """The choices that the runs so far cannot have made: name -> what the first of them would have chosen."""
        return {
            name: choice
            for seen in self._seen.values()
            if not seen.allowed((self.known or self)._seen.get(seen.names, seen))
            for name, choice in zip(seen.names, seen.first, strict=True)
        }

    def _forced(self, node: OpNode, call: Call) -> Call:
        def run(given: list[torch.Tensor]) -> Any:
            floats = [t.clone() for t in given] if written_inputs(node) else given
            result = call(given)
            self._look(node, floats, flatten_outputs(result))
            return result

        return run

    def _look(self, node: OpNode, given: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Compare with the choice, and take it."""
        chosen = [self._choices.get(name) for name in node.outputs]
        fits = all(c is None or c.shape == o.shape for c, o in zip(chosen, outputs, strict=True))
        if not fits:  # as many as fulfil a condition
            return
        names = tuple(name for name in node.outputs if name in self._choices)
        seen = self._seen.setdefault(names, _Choosing(names))
        for position, tensor in enumerate(given):
            if tensor.is_floating_point():
                if position in seen.inputs:
                    seen.inputs[position].add(tensor)
                else:
                    seen.inputs[position] = Spread(tensor, roundings=self._roundings)
        own = [output for output, choice in zip(outputs, chosen, strict=True) if choice is not None]
        taken = [choice for choice in chosen if choice is not None]
        if not seen.own:
            seen.own, seen.first = [Spread(tensor) for tensor in own], [tensor.clone() for tensor in own]
        else:
            for spread, tensor in zip(seen.own, own, strict=True):
                spread.add(tensor)
        seen.apart.append(gaps(node, given, node.outputs.index(names[0]), own[0], taken[0]))
        for output, choice in zip(outputs, chosen, strict=True):
            if choice is not None and not torch.equal(output, choice):
                output.copy_(choice)
        _bring_along(node, given, outputs)


def _is_choice(node: OpNode, tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_meta:
        return False
    return not tensor.is_floating_point() or _name(node) in _STEPS


def _name(node: OpNode) -> str:
    """The op without its overload: ``aten.lt_.Scalar`` is "lt"."""
    return node.op_type.removeprefix("aten.").partition(".")[0].rstrip("_")


# --- how far candidates lie apart


def roundings_apart(
    node: OpNode, given: Sequence[torch.Tensor], number: int, own: torch.Tensor, chosen: torch.Tensor
) -> float:
    """How far the floats lie apart that `own` and `chosen` stand for, both output `number` of an op on `given`: in
    roundings of what lies apart most; inf where that is not known."""
    found = gaps(node, given, number, own, chosen)
    if found is None:
        return torch.inf
    gap, size, unit = found
    return float((gap / size).nan_to_num(nan=torch.inf).max()) / unit if gap.numel() else 0.0


def gaps(
    node: OpNode, given: Sequence[torch.Tensor], number: int, own: torch.Tensor, chosen: torch.Tensor
) -> Gaps | None:
    """Where `own` and `chosen` differ, both output `number` of an op: how far the floats lie apart that they stand for;
    None where that is not known of the op."""
    if torch.equal(own, chosen):
        nothing = torch.empty(0, dtype=torch.float64, device=own.device)
        return Gaps(nothing, nothing, 1.0)
    if own.shape != chosen.shape:
        return None
    if node.op_type.startswith(FUSED):
        return _inside(node.attr("body"), given, number, own, chosen)
    find = _FLOATS.get(_name(node))
    floats = find(node, given, own, chosen) if find is not None else None
    if floats is None:
        return None
    left, right = (side.double().reshape(-1) for side in torch.broadcast_tensors(*floats))
    differ = left != right  # an infinity lies nowhere near a number
    left, right = left[differ], right[differ]
    size = torch.maximum(left.abs(), right.abs())
    unit = max((rounding(tensor.dtype) for tensor in given), default=0.0) or 1.0
    return Gaps((left - right).abs().nan_to_num(nan=torch.inf), size, unit)


def _inside(
    body: SubGraph, given: Sequence[torch.Tensor], number: int, own: torch.Tensor, chosen: torch.Tensor
) -> Gaps | None:
    """`gaps` of a region's result."""
    producer = body.producers.get(body.output_names[number])
    if producer is None:
        return None
    node, found = body.nodes[producer], []

    def watch(step: int, tensors: list[torch.Tensor], result: Any) -> None:
        if step == producer:
            found.extend(tensors)

    steps = [(each, None) for each in body.nodes[: producer + 1]]
    Executor(steps, body.input_names, ()).run(apart(body, given), watch)
    return gaps(node, found, node.outputs.index(body.output_names[number]), own, chosen)


Floats = tuple[torch.Tensor, torch.Tensor] | None


def _argument(node: OpNode, given: Sequence[torch.Tensor], name: str, default: Any = None) -> Any:
    value = arguments(node).get(name, default)
    return given[value.index] if isinstance(value, Arg) else value


def _by_index(node: OpNode, given: Sequence[torch.Tensor], own: torch.Tensor, chosen: torch.Tensor) -> Floats:
    """The elements at the indices, in order."""
    found = [_gathered(node, given, index) for index in (own, chosen)]
    left, right = found
    if left is None or right is None:
        return None
    if _argument(node, given, "sorted", True) is False:
        dim = _dimension(node, given) or 0
        left, right = left.sort(dim).values, right.sort(dim).values
    return left, right


def _gathered(node: OpNode, given: Sequence[torch.Tensor], index: torch.Tensor) -> torch.Tensor | None:
    """The input's elements at indices that an op has given; None where one lies outside."""
    x, dim = given[0], _dimension(node, given)
    if _name(node) in _POOLS:
        x, index, dim = x.flatten(-_POOLS[_name(node)]), index.flatten(-_POOLS[_name(node)]), -1
    elif dim is None:
        x, index, dim = x.reshape(-1), index.reshape(-1), 0
    elif index.dim() < x.dim():
        index = index.unsqueeze(dim)
    if x.dim() == 0:
        x, index = x.reshape(1), index.reshape(1)
    if index.dtype is not torch.int64 or index.dim() != x.dim():
        return None
    if index.numel() and not bool(((index >= 0) & (index < x.shape[dim])).all()):
        return None
    return x.gather(dim, index)


def _dimension(node: OpNode, given: Sequence[torch.Tensor]) -> int | None:
    return _argument(node, given, "dim", None if _name(node) in ("argmax", "argmin") else -1)


def _compared(node: OpNode, given: Sequence[torch.Tensor], own: torch.Tensor, chosen: torch.Tensor) -> Floats:
    """The two sides, where the outcomes differ."""
    left = given[0]
    right = _argument(node, given, "other")
    if not isinstance(right, torch.Tensor):
        right = torch.full_like(left, float(right))
    left, right = torch.broadcast_tensors(left, right)
    differ = own != chosen
    return left[differ], right[differ]


def _cast(node: OpNode, given: Sequence[torch.Tensor], own: torch.Tensor, chosen: torch.Tensor) -> Floats:
    """The float, and the nearest one that is cast to what was chosen."""
    x = given[1] if _name(node) == "copy" else given[0]
    x = x.broadcast_to(chosen.shape).double()
    if chosen.dtype is torch.bool:
        return x, torch.where(chosen == (x != 0), x, torch.where(chosen, torch.full_like(x, torch.nan), 0.0))
    whole = chosen.double()
    low = torch.where(whole > 0, whole, torch.where(whole < 0, whole - 1, -1.0))
    return x, x.clamp(low, torch.where(whole < 0, whole, whole + 1))


def _stepped(node: OpNode, given: Sequence[torch.Tensor], own: torch.Tensor, chosen: torch.Tensor) -> Floats:
    """The float, and the nearest one that is rounded to what was chosen."""
    x, whole = given[0].double(), chosen.double()
    below, above = _STEPS[_name(node)]
    if _name(node) == "trunc":
        return _cast(node, given, own, chosen)
    if _name(node) == "sign":
        return x, torch.where(whole == x.sign(), x, torch.where(whole * x < 0, -0.0, 0.0))
    if _argument(node, given, "decimals", 0):
        return None
    return x, x.clamp(whole + below, whole + above)


def _searched(node: OpNode, given: Sequence[torch.Tensor], own: torch.Tensor, chosen: torch.Tensor) -> Floats:
    """The value, and the nearest one that belongs where it was put."""
    edges, values = (given[0], given[1]) if _name(node) == "searchsorted" else (given[1], given[0])
    if edges.dim() != 1 and edges.shape[:-1] != values.shape[:-1]:
        return None
    edges, values, index = edges.double(), values.double(), chosen.long()
    size = edges.shape[-1]
    if index.numel() and not bool(((index >= 0) & (index <= size)).all()):
        return None
    end = torch.full((*edges.shape[:-1], 1), torch.inf, dtype=edges.dtype, device=edges.device)
    padded = torch.cat([-end, edges, end], -1)  # an index i lies between padded[i] and padded[i + 1]
    if edges.dim() == 1:
        return values, values.clamp(padded[index], padded[index + 1])
    return values, values.clamp(padded.gather(-1, index), padded.gather(-1, index + 1))


_POOLS = {
    f"{kind}max_pool{n}d{rest}": n
    for n in (1, 2, 3)
    for kind, rest in (("", "_with_indices"), ("adaptive_", ""), ("fractional_", ""))
}
_STEPS = {"round": (-0.5, 0.5), "floor": (0.0, 1.0), "ceil": (-1.0, 0.0), "trunc": (0.0, 0.0), "sign": (0.0, 0.0)}
_PICKS = ("argmax", "argmin", "max", "min", "median", "nanmedian", "mode", "kthvalue", "topk", "sort", "argsort")
_FLOATS: dict[str, Callable[[OpNode, Sequence[torch.Tensor], torch.Tensor, torch.Tensor], Floats]] = {
    **dict.fromkeys((*_PICKS, *_POOLS), _by_index),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), _compared),
    **dict.fromkeys(("cast", "copy", "_to_copy"), _cast),
    **dict.fromkeys(_STEPS, _stepped),
    **dict.fromkeys(("searchsorted", "bucketize"), _searched),
}


def _bring_along(node: OpNode, given: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    """Give results that belong to an index (the values of top-k) those at the index that was taken."""
    if len(outputs) != 2 or _name(node) not in (*_PICKS, *_POOLS):
        return
    found = _gathered(node, given, outputs[1])
    if found is not None:
        outputs[0].copy_(found.reshape(outputs[0].shape))
