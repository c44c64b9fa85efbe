"""What a kernel computes, before any target prints it: an iteration space, operands, scalar statements.

A spec is frozen, and equal for equal kernels. It knows how its outputs are allocated and how the tensors of a call lie
over its iteration space; targets turn that into code and into launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from graph_capture.codegen.spec.geometry import Geometry, arrange, dense_strides
from graph_capture.errors import FusionError
from graph_capture.ir.values import TensorMeta

REDUCTIONS = ("sum", "mean", "max", "min")
INDEX = "index"  # the function, without arguments, that gives an element's column as a float32


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads or writes.

    Attributes:
        name: of the value in the region.
        dtype: of its elements in memory.
        over: for each dimension of the iteration space, the columns last, whether the tensor moves along it.
        unit: whether its columns lie next to each other.
        keepdim: False for a result of a reduction that lacks its last dimension.
        order: the dimensions of a fresh output from the slowest to the fastest; () for contiguous.
    """

    name: str
    dtype: torch.dtype
    over: tuple[bool, ...] = ()
    unit: bool = True
    keepdim: bool = True
    order: tuple[int, ...] = ()

    @property
    def per_row(self) -> bool:
        """Whether it has one element for each row, or one for all."""
        return not self.over[-1]


@dataclass(frozen=True)
class Statement:
    """``target = function(arguments)``; an argument is the name of a variable or a number."""

    target: str
    function: str
    arguments: tuple[Any, ...]
    dtype: torch.dtype


@runtime_checkable
class Spec(Protocol):
    """What every kind of kernel description has."""

    @property
    def inputs(self) -> tuple[Operand, ...]: ...

    @property
    def outputs(self) -> tuple[Operand, ...]: ...

    def allocate(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A tensor for each output of a call on `inputs`; for what is written in place, the input itself.

        Raises:
            FusionError: the shapes do not fit the kernel.
        """
        ...


class BuildRequest(NamedTuple):
    """A kernel that is about to be asked for.

    Attributes:
        spec: what it computes.
        name: of the kernel.
        inputs: the layouts of the tensors that it will get.
        choice: which of the target's `candidates` will run; None if they are going to be timed.
    """

    spec: Spec
    name: str
    inputs: tuple[TensorMeta, ...]
    choice: int | None = 0


@dataclass(frozen=True)
class Pass:
    """One sweep over a row: what is computed for each element, and what is reduced or stored."""

    row: tuple[Statement, ...]  # once a row, before the sweep
    element: tuple[Statement, ...]
    reductions: tuple[Statement, ...]


@dataclass(frozen=True)
class KernelSpec:
    """Pointwise ops and row reductions over rows x columns.

    The dimensions before the columns have sizes that are known at launch. `columns` is the static size of a row, or
    None for a flat kernel, whose one dimension is everything. `stores` gives the variable that each output holds.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    columns: int | None
    statements: tuple[Statement, ...]
    stores: tuple[str, ...]

    @cached_property
    def reduces(self) -> bool:
        """Whether a row is reduced."""
        return any(statement.function in REDUCTIONS for statement in self.statements)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Inputs, then outputs."""
        return (*self.inputs, *self.outputs)

    # --- calls

    def allocate(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Spec.allocate`."""
        space = self._space(inputs)
        outputs = []
        for operand in self.outputs:
            shape = space if operand.over[-1] else (*space[:-1], 1)
            shape = shape if operand.keepdim else shape[:-1]
            strides = dense_strides(shape, operand.order)
            outputs.append(torch.empty_strided(shape, strides, dtype=operand.dtype, device=inputs[0].device))
        return outputs

    def _space(self, inputs: Sequence[torch.Tensor]) -> tuple[int, ...]:
        try:
            space = tuple(torch.broadcast_shapes(*(tensor.shape for tensor in inputs)))
        except RuntimeError as error:
            raise FusionError(str(error)) from error
        if self.reduces and (not space or space[-1] != self.columns):
            raise FusionError(f"rows have {list(space)[-1:]} elements, expected {self.columns}")
        return space

    def geometry(self, tensors: Sequence[torch.Tensor]) -> Geometry:
        """How the operands of a call (inputs, then outputs) lie over the iteration space.

        Raises:
            FusionError: a shape does not fit, or an operand lies in another way than the kernel's does.
        """
        space = self._space(tensors[: len(self.inputs)])
        shapes, strides = [tuple(tensor.shape) for tensor in tensors], [tensor.stride() for tensor in tensors]
        for index, operand in enumerate(self.outputs, len(self.inputs)):
            if not operand.keepdim:
                shapes[index], strides[index] = (*shapes[index], 1), (*strides[index], 0)
            want = space if operand.over[-1] else (*space[:-1], 1)
            if shapes[index] != want:
                raise FusionError(f"{operand.name} is {list(shapes[index])}, expected {list(want)}")
        rank = len(self.operands[0].over)
        found = arrange(space, shapes, strides, flat=self.columns is None, rows=self.reduces)
        if len(found.sizes) > rank or self.columns not in (None, found.sizes[-1]):
            raise FusionError(f"{list(space)} lies in {list(found.sizes)}, not in {rank} dimensions as the kernel's")
        found = found.padded(rank)
        for operand, steps in zip(self.operands, found.strides, strict=True):
            if not _fits(operand, steps, found.sizes):
                raise FusionError(f"{operand.name} lies in another way, {steps} over {list(found.sizes)}")
        return found

    # --- structure

    @cached_property
    def stages(self) -> dict[str, int]:
        """Variable -> the number of sweeps over its row after which it is known."""
        known = {operand.name: 0 for operand in self.inputs}
        for statement in self.statements:
            before = max((known[a] for a in statement.arguments if isinstance(a, str)), default=0)
            known[statement.target] = before + (statement.function in REDUCTIONS)
        return known

    @cached_property
    def per_row(self) -> frozenset[str]:
        """The variables that are the same for all elements of a row."""
        found = {operand.name for operand in self.inputs if operand.per_row}
        for statement in self.statements:
            names = [a for a in statement.arguments if isinstance(a, str)]
            if statement.function in REDUCTIONS or (statement.function != INDEX and all(n in found for n in names)):
                found.add(statement.target)
        return frozenset(found)

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """The sweeps over a row, in order; the last stores. What one needs of an earlier one is computed again."""
        last = max(self.stages[name] for name in self.stores)
        found = []
        for stage in range(last + 1):
            reductions = [s for s in self.statements if s.function in REDUCTIONS and self.stages[s.target] == stage + 1]
            wanted = {a for s in reductions for a in s.arguments if isinstance(a, str)}
            wanted |= set(self.stores) if stage == last else set()
            row, element = [], []
            for statement in reversed(self.statements):
                if statement.function in REDUCTIONS:
                    continue
                if statement.target in self.per_row:
                    if self.stages[statement.target] == stage:
                        row.append(statement)
                elif statement.target in wanted:
                    element.append(statement)
                    wanted |= {a for a in statement.arguments if isinstance(a, str)}
            found.append(Pass(tuple(reversed(row)), tuple(reversed(element)), tuple(reductions)))
        return tuple(found)


def _fits(operand: Operand, steps: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether an operand that moves like this is what the kernel was made for; it may stand still where it need not."""
    still = all(moves or step == 0 or size == 1 for moves, step, size in zip(operand.over, steps, sizes, strict=True))
    return still and (not operand.unit or not operand.over[-1] or steps[-1] == 1 or sizes[-1] == 1)
