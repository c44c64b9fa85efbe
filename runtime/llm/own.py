"""A model that our steps do not serve answers through transformers' own ``generate``, token by token."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Sequence
from typing import Any

import torch

from graph_capture.errors import CaptureError
from graph_capture.runtime.llm.sampling import Sampler, Sampling, SamplingKind, check_rows, rectangle

_ENDED = object()


class _Left(Exception):
    """Nobody wants the rest of an answer."""


class OwnSession:
    """Answers of a model as it is: what `Session` does, where nothing is captured.

    ``generate`` runs in a thread of its own and waits, after each step, for the token that was chosen here.

    Args:
        model: has a ``generate``.
        capacity: tokens of prompt and answer together.
        reason: why its steps are not captured.
    """

    def __init__(self, model: Any, batch: int, capacity: int, reason: str) -> None:
        self.model, self.batch, self.capacity, self.reason = model, batch, capacity, reason
        self.filled = 0
        self.sampler: Sampler | None = None
        self._asked: tuple[Any, ...] = ()
        self._device = model.device
        self._logits: queue.Queue[Any] = queue.Queue()
        self._chosen: queue.Queue[Any] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._step = 0
        self._held: torch.Tensor | None = None  # tokens that `generate` is still to get

    def prepare(
        self, samplings: Sequence[Sampling], seeds: Sequence[int | None], rows: Sequence[Sequence[int]], told: int
    ) -> SamplingKind:
        """As `Session.prepare`."""
        self._asked = (samplings, seeds, rectangle(rows), told)
        return SamplingKind.of(samplings, told)

    def prefill(self, rows: Sequence[Sequence[int]], kind: SamplingKind) -> torch.Tensor:
        """As `Session.prefill`."""
        self.truncate(0)
        longest = max(map(len, rows))
        check_rows(rows, self.capacity)
        ids = torch.tensor([[0] * (longest - len(row)) + [*row] for row in rows], device=self._device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self._device)
        self._logits, self._chosen, self._step = queue.Queue(), queue.Queue(), 0
        work = functools.partial(self._generate, ids, mask, self._logits, self._chosen)
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        self.filled = longest
        logits = self._next_logits()
        if self.sampler is None or self.sampler.vocabulary != logits.shape[1]:
            self.sampler = Sampler(self.batch, self.capacity, logits.shape[1], logits.device)
        self.sampler.prepare(*self._asked)
        return self._choose(logits, kind)

    def decode(self, kind: SamplingKind) -> torch.Tensor:
        """As `Session.decode`."""
        self.filled += 1
        self._chosen.put(self._held)  # not before: what follows the last token of an answer is not computed
        return self._choose(self._next_logits(), kind)

    def truncate(self, filled: int, held: Sequence[int] = ()) -> None:
        """End the answer under way."""
        if self._thread is not None:
            self._chosen.put(_ENDED)
            self._thread.join()
            self._thread = None
        self.filled = 0

    def settle(self, short: bool = False) -> None:
        """There is nothing to record."""

    def _choose(self, logits: torch.Tensor, kind: SamplingKind) -> torch.Tensor:
        assert self.sampler is not None
        with torch.no_grad():
            chosen = self.sampler.choose(kind, logits, torch.tensor(self._step, device=logits.device))
        self._step += 1
        self._held = chosen
        return chosen

    def _next_logits(self) -> torch.Tensor:
        logits = self._logits.get()
        if isinstance(logits, BaseException):
            self._thread = None
            raise logits
        return logits

    def _generate(
        self, ids: torch.Tensor, mask: torch.Tensor, logits: queue.Queue[Any], chosen: queue.Queue[Any]
    ) -> None:
        from transformers import GenerationConfig

        kept = self.model.generation_config
        # Nothing but these says how tokens are chosen, and when an answer ends.
        config = GenerationConfig(max_length=self.capacity + 1, do_sample=False, pad_token_id=0)

        def hand(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """The scores go out, the chosen tokens come in."""
            self.model.generation_config = kept  # it has been read
            logits.put(scores.clone())
            tokens = chosen.get()
            if tokens is _ENDED:
                raise _Left
            return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

        try:
            self.model.generation_config = GenerationConfig()
            self.model.generate(ids, generation_config=config, attention_mask=mask, logits_processor=[hand])
            logits.put(CaptureError(f"the model's own generate() has ended before {self.capacity} tokens"))
        except _Left:
            pass
        except BaseException as error:
            logits.put(error)
        finally:
            self.model.generation_config = kept
