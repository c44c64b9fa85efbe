"""Prefill and decode steps of one model over fixed memory: captured, or run as they are."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from graph_capture.errors import CaptureError
from graph_capture.runtime.fuse import FusionScheduler
from graph_capture.runtime.llm.calling import Calling
from graph_capture.runtime.llm.given import ModelCall
from graph_capture.runtime.llm.lookup import ENOUGH, PAYS, WIDTH, Lookup
from graph_capture.runtime.llm.memory import SlotMemory, plainly
from graph_capture.runtime.llm.phases import OFTEN, Key, Phase, Progress, Step, Steps
from graph_capture.runtime.llm.sampling import Sampling, SamplingKind, check_rows, rectangle

PIECES = (256, 64, 16)  # tokens of the steps that a prompt of any length is put together from
SHORT = 4  # tokens of an answer that is not to be followed by recording, which takes longer


class Session(SlotMemory):
    """Memory for `batch` sequences, and the captured steps that fill it.

    A step is a function without arguments but the prompt: tokens, positions and what sampling needs lie in memory of
    the session. It can replay, or run as it is, at any time. A prompt whose length was not met before runs as it is,
    at the model's own speed, or in pieces that are captured, where that is faster; `settle` records what it would have
    replayed.

    Args:
        calling: a language model of transformers, in evaluation mode.
        scheduler: analyses what is recorded.
        capacity: slots.
        progress: is told what takes long.
        recording: is entered while something is recorded and analysed: weights may get other addresses.
        encoded: places for what an encoder gives, where the model has one.

    Attributes:
        steps: what was captured, and what is to be.
        eager_first: whether a prefill runs as it is before it is recorded.
        in_pieces: whether a prompt may be read piece by piece: the proof says so.
        lookup: guesses of the next tokens, and whether they pay.
        kept: memory of tensors that the model replaces at each call, by module and name.

    Raises:
        CaptureError: see `SlotMemory`.
    """

    def __init__(
        self,
        calling: Calling,
        scheduler: FusionScheduler,
        batch: int,
        capacity: int,
        progress: Progress | None = None,
        recording: Callable[[], AbstractContextManager[None]] = nullcontext,
        encoded: int = 0,
    ) -> None:
        super().__init__(calling, batch, capacity, encoded)
        self.eager_first, self.in_pieces = True, False
        self.steps = Steps(scheduler, batch, progress or (lambda _: None), recording)
        self.lookup = Lookup()
        self.kept: dict[tuple[str, str], torch.Tensor] = {}
        self._met: Counter[Key] = Counter()  # lengths of prompts
        self._met_pieces: dict[Key, set[int]] = {}  # lengths that they were wanted for
        self._own_seconds: dict[int, float] = {}  # of prompts that ran as they are, by length
        self._encoding: dict[str, Any] = {}  # what an encoder gave, as later steps are passed it

    @property
    def phases(self) -> dict[Key, Phase]:
        """What was captured, and what could not be."""
        return self.steps.phases

    @plainly
    def prepare(
        self, samplings: Sequence[Sampling], seeds: Sequence[int | None], rows: Sequence[Sequence[int]], told: int
    ) -> SamplingKind:
        """Say how tokens are chosen from here on; see `Sampler.prepare`."""
        return self.sampler.prepare(samplings, seeds, rectangle(rows), told)

    @plainly
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
        self._pad([longest - len(row) for row in rows])
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

    @plainly
    def decode(self, kind: SamplingKind | None) -> torch.Tensor:
        """One step with `tokens`; returns as `prefill` does.

        Raises:
            CaptureError: all slots are filled.
        """
        self._check_room()
        result = self.steps.run(Key("decode", 1, kind, self._padded), self._next)
        self.filled += 1
        return result

    @plainly
    def check(self, guess: Sequence[int], kind: SamplingKind) -> list[int]:
        """The most likely tokens after the last one, of one sequence: as many as `guess` has right, and one more.

        A token that is ahead of others by no more than rounding comes from an ordinary step.
        """
        key, ids = self._guessed(guess)
        chosen, clear = self.steps.run(key, self._check, ids).tolist()
        count = 0
        while count <= len(guess) and clear[count] and (count == 0 or guess[count - 1] == chosen[count - 1]):
            count += 1
        if count == 0:
            return self.decode(kind).tolist()
        self.filled += count
        self.slots.position.fill_(self.filled)
        self.tokens.fill_(chosen[count - 1])
        return chosen[:count]

    @plainly
    def given_prompt(self, call: ModelCall) -> Any:
        """Start with a prompt that the model reads as it is, with all that it is passed; its own output.

        Raises:
            CaptureError: it does not fit.
        """
        length = call.ids.shape[1]
        if length >= self.capacity:
            raise CaptureError(f"the prompt has {length} tokens, and the cache {self.capacity} slots")
        self._pad(call.padding)
        self.truncate(0)
        self.cache.begin(length, True)
        output = self.model(**{**call.arguments, self.calling.cache_name: self.cache})
        self._encoding = call.padded_encoding(self.cache.size) if call.encoded() else {}
        self.filled = length
        self.slots.position.fill_(length)
        return output

    @plainly
    def given_token(self, call: ModelCall, proving: bool = False) -> torch.Tensor:
        """The logits after one token more a row, [B, V], with all that the model is passed.

        Args:
            proving: run the step as it is, and have it recorded later.

        Raises:
            CaptureError: all slots are filled, or something that is passed cannot be compared.
        """
        self._check_room()
        form: tuple[Any, ...] = ()
        step: Step = self._next
        inputs: list[torch.Tensor] = []
        if call.usual:
            self.tokens.copy_(call.ids)
        else:
            form, together, inputs = call.step(self._encoding)
            step = functools.partial(self._next_given, together)
        key = Key("decode", 1, None, self._padded, form)
        if proving:
            self.steps.want(key, step, inputs, self.filled, OFTEN)
            result = step(*inputs, kind=None)
        else:
            result = self.steps.run(key, step, *inputs)
        self.filled += 1
        return result

    @plainly
    def settle(self, short: bool = False) -> None:
        """Record what has run as it is because nobody was to wait for it; the slots stay what they are.

        Args:
            short: after so short an answer that recording would take far longer: only what is wanted again and again.
        """
        wanted = self.steps.wanted
        for key, what in list(wanted.items()):
            if (short and what.uses < OFTEN) or key.padded != self._padded:
                continue
            del wanted[key]
            if not self.steps.fusing or key in self.phases:
                continue
            filled, held = self.filled, self.held
            most = self.capacity - key.size
            if not self.steps.record_apart(key, what, lambda at: self.slots.position.fill_(min(at, most))):  # noqa: B023
                filled, held = 0, []
            self.truncate(filled, held)

    @plainly
    def learn_lookup(self, prompt: Sequence[int], answer: Sequence[int], kind: SamplingKind) -> None:
        """See in an answer whether prompt lookup would have paid, and have its step recorded and timed if so."""
        lookup, decode = self.lookup, Key("decode", 1, kind, self._padded)
        able = self.in_pieces and self.calling.goes_back and self.batch == 1 and self.steps.fusing
        if lookup.pays or not able or len(answer) < ENOUGH:
            return
        lookup.gain = lookup.look_back(prompt, answer)
        if lookup.gain < PAYS or self.filled + WIDTH > self.capacity or self.steps.captured(decode) is None:
            return
        key, ids = self._guessed(())
        if key not in self.phases:
            self.steps.want(key, self._check, (ids,), self.filled, OFTEN)
            self.settle(short=True)
        if self.steps.captured(key) is not None:
            lookup.timed(self.steps.seconds(decode), self.steps.seconds(key, (ids,)))

    # --- prompts

    def _check_room(self) -> None:
        if self.filled >= self.capacity:
            raise CaptureError(f"all {self.capacity} slots of the cache are filled: take a larger max_length")

    def _guessed(self, guess: Sequence[int]) -> tuple[Key, torch.Tensor]:
        """The step that checks a guess, and its input: the last token and the guess, [1, `WIDTH`] int64."""
        ids = torch.zeros(1, WIDTH, dtype=torch.int64)
        ids[0, 1 : 1 + len(guess)] = torch.tensor(guess)
        ids = ids.to(self._device)
        ids[:, :1] = self.tokens
        return Key("check", WIDTH, None, self._padded), ids

    def _prompt(self, rows: Sequence[Sequence[int]], kept: int, new: int) -> torch.Tensor:
        """The logits after the prompts, of which `kept` tokens are there; captured where this length was met before."""
        step = self._extend if kept else self._begin
        size = self._size(kept, new)
        key = Key("continue" if kept else "prefill", size, None, self._padded)
        if not self.steps.fusing or self.cache.stateful or self.steps.given_up(key):
            return step(*self._inputs(rows, kept, new, new), kind=None)
        inputs = self._inputs(rows, kept, new, size)
        if key in self.phases or not self.eager_first:
            return self.steps.run(key, step, *inputs)
        self._met[key] += 1
        pieces = self._pieces(kept, new)
        if self._met[key] < OFTEN and len(self._met) > 1 and pieces:  # lengths vary: pieces serve them all
            self._each(pieces, rows, kept, new, functools.partial(self._want_piece, size))
        else:
            self.steps.want(key, step, inputs, kept, self._met[key])
        if pieces and self._is_faster(pieces, new):
            return self._each(pieces, rows, kept, new, self.steps.run)
        start = time.perf_counter()
        logits = step(*self._inputs(rows, kept, new, new), kind=None)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        seconds = time.perf_counter() - start
        self._own_seconds[new] = min(seconds, self._own_seconds.get(new, seconds))
        return logits

    def _pieces(self, kept: int, new: int) -> list[Key]:
        """Steps that read `new` tokens together, the last one padded; none where they do not fit."""
        pieces: list[Key] = []
        at = 0
        while at < new:
            size = next((size for size in PIECES if 3 * size <= 4 * (new - at)), PIECES[-1])
            pieces.append(Key("continue" if kept + at else "prefill", size, None, self._padded))
            at += size
        return pieces if self.in_pieces and kept + at <= self.capacity else []

    def _each(
        self,
        pieces: Sequence[Key],
        rows: Sequence[Sequence[int]],
        kept: int,
        new: int,
        run: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        keys = iter(pieces)
        sizes = [key.size for key in pieces]
        return self._piecewise(rows, kept, new, sizes, lambda step, *inputs: run(next(keys), step, *inputs))

    def _want_piece(self, size: int, key: Key, step: Step, ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        if key not in self.phases:
            lengths = self._met_pieces.setdefault(key, set())
            lengths.add(size)
            self.steps.want(key, step, (ids, last), PIECES[-1], len(lengths))
        return ids

    def _is_faster(self, pieces: Sequence[Key], new: int) -> bool:
        """Whether captured pieces read `new` tokens sooner than the model does as it is, by what was measured."""
        phases = [self.steps.captured(key) for key in pieces]
        own = [seconds * max(1.0, new / length) for length, seconds in self._own_seconds.items()]
        return all(phases) and (not own or sum(phase.seconds for phase in phases if phase) <= min(own))


def _shared(held: Sequence[int], row: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for ours, theirs in zip(held, row, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
