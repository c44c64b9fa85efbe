"""Prefill and decode steps of one model over fixed memory: captured, or run as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graph_capture.errors import CaptureError, DataDependentError, SignatureMismatchError
from graph_capture.log import log
from graph_capture.record.recorder import record
from graph_capture.runtime.fuse import FusionScheduler
from graph_capture.runtime.fused import FusedGraph
from graph_capture.runtime.llm.sampling import Sampler, SamplingKind

Progress = Callable[[str], None]
SHORTEST = 16  # tokens of the smallest bucket


def bucket(length: int) -> int:
    """What a prompt is padded to: 16, 24, 32, 48, 64, ..., so that few recordings serve all lengths."""
    size = SHORTEST
    while size < length:
        size *= 2
    between = size // 4 * 3
    return between if length <= between and size > SHORTEST else size


class Pending:
    """A small tensor on its way to the host: what is launched after it is not waited for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def tolist(self) -> list[int]:
        """Its values."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()


@dataclass
class Phase:
    """One captured step.

    Attributes:
        name: what it is.
        fused: its replay; None where it cannot be captured.
        reason: why it cannot.
        replays: how often it was replayed.
    """

    name: str
    fused: FusedGraph | None
    reason: str = ""
    replays: int = 0


class Session:
    """Slots for `batch` sequences, and the steps that fill them.

    A step is a function without arguments but the prompt: tokens, positions and what sampling needs lie in memory of
    the session. It can replay, or run as it is, at any time.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        scheduler: analyses what is recorded.
        capacity: slots.
        progress: is told what takes long.

    Attributes:
        filled: slots filled; also on the device, as `slots.position`.
        held: the tokens in them, where there is one sequence.
        phases: what was captured, and what could not be.
        fusing: False runs every step as it is.

    Raises:
        CaptureError: the architecture is not supported, or memory does not suffice.
    """

    def __init__(
        self, model: Any, scheduler: FusionScheduler, batch: int, capacity: int, progress: Progress | None = None
    ) -> None:
        from graph_capture.runtime.llm.cache import slot_cache

        self.model, self.batch, self.capacity = model, batch, capacity
        self.fusing = True
        self.filled = 0
        self.held: list[int] = []
        self.phases: dict[tuple[Any, ...], Phase] = {}
        self._scheduler = scheduler
        self._progress = progress or (lambda _: None)
        self._device = device = model.device
        vocabulary = model.get_output_embeddings().weight.shape[0]
        try:
            self.cache, self.slots = slot_cache(model.config, capacity, device)
            self.sampler = Sampler(batch, capacity, vocabulary, device)
            self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self._offset = torch.zeros(batch, dtype=torch.int64, device=device)
            self._padded = False
            with torch.no_grad():  # makes the cache, and whatever the model makes at its first call
                self._forward(self.tokens, False, 1)
        except RuntimeError as error:  # on the CPU it has no class of its own
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise CaptureError(
                f"{capacity} slots for {batch} sequences do not fit into memory: take a smaller max_length"
            ) from error

    def prefill(self, rows: Sequence[Sequence[int]], kind: SamplingKind | None) -> torch.Tensor:
        """Start with these prompts; what was there is forgotten, but for a beginning that one sequence shares.

        Returns:
            The next tokens, [B] int64; without a `kind` the logits for them, [B, V].

        Raises:
            CaptureError: a prompt is empty, or does not fit.
        """
        longest = max(map(len, rows))
        if not all(rows):
            raise CaptureError("a prompt is empty")
        if longest >= self.capacity:
            raise CaptureError(
                f"the prompt has {longest} tokens, and the cache {self.capacity} slots, one of them for an answer: "
                "shorten it, or take a larger max_length"
            )
        kept = _shared(self.held, rows[0]) if self.batch == 1 and not self._padded else 0
        kept = min(kept, longest - 1)
        if kept < longest - kept:  # attention over all slots costs more than it saves
            kept = 0
        self._padded = any(len(row) < longest for row in rows)
        if self._padded:
            self._offset.copy_(torch.tensor([longest - len(row) for row in rows]))
        self.truncate(kept)
        new = longest - kept
        if kept and new == 1:
            self.tokens.fill_(rows[0][-1])
            result = self.decode(kind)
            self.held = list(rows[0])
            return result
        size = bucket(new)
        if kept + size > self.capacity:
            size = new
        ids = torch.zeros(self.batch, size, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, new - len(row) + kept : new] = torch.tensor(row[kept:])
        last = torch.tensor([new - 1])
        name = "continue" if kept else "prefill"
        step = self._extend if kept else self._begin
        logits = self._run((name, size, None, self._padded), step, ids.to(self._device), last.to(self._device))
        self.filled = longest
        self.held = list(rows[0])
        with torch.no_grad():  # apart, so that one recording serves every kind of sampling
            return self._choose(logits, kind)

    def decode(self, kind: SamplingKind | None) -> torch.Tensor:
        """One step with `tokens`; returns as `prefill` does.

        Raises:
            CaptureError: all slots are filled.
        """
        if self.filled >= self.capacity:
            raise CaptureError(f"all {self.capacity} slots of the cache are filled: take a larger max_length")
        result = self._run(("decode", 1, kind, self._padded), self._next)
        self.filled += 1
        return result

    def truncate(self, filled: int, held: Sequence[int] = ()) -> None:
        """Forget all but the first `filled` slots, which hold these tokens."""
        self.filled, self.held = filled, list(held[:filled])
        self.slots.position.fill_(filled)

    # --- the steps

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
        self.slots.begin(length, fresh)
        more: dict[str, Any] = {}
        if self._padded:  # on the left
            slots = torch.arange(length if fresh else self.capacity, device=ids.device)
            more["position_ids"] = (self.slots.where - self._offset[:, None]).clamp(min=0)
            more["attention_mask"] = slots >= self._offset[:, None]
        result = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=keep, **more)
        return result.logits[:, -1]

    def _choose(self, logits: torch.Tensor, kind: SamplingKind | None) -> torch.Tensor:
        if kind is None:
            return logits
        chosen = self.sampler.choose(kind, logits, self.slots.position)
        self.tokens.copy_(chosen[:, None])
        return chosen

    # --- capture

    def _run(self, key: tuple[Any, ...], step: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        kind = key[2]
        phase = self.phases.get(key)
        if not self.fusing or (phase is not None and phase.fused is None):
            with torch.no_grad():
                return step(*inputs, kind=kind)
        if phase is not None and phase.fused is not None:
            try:
                result = phase.fused(*inputs)
            except (SignatureMismatchError, DataDependentError) as changed:  # a weight was replaced; nothing has run
                log.info("recording %s again: %s", phase.name, changed)
            else:
                phase.replays += 1
                return result
        return self._capture(key, step, inputs)

    def _capture(
        self, key: tuple[Any, ...], step: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        what, size, kind, padded = key
        name = what if what == "decode" else f"{what} of {size} tokens"
        name += f", batch {self.batch}" if self.batch > 1 else ""
        name += f", {kind}" if kind is not None else ""
        name += ", padded" if padded else ""
        self._progress(f"recording {name}")
        result = None
        # transformers asks, in Python, whether padding masks anything and whether a prompt is a beginning.
        asked = "error" if what == "decode" else "guard"
        try:
            with record(*inputs, data_dependent=asked) as recording:  # type: ignore[arg-type]
                result = step(*inputs, kind=kind)
                recording.output(result)
            self._progress(f"finding, compiling and timing the fusions of {name}")
            self.phases[key] = Phase(name, self._scheduler.analyze(recording.graph))
        except CaptureError as error:
            log.warning("%s runs as it is, uncaptured: %s", name, error)
            self.phases[key] = Phase(name, None, f"{type(error).__name__}: {error}")
            if result is None:  # it stopped half-way; it writes the slots again, and counts at its end
                with torch.no_grad():
                    result = step(*inputs, kind=kind)
        return result


def _shared(held: Sequence[int], row: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for ours, theirs in zip(held, row, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
