"""Padding a dimension of the arguments up to a few sizes, so that few signatures serve all lengths."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graph_capture.errors import CaptureError
from graph_capture.ir.numerics import ROUNDINGS, close_enough, rounding

RUNS = 4  # of the call as it is, where padding seems to change it, to learn how much it differs by from time to time


@dataclass(frozen=True)
class Bucket:
    """One named dimension that may be padded.

    Attributes:
        sizes: what it is padded to: the next of these. A call with a larger size is recorded as it is.
        arguments: the arguments that have the dimension, by name, and which of their dimensions it is. The mask,
            without which padding changes the result of most models, belongs here as well.
        outputs: the results that have it, by path (``"logits"``, ``"0"``, ``""`` for a single tensor), and where: they
            are cut back to the call's size.
        fill: what an argument is padded with at its end, where that is not 0 or False.

    Raises:
        ValueError: there is no size or no argument, or a size is less than 1.
    """

    sizes: Sequence[int]
    arguments: Mapping[str, int]
    outputs: Mapping[str, int] = field(default_factory=dict)
    fill: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(sorted(self.sizes)))
        if not self.sizes or self.sizes[0] < 1 or not self.arguments:
            raise ValueError("a bucket needs sizes of at least 1, and arguments that have the dimension")
        stray = sorted(set(self.fill) - set(self.arguments))
        if stray:
            raise ValueError(f"fill names {', '.join(stray)}, which no dimension is given for")


@dataclass(frozen=True)
class Padded:
    """A call with longer arguments.

    Attributes:
        args, kwargs: the arguments.
        cuts: path of a result -> pairs of a dimension and its size in the call.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cuts: Mapping[str, tuple[tuple[int, int], ...]]

    def cut(self, result: Any) -> Any:
        """`result` as the call would have given it; the tensors are views.

        Raises:
            CaptureError: a result that a bucket names is not there.
        """
        seen = set()

        def cropped(path: Any, value: Any) -> Any:
            name = ".".join(map(_step, path))
            if name not in self.cuts or not isinstance(value, torch.Tensor):
                return value
            seen.add(name)
            for dim, size in self.cuts[name]:
                value = value.narrow(dim, 0, size)
            return value

        found = pytree.tree_map_with_path(cropped, result)
        if seen != set(self.cuts):
            missing = ", ".join(repr(name) for name in sorted(set(self.cuts) - seen))
            there = ", ".join(repr(".".join(map(_step, path))) for path, _ in pytree.tree_flatten_with_path(result)[0])
            raise CaptureError(f"the result has no tensor {missing}, which a bucket cuts back; it has {there}")
        return found


class Buckets:
    """The named dimensions of one captured function."""

    def __init__(self, function: Callable[..., Any], buckets: Mapping[str, Bucket]) -> None:
        self._buckets = dict(buckets)
        target = function.forward if isinstance(function, torch.nn.Module) else function
        kinds = {name: parameter.kind for name, parameter in inspect.signature(target).parameters.items()}
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._positions = {name: index for index, name in enumerate(kinds) if kinds[name] in by_position}
        named = {name for bucket in self._buckets.values() for name in bucket.arguments}
        unknown = sorted(named - set(kinds))
        if unknown and inspect.Parameter.VAR_KEYWORD not in kinds.values():
            raise ValueError(f"{target!r:.60} has no argument {', '.join(unknown)}; it takes ({', '.join(kinds)})")

    def pad(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Padded | None:
        """The call with each dimension at its next size; None where nothing has to be padded.

        Raises:
            CaptureError: an argument is no tensor or lacks the dimension; or two differ in its size.
        """
        arguments: dict[int | str, Any] = dict(enumerate(args))
        arguments.update((name, value) for name, value in kwargs.items())
        cuts: dict[str, tuple[tuple[int, int], ...]] = {}
        padded = False
        for label, bucket in self._buckets.items():
            places = {name: self._place(name, len(args)) for name in bucket.arguments}
            places = {name: place for name, place in places.items() if arguments.get(place) is not None}
            sizes = {n: _size(label, n, arguments[place], bucket.arguments[n]) for n, place in places.items()}
            if len({*sizes.values()}) > 1:
                raise CaptureError(f"the arguments differ in {label!r}: {_listed(sizes)}")
            size = next(iter(sizes.values()), None)
            target = next((wanted for wanted in bucket.sizes if size is not None and wanted >= size), None)
            if size is None or target is None or target == size:
                continue
            padded = True
            for name, place in places.items():
                fill = bucket.fill.get(name, 0)
                arguments[place] = _pad(arguments[place], bucket.arguments[name], target - size, fill)
            for path, dim in bucket.outputs.items():
                cuts[path] = (*cuts.get(path, ()), (dim, size))
        if not padded:
            return None
        return Padded(tuple(arguments[i] for i in range(len(args))), {n: arguments[n] for n in kwargs}, cuts)

    def _place(self, name: str, given: int) -> int | str:
        """Where a call with so many positional arguments has this one."""
        position = self._positions.get(name, given)
        return position if position < given else name


def compare(padded: Any, run: Callable[[], Any]) -> None:
    """Refuse padding that changes results beyond the rounding of other algorithms for other sizes, and beyond what
    `run`, the call as it is, differs by from time to time.

    Raises:
        CaptureError: they differ.
    """
    ours = pytree.tree_flatten_with_path(padded)[0]
    runs = [pytree.tree_flatten(run())[0]]
    for number, (path, value) in enumerate(ours):
        expected = runs[0][number]
        if not isinstance(expected, torch.Tensor):
            continue
        name = ".".join(map(_step, path)) or "the result"
        if value.shape != expected.shape:
            raise CaptureError(
                f"with padding, {name} is {list(value.shape)}, without {list(expected.shape)}: name it in the bucket's "
                "outputs"
            )
        allowed = ROUNDINGS * rounding(expected.dtype)
        if not close_enough(value, [expected], allowed)[0]:
            runs += [pytree.tree_flatten(run())[0] for _ in range(RUNS - len(runs))]
            if not close_enough(value, [found[number] for found in runs], allowed)[0]:
                raise CaptureError(f"padding changes {name}: the model needs a mask among the bucket's arguments")


def _step(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _size(label: str, name: str, value: Any, dim: int) -> int:
    if not isinstance(value, torch.Tensor) or not -value.dim() <= dim < value.dim():
        raise CaptureError(f"{name} has no dimension {dim} to be {label!r}: it is {_text(value)}")
    return value.shape[dim]


def _text(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} has {size}" for name, size in sizes.items())


def _pad(tensor: torch.Tensor, dim: int, count: int, value: float) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor, tensor.new_full(shape, value)], dim)
