"""Replays an executor's steps: the first time as they are, watching; from then on by a plan made of what was seen."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from graph_capture.codegen.launches import Tensors
from graph_capture.errors import SignatureMismatchError
from graph_capture.ir.interpreter import Executor, plain_mode
from graph_capture.ir.layouts import copy_into, like
from graph_capture.log import log
from graph_capture.runtime.replay.first_run import FirstRun
from graph_capture.runtime.replay.memory import HOLDERS, Memory
from graph_capture.runtime.replay.plan import Plan


class Replay:
    """Runs an executor, by a plan where that is possible.

    A replay that begins while another has the arenas (in another thread, or inside it) runs the steps as they are.

    Args:
        executor: the steps.
        dynamic: how many of the executor's inputs, the first ones, a call brings along. The others are the same tensors
            in every call, until `run` is told otherwise.
        memory: the arenas (default: its own).
        keep_outputs: see `Plan`.
        enabled: False never makes a plan.
    """

    def __init__(
        self,
        executor: Executor,
        dynamic: int,
        memory: Memory | None = None,
        *,
        keep_outputs: bool = True,
        enabled: bool = True,
    ) -> None:
        self.executor = executor
        self._memory = memory or Memory()
        self._memory.joins(self)
        self._dynamic, self._keep_outputs, self._enabled = dynamic, keep_outputs, enabled
        self._first_run: FirstRun | None = None
        self._plan: Plan | None = None
        self._static: Tensors = ()
        self._seen: tuple[FirstRun, Tensors] | None = None  # what the plan was made of
        self._stamp: Any = None
        self.on_plan: Callable[[], None] | None = None  # called when a plan has been made
        self._latest: list[weakref.ref[torch.Tensor]] = []  # results that lie in the plan's buffers

    def run(self, dynamic: Tensors, static: Tensors, stamp: Any = None) -> list[torch.Tensor]:
        """One tensor for each output.

        Args:
            dynamic: a tensor for each of the first inputs.
            static: a tensor for each other input.
            stamp: a value that changes whenever `static` are other tensors, or lie elsewhere.

        Raises:
            SignatureMismatchError: an input is a result of an earlier replay that a later one has overwritten.
        """
        plan = self._plan
        if plan is None or stamp != self._stamp or torch._C._len_torch_dispatch_stack():
            return self._without_plan(dynamic, static, stamp)
        if plan.lent:
            dynamic = self._not_lent(plan, dynamic)
        memory, turn = self._memory, object()
        try:
            if not memory.enter(turn):
                return self.executor.run([*dynamic, *static])
            if plan.cuda and not memory.on_this_stream(plan.cuda):
                return self.executor.run([*dynamic, *static])
            results = self._run(plan, dynamic)
        except torch.OutOfMemoryError as error:
            if plan.writes:  # some of it may be done
                raise
            return self._in_less_memory([*dynamic, *static], error)
        finally:
            memory.leave(turn)
        if plan.lent:
            self._latest = [weakref.ref(tensor) for tensor in results]
        return results

    def _run(self, plan: Plan, dynamic: Tensors) -> list[torch.Tensor]:
        function = plan.traced if torch.autograd._profiler_enabled() else plan.function
        try:
            return self._call(function, dynamic)
        except Exception as error:
            plan.blame(error)
            raise

    def _call(self, function: Callable[..., list[torch.Tensor]], dynamic: Tensors) -> list[torch.Tensor]:
        if torch._C._is_any_autocast_enabled():
            with plain_mode():
                return function(*dynamic)
        grad = torch.is_grad_enabled()
        try:
            try:
                torch._C._set_grad_enabled(False)
                return function(*dynamic)
            finally:
                torch._C._set_grad_enabled(grad)
        finally:  # an interrupt may come in the line above
            torch._C._set_grad_enabled(grad)

    def _not_lent(self, plan: Plan, dynamic: Tensors) -> Tensors:
        """The inputs, with copies of those that are results of the latest replay: this one will overwrite them."""
        found = list(dynamic)
        for index, tensor in enumerate(dynamic):
            if tensor.layout is not torch.strided or tensor.untyped_storage()._cdata not in plan.lent:
                continue
            owner = tensor if tensor._base is None else tensor._base
            if index in plan.written or not any(ref() is owner for ref in self._latest):
                what = "is to be written" if index in plan.written else "has been overwritten since"
                raise SignatureMismatchError(
                    f"argument {self.executor.names[self.executor.inputs[index]]!r} is the result of an earlier replay "
                    f"and {what}; clone it, or use clone_outputs=True"
                )
            found[index] = copy_into(like(tensor), tensor)
        return found

    @property
    def plan(self) -> Plan | None:
        """The plan; None before the first replay, or where there cannot be one."""
        if self._plan is None and self._first_run is not None:
            self._make()
        return self._plan

    def forget(self) -> None:
        """Drop the plan; the next replay watches again."""
        self._plan = self._first_run = self._seen = None

    def move(self) -> None:
        """Drop the plan; the next replay makes another by what was seen."""
        self._plan = None
        if self._seen is not None:
            self._first_run, self._static = self._seen

    def release(self) -> None:
        """There are no graphs to drop."""

    def _without_plan(self, dynamic: Tensors, static: Tensors, stamp: Any) -> list[torch.Tensor]:
        tensors = [*dynamic, *static]
        if not self._enabled or torch._C._len_torch_dispatch_stack():
            return self.executor.run(tensors)
        if stamp != self._stamp:
            changed, self._stamp = self._stamp is not None, stamp
            self.forget()
            if changed:  # what changes at each call is not worth a plan
                return self.executor.run(tensors)
        if self._first_run is not None:
            self._make()
            return self.executor.run(tensors) if self._plan is None else self.run(dynamic, static, stamp)
        first_run = FirstRun(self.executor, self._memory.forms)
        try:
            results = self.executor.run(tensors, first_run.watching(tensors))
        except torch.OutOfMemoryError as error:
            if first_run.writes or not self._memory.enter():
                raise
            try:
                return self._in_less_memory(tensors, error)
            finally:
                self._memory.leave()
        self._first_run, self._static = first_run, static
        return results

    def _in_less_memory(self, tensors: Tensors, error: Exception) -> list[torch.Tensor]:
        """Op by op, without anything that is kept to be fast."""
        log.warning("out of memory: plans and graphs are given up, and made again where there is room: %s", error)
        self._memory.release()
        return self.executor.run(tensors)

    def _make(self) -> None:
        first_run, turn = self._first_run, object()
        if first_run is None:
            return
        entered = False
        try:
            entered = self._memory.enter(turn)
            if not entered:
                return
            if first_run.failure is not None:
                raise first_run.failure
            static = dict(zip(self.executor.inputs[self._dynamic :], self._static, strict=True))
            self._memory.planning, self._seen = self, (first_run, self._static)
            self._plan = Plan(self.executor, first_run, static, self._memory.arena, self._keep_outputs)
        except Exception as error:  # a plan is never needed
            log.info("replays run op by op, without a plan: %s: %s", type(error).__name__, error)
            self._enabled = False
        finally:
            if entered:
                self._first_run, self._static, self._memory.planning = None, (), None
            self._memory.leave(turn)
        if self._plan is not None and self.on_plan is not None:
            self.on_plan()


HOLDERS.update({Replay.run.__code__, Replay._make.__code__})  # they have a turn
