"""What callers ask: text, tokens or messages, and how to answer them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graph_capture.errors import CaptureError
from graph_capture.runtime.llm.sampling import MOST, Sampling, checked

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Messages
ANSWER = 128  # tokens, where nobody says how many
_CHOICES = tuple(Sampling.__dataclass_fields__)


@dataclass(frozen=True)
class Request:
    """Prompts and how to answer them; an entry for each answer.

    Attributes:
        rows: the tokens of each prompt.
        limits: tokens of each answer, at most.
        samplings: how they are chosen.
        stops: strings that end an answer.
        seeds: of the random numbers; None takes others each time.
        told: for how many tokens log-probabilities are wanted, the chosen one among them; 0 for none.
        each: answers to one prompt.
    """

    rows: list[list[int]]
    limits: list[int]
    samplings: list[Sampling]
    stops: list[tuple[str, ...]]
    seeds: list[int | None]
    told: int = 0
    each: int = 1

    @property
    def total(self) -> int:
        """Tokens of the longest prompt with its answer, at most."""
        return max(map(len, self.rows)) + max(self.limits)


class Prompts:
    """Makes tokens of prompts.

    Args:
        tokenizer: of transformers; None where the model has none.
        vocabulary: how many tokens the model knows.
        defaults: options that hold where callers say nothing; see `defaults_of`.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, defaults: Mapping[str, Any] | None = None) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self.defaults = dict(defaults or {})

    def request(
        self, rows: list[list[int]], *, n: int = 1, logprobs: int | bool | None = None, **options: Any
    ) -> Request:
        """A request, checked. Any of `options` may be a list with an entry for each prompt.

        Raises:
            CaptureError: there is no such option, one is out of its range or of another type, or stop strings meet no
                tokenizer.
        """
        known = {*_CHOICES, "max_new_tokens", "stop", "seed"}
        unknown = sorted(set(options) - known)
        if unknown:
            raise CaptureError(f"there is no option {unknown[0]!r}; there are {', '.join(sorted(known))}, n, logprobs")
        if checked("n", n, whole=True) < 1:
            raise CaptureError(f"n must be at least 1, got {n}")
        told = 0 if logprobs is None or logprobs is False else 1 + (0 if logprobs is True else logprobs)
        if checked("logprobs", told, whole=True) < 0 or told > MOST + 1:
            raise CaptureError(f"logprobs must be from 0 to {MOST}, got {logprobs}")
        each = [self._of_row(index, len(rows), options) for index in range(len(rows))]
        seeds = _seeds(options.get("seed"), len(each), n)
        each = [one for one in each for _ in range(n)]
        rows = [row for row in rows for _ in range(n)]
        return Request(rows, [e[0] for e in each], [e[1] for e in each], [e[2] for e in each], seeds, told, n)

    def _of_row(self, index: int, count: int, options: Mapping[str, Any]) -> tuple[int, Sampling, tuple[str, ...]]:
        said = {name: _entry(name, value, index, count) for name, value in options.items() if name != "seed"}
        said = {name: value for name, value in said.items() if value is not None}
        asked = {name: value for name, value in self.defaults.items() if value is not None}
        if said.get("temperature") == 0:  # whoever asks for the most likely token wants no draw of the defaults'
            asked = {name: value for name, value in asked.items() if name not in ("top_k", "top_p", "min_p")}
        asked |= said
        limit = checked("max_new_tokens", asked.pop("max_new_tokens", ANSWER), whole=True)
        if limit < 1:
            raise CaptureError(f"max_new_tokens must be at least 1, got {limit}")
        sampling = Sampling(**{name: value for name, value in asked.items() if name in _CHOICES})
        strange = next((token for token in sampling.logit_bias if not 0 <= token < self._vocabulary), None)
        if strange is not None:
            raise CaptureError(f"logit_bias names token {strange}, which is not one of the model's {self._vocabulary}")
        return limit, sampling, self._words(asked.get("stop", ()))

    def _words(self, stop: Any) -> tuple[str, ...]:
        words = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, (list, tuple)) else None
        if words is None or not all(isinstance(word, str) for word in words):
            raise CaptureError(f"stop must be a string or a list of strings, got {stop!r:.80}")
        if words and self._tokenizer is None:
            raise CaptureError("stop strings need a tokenizer, and the model has none")
        if not all(words):
            raise CaptureError("a stop string is empty")
        return words

    def rows(self, prompts: Any) -> tuple[list[list[int]], bool]:
        """Tokens of each prompt, and whether there is a batch of them.

        Raises:
            CaptureError: there is no prompt, something else than a prompt, no tokenizer for text, or a token that the
                model does not know.
        """
        if isinstance(prompts, torch.Tensor):
            if prompts.is_floating_point() or prompts.dim() not in (1, 2):
                raise CaptureError(f"tokens are whole numbers, [L] or [B, L]; got {prompts.dtype} {[*prompts.shape]}")
            prompts = prompts.tolist()
        if isinstance(prompts, str):
            return [self._encode(prompts)], False
        if isinstance(prompts, (Mapping, bytes)) or not hasattr(prompts, "__iter__"):
            raise CaptureError(f"a prompt is text, tokens or a list of messages, not a {type(prompts).__name__}")
        prompts = list(prompts)
        if not prompts:
            raise CaptureError("there is no prompt")
        if isinstance(prompts[0], Mapping):
            return [self.templated(prompts)], False
        if hasattr(prompts[0], "__index__"):
            return [self._checked(prompts)], False
        return [self._row(prompt) for prompt in prompts], True

    def _row(self, prompt: Any) -> list[int]:
        """One prompt of a batch."""
        if isinstance(prompt, str):
            return self._encode(prompt)
        if isinstance(prompt, (Mapping, bytes)) or not hasattr(prompt, "__iter__"):
            raise CaptureError(f"a prompt of a batch is text, tokens or messages, not a {type(prompt).__name__}")
        prompt = list(prompt)
        return self.templated(prompt) if prompt and isinstance(prompt[0], Mapping) else self._checked(prompt)

    def templated(self, messages: Messages) -> list[int]:
        """The tokens of a conversation, up to where the answer begins.

        Raises:
            CaptureError: there is no tokenizer or no chat template, a message has something else than text, or the
                template refuses the messages.
        """
        if self._tokenizer is None:
            raise CaptureError("the model has no tokenizer: pass tokens, not text")
        if not getattr(self._tokenizer, "chat_template", None):
            raise CaptureError("the model's tokenizer has no chat template: pass text")
        plain = [_plain_message(message) for message in messages]
        for message in plain:
            self._encode(message["content"])
        try:
            text = self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # no system messages, say; or whatever the template runs into
            raise CaptureError(f"the model's chat template refuses the messages: {error}") from error
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _checked(self, tokens: Sequence[Any]) -> list[int]:
        try:
            checked_tokens = [operator.index(token) for token in tokens]
        except TypeError as error:
            raise CaptureError(f"a prompt is text or tokens, and tokens are whole numbers: {error}") from error
        strange = next((token for token in checked_tokens if not 0 <= token < self._vocabulary), None)
        if strange is not None:
            raise CaptureError(f"token {strange} is not one of the model's {self._vocabulary}")
        return checked_tokens

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise CaptureError("the model has no tokenizer: pass tokens, not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate: what a terminal gives for bytes that are not UTF-8
            raise CaptureError(f"the prompt is not valid text (UTF-8) at character {error.start}") from error
        return self._tokenizer(text)["input_ids"]


def defaults_of(generation_config: Any) -> dict[str, Any]:
    """The options that a model's ``generation_config.json`` sets.

    Where it asks for draws (``do_sample``), its temperature, top_k, top_p and min_p hold; its penalty and its number of
    new tokens always do.
    """
    defaults = {name: getattr(generation_config, name, None) for name in ("repetition_penalty", "max_new_tokens")}
    if getattr(generation_config, "do_sample", None):
        defaults["temperature"] = getattr(generation_config, "temperature", None) or 1.0
        defaults |= {name: getattr(generation_config, name, None) for name in ("top_k", "top_p", "min_p")}
    return {name: value for name, value in defaults.items() if value is not None}


def _entry(name: str, value: Any, index: int, count: int) -> Any:
    """What an option is for one of the prompts.

    Raises:
        CaptureError: a list has another number of entries.
    """
    lists = isinstance(value, (list, tuple))
    if name == "stop":  # a list of strings holds for all
        lists = lists and any(not isinstance(word, str) for word in value)
    if not lists:
        return value
    if len(value) != count:
        raise CaptureError(f"{name} has {len(value)} entries for {count} prompts")
    return value[index]


def _seeds(seed: Any, count: int, n: int) -> list[int | None]:
    """A seed for each answer. One for all is counted on, so that answers differ and the first is that of the seed."""
    if seed is None:
        return [None] * (count * n)
    if isinstance(seed, (list, tuple)):
        each = [_entry("seed", seed, index, count) for index in range(count)]
    else:
        each = [checked("seed", seed, whole=True) + index * n for index in range(count)]
    for one in each:
        if one is not None and not -(2**63) <= checked("seed", one, whole=True) < 2**63:
            raise CaptureError(f"seed must fit into 64 bits, got {one}")
    return [None if one is None else one + answer for one in each for answer in range(n)]


def _plain_message(message: Any) -> dict[str, Any]:
    """A message whose content is one string; parts are joined, and None says nothing.

    Raises:
        CaptureError: it is no message, or has other parts than text.
    """
    if not isinstance(message, Mapping) or "role" not in message:
        raise CaptureError(f"a message has a role and a content, got {message!r:.80}")
    content = message.get("content")
    if content is None:
        content = ""
    elif isinstance(content, (list, tuple)):
        content = "".join(map(_text_of, content))
    elif not isinstance(content, str):
        raise CaptureError(f"the content of a message is text, a list of parts or None, not a {type(content).__name__}")
    return {**message, "content": content}


def _text_of(part: Any) -> str:
    text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        what = part.get("type", "thing") if isinstance(part, Mapping) else type(part).__name__
        raise CaptureError(f"a message has a part that is no text ({what}); this engine reads text only")
    return text
