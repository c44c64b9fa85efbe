"""The steps of a session: what one recording serves, what became of it, and what is still to be recorded."""

from __future__ import annotations

import ctypes
import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from graph_capture.errors import CaptureError, DataDependentError, SignatureMismatchError
from graph_capture.log import log
from graph_capture.record.recorder import Recording, record
from graph_capture.runtime.fuse import FusionScheduler
from graph_capture.runtime.fused import FusedGraph
from graph_capture.runtime.llm.sampling import SamplingKind

Progress = Callable[[str], None]
Step = Callable[..., torch.Tensor]
AGAIN = 2  # times that a step is recorded anew because Python took another way
OFTEN = 4  # uses after which a step is recorded, though the answer was short


class Pending:
    """A small tensor on its way to the host: what is launched after it is not waited for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor.clone()
        self._copied = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def tolist(self) -> list[Any]:
        """Its values."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()


class Key(NamedTuple):
    """What one recording serves; `form` is what else a call has that the steps hand on: its names first."""

    what: str
    size: int
    kind: SamplingKind | None
    padded: bool
    form: tuple[Any, ...] = ()

    def named(self, batch: int) -> str:
        """In words."""
        name = self.what if self.what == "decode" else f"{self.what} of {self.size} tokens"
        name += f", batch {batch}" if batch > 1 else ""
        name += f", {self.kind}" if self.kind is not None else ""
        return name + (", padded" if self.padded else "") + (f", with {', '.join(self.form[0])}" if self.form else "")


@dataclass
class Phase:
    """One captured step.

    Attributes:
        name: what it is.
        fused: its replay; None where it cannot be captured.
        reason: why it cannot.
        replays: how often it was replayed.
        seconds: of a replay, the least; 0 where that was not measured.
    """

    name: str
    fused: FusedGraph | None
    reason: str = ""
    replays: int = 0
    seconds: float = 0.0


class Wanted(NamedTuple):
    """A step that has run as it is, and is to be recorded when nobody waits: the step, its inputs, how many slots were
    filled before it, and how often it was wanted."""

    step: Step
    inputs: tuple[torch.Tensor, ...]
    filled: int
    uses: int


class Steps:
    """Records the steps of one session, and replays them.

    Args:
        scheduler: analyses what is recorded.
        batch: sequences.
        progress: is told what takes long.
        recording: is entered while something is recorded and analysed: weights may get other addresses.

    Attributes:
        phases: what was captured, and what could not be.
        wanted: what is to be captured.
        fusing: False runs every step as it is.
    """

    def __init__(
        self,
        scheduler: FusionScheduler,
        batch: int,
        progress: Progress,
        recording: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.phases: dict[Key, Phase] = {}
        self.wanted: dict[Key, Wanted] = {}
        self.fusing = True
        self._asked_again: Counter[Key] = Counter()
        self._scheduler, self._batch = scheduler, batch
        self._progress, self._recording = progress, recording

    def captured(self, key: Key) -> Phase | None:
        """The step that replays for `key`; None where none does."""
        phase = self.phases.get(key)
        return phase if phase is not None and phase.fused is not None else None

    def given_up(self, key: Key) -> bool:
        """Whether it cannot be captured."""
        return key in self.phases and self.phases[key].fused is None

    def run(self, key: Key, step: Step, *inputs: torch.Tensor) -> torch.Tensor:
        """Replay a step; at its first use run and record it."""
        if not self.fusing or self.given_up(key):
            return step(*inputs, kind=key.kind)
        phase = self.captured(key)
        if phase is not None and phase.fused is not None:
            try:
                result = phase.fused(*inputs)
            except (SignatureMismatchError, DataDependentError) as changed:  # a weight was replaced; nothing has run
                log.info("recording %s again: %s", phase.name, changed)
                if isinstance(changed, DataDependentError):
                    self._asked_again[key] += 1
                    if self._asked_again[key] > AGAIN:
                        self._give_up(key, changed)
                        return step(*inputs, kind=key.kind)
            else:
                phase.replays += 1
                return result
        return self._record(key, step, inputs)

    def want(self, key: Key, step: Step, inputs: Sequence[torch.Tensor], filled: int, uses: int) -> None:
        """Have a step recorded later."""
        self.wanted[key] = Wanted(step, tuple(inputs), filled, uses)

    def _record(self, key: Key, step: Step, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        name = key.named(self._batch)
        self._progress(f"recording {name}")
        result = None
        try:
            with record(*inputs, data_dependent=_asked(key)) as recording:  # type: ignore[arg-type]
                result = step(*inputs, kind=key.kind)
                recording.output(result)
            self._progress(f"finding, compiling and timing the fusions of {name}")
            with self._recording():
                self.phases[key] = Phase(name, self._scheduler.analyze(recording.graph))
        except CaptureError as error:
            self._give_up(key, error)
            if result is None:  # it stopped half-way; it writes the slots again, and counts at its end
                result = step(*inputs, kind=key.kind)
        finally:
            _give_back()
        return result

    def record_apart(self, key: Key, wanted: Wanted, place: Callable[[int], object]) -> bool:
        """Record a step and prepare its replay, and undo what both write; False where it stopped half-way.

        Args:
            place: says how many slots are filled. A step that asks, in Python, where it is replays nowhere else.
        """
        name, inputs = key.named(self._batch), wanted.inputs
        self._progress(f"recording {name}")
        try:
            place(wanted.filled)
            with Recording(inputs, {}, data_dependent=_asked(key), verify=True, rollback=True) as recording:  # type: ignore[arg-type]
                recording.output(wanted.step(*inputs, kind=key.kind))
            self._progress(f"finding, compiling and timing the fusions of {name}")
            with self._recording():
                phase = Phase(name, self._scheduler.analyze(recording.graph))
            _give_back()
            for filled in (wanted.filled, wanted.filled + 1):  # watched, then planned or captured
                place(filled)
                phase.seconds = _timed(phase, inputs)
            self.phases[key] = phase
        except CaptureError as error:
            self._give_up(key, error)
            return False
        finally:
            _give_back()
        return True

    def seconds(self, key: Key, inputs: Sequence[torch.Tensor] = ()) -> float:
        """How long a replay takes, the least of several; what it writes is undone."""
        phase = self.captured(key)
        if phase is None:
            return 0.0
        phase.seconds = min(_timed(phase, inputs) for _ in range(5))
        return phase.seconds

    def _give_up(self, key: Key, error: CaptureError) -> None:
        name = key.named(self._batch)
        log.warning("%s runs as it is, uncaptured: %s", name, error)
        self.phases[key] = Phase(name, None, f"{type(error).__name__}: {error}")


def _give_back() -> None:
    """Return what recording and analysing took for a while, which Python and the C library would keep."""
    gc.collect()
    with suppress(OSError, AttributeError):  # it is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _timed(phase: Phase, inputs: Sequence[torch.Tensor]) -> float:
    assert phase.fused is not None
    graph = phase.fused.recorded
    with graph.undone([*inputs, *graph.captured.values()]):
        start = time.perf_counter()
        result = phase.fused(*inputs)
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        return time.perf_counter() - start


def _asked(key: Key) -> str:
    """transformers asks, in Python, whether padding masks anything and whether a prompt is a beginning."""
    return "error" if key.what == "decode" and not key.form else "guard"
