"""What one real replay shows of each value and op, from which a plan is made.

Which values share memory is read off the tensors themselves: op schemas do not say it of every op, and passes make
values that the recorder never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graph_capture.ir.binding import flatten_outputs
from graph_capture.ir.effects import is_random, written_inputs
from graph_capture.ir.graph import OpNode
from graph_capture.ir.interpreter import Executor, Step, Watch
from graph_capture.ir.ops import EXTERNAL, FUSED, GUARD, TABLE, Kind, op
from graph_capture.runtime.replay.forms import Writer, direct, writer


@dataclass(frozen=True)
class SeenValue:
    """A value as it was: the memory that it lies in, and its layout there (in elements)."""

    group: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes from its first element to its last."""
        if 0 in self.shape or len(self.stride) != len(self.shape):  # the latter: it is not strided
            return 0
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return extent * self.dtype.itemsize


@dataclass
class Group:
    """Values that share memory.

    Attributes:
        maker: the step that made the memory; -1 where it came from outside.
        root: the slot of the first value in it.
        members: the slots of all of them.
        nbytes: the size of the memory.
        plain: whether an arena can stand for it: strided tensors that no op turns into others, none of them lent to
            code that could keep them.
        written: whether a step writes into it after its maker.
    """

    maker: int
    root: int
    nbytes: int
    members: list[int] = field(default_factory=list)
    plain: bool = True
    written: bool = False


@dataclass
class CallForm:
    """How a step was seen to behave.

    Attributes:
        function: the fastest function that calls its op; None where that is the step's own call.
        writer: computes the op into given memory; None where it cannot.
        same: for each output, the input (by position) that it is, as an object; None elsewhere.
        is_view: it computes nothing and gives other views of its inputs.
        is_pure: it computes new results from its inputs, and nothing else.
        result: "tensor", "flat" (a list or tuple of tensors), or "nested".
    """

    function: Callable[..., Any] | None = None
    writer: Writer | None = None
    same: tuple[int | None, ...] = ()
    is_view: bool = False
    is_pure: bool = False
    result: str = "tensor"


Forms = dict[Any, tuple[Callable[..., Any] | None, Writer | None]]


class FirstRun:
    """Watches one run of an executor.

    Args:
        executor: what runs.
        forms: what is known of how ops are called, by op and layouts; it grows.

    Attributes:
        values: what is known of each slot.
        groups: the pieces of memory.
        forms: one for each step.
        failure: what went wrong while watching.
    """

    def __init__(self, executor: Executor, forms: Forms | None = None) -> None:
        self._steps, self._inputs = executor.steps, executor.inputs
        self.values: list[SeenValue | None] = [None] * len(executor.names)
        self.groups: list[Group] = []
        self.forms: list[CallForm] = []
        self.failure: Exception | None = None
        self._living: dict[int, int] = {}  # address of a storage's implementation -> group
        self._addresses: list[int] = []  # of each group
        self._uses: list[int] = []  # how many slots of each group are alive
        self._found: Forms = {} if forms is None else forms

    def watching(self, tensors: Sequence[torch.Tensor]) -> Watch:
        """What `Executor.run` on these inputs is to call; it never raises."""

        def watch(number: int, given: list[torch.Tensor], result: Any) -> None:
            if self.failure is None:
                try:
                    self._ran(number, given, result)
                except Exception as error:
                    self.failure = error

        try:
            for slot, tensor in zip(self._inputs, tensors, strict=True):
                self._enters(slot, tensor, -1)
        except Exception as error:
            self.failure = error
        return watch

    @property
    def writes(self) -> bool:
        """Whether a step, of those that ran, writes into memory that was there before."""
        return any(group.maker < 0 and group.written for group in self.groups)

    def part(self, executor: Executor, slots: Sequence[int], start: int) -> FirstRun:
        """What is known of some steps alone, from `start` on: `executor`'s, whose slots are these here."""
        found = FirstRun(executor, self._found)
        numbers: dict[int, int] = {}
        for slot, here in enumerate(slots):
            value = self.values[here]
            assert value is not None
            if value.group not in numbers:
                numbers[value.group] = len(found.groups)
                group = self.groups[value.group]
                found.groups.append(replace(group, maker=max(group.maker - start, -1), root=slot, members=[]))
            group = found.groups[numbers[value.group]]
            group.members.append(slot)
            found.values[slot] = replace(value, group=numbers[value.group])
        found.forms = self.forms[start : start + len(executor.steps)]
        return found

    def _ran(self, number: int, given: list[torch.Tensor], result: Any) -> None:
        step = self._steps[number]
        results = flatten_outputs(result)
        fresh = [self._enters(slot, tensor, number) for slot, tensor in zip(step.fills, results, strict=True)]
        form = CallForm(
            same=tuple(next((i for i, t in enumerate(given) if t is tensor), None) for tensor in results),
            result=_kind(result, len(results)),
        )
        if not step.own:
            self._learn(step, form, given, results, fresh)
        for position in written_inputs(step.node):
            self._of(step.reads[position]).written = True
        if not _is_known(step):
            for slot in (*step.reads, *step.fills):
                self._of(slot).plain = False
        self.forms.append(form)
        for slot in step.frees:
            self._leaves(slot)

    def _learn(
        self, step: Step, form: CallForm, given: list[torch.Tensor], results: list[torch.Tensor], fresh: list[bool]
    ) -> None:
        node = step.node
        pure = _is_pure(node)
        form.is_view = pure and bool(results) and not any(fresh) and bool(given) and op(node.op_type).kind is Kind.VIEW
        form.is_pure = pure and bool(results) and all(fresh)
        wanted = pure and fresh == [True] and form.result == "tensor" and self._of(step.fills[0]).plain
        layouts = [
            (t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in given if t.layout is torch.strided
        ]
        key = (node.op_type, repr(node.attrs), len(given), *layouts, wanted and results[0].stride())
        found = self._found.get(key)
        if found is None:
            form_of = writer(node, given, results[0]) if wanted else None
            found = self._found[key] = (direct(node, given), form_of)
        form.function, form.writer = found

    def _enters(self, slot: int, tensor: torch.Tensor, number: int) -> bool:
        """Note a value; whether its memory is new."""
        plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
        plain = (
            plain and not (tensor.is_conj() or tensor.is_neg()) and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        )
        address = tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
        group = self._living.get(address)
        new = group is None
        if group is None:
            size = tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 0
            group = self._living[address] = len(self.groups)
            self.groups.append(Group(number, slot, size))
            self._addresses.append(address)
            self._uses.append(0)
        self._uses[group] += 1
        self.groups[group].members.append(slot)
        self.groups[group].plain &= plain
        stride, offset = (tensor.stride(), tensor.storage_offset()) if tensor.layout is torch.strided else ((), 0)
        self.values[slot] = SeenValue(group, tuple(tensor.shape), stride, int(offset), tensor.dtype, tensor.device)
        return new

    def _leaves(self, slot: int) -> None:
        value = self.values[slot]
        assert value is not None
        self._uses[value.group] -= 1
        if not self._uses[value.group]:  # its memory may come again as another's
            del self._living[self._addresses[value.group]]

    def _of(self, slot: int) -> Group:
        value = self.values[slot]
        assert value is not None
        return self.groups[value.group]


def _kind(result: Any, count: int) -> str:
    if isinstance(result, torch.Tensor):
        return "tensor"
    flat = (
        isinstance(result, (list, tuple)) and len(result) == count and all(isinstance(t, torch.Tensor) for t in result)
    )
    return "flat" if flat else "nested"


def _is_pure(node: OpNode) -> bool:
    """Whether the op only computes its results from its inputs, each time the same."""
    return not (
        node.op_type == EXTERNAL or node.op_type.startswith((FUSED, GUARD)) or is_random(node) or written_inputs(node)
    )


def _is_known(step: Step) -> bool:
    """Whether the step leaves the tensors that it gets what they are, and keeps none of them."""
    name = step.node.op_type
    if step.own:
        return name.startswith(FUSED)
    if name in TABLE:
        return name != EXTERNAL
    overload = op(name.removeprefix(GUARD)).overload
    if name.startswith(GUARD):
        return overload is None or overload.namespace == "aten"
    return (
        overload is not None
        and overload.namespace == "aten"
        and torch.Tag.inplace_view not in overload.tags
        and overload._schema.name.partition("::")[2] not in _RESIZES
    )


_RESIZES = frozenset({"resize_", "resize_as_", "set_", "_resize_output_"})
