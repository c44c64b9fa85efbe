"""What an engine answers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, by the model's own distribution: before temperature, penalties and bias.

    Attributes:
        logprob: of the chosen token.
        top: the most likely tokens and theirs, the most likely first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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
        logprobs: for each of `tokens`, where they were asked for.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: str = "length"
    time_to_first_token: float = 0.0
    seconds: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, the first token apart; 0 where there was only one."""
        rest = self.seconds - self.time_to_first_token
        return (len(self.tokens) - 1) / rest if len(self.tokens) > 1 and rest > 0 else 0.0
