"""A static plan: the steps of an executor as one straight piece of Python, over buffers that exist beforehand.

Buffers of intermediate values are placed by lifetime in one arena for each device. Views of them and of the weights are
made once. What a call brings along, and what ops allocate themselves, are arguments and local variables of the
function, so that nothing of a call outlives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from graph_capture.codegen.launches import Chain
from graph_capture.ir.interpreter import Executor
from graph_capture.runtime.replay.first_run import FirstRun
from graph_capture.runtime.replay.planner import Arenas, Builder
from graph_capture.runtime.replay.script import Scope


class Plan:
    """A bound replay.

    Args:
        executor: what to replay.
        first_run: what a run of it has shown.
        static: the inputs (by slot) that are the same tensors, at the same addresses, in every replay.
        arena: gives the arena of a device.
        keep_outputs: results get memory of their own; otherwise they lie in buffers of the plan, until the next replay.
        captured: it runs once, to be captured: what Python does costs nothing then, and copies do.

    Attributes:
        function: takes a tensor for each other input, in order, and returns the outputs.
        source: the function as Python.
        peak_bytes: what intermediate values take of the arena, by device.
        live_bytes: and at each step.
        eager_bytes: what the same values take at most, where each is allocated for as long as it lives.
        arenas: where they lie, by device; other plans share them.
        counts: what became of how many steps.
        cuda: the CUDA devices that it uses.
        lent: the storages of results that the next replay overwrites.
        lent_bytes: what they take.
        written: the positions of those of the function's arguments that it writes.
        writes: whether it writes into memory that is there before a replay.
    """

    def __init__(
        self,
        executor: Executor,
        first_run: FirstRun,
        static: Mapping[int, torch.Tensor],
        arena: Arenas,
        keep_outputs: bool,
        captured: bool = False,
    ) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._builder = Builder(executor, first_run, static, arena, keep_outputs, captured)
        self.counts, self.lent, self.lent_bytes = self._builder.counts, self._builder.lent, self._builder.lent_bytes
        self.writes, self.arenas = first_run.writes, self._builder.arenas
        self.cuda = sorted({v.device for v in first_run.values if v is not None and v.device.type == "cuda"}, key=str)
        dynamic = [first_run.values[slot] for slot in executor.inputs if slot not in static]
        self.written = frozenset(
            i for i, v in enumerate(dynamic) if v is not None and first_run.groups[v.group].written
        )
        self.peak_bytes, self.eager_bytes = self._builder.peak_bytes, self._builder.eager_bytes
        self.live_bytes = self._builder.live_bytes
        self.source = self._builder.text(traced=False)
        self._doing = self._builder.places
        self.function = self._builder.compiled(self.source)
        self._traced: Callable[..., list[torch.Tensor]] | None = None

    def held(self) -> list[Any]:
        """Everything that the function uses, and what its kernels have for themselves; not what its kernels are given,
        which may be the caller's."""
        values = self._builder.namespace.values()
        scratch = [tensor for value in values if isinstance(value, Chain) for tensor in value.scratch]
        return [*(value for value in values if not isinstance(value, Chain)), *scratch]

    @property
    def scopes(self) -> list[Scope]:
        """What each scope that a profiler sees of `traced` belongs to, in order."""
        return self._builder.scopes

    @property
    def traced(self) -> Callable[..., list[torch.Tensor]]:
        """`function`, with each region, and each other step, under its name for a profiler."""
        if self._traced is None:
            self._traced = self._builder.compiled(self._builder.text(traced=True))
        return self._traced

    def blame(self, error: Exception) -> None:
        """Note on an error of `function` which op raised it."""
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code is not self.function.__code__:
            trace = trace.tb_next
        if trace is not None and (doing := self._doing[trace.tb_lineno - 1]):
            error.add_note(f"raised in a replay by {doing}")

    def __str__(self) -> str:
        sizes = [f"{d}: {size:,} bytes (eager: {self.eager_bytes[d]:,})" for d, size in self.peak_bytes.items()]
        counts = [f"{count} {name}" for name, count in self.counts.items() if count]
        return f"# arena: {', '.join(sizes) or 'none'}\n# steps: {', '.join(counts)}\n{self.source}"
