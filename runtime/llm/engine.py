"""The inference engine: a model and its tokenizer, answers, and what became of every captured step."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal, overload

import torch

from graph_capture.errors import CaptureError
from graph_capture.runtime.capture.capture import Captured, capture
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.llm.agreement import Agreement, agreement
from graph_capture.runtime.llm.calling import generating, slots_for, vocabulary_of
from graph_capture.runtime.llm.completion import Completion, TokenLogprobs
from graph_capture.runtime.llm.lookup import WIDTH
from graph_capture.runtime.llm.memory import bucket
from graph_capture.runtime.llm.models import load_model, load_tokenizer
from graph_capture.runtime.llm.own import OwnSession
from graph_capture.runtime.llm.packed import quantize as quantized
from graph_capture.runtime.llm.phases import Pending, Progress
from graph_capture.runtime.llm.prompts import Messages, Prompt, Prompts, Request, defaults_of
from graph_capture.runtime.llm.sampling import Sampling, SamplingKind
from graph_capture.runtime.llm.serving import ENGINE, Serving
from graph_capture.runtime.llm.session import Session
from graph_capture.runtime.llm.text import Detokenizer

GREEDY = Sampling().kind
_Told = tuple[list[int], tuple[list[Any], list[Any]] | None]  # tokens, and values and tokens of likelihoods


class InferEnginePython(Serving):
    """A causal language model of transformers that answers prompts, its steps captured and fused.

    Prefill and decode are captured apart: a decode step for each batch size at its first use, sampling included; a
    prefill for each bucket of lengths after the first answer to one. A step that cannot be captured runs as it is, a
    model over whose cache the steps do not give what it gives without one is left to transformers' own ``generate``,
    and `explain` says why. An engine answers one call at a time.

    Args:
        model_path: a folder of safetensors, a GGUF file (whose weights stay packed) or a folder with one, a name of
            `graph_capture.models.CONFIGURATIONS` (random weights), a name on the hub; or a model that is there already.
        device: of the model (default: CUDA where there is one).
        enable_fusion: False runs the model as it is; so does ``"enable_fusion": false`` in the model's config. Can be
            changed at any time, as an attribute.
        dtype: of the weights (default: as they are stored).
        max_length: slots of the cache, for prompt and answer together (default: what the model was made for, at most
            2048; "most": what it was made for and memory allows).
        config: how steps are fused (default: a kernel is kept where it saves 5 % of its region; a step that is replayed
            for every token is worth it).
        progress: is told, in words, what takes long.
        quantize: "int8" or "int4" rounds the weights first, in place, by groups of 64; see `graph_capture.quantize`.

    Attributes:
        model, tokenizer: transformers' own; no tokenizer where the model has none.
        prompts: makes tokens of what callers pass.
        capacity: slots of the cache.
        last: the latest answer.

    Raises:
        CaptureError: there is no such model, it is no causal language model, or it does not fit into memory.
    """

    def __init__(
        self,
        model_path: Any,
        device: str | torch.device | None = None,
        enable_fusion: bool = True,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | Literal["most"] | None = None,
        config: FusionConfig | None = None,
        progress: Progress | None = None,
        quantize: str | None = None,
    ) -> None:
        progress = progress or (lambda _: None)
        self.tokenizer: Any = None
        if isinstance(model_path, torch.nn.Module):
            model = model_path.eval()
        elif not isinstance(model_path, str) and not hasattr(model_path, "__fspath__"):
            raise CaptureError(f"a model is a folder, a name or a module, not a {type(model_path).__name__}")
        else:
            progress(f"loading {model_path}")
            where = device or ("cuda" if torch.cuda.is_available() else "cpu")
            model = load_model(str(model_path), dtype=dtype, device=str(where))
            self.tokenizer = load_tokenizer(str(model_path))
        if quantize is not None:
            progress(f"rounding the weights to {quantize}")
            quantized(model, quantize)
        target = generating(model)
        capacity = slots_for(target, max_length)
        super().__init__(model, target, capacity, config or ENGINE, progress)
        self.enable_fusion = enable_fusion and bool(getattr(target.config, "enable_fusion", True))
        self.last: Completion | None = None
        self._captured: Captured | None = None
        defaults = defaults_of(getattr(target, "generation_config", None))
        self.prompts = Prompts(self.tokenizer, vocabulary_of(target), defaults)
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
            self._captured = capture(self.model, self.scheduler.config)
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
            options: see `stream`; each may be a list with an entry for each prompt. A row's answer does not depend on
                the others. Also ``n``: so many answers to each prompt.

        Returns:
            A `Completion` for one prompt; a list of them for a batch. With an ``n`` above 1, a list in place of each.

        Raises:
            CaptureError: see `stream`.
        """
        rows, batched = self.prompts.rows(prompts)
        request = self.prompts.request(rows, **options)
        answers = [Completion(prompt_tokens=len(row)) for row in request.rows]
        for _ in self._answer(request, answers):
            pass
        if request.each > 1:
            grouped = [answers[at : at + request.each] for at in range(0, len(answers), request.each)]
            return grouped if batched else grouped[0]
        return answers if batched else answers[0]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Answer one prompt piece by piece; afterwards `last` is the whole answer.

        What an option is where it is not given, the model's ``generation_config.json`` says, or else: the most likely
        token is taken, without penalty, 128 times.

        Args:
            prompt: text, tokens, or messages (``{"role": ..., "content": ...}``) for the tokenizer's chat template.
            max_new_tokens: of the answer.
            temperature, top_k, top_p, min_p: see `Sampling`.
            repetition_penalty, presence_penalty, frequency_penalty, logit_bias: see `Sampling`.
            stop: strings that end the answer; they are not part of it.
            seed: the same seed gives the same tokens; None is another one each time.
            logprobs: keep the log-probability of each token, and of so many of the most likely ones.

        Raises:
            CaptureError: the prompt is empty or longer than the cache, an option is out of its range or of another
                type, there is no tokenizer or no chat template, or this thread has a stream under way.
        """
        rows, _ = self.prompts.rows(prompt)
        if len(rows) != 1:
            raise CaptureError("stream() answers one prompt; generate() takes several")
        request = self.prompts.request(rows, **options)
        if request.each > 1:
            raise CaptureError("stream() gives one answer; generate() takes n")
        return self._pieces(request, Completion(prompt_tokens=len(rows[0])))

    def _pieces(self, request: Request, answer: Completion) -> Iterator[str]:
        with closing(self._answer(request, [answer])) as steps:  # since Python 3.12 nobody else closes it at once
            for pieces in steps:
                yield from pieces

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
        self.eager_first = False
        try:
            for length in sorted({bucket(length) for length in lengths}):
                rows = [[0] * max(1, min(length, self.capacity - 4))] * batch
                for _ in range(3):  # recorded, watched, captured
                    self.forget_prompts()
                    self.generate(rows, **{**options, "max_new_tokens": 4})
        finally:
            self.eager_first = True

    def stats(self) -> dict[str, Any]:
        """The latest answer, the cache, and the steps, for programs."""
        last = self.last
        return super().stats() | {
            "time_to_first_token": last.time_to_first_token if last else None,
            "tokens_per_second": last.tokens_per_second if last else None,
        }

    def agreement(self, prompt: str | Sequence[int], max_new_tokens: int = 64) -> Agreement:
        """Whether greedy answers with fusion on and off are the same, and if not, by how little they part."""
        return agreement(self, self.prompts.rows(prompt)[0][0], max_new_tokens)

    # --- answers

    def _answer(self, request: Request, answers: list[Completion]) -> Generator[list[str], None, None]:
        """Fill `answers`, yielding the pieces of text that each step adds."""
        start = time.perf_counter()
        texts = [Detokenizer(self.tokenizer, stop) if self.tokenizer else None for stop in request.stops]
        open_rows = set(range(len(answers)))
        with self.alone():
            session = self.session_for(len(request.rows), len({*map(len, request.rows)}) > 1, request.total)
            kind = session.prepare(request.samplings, request.seeds, request.rows, request.told)
            guessing = kind == GREEDY and isinstance(session, Session) and session.lookup.pays
            steps = self._guessed(session, request.rows) if guessing else self._steps(session, request.rows, kind)  # type: ignore[arg-type]
            with closing(steps):
                for tokens, told in steps:
                    now = time.perf_counter() - start
                    pieces = []
                    for row in sorted(open_rows):
                        answer, text, token = answers[row], texts[row], tokens[row]
                        answer.time_to_first_token = answer.time_to_first_token or now
                        answer.seconds = now
                        if token in self._ends:
                            answer.finish_reason = "stop"
                            open_rows.remove(row)
                            continue
                        answer.tokens.append(token)
                        if told is not None:
                            answer.logprobs.append(_logprobs(told[0][row], told[1][row], request.told))
                        pieces.append(text.add(token) if text else "")
                        if text and text.stopped:
                            answer.finish_reason = "stop"
                        if answer.finish_reason == "stop" or len(answer.tokens) == request.limits[row]:
                            open_rows.remove(row)
                    yield pieces
                    if not open_rows:
                        break
            rest = [text.finish() if text else "" for text in texts]
            for answer, text in zip(answers, texts, strict=True):
                answer.text = text.text if text else ""
            self.last = answers[-1]
            yield rest
            self.settle(max(len(answer.tokens) for answer in answers))
            if kind == GREEDY and isinstance(session, Session):
                session.learn_lookup(request.rows[0], answers[0].tokens, kind)

    def _steps(
        self, session: Session | OwnSession, rows: list[list[int]], kind: SamplingKind
    ) -> Generator[_Told, None, None]:
        """The next token of every row, step by step, until the cache is full, and what was kept of likelihoods. On a
        GPU a step is under way while the tokens of the one before are looked at."""
        held = list(rows[0])
        ahead = self.model.device.type == "cuda" and isinstance(session, Session)

        def sent(tokens: torch.Tensor) -> tuple[Pending, ...]:
            sampler = session.sampler
            told = (sampler.told_values, sampler.told_tokens) if kind.told and sampler is not None else ()
            return tuple(map(Pending, (tokens, *told)))

        try:
            waiting = sent(session.prefill(rows, kind))
            while True:
                more = session.filled < session.capacity
                following = sent(session.decode(kind)) if ahead and more else None
                tokens, *told = [pending.tolist() for pending in waiting]
                yield tokens, (told[0], told[1]) if told else None
                held.append(tokens[0])
                if not more:
                    return
                waiting = sent(session.decode(kind)) if following is None else following
        finally:
            session.truncate(min(session.filled, len(held)), held if len(rows) == 1 else ())

    def _guessed(self, session: Session, rows: list[list[int]]) -> Generator[_Told, None, None]:
        """As `_steps`, of one row by its most likely tokens: several at once where they were guessed right."""
        held, lookup = list(rows[0]), session.lookup
        lookup.begin(held)
        try:
            tokens = session.prefill(rows, GREEDY).tolist()
            while True:
                for token in tokens:
                    yield [token], None
                    held.append(token)
                    lookup.add(token)
                if session.filled >= session.capacity:
                    return
                fits = session.filled + WIDTH <= session.capacity
                guess = lookup.guess() if fits and lookup.pays else []
                tokens = session.check(guess, GREEDY) if guess else session.decode(GREEDY).tolist()
                if guess:
                    lookup.took(len(tokens))
        finally:
            session.truncate(min(session.filled, len(held)), held)

    def _end_tokens(self) -> frozenset[int]:
        tokens: set[int] = set()
        for owner in (getattr(self.target, "generation_config", None), self.target.config, self.tokenizer):
            ends = getattr(owner, "eos_token_id", None)
            tokens |= {ends} if isinstance(ends, int) else set(ends or ())
        return frozenset(tokens)


InferEngine = InferEnginePython


def _logprobs(values: Sequence[float], tokens: Sequence[int], told: int) -> TokenLogprobs:
    return TokenLogprobs(values[0], tuple(zip(tokens[1:told], values[1:told], strict=True)))
