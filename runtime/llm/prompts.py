"""What callers ask: text, tokens or messages, and how to answer them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graph_capture.errors import CaptureError
from graph_capture.runtime.llm.sampling import Sampling

Messages = Sequence[Mapping[str, str]]
Prompt = str | Sequence[int] | Messages


@dataclass(frozen=True)
class Request:
    """Prompts and how to answer them.

    Attributes:
        rows: the tokens of each prompt.
        limit: tokens of an answer.
        sampling: how they are chosen.
        stop: strings that end an answer.
        seed: of the random numbers; None takes others each time.
    """

    rows: list[list[int]]
    limit: int
    sampling: Sampling
    stop: tuple[str, ...]
    seed: int | None


class Prompts:
    """Makes tokens of prompts.

    Args:
        tokenizer: of transformers; None where the model has none.
        vocabulary: how many tokens the model knows.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def request(
        self,
        rows: list[list[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> Request:
        """A request, checked.

        Raises:
            CaptureError: an option is out of its range, or stop strings meet no tokenizer.
        """
        if max_new_tokens < 1:
            raise CaptureError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        words = (stop,) if isinstance(stop, str) else tuple(stop)
        if words and self._tokenizer is None:
            raise CaptureError("stop strings need a tokenizer, and the model has none")
        if not all(words):
            raise CaptureError("a stop string is empty")
        return Request(rows, max_new_tokens, Sampling(temperature, top_k, top_p, repetition_penalty), words, seed)

    def rows(self, prompts: Any) -> tuple[list[list[int]], bool]:
        """Tokens of each prompt, and whether there is a batch of them.

        Raises:
            CaptureError: there is no prompt, no tokenizer for text, or a token that the model does not know.
        """
        if isinstance(prompts, torch.Tensor):
            prompts = prompts.tolist()
        if isinstance(prompts, str):
            return [self._encode(prompts)], False
        prompts = list(prompts)
        if not prompts:
            raise CaptureError("there is no prompt")
        if isinstance(prompts[0], Mapping):
            return [self.templated(prompts)], False
        if isinstance(prompts[0], int):
            return [self._checked(prompts)], False
        return [self._encode(p) if isinstance(p, str) else self._checked(list(p)) for p in prompts], True

    def templated(self, messages: Messages) -> list[int]:
        """The tokens of a conversation, up to where the answer begins.

        Raises:
            CaptureError: there is no tokenizer or no chat template, or the template refuses the messages.
        """
        from jinja2 import TemplateError  # comes with chat templates

        if self._tokenizer is None:
            raise CaptureError("the model has no tokenizer: pass tokens, not text")
        if not getattr(self._tokenizer, "chat_template", None):
            raise CaptureError("the model's tokenizer has no chat template: pass text")
        for message in messages:
            self._encode(message["content"])
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # no system messages, say
            raise CaptureError(f"the model's chat template refuses the messages: {error}") from error
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _checked(self, tokens: list[int]) -> list[int]:
        strange = next((token for token in tokens if not 0 <= token < self._vocabulary), None)
        if strange is not None:
            raise CaptureError(f"token {strange} is not one of the model's {self._vocabulary}")
        return tokens

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise CaptureError("the model has no tokenizer: pass tokens, not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate: what a terminal gives for bytes that are not UTF-8
            raise CaptureError(f"the prompt is not valid text (UTF-8) at character {error.start}") from error
        return self._tokenizer(text)["input_ids"]
