"""Replays as CUDA graphs: the steps in as few graphs as possible, split around those that cannot be captured.

Small arguments are copied to static addresses. Large ones, and those that the steps write (caches), are used where they
are: graphs serve calls that bring the same addresses again, other calls replay by the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graph_capture.codegen.launches import Tensors
from graph_capture.ir.binding import flatten_outputs
from graph_capture.ir.interpreter import Executor, Step, plain_mode
from graph_capture.ir.layouts import copy_into, like
from graph_capture.ir.memory import storage_bytes, uncollected
from graph_capture.ir.ops import EXTERNAL, GUARD, op
from graph_capture.log import log
from graph_capture.runtime.replay.capturing import Backend, Cuda
from graph_capture.runtime.replay.first_run import FirstRun, SeenValue
from graph_capture.runtime.replay.memory import Memory
from graph_capture.runtime.replay.plan import Plan
from graph_capture.runtime.replay.planner import lend
from graph_capture.runtime.replay.replay import Replay

COPIED = 2**20  # bytes of an argument that is copied rather than followed
CAPTURES = 4  # address changes after which graphs are given up


@dataclass
class _GraphSegment:
    """Steps that are captured together, or steps that are not.

    Attributes:
        start: the number of the first one.
        replay: computes again what was captured.
        kept: slot -> where later segments, and the caller, find it.
        held: whatever may own memory that the captured graph uses, but the caller's.
    """

    start: int
    steps: list[Step]
    captured: bool
    replay: Callable[[], None] | None = None
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)


class Graphs:
    """The captured steps of one executor for arguments at given addresses.

    `start` runs them once, for the call that brings these arguments, and captures them meanwhile. Each piece that is
    captured has a plan of its own, all of whose inputs stay where they are: intermediate values lie in the arena, as in
    replays without graphs, and what ops allocate themselves is freed inside the capture, where eager would free it.

    Attributes:
        failure: why there is no graph after all.
        bytes_before, bytes_after: device memory reserved before and after the capture.
        lent: the storages of results that the next replay overwrites, where they are not copied.
        lent_bytes: what these and the copied arguments take.
    """

    def __init__(
        self, executor: Executor, first_run: FirstRun, dynamic: Tensors, static: Tensors, memory: Memory
    ) -> None:
        self._executor, self._first_run, self._memory = executor, first_run, memory
        self._backend: Backend = memory.captures
        self._segments = _split(executor, first_run, self._backend.device_type)
        self.failure: Exception | None = None
        self.lent: set[int] = set()
        self.bytes_before = self.bytes_after = self._backend.allocated()
        self._dynamic = dynamic
        count = len(dynamic)
        self._copied = {i: like(t) for i, t in enumerate(dynamic) if self._is_copied(executor.inputs[i], t)}
        self.lent_bytes = sum(buffer.nbytes for buffer in self._copied.values())
        self._addresses = [(i, dynamic[i].data_ptr()) for i in range(count) if i not in self._copied]
        self._same = {slot: slot for slot in executor.inputs}  # what is an input, as an object: which one
        for step, form in zip(executor.steps, first_run.forms, strict=True):
            for slot, same in zip(step.fills, form.same, strict=True):
                if same is not None and step.reads[same] in self._same:
                    self._same[slot] = self._same[step.reads[same]]
        self._values: list[torch.Tensor | None] = [None] * len(executor.names)
        for given, bound in zip(executor.inputs, [*dynamic, *static], strict=True):
            self._values[given] = bound
        for index, buffer in self._copied.items():
            self._values[executor.inputs[index]] = copy_into(buffer, dynamic[index])
        first = self._segments[0]  # its plan is made before anything has run: whatever goes wrong has no consequence
        self._first_plan = self._plan(0, first) if first.captured else None

    def start(self, keep_outputs: bool) -> list[torch.Tensor]:
        """Run and capture. One tensor for each output."""
        dynamic, self._dynamic = self._dynamic, ()
        with plain_mode():
            for number, segment in enumerate(self._segments):
                if segment.captured and self.failure is None:
                    self._capture(number, segment, dynamic)
                else:
                    self._run_once(number, segment)
        copies: dict[int, torch.Tensor] = {}
        results = [self._output(slot, dynamic, self._values, copies, keep_outputs) for slot in self._executor.outputs]
        for index, _ in self._addresses:
            self._values[self._executor.inputs[index]] = None  # the caller's
        self.bytes_after = self._backend.allocated()
        return results

    @property
    def segments(self) -> tuple[int, int]:
        """How many graphs there are, and how many pieces run between them."""
        captured = sum(segment.captured for segment in self._segments)
        return captured, len(self._segments) - captured

    def fit(self, dynamic: Tensors) -> bool:
        """Whether the arguments are where they were."""
        return all(dynamic[index].data_ptr() == address for index, address in self._addresses)

    def run(self, dynamic: Tensors, keep_outputs: bool) -> list[torch.Tensor]:
        """One tensor for each output; where `keep_outputs` is False, in memory that the next run overwrites."""
        for index, buffer in self._copied.items():
            copy_into(buffer, dynamic[index])
        values = list(self._values)
        for index, _ in self._addresses:
            values[self._executor.inputs[index]] = dynamic[index]
        with plain_mode():
            for segment in self._segments:
                if segment.replay is not None:
                    segment.replay()
                else:
                    self._between(segment, values)
        copies: dict[int, torch.Tensor] = {}
        return [self._output(slot, dynamic, values, copies, keep_outputs) for slot in self._executor.outputs]

    def _is_copied(self, slot: int, tensor: torch.Tensor) -> bool:
        value = self._value(slot)
        group = self._first_run.groups[value.group]
        shared = len({s for s in self._executor.inputs if self._value(s).group == value.group}) > 1
        lent = slot in self._executor.outputs or any(
            self._value(s).group == value.group for s in self._executor.outputs
        )
        return not (group.written or shared or lent) and tensor.is_contiguous() and tensor.nbytes <= COPIED

    def _needed(self, number: int, segment: _GraphSegment) -> list[int]:
        """The slots that a segment fills for others."""
        later = {slot for other in self._segments[number + 1 :] for step in other.steps for slot in step.reads}
        made = [slot for step in segment.steps for slot in step.fills]
        return [slot for slot in made if slot in later or slot in self._executor.outputs]

    def _plan(self, number: int, segment: _GraphSegment) -> Plan:
        """A plan of a segment, over memory that stays where it is."""
        stop = segment.start + len(segment.steps)
        part, slots = self._executor.part(segment.start, stop, self._needed(number, segment))
        static = {own: self._tensor(slots[own]) for own in part.inputs}
        return Plan(
            part, self._first_run.part(part, slots, segment.start), static, self._memory.arena, False, captured=True
        )

    def _capture(self, number: int, segment: _GraphSegment, dynamic: Tensors) -> None:
        """Run a segment, and capture it for later."""
        plan, self._first_plan = self._first_plan or self._plan(number, segment), None
        needed = self._needed(number, segment)
        with self._backend.beside():
            results = plan.function()
        try:
            with uncollected():  # the end of a CUDA graph, or of a Triton kernel, invalidates a capture
                found, segment.replay = self._backend.capture(plan.function)
        except Exception as error:  # out of memory, or an op that cannot be captured
            self.failure, found = error, results
        for slot, result, tensor in zip(needed, results, found, strict=True):
            if tensor.data_ptr() != result.data_ptr():
                copy_into(tensor, result)  # nothing has been computed in what was captured
            self._values[slot] = segment.kept[slot] = tensor
        callers = {tensor.untyped_storage()._cdata for tensor in dynamic if tensor.layout is torch.strided}
        segment.held = [value for value in plan.held() if _memory(value) not in callers]
        self.lent |= plan.lent | {tensor.untyped_storage()._cdata for tensor in found} - callers
        self.lent_bytes += plan.lent_bytes

    def _run_once(self, number: int, segment: _GraphSegment) -> None:
        """Run a segment that is not captured; what it makes for others is copied to where they will find it."""
        _apply(segment.steps, self._values)
        for slot in self._needed(number, segment):
            tensor = self._tensor(slot)
            if tensor.device.type == self._backend.device_type:
                segment.kept[slot] = self._values[slot] = copy_into(like(tensor), tensor)

    def _between(self, segment: _GraphSegment, values: list[torch.Tensor | None]) -> None:
        _apply(segment.steps, values)
        for slot, buffer in segment.kept.items():
            found = values[slot]
            assert found is not None
            values[slot] = copy_into(buffer, found)

    def _output(
        self,
        slot: int,
        dynamic: Tensors,
        values: Sequence[torch.Tensor | None],
        copies: dict[int, torch.Tensor],
        keep_outputs: bool,
    ) -> torch.Tensor:
        value = self._value(slot)
        group = self._first_run.groups[value.group]
        if group.maker < 0:  # an argument or a weight, or a view of one
            root = self._same.get(slot, group.root)
            owner = self._executor.inputs.index(root)
            base = dynamic[owner] if owner < len(dynamic) else self._tensor(root)
            if slot in self._same:
                return base
            start = int(base.storage_offset()) + value.offset - self._value(group.root).offset
            return base.as_strided(value.shape, value.stride, start)
        tensor = values[slot]
        assert tensor is not None
        if not keep_outputs or tensor.device.type != self._backend.device_type:
            return lend(tensor)
        if value.group not in copies:  # results that share memory go on sharing it
            copies[value.group] = storage_bytes(tensor).clone()
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        memory = copies[value.group].untyped_storage()
        return empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())

    def _value(self, slot: int) -> SeenValue:
        value = self._first_run.values[slot]
        assert value is not None
        return value

    def _tensor(self, slot: int) -> torch.Tensor:
        tensor = self._values[slot]
        assert tensor is not None
        return tensor


class GraphReplay(Replay):
    """A `Replay` that captures its steps once a call has come twice with arguments at the same addresses.

    Args:
        backend: makes what captures (default: CUDA graphs).
    """

    def __init__(
        self,
        executor: Executor,
        dynamic: int,
        memory: Memory | None = None,
        *,
        backend: Callable[[], Backend] = Cuda,
        keep_outputs: bool = True,
        enabled: bool = True,
    ) -> None:
        super().__init__(executor, dynamic, memory, keep_outputs=keep_outputs, enabled=enabled)
        self._make_backend = backend
        self._followed: list[int] = []
        self._left = CAPTURES
        self.graphs: Graphs | None = None

    def forget(self) -> None:
        super().forget()
        self.graphs = None

    def release(self) -> None:
        self.graphs = None

    def move(self) -> None:
        super().move()
        if self.graphs is not None:
            self.graphs, self._left = None, CAPTURES

    def _run(self, plan: Plan, dynamic: Tensors) -> list[torch.Tensor]:
        if torch.autograd._profiler_enabled():  # a graph hides its regions
            return super()._run(plan, dynamic)
        if self.graphs is not None and self.graphs.fit(dynamic):
            self._memory.used(self)
            return self.graphs.run(dynamic, self._keep_outputs)
        addresses = [tensor.data_ptr() for tensor in dynamic if tensor.nbytes > COPIED]
        again, self._followed = addresses == self._followed, addresses
        self.graphs = None
        if not self._left or self._seen is None or not again:
            return super()._run(plan, dynamic)
        self._left -= 1
        graphs = self._bound(*self._seen, dynamic)
        return super()._run(plan, dynamic) if graphs is None else self._started(graphs, plan)

    def _bound(self, first_run: FirstRun, static: Tensors, dynamic: Tensors) -> Graphs | None:
        """What is to be captured; None where it cannot be."""
        try:
            if self._memory.captures is None:
                self._memory.captures = self._make_backend()
            return Graphs(self.executor, first_run, dynamic, static, self._memory)
        except Exception as error:
            self._gives_up(error)
            return None

    def _started(self, graphs: Graphs, plan: Plan) -> list[torch.Tensor]:
        """Run and capture."""
        results = graphs.start(self._keep_outputs)
        nbytes = max(0, graphs.bytes_after - graphs.bytes_before)
        if graphs.failure is not None:
            self._gives_up(graphs.failure)
        elif self._memory.captured(self, nbytes):
            self.graphs = graphs
            plan.lent |= graphs.lent
            log.info("captured as %d graphs with %d pieces between them, %d bytes", *graphs.segments, nbytes)
        else:
            self._gives_up(f"{nbytes} bytes are more than graph_memory={self._memory.budget}")
        return results

    def _gives_up(self, why: object) -> None:
        self._left = 0
        kind = f"{type(why).__name__}: " if isinstance(why, Exception) else ""
        log.warning("no CUDA graph, replays launch kernel by kernel: %s%s", kind, why)


def _memory(value: Any) -> int:
    """The storage that something is over; 0 for none."""
    strided = isinstance(value, torch.Tensor) and value.layout is torch.strided
    return value.untyped_storage()._cdata if strided else 0


def _split(executor: Executor, first_run: FirstRun, device_type: str) -> list[_GraphSegment]:
    segments: list[_GraphSegment] = []
    for number, step in enumerate(executor.steps):
        captured = _capturable(step, first_run, device_type)
        if segments and segments[-1].captured == captured:
            segments[-1].steps.append(step)
        else:
            segments.append(_GraphSegment(number, [step], captured))
    return segments


def _capturable(step: Step, first_run: FirstRun, device_type: str) -> bool:
    """Whether the step only launches kernels on the device, the same ones each time."""
    name = step.node.op_type
    if name == EXTERNAL or name.startswith(GUARD) or step.node.attr("generator") is not None:
        return False
    values = [first_run.values[slot] for slot in (*step.reads, *step.fills)]
    if not values or any(value is None or value.device.type != device_type for value in values):
        return False
    overload = None if step.own else op(name).overload
    return overload is None or not _SYNCHRONISES.intersection(overload.tags)


_SYNCHRONISES = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})


def _apply(steps: Sequence[Step], values: list[torch.Tensor | None]) -> None:
    for step in steps:
        given: list[Any] = [values[slot] for slot in step.reads]
        for slot, tensor in zip(step.fills, flatten_outputs(step.call(given)), strict=True):
            values[slot] = tensor
