"""Replays as CUDA graphs: the steps in as few graphs as possible, split around those that cannot be captured.

Small arguments are copied to static addresses. Large ones, and those that the steps write (caches), are used where they
are: graphs serve calls that bring the same addresses again, other calls replay by the plan.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from graph_capture.codegen.launches import Tensors
from graph_capture.ir.binding import flatten_outputs
from graph_capture.ir.interpreter import Executor, Step, plain_mode
from graph_capture.ir.layouts import copy_into, like
from graph_capture.ir.memory import storage_bytes
from graph_capture.ir.ops import EXTERNAL, GUARD, op
from graph_capture.log import log
from graph_capture.runtime.replay.first_run import FirstRun, SeenValue
from graph_capture.runtime.replay.plan import Plan
from graph_capture.runtime.replay.planner import lend
from graph_capture.runtime.replay.replay import Memory, Replay

COPIED = 2**20  # bytes of an argument that is copied rather than followed
CAPTURES = 4  # address changes after which graphs are given up
Body = Callable[[], list[torch.Tensor]]
Undone = Callable[[Tensors], contextlib.AbstractContextManager[None]]


class Backend(Protocol):
    """What captures."""

    device_type: str

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """A stream of its own for everything inside, ordered with the current one."""

    def capture(self, body: Body) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """What `body` returns, and a function that computes it again in the same memory. Nothing is computed yet."""

    def allocated(self) -> int:
        """Bytes of memory in use, without what is only kept in reserve."""


class Cuda:
    """CUDA graphs with one private pool.

    Graphs may share it, for no two replay at once (see `runtime.replay.replay.Memory`), and what a graph returns, or
    hands on to a later piece, is held for as long as the graph is there: only memory within a replay serves again.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def capture(self, body: Body) -> tuple[list[torch.Tensor], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # A workspace that cuBLAS had before lies outside the pool and may be freed while the graph lives: torch.compile
        # frees all of them. So does this, that the graph's own lies in the pool.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                results = body()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        return results, graph.replay

    def allocated(self) -> int:
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()


@dataclass
class _GraphSegment:
    """Steps that are captured together, or one step that is not."""

    steps: list[Step]
    captured: bool
    replay: Callable[[], None] | None = None
    kept: dict[int, torch.Tensor] = field(default_factory=dict)  # slot -> where later segments find it


class Graphs:
    """The captured steps of one executor for arguments at given addresses.

    Attributes:
        bytes_before, bytes_after: device memory reserved before and after the capture.
    """

    def __init__(
        self,
        executor: Executor,
        first_run: FirstRun,
        dynamic: Tensors,
        static: Tensors,
        backend: Backend,
        undone: Undone,
    ) -> None:
        self._executor, self._first_run, self._backend = executor, first_run, backend
        self._segments = _split(executor, first_run, backend.device_type)
        self.bytes_before = backend.allocated()
        count = len(dynamic)
        self._copied = {i: like(t) for i, t in enumerate(dynamic) if self._is_copied(executor.inputs[i], t)}
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
            self._values[executor.inputs[index]] = buffer
        with undone([*dynamic, *static]), backend.beside(), plain_mode():
            for index, buffer in self._copied.items():
                copy_into(buffer, dynamic[index])
            executor.run([tensor for slot in executor.inputs if (tensor := self._values[slot]) is not None])
        with undone([*dynamic, *static]), plain_mode():  # segments run as they are captured: others read their results
            for number, segment in enumerate(self._segments):
                self._capture(number, segment)
        for index in range(count):
            slot = executor.inputs[index]
            if index not in self._copied:
                self._values[slot] = None  # the caller's
        self.bytes_after = backend.allocated()

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

    def _capture(self, number: int, segment: _GraphSegment) -> None:
        later = {slot for other in self._segments[number + 1 :] for step in other.steps for slot in step.reads}
        made = [slot for step in segment.steps for slot in step.fills]
        needed = [slot for slot in made if slot in later or slot in self._executor.outputs]
        if not segment.captured:
            _apply(segment.steps, self._values)
            for slot in needed:
                tensor = self._tensor(slot)
                if tensor.device.type == self._backend.device_type:
                    segment.kept[slot] = self._values[slot] = copy_into(like(tensor), tensor)
            return

        known = list(self._values)

        def body() -> list[torch.Tensor]:
            inner = list(known)
            _apply(segment.steps, inner)
            return [tensor for slot in needed if (tensor := inner[slot]) is not None]

        with _uncollected():
            results, segment.replay = self._backend.capture(body)
        for slot, tensor in zip(needed, results, strict=True):
            self._values[slot] = tensor
        segment.replay()

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
        undone: puts back what the steps write into tensors and draw at random.
        backend: makes what captures (default: CUDA graphs).
    """

    def __init__(
        self,
        undone: Undone,
        executor: Executor,
        dynamic: int,
        memory: Memory | None = None,
        *,
        backend: Callable[[], Backend] = Cuda,
        keep_outputs: bool = True,
        enabled: bool = True,
    ) -> None:
        super().__init__(executor, dynamic, memory, keep_outputs=keep_outputs, enabled=enabled)
        self._undone, self._make_backend = undone, backend
        self._seen: tuple[FirstRun, Tensors] | None = None
        self._followed: list[int] = []
        self._left = CAPTURES
        self.graphs: Graphs | None = None

    def forget(self) -> None:
        super().forget()
        self.graphs = self._seen = None

    def _make(self) -> None:
        if self._first_run is not None and self._first_run.failure is None:
            self._seen = (self._first_run, self._static)
        super()._make()

    def _run(self, plan: Plan, dynamic: Tensors) -> list[torch.Tensor]:
        if torch.autograd._profiler_enabled():  # a graph hides its regions
            return super()._run(plan, dynamic)
        if self.graphs is None or not self.graphs.fit(dynamic):
            addresses = [tensor.data_ptr() for tensor in dynamic if tensor.nbytes > COPIED]
            again, self._followed = addresses == self._followed, addresses
            self.graphs = None
            if not self._left or self._seen is None or not again:
                return super()._run(plan, dynamic)
            self._left -= 1
            self._capture(*self._seen, dynamic)
            if self.graphs is None:
                return super()._run(plan, dynamic)
        return self.graphs.run(dynamic, self._keep_outputs)

    def _capture(self, first_run: FirstRun, static: Tensors, dynamic: Tensors) -> None:
        try:
            if self._memory.captures is None:
                self._memory.captures = self._make_backend()
            self.graphs = Graphs(self.executor, first_run, dynamic, static, self._memory.captures, self._undone)
            log.info(
                "captured as %d graphs with %d pieces between them, %d bytes",
                *self.graphs.segments,
                self.graphs.bytes_after - self.graphs.bytes_before,
            )
        except Exception as error:  # out of memory, or an op that cannot be captured
            self._left = 0
            log.warning("no CUDA graph, replays launch kernel by kernel: %s: %s", type(error).__name__, error)


_capturing = threading.RLock()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection inside: the end of a CUDA graph, or of a Triton kernel, invalidates what is captured."""
    with _capturing:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def _split(executor: Executor, first_run: FirstRun, device_type: str) -> list[_GraphSegment]:
    segments: list[_GraphSegment] = []
    for step in executor.steps:
        captured = _capturable(step, first_run, device_type)
        if segments and segments[-1].captured == captured:
            segments[-1].steps.append(step)
        else:
            segments.append(_GraphSegment([step], captured))
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
