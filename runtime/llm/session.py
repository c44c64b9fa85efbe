"""Prefill and decode steps of one model over fixed memory: captured, or run as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from graph_capture.errors import CaptureError, DataDependentError, SignatureMismatchError
from graph_capture.log import log
from graph_capture.record.recorder import Recording, record
from graph_capture.runtime.fuse import FusionScheduler
from graph_capture.runtime.llm.calling import Calling
from graph_capture.runtime.llm.phases import Key, Phase, Wanted
from graph_capture.runtime.llm.sampling import Sampler, Sampling, SamplingKind, check_rows, rectangle

Progress = Callable[[str], None]
SHORTEST = 16  # tokens of the smallest bucket
SHORT = 4  # tokens of an answer that is not to be followed by recording, which takes longer,
OFTEN = 4  # but for what is used so often
_F = TypeVar("_F", bound=Callable[..., Any])


def bucket(length: int) -> int:
    """What a prompt is padded to: 16, 24, 32, 48, 64, ..., so that few recordings serve all lengths."""
    size = SHORTEST
    while size < length:
        size *= 2
    between = size // 4 * 3
    return between if length <= between and size > SHORTEST else size


class OutOfSlots(CaptureError):
    """There is no memory for the cache."""


def _plainly(method: _F) -> _F:
    """A session's memory is made and written under neither grad nor inference mode, whatever its caller is under."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return call  # type: ignore[return-value]


class Session:
    """Memory for `batch` sequences, and the steps that fill it.

    A step is a function without arguments but the prompt: tokens, positions and what sampling needs lie in memory of
    the session. It can replay, or run as it is, at any time. A prompt whose length was not met before runs as it is,
    at the model's own speed; `settle` records what it would have replayed.

    Args:
        calling: a causal language model of transformers, in evaluation mode.
        scheduler: analyses what is recorded.
        capacity: slots.
        progress: is told what takes long.
        recording: is entered while something is recorded and analysed: weights may get other addresses.

    Attributes:
        filled: slots filled; also on the device, as `slots.position`.
        held: the tokens in them, where there is one sequence.
        phases: what was captured, and what could not be.
        wanted: what is to be captured.
        fusing: False runs every step as it is.
        eager_first: whether a prefill runs as it is before it is recorded.

    Raises:
        CaptureError: the architecture is not supported, or memory does not suffice.
    """

    @_plainly
    def __init__(
        self,
        calling: Calling,
        scheduler: FusionScheduler,
        batch: int,
        capacity: int,
        progress: Progress | None = None,
        recording: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        from graph_capture.runtime.llm.cache import slot_cache

        self.calling, self.model, self.batch, self.capacity = calling, calling.model, batch, capacity
        self.fusing = self.eager_first = True
        self.filled = 0
        self.held: list[int] = []
        self.phases: dict[Key, Phase] = {}
        self.wanted: dict[Key, Wanted] = {}
        self._scheduler = scheduler
        self._progress = progress or (lambda _: None)
        self._recording = recording
        self._device = device = self.model.device
        try:
            self.cache = slot_cache(self.model.config, capacity, device)
            self.slots = self.cache.slots
            self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self._offset = torch.zeros(batch, dtype=torch.int64, device=device)
            self._padded = False
            logits = self._forward(self.tokens, True, 1)  # makes the cache, and what the model makes at its first call
            self.vocabulary = logits.shape[-1]
            self.sampler = Sampler(batch, capacity, self.vocabulary, device)
        except RuntimeError as error:  # on the CPU it has no class of its own
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise OutOfSlots(
                f"{capacity} slots for {batch} sequences do not fit into memory: take a smaller max_length"
            ) from error

    @_plainly
    def prepare(
        self, samplings: Sequence[Sampling], seeds: Sequence[int | None], rows: Sequence[Sequence[int]], told: int
    ) -> SamplingKind:
        """Say how tokens are chosen from here on; see `Sampler.prepare`."""
        return self.sampler.prepare(samplings, seeds, rectangle(rows), told)

    @_plainly
    def prefill(self, rows: Sequence[Sequence[int]], kind: SamplingKind | None) -> torch.Tensor:
        """Start with these prompts; what was there is forgotten, but for a beginning that one sequence shares.

        Returns:
            The next tokens, [B] int64; without a `kind` the logits for them, [B, V].

        Raises:
            CaptureError: a prompt is empty, or does not fit.
        """
        check_rows(rows, self.capacity)
        longest = max(map(len, rows))
        whole = self.batch > 1 or self._padded or self.cache.stateful or not self.calling.goes_back
        kept = 0 if whole else min(_shared(self.held, rows[0]), longest - 1)
        if kept < longest - kept:  # attention over all slots costs more than it saves
            kept = 0
        self._pad(rows, longest)
        self.truncate(kept)
        new = longest - kept
        if kept and new == 1:
            self.tokens.fill_(rows[0][-1])
            result = self.decode(kind)
            self.held = list(rows[0])
            return result
        logits = self._prompt(rows, kept, new)
        self.filled = longest
        self.held = list(rows[0])
        return self._choose(logits, kind)  # apart, so that one recording serves every kind of sampling

    @_plainly
    def decode(self, kind: SamplingKind | None) -> torch.Tensor:
        """One step with `tokens`; returns as `prefill` does.

        Raises:
            CaptureError: all slots are filled.
        """
        if self.filled >= self.capacity:
            raise CaptureError(f"all {self.capacity} slots of the cache are filled: take a larger max_length")
        result = self._run(Key("decode", 1, kind, self._padded), self._next)
        self.filled += 1
        return result

    @_plainly
    def truncate(self, filled: int, held: Sequence[int] = ()) -> None:
        """Forget all but the first `filled` slots, which hold these tokens."""
        self.filled, self.held = filled, list(held[:filled])
        self.slots.position.fill_(filled)

    @_plainly
    def settle(self, short: bool = False) -> None:
        """Record what has run as it is because nobody was to wait for it; the slots stay what they are.

        Args:
            short: after so short an answer that recording would take far longer: only what is wanted again and again.
        """
        for key, what in list(self.wanted.items()):
            if not short or what.uses >= OFTEN:
                del self.wanted[key]
                if self.fusing and key not in self.phases:
                    self._record_apart(key, what)

    @_plainly
    def prove_prompt(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """The logits after these prompts, as a recorded prefill would compute them, but as it is; [B, V]."""
        longest = max(map(len, rows))
        self._pad(rows, longest)
        self.truncate(0)
        size = longest if self.cache.stateful else self._size(0, longest)
        logits = self._begin(*self._inputs(rows, 0, longest, size), kind=None)
        self.filled = longest
        return logits.clone()

    @_plainly
    def prove_return(self, filled: int, more: Sequence[int]) -> torch.Tensor:
        """The logits after `more` tokens behind the first `filled` slots, [1, V]; what the others held is forgotten."""
        self.truncate(filled)
        logits = self._extend(*self._inputs([[0] * filled + [*more]], filled, len(more), len(more)), kind=None)
        self.filled += len(more)
        return logits.clone()

    @_plainly
    def prove_token(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits after one token more a row, [B, V], from a decode step as it is."""
        self.tokens.copy_(tokens[:, None])
        self.filled += 1
        return self._next(kind=None).clone()

    # --- the steps

    def _pad(self, rows: Sequence[Sequence[int]], longest: int) -> None:
        self._padded = any(len(row) < longest for row in rows)
        self._offset.copy_(torch.tensor([longest - len(row) for row in rows]))

    def _size(self, kept: int, new: int) -> int:
        return bucket(new) if kept + bucket(new) <= self.capacity else new

    def _inputs(
        self, rows: Sequence[Sequence[int]], kept: int, new: int, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.zeros(self.batch, size, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, new - len(row) + kept : new] = torch.tensor(row[kept:])
        return ids.to(self._device), torch.tensor([new - 1], device=self._device)

    def _prompt(self, rows: Sequence[Sequence[int]], kept: int, new: int) -> torch.Tensor:
        """The logits after the prompts, of which `kept` tokens are there; captured where this length was met before."""
        step = self._extend if kept else self._begin
        size = self._size(kept, new)
        key = Key("continue" if kept else "prefill", size, None, self._padded)
        phase = self.phases.get(key)
        as_it_is = not self.fusing or self.cache.stateful or (phase is not None and phase.fused is None)
        if as_it_is or (phase is None and self.eager_first):
            if not as_it_is:
                uses = 1 + (self.wanted[key].uses if key in self.wanted else 0)
                self.wanted[key] = Wanted(step, self._inputs(rows, kept, new, size), kept, uses)
            return step(*self._inputs(rows, kept, new, new), kind=None)
        return self._run(key, step, *self._inputs(rows, kept, new, size))

    def _begin(self, ids: torch.Tensor, last: torch.Tensor, *, kind: None) -> torch.Tensor:
        logits = self._forward(ids, True, last)
        self.slots.position.copy_(last[0] + 1)
        return logits

    def _extend(self, ids: torch.Tensor, last: torch.Tensor, *, kind: None) -> torch.Tensor:
        logits = self._forward(ids, False, last)
        self.slots.position.copy_(self.slots.position + last[0] + 1)
        return logits

    def _next(self, *, kind: SamplingKind | None) -> torch.Tensor:
        logits = self._forward(self.tokens, False, 1)
        self.slots.position.copy_(self.slots.position + 1)
        return self._choose(logits, kind)

    def _forward(self, ids: torch.Tensor, fresh: bool, keep: int | torch.Tensor) -> torch.Tensor:
        """The logits of one token a row, [B, V]."""
        length = ids.shape[1]
        self.cache.begin(length, fresh)
        if not self._padded:
            return self.calling(ids, self.cache, keep, self.slots.where[None])
        positions = (self.slots.where - self._offset[:, None]).clamp(min=0)
        mask = None
        if fresh or self.cache.slotted:
            slots = torch.arange(length if fresh else self.capacity, device=ids.device)
            mask = slots >= self._offset[:, None]
        return self.calling(ids, self.cache, keep, positions, mask)

    def _choose(self, logits: torch.Tensor, kind: SamplingKind | None) -> torch.Tensor:
        if kind is None:
            return logits
        chosen = self.sampler.choose(kind, logits, self.slots.position - self._offset)
        self.tokens.copy_(chosen[:, None])
        return chosen

    # --- capture

    def _run(self, key: Key, step: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        phase = self.phases.get(key)
        if not self.fusing or (phase is not None and phase.fused is None):
            return step(*inputs, kind=key.kind)
        if phase is not None and phase.fused is not None:
            try:
                result = phase.fused(*inputs)
            except (SignatureMismatchError, DataDependentError) as changed:  # a weight was replaced; nothing has run
                log.info("recording %s again: %s", phase.name, changed)
            else:
                phase.replays += 1
                return result
        return self._record(key, step, inputs)

    def _record(self, key: Key, step: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Run a step and record it."""
        name = self._name(key)
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
            self._given_up(key, name, error)
            if result is None:  # it stopped half-way; it writes the slots again, and counts at its end
                result = step(*inputs, kind=key.kind)
        return result

    def _record_apart(self, key: Key, wanted: Wanted) -> None:
        """Record a step and prepare its replay, and undo what both write."""
        name, inputs = self._name(key), wanted.inputs
        filled, held = self.filled, self.held
        self._progress(f"recording {name}")
        self.slots.position.fill_(wanted.filled)
        try:
            with Recording(inputs, {}, data_dependent=_asked(key), verify=True, rollback=True) as recording:  # type: ignore[arg-type]
                recording.output(wanted.step(*inputs, kind=key.kind))
            self._progress(f"finding, compiling and timing the fusions of {name}")
            with self._recording():
                fused = self._scheduler.analyze(recording.graph)
            memory = [*inputs, *recording.graph.captured.values()]
            for _ in range(2):  # watched, then planned or captured
                with recording.graph.undone(memory):
                    fused(*inputs)
            self.phases[key] = Phase(name, fused)
        except CaptureError as error:
            self._given_up(key, name, error)
            filled, held = 0, []  # it may have stopped half-way
        self.truncate(filled, held)

    def _given_up(self, key: Key, name: str, error: CaptureError) -> None:
        log.warning("%s runs as it is, uncaptured: %s", name, error)
        self.phases[key] = Phase(name, None, f"{type(error).__name__}: {error}")

    def _name(self, key: Key) -> str:
        name = key.what if key.what == "decode" else f"{key.what} of {key.size} tokens"
        name += f", batch {self.batch}" if self.batch > 1 else ""
        name += f", {key.kind}" if key.kind is not None else ""
        return name + (", padded" if key.padded else "")


def _asked(key: Key) -> str:
    """transformers asks, in Python, whether padding masks anything and whether a prompt is a beginning."""
    return "error" if key.what == "decode" else "guard"


def _shared(held: Sequence[int], row: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for ours, theirs in zip(held, row, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
