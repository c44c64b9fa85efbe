"""Replays an executor's steps: the first time as they are, watching; from then on by a plan made of what was seen."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from graph_capture.executor import Executor, plain_mode
from graph_capture.log import log
from graph_capture.plan import Plan
from graph_capture.survey import Survey

Tensors = Sequence[torch.Tensor]


class Replay:
    """Runs an executor, by a plan where that is possible.

    A plan has one set of buffers: a replay that begins while another is under way (in another thread, or inside it)
    runs the steps as they are.

    Args:
        executor: the steps.
        brought: how many of the executor's inputs, the first ones, a call brings along. The others are the same tensors
            in every call, until `run` is told otherwise.
        keep_outputs: see `Plan`.
        enabled: False never makes a plan.
    """

    def __init__(self, executor: Executor, brought: int, *, keep_outputs: bool = True, enabled: bool = True) -> None:
        self.executor = executor
        self._brought, self._keep_outputs, self._enabled = brought, keep_outputs, enabled
        self._survey: Survey | None = None
        self._plan: Plan | None = None
        self._stamp: Any = None
        self._fixed: Tensors = ()
        self._busy = threading.Lock()
        self._holder = 0  # the thread whose replay is under way
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # where the latest replay ran
        _replays.add(self)

    def run(self, brought: Tensors, fixed: Tensors, stamp: Any = None) -> list[torch.Tensor]:
        """One tensor for each output.

        Args:
            brought: a tensor for each of the first inputs.
            fixed: a tensor for each other input.
            stamp: a value that changes whenever `fixed` are other tensors, or lie elsewhere.
        """
        plan = self._plan
        if plan is None or stamp != self._stamp or torch._C._len_torch_dispatch_stack():
            return self._without_plan(brought, fixed, stamp)
        if not self._enter():
            return self.executor.run([*brought, *fixed])
        try:
            if self._streams and not self._on_this_stream():
                return self.executor.run([*brought, *fixed])
            function = plan.traced if torch.autograd._profiler_enabled() else plan.function
            if torch._C._is_any_autocast_enabled():
                with plain_mode():
                    return function(*brought)
            grad = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)
            try:
                return function(*brought)
            finally:
                torch._C._set_grad_enabled(grad)
        finally:
            self._busy.release()

    @property
    def plan(self) -> Plan | None:
        """The plan; None before the first replay, or where there cannot be one."""
        if self._plan is None and self._survey is not None:
            self._make()
        return self._plan

    def forget(self) -> None:
        """Drop the plan and its buffers; the next replay watches again."""
        self._plan = self._survey = None
        self._streams.clear()

    def _without_plan(self, brought: Tensors, fixed: Tensors, stamp: Any) -> list[torch.Tensor]:
        tensors = [*brought, *fixed]
        if not self._enabled or torch._C._len_torch_dispatch_stack():
            return self.executor.run(tensors)
        if stamp != self._stamp:
            changed, self._stamp = self._stamp is not None, stamp
            self.forget()
            if changed:  # what changes at each call is not worth a plan
                return self.executor.run(tensors)
        if self._survey is not None:
            self._make()
            return self.executor.run(tensors) if self._plan is None else self.run(brought, fixed, stamp)
        survey = Survey(self.executor)
        results = self.executor.run(tensors, survey.watching(tensors))
        self._survey, self._fixed = survey, fixed
        return results

    def _make(self) -> None:
        survey = self._survey
        if survey is None or not self._enter():
            return
        try:
            slots = self.executor.inputs[self._brought :]
            if survey.failure is not None:
                raise survey.failure
            plan = Plan(self.executor, survey, dict(zip(slots, self._fixed, strict=True)), self._keep_outputs)
            self._streams = {d: torch.cuda.current_stream(d) for d in plan.arenas if d.type == "cuda"}
            self._plan = plan
        except Exception as error:  # a plan is never needed
            log.info("replays run op by op, without a plan: %s: %s", type(error).__name__, error)
            self._enabled = False
        finally:
            self._survey, self._fixed = None, ()
            self._busy.release()

    def _enter(self) -> bool:
        """Take the buffers, if nobody has them."""
        if not self._busy.acquire(blocking=False):
            return False
        self._holder = threading.get_ident()
        return True

    def _on_this_stream(self) -> bool:
        """Order this replay after the one before, which may have run on another stream."""
        if torch.cuda.is_current_stream_capturing():  # the caller's graph must not share buffers with replays
            return False
        for device, before in self._streams.items():
            stream = torch.cuda.current_stream(device)
            if stream != before:
                stream.wait_stream(before)
                self._streams[device] = stream
        return True


_replays: weakref.WeakSet[Replay] = weakref.WeakSet()


def _after_fork() -> None:
    """In a child process: the threads of the parent, and their replays, are gone."""
    for replay in _replays:
        if replay._busy.locked() and replay._holder != threading.get_ident():
            replay._busy = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
