"""The inference engine: a model and its tokenizer, answers, and what became of every captured step."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, overload

import torch

from graph_capture.errors import CaptureError
from graph_capture.runtime.capture.capture import Captured, capture
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.fuse import FusionScheduler
from graph_capture.runtime.llm.agreement import Agreement, agreement
from graph_capture.runtime.llm.models import load_model, load_tokenizer
from graph_capture.runtime.llm.prompts import Messages, Prompt, Prompts, Request
from graph_capture.runtime.llm.session import Pending, Progress, Session, bucket
from graph_capture.runtime.llm.text import Detokenizer

SLOTS = 2048  # of a cache, where neither the model nor the caller asks for fewer
SESSIONS = 2  # batch sizes whose caches are kept


@dataclass
class Completion:
    """One answer.

    Attributes:
        text: the answer; empty without a tokenizer.
        tokens: the tokens of the answer, without the one that ended it.
        prompt_tokens: how many tokens the prompt has.
        finish_reason: "stop": an end token or a stop string; "length": `max_new_tokens`, or the cache is full.
        time_to_first_token: seconds.
        seconds: all of it.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: str = "length"
    time_to_first_token: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, the first token apart; 0 where there was only one."""
        rest = self.seconds - self.time_to_first_token
        return (len(self.tokens) - 1) / rest if len(self.tokens) > 1 and rest > 0 else 0.0


class InferEnginePython:
    """A causal language model of transformers that answers prompts, its steps captured and fused.

    Prefill and decode are captured apart at their first use: a decode step for each batch size, sampling included; a
    prefill for each bucket of lengths. A step that cannot be captured runs as it is, and `explain` says why. An engine
    answers one call at a time.

    Args:
        model_path: a folder of safetensors, a name of `runtime.llm.models.CONFIGURATIONS` (random weights), a name
            on the hub; or a model that is there already.
        device: of the model (default: CUDA where there is one).
        enable_fusion: False runs the model as it is; so does ``"enable_fusion": false`` in the model's config. Can be
            changed at any time, as an attribute.
        dtype: of the weights (default: as they are stored).
        max_length: slots of the cache, for prompt and answer together (default: what the model was made for, at most
            2048).
        config: how steps are fused (default: a kernel is kept where it saves 5 % of its region; a step that is replayed
            for every token is worth it).
        progress: is told, in words, what takes long.

    Attributes:
        model, tokenizer: transformers' own; no tokenizer where the model has none.
        prompts: makes tokens of what callers pass.
        capacity: slots of the cache.
        last: the latest answer.

    Raises:
        CaptureError: there is no such model, its architecture is not supported, or it does not fit into memory.
    """

    def __init__(
        self,
        model_path: Any,
        device: str | torch.device | None = None,
        enable_fusion: bool = True,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
        config: FusionConfig | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress or (lambda _: None)
        self.model: Any
        self.tokenizer: Any = None
        if isinstance(model_path, torch.nn.Module):
            self.model = model_path.eval()
        else:
            self._progress(f"loading {model_path}")
            where = device or ("cuda" if torch.cuda.is_available() else "cpu")
            self.model = load_model(str(model_path), dtype=dtype, device=str(where))
            self.tokenizer = load_tokenizer(str(model_path))
        made_for = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None) or SLOTS
        self.capacity = min(max_length or SLOTS, made_for)
        if self.capacity < 2:
            raise CaptureError(f"max_length must be at least 2, got {max_length}")
        self.enable_fusion = enable_fusion and bool(getattr(self.model.config, "enable_fusion", True))
        self.last: Completion | None = None
        self._scheduler = FusionScheduler(config or FusionConfig(fusion_ratio=0.95))
        self._sessions: OrderedDict[int, Session] = OrderedDict()
        self._captured: Captured | None = None
        self._lock = threading.Lock()
        self._owner: int | None = None
        self.prompts = Prompts(self.tokenizer, self.model.get_input_embeddings().weight.shape[0])
        self._ends = self._end_tokens()

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The logits of a whole sequence, [B, L, V], captured for each signature; keeps no cache.

        Args:
            input_ids: [B, L] int64.
            kwargs: what the model's own ``forward`` takes.
        """
        kwargs.setdefault("use_cache", False)
        input_ids = input_ids.to(self.model.device)
        if not self.enable_fusion:
            with torch.no_grad():
                return self.model(input_ids=input_ids, **kwargs).logits
        if self._captured is None:
            self._captured = capture(self.model, self._scheduler.config)
        return self._captured(input_ids=input_ids, **kwargs).logits

    @overload
    def generate(self, prompts: str | Sequence[int], **options: Any) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]] | torch.Tensor, **options: Any
    ) -> list[Completion]: ...

    def generate(self, prompts: Any, **options: Any) -> Any:
        """Answer a prompt, or several at once.

        Args:
            prompts: text or tokens; a list of them, or tokens [B, L], for a batch, whose prompts may differ in length.
            options: see `stream`.

        Returns:
            A `Completion` for one prompt; a list of them for a batch.

        Raises:
            CaptureError: see `stream`.
        """
        rows, batched = self.prompts.rows(prompts)
        request = self.prompts.request(rows, **options)
        found = [Completion(prompt_tokens=len(row)) for row in rows]
        for _ in self._answer(request, found):
            pass
        return found if batched else found[0]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Answer one prompt piece by piece; afterwards `last` is the whole answer.

        Args:
            prompt: text, tokens, or messages (``{"role": ..., "content": ...}``) for the tokenizer's chat template.
            max_new_tokens: of the answer (default: 128).
            temperature, top_k, top_p, repetition_penalty: see `Sampling`. By default the most likely token is taken.
            stop: strings that end the answer; they are not part of it.
            seed: the same seed gives the same tokens; None is another one each time.

        Raises:
            CaptureError: the prompt is empty or longer than the cache, an option is out of its range, there is no
                tokenizer or no chat template, or this thread has a stream under way.
        """
        rows, _ = self.prompts.rows(prompt)
        if len(rows) != 1:
            raise CaptureError("stream() answers one prompt; generate() takes several")
        request = self.prompts.request(rows, **options)
        return (piece for pieces in self._answer(request, [Completion(prompt_tokens=len(rows[0]))]) for piece in pieces)

    def chat(self, messages: Messages, **options: Any) -> Completion:
        """Answer a conversation, by the tokenizer's chat template; options as in `stream`."""
        return self.generate(self.encode_messages(messages), **options)

    def encode_messages(self, messages: Messages) -> list[int]:
        """The tokens of a conversation, up to where the answer begins; see `Prompts.templated`."""
        return self.prompts.templated(messages)

    def warm_up(self, lengths: Sequence[int] = (1,), batch: int = 1, **options: Any) -> None:
        """Capture before the first prompt comes.

        Args:
            lengths: of prompts, in tokens; each stands for its bucket.
            batch: sequences at once.
            options: how answers will be chosen, as in `stream`.
        """
        for length in sorted({bucket(length) for length in lengths}):
            rows = [[0] * max(1, min(length, self.capacity - 4))] * batch
            for _ in range(3):  # recorded, watched, captured
                if batch in self._sessions:
                    self._sessions[batch].truncate(0)
                self.generate(rows, **{**options, "max_new_tokens": 4})

    def explain(self) -> str:
        """What became of every captured step: the receipts, and what runs as it is and why."""
        parts = []
        for session in self._sessions.values():
            for phase in session.phases.values():
                what = f"runs as it is: {phase.reason}" if phase.fused is None else str(phase.fused.explain())
                parts.append(f"{phase.name} ({phase.replays} replays)\n{what}")
        return "\n\n".join(parts) or "nothing has been captured yet"

    def stats(self) -> dict[str, Any]:
        """The latest answer, the cache, and the steps, for programs."""
        phases = [phase for session in self._sessions.values() for phase in session.phases.values()]
        last = self.last
        return {
            "enable_fusion": self.enable_fusion,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "capacity": self.capacity,
            "filled": {batch: session.filled for batch, session in self._sessions.items()},
            "captured": {phase.name: phase.replays for phase in phases if phase.fused is not None},
            "eager": {phase.name: phase.reason for phase in phases if phase.fused is None},
            "time_to_first_token": last.time_to_first_token if last else None,
            "tokens_per_second": last.tokens_per_second if last else None,
        }

    def agreement(self, prompt: str | Sequence[int], max_new_tokens: int = 64) -> Agreement:
        """Whether greedy answers with fusion on and off are the same, and if not, by how little they part."""
        return agreement(self, self.prompts.rows(prompt)[0][0], max_new_tokens)

    def session(self, batch: int) -> Session:
        """The cache and the captured steps for so many sequences; made at the first use, the latest two are kept."""
        session = self._sessions.get(batch)
        if session is None:
            while len(self._sessions) >= SESSIONS:
                self._sessions.popitem(last=False)
            self._progress(f"making a cache of {self.capacity} slots for {batch} sequences")
            session = Session(self.model, self._scheduler, batch, self.capacity, self._progress)
            self._sessions[batch] = session
        self._sessions.move_to_end(batch)
        session.fusing = self.enable_fusion
        return session

    # --- answers

    def _answer(self, request: Request, found: list[Completion]) -> Iterator[list[str]]:
        """Fill `found`, yielding the pieces of text that each step adds."""
        start = time.perf_counter()
        texts = [Detokenizer(self.tokenizer, request.stop) if self.tokenizer else None for _ in found]
        open_rows = set(range(len(found)))
        with self.alone():
            for tokens in self._steps(request):
                now = time.perf_counter() - start
                pieces = []
                for row in sorted(open_rows):
                    answer, text, token = found[row], texts[row], tokens[row]
                    answer.time_to_first_token = answer.time_to_first_token or now
                    answer.seconds = now
                    if token in self._ends:
                        answer.finish_reason = "stop"
                        open_rows.remove(row)
                        continue
                    answer.tokens.append(token)
                    pieces.append(text.add(token) if text else "")
                    if text and text.stopped:
                        answer.finish_reason = "stop"
                    if answer.finish_reason == "stop" or len(answer.tokens) == request.limit:
                        open_rows.remove(row)
                yield pieces
                if not open_rows:
                    break
            rest = [text.finish() if text else "" for text in texts]
            for answer, text in zip(found, texts, strict=True):
                answer.text = text.text if text else ""
            self.last = found[-1]
        yield rest

    def _steps(self, request: Request) -> Iterator[list[int]]:
        """The next token of every row, step by step, until the cache is full. On a GPU a step is under way while the
        tokens of the one before are looked at."""
        session = self.session(len(request.rows))
        kind = request.sampling.kind
        session.sampler.prepare(request.sampling, request.seed, _rectangle(request.rows))
        held = list(request.rows[0])
        ahead = self.model.device.type == "cuda"
        try:
            waiting = Pending(session.prefill(request.rows, kind))
            while True:
                more = session.filled < session.capacity
                following = Pending(session.decode(kind)) if ahead and more else None
                tokens = waiting.tolist()
                yield tokens
                held.append(tokens[0])
                if not more:
                    return
                waiting = Pending(session.decode(kind)) if following is None else following
        finally:
            session.truncate(min(session.filled, len(held)), held if len(request.rows) == 1 else ())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other threads' calls waiting.

        Raises:
            CaptureError: this thread has a stream under way.
        """
        if self._owner == threading.get_ident():
            raise CaptureError("this thread has a stream under way: read it to its end, or close() it")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def _end_tokens(self) -> frozenset[int]:
        found: set[int] = set()
        for owner in (getattr(self.model, "generation_config", None), self.model.config, self.tokenizer):
            ends = getattr(owner, "eos_token_id", None)
            found |= {ends} if isinstance(ends, int) else set(ends or ())
        return frozenset(found)


InferEngine = InferEnginePython


def _rectangle(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """[B, L] int64; short rows repeat their last token, which says nothing new about what was there."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (longest - len(row))] if row else [0] * longest for row in rows])
