"""The memory of a session, and its steps as plain functions of it: what is recorded, and what runs where nothing is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from graph_capture.errors import CaptureError
from graph_capture.runtime.llm.calling import Calling
from graph_capture.runtime.llm.sampling import Sampler, SamplingKind

SHORTEST = 16  # tokens of the smallest bucket
CLEAR = 4  # roundings of the largest logit by which a token is ahead of any other, however its sums were added
_F = TypeVar("_F", bound=Callable[..., Any])


class OutOfSlots(CaptureError):
    """There is no memory for the cache."""


def bucket(length: int) -> int:
    """What a prompt is padded to: 16, 24, 32, 48, 64, ..., so that few recordings serve all lengths."""
    size = SHORTEST
    while size < length:
        size *= 2
    between = size // 4 * 3
    return between if length <= between and size > SHORTEST else size


def plainly(method: _F) -> _F:
    """A session's memory is made and written under neither grad nor inference mode, whatever its caller is under."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return call  # type: ignore[return-value]


class SlotMemory:
    """Slots for `batch` sequences, the tokens that go in next, and what sampling reads.

    Attributes:
        filled: slots filled; also on the device, as `slots.position`.
        held: the tokens in them, where there is one sequence.

    Raises:
        CaptureError: the architecture is not supported, or memory does not suffice.
    """

    @plainly
    def __init__(self, calling: Calling, batch: int, capacity: int, encoded: int = 0) -> None:
        from graph_capture.runtime.llm.cache import PairCache, slot_cache

        self.calling, self.model, self.batch, self.capacity = calling, calling.model, batch, capacity
        self.filled = 0
        self.held: list[int] = []
        self._device = device = self.model.device
        self._padded = False
        try:
            self.cache: Any
            if encoded:
                self.cache = PairCache(capacity, encoded, device)
            else:
                self.cache = slot_cache(self.model.config, capacity, device)
            self.slots = self.cache.slots
            self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self._offset = torch.zeros(batch, dtype=torch.int64, device=device)
            self.vocabulary = calling.vocabulary
            if not encoded:  # makes the cache, and what the model makes at its first call
                self.vocabulary = self._forward(self.tokens, True, 1).shape[-1]
            self.sampler = Sampler(batch, capacity, self.vocabulary, device)
        except RuntimeError as error:  # on the CPU it has no class of its own
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise OutOfSlots(
                f"{capacity} slots for {batch} sequences do not fit into memory: take a smaller max_length"
            ) from error

    @plainly
    def truncate(self, filled: int, held: Sequence[int] = ()) -> None:
        """Forget all but the first `filled` slots, which hold these tokens."""
        self.filled, self.held = filled, list(held[:filled])
        self.slots.position.fill_(filled)

    @plainly
    def prove_prompt(self, rows: Sequence[Sequence[int]], pieces: Sequence[int] = ()) -> torch.Tensor:
        """The logits after these prompts, as a recorded prefill would compute them, but as it is; [B, V].

        Args:
            pieces: lengths of the steps that read them, where that is not one.
        """
        longest = max(map(len, rows))
        self._pad([longest - len(row) for row in rows])
        self.truncate(0)
        if pieces:
            logits = self._piecewise(rows, 0, longest, pieces, lambda step, ids, last: step(ids, last, kind=None))
        else:
            size = longest if self.cache.stateful else self._size(0, longest)
            logits = self._begin(*self._inputs(rows, 0, longest, size), kind=None)
        self.filled = longest
        return logits.clone()

    @plainly
    def prove_return(self, filled: int, more: Sequence[int]) -> torch.Tensor:
        """The logits after `more` tokens behind the first `filled` slots, [1, V]; what the others held is forgotten."""
        self.truncate(filled)
        logits = self._extend(*self._inputs([[0] * filled + [*more]], filled, len(more), len(more)), kind=None)
        self.filled += len(more)
        return logits.clone()

    @plainly
    def prove_token(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits after one token more a row, [B, V], from a decode step as it is."""
        self.tokens.copy_(tokens[:, None])
        self.filled += 1
        return self._next(kind=None).clone()

    # --- what goes in

    def _pad(self, padding: Sequence[int]) -> None:
        self._padded = any(padding)
        self._offset.copy_(torch.tensor(padding))

    def _size(self, kept: int, new: int) -> int:
        return bucket(new) if kept + bucket(new) <= self.capacity else new

    def _inputs(
        self, rows: Sequence[Sequence[int]], kept: int, new: int, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, [B, size] int64, those beyond the first `new` 0; the place of the last one, [1] int64."""
        ids = torch.zeros(self.batch, size, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, new - len(row) + kept : new] = torch.tensor(row[kept:])
        return ids.to(self._device), torch.tensor([new - 1], device=self._device)

    def _piecewise(
        self,
        rows: Sequence[Sequence[int]],
        kept: int,
        new: int,
        pieces: Sequence[int],
        run: Callable[[Callable[..., torch.Tensor], torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The logits after prompts that are read in steps of these lengths, which `run` runs."""
        ids, _ = self._inputs(rows, kept, new, sum(pieces))
        at = 0
        logits = ids
        for size in pieces:
            last = torch.tensor([min(size, new - at) - 1], device=self._device)
            logits = run(self._extend if kept + at else self._begin, ids[:, at : at + size].contiguous(), last)
            at += size
        return logits

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

    def _next_given(
        self, together: Callable[[tuple[torch.Tensor, ...]], dict[str, Any]], *inputs: torch.Tensor, kind: None
    ) -> torch.Tensor:
        self.cache.begin(1, False)
        names = self.calling
        more = {names.ids_name: inputs[0], names.cache_name: self.cache, "use_cache": True, **together(inputs[1:])}
        if self._padded:
            more[names.mask_name] = torch.arange(self.capacity, device=self._device) >= self._offset[:, None]
        logits = self.model(**more).logits[:, -1]
        self.slots.position.copy_(self.slots.position + 1)
        return logits

    def _check(self, ids: torch.Tensor, *, kind: SamplingKind | None) -> torch.Tensor:
        """The most likely tokens after each of `ids`, [1, L], and whether they are so beyond rounding; [2, L] int64."""
        logits = self._forward(ids, False, 0)[0].float()
        best = logits.topk(2, dim=-1)
        rounding = CLEAR * torch.finfo(self.model.dtype).eps * logits.abs().amax(-1)
        clear = best.values[:, 0] - best.values[:, 1] > rounding
        return torch.stack((best.indices[:, 0], clear.long()))

    def _forward(self, ids: torch.Tensor, fresh: bool, keep: int | torch.Tensor) -> torch.Tensor:
        """The logits of one token a row, [B, V]; of all, [B, L, V], where `keep` is 0."""
        length = ids.shape[1]
        self.cache.begin(length, fresh)
        if not self._padded and (fresh or not self.calling.asks_for_mask):
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
