"""Choosing the next token, as ops of the step itself, so that they are captured with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graph_capture.errors import CaptureError

MOST = 64  # alternatives whose log-probabilities can be asked for


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: choose among so many, and what is as likely as the last of them; 0 for all.
        top_p: choose among the fewest tokens that are this likely together (Holtzman et al., 2020); 1 for all.
        min_p: leave out what is less likely than this part of the most likely token; 0 for none.
        repetition_penalty: divides positive logits of tokens that were there before, and multiplies negative ones
            (Keskar et al., 2019); 1 for none.
        presence_penalty: taken from the logits of tokens that the answer has already; 0 for none.
        frequency_penalty: the same for each time that the answer has them.
        logit_bias: added to the logits of these tokens.

    Raises:
        CaptureError: a value is out of its range, or of another type.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, fits, what in (
            ("temperature", lambda x: 0 <= x < math.inf, "0 or more"),
            ("top_k", lambda x: x >= 0, "0 or more"),
            ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("min_p", lambda x: 0 <= x <= 1, "0 or more and at most 1"),
            ("repetition_penalty", lambda x: 0 < x < math.inf, "above 0"),
            ("presence_penalty", math.isfinite, "a finite number"),
            ("frequency_penalty", math.isfinite, "a finite number"),
        ):
            number = checked(name, getattr(self, name), whole=name == "top_k")
            if not fits(number):
                raise CaptureError(f"{name} must be {what}, got {number}")
        if not isinstance(self.logit_bias, Mapping):
            raise CaptureError(f"logit_bias must map tokens to numbers, got {self.logit_bias!r:.80}")
        for token, bias in self.logit_bias.items():
            checked("a token of logit_bias", token, whole=True)
            if math.isnan(checked("a value of logit_bias", bias)):
                raise CaptureError(f"logit_bias of token {token} is no number")

    @property
    def kind(self) -> SamplingKind:
        """What a recorded step depends on; everything else it reads from memory."""
        greedy = self.temperature == 0
        return SamplingKind(
            greedy,
            0 if greedy else self.top_k,
            not greedy and self.top_p < 1,
            self.repetition_penalty != 1,
            not greedy and self.min_p > 0,
            bool(self.presence_penalty or self.frequency_penalty),
            bool(self.logit_bias),
        )


def checked(name: str, value: Any, whole: bool = False) -> Any:
    """`value`, if it is a number; a `whole` one where that is asked for.

    Raises:
        CaptureError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise CaptureError(f"{name} must be {'a whole' if whole else 'a'} number, got {value!r:.80}")
    return value


@dataclass(frozen=True)
class SamplingKind:
    """The ops that the sampling of some rows takes, together.

    Attributes:
        greedy: no row draws.
        top_k: the number of candidates, where all rows have the same; -1 where each row has its own; 0 for all tokens.
        nucleus, penalty, least, counting, biased: whether a row has top_p, a repetition penalty, min_p, a presence or
            frequency penalty, a bias.
        told: for how many tokens log-probabilities are kept, with the chosen one; 0 for none.
    """

    greedy: bool
    top_k: int
    nucleus: bool
    penalty: bool
    least: bool = False
    counting: bool = False
    biased: bool = False
    told: int = 0

    @classmethod
    def of(cls, rows: Sequence[Sampling], told: int = 0) -> SamplingKind:
        """Of rows, each with its own."""
        kinds = [row.kind for row in rows]
        ks = {kind.top_k for kind in kinds if not kind.greedy}
        flags = {name: any(getattr(kind, name) for kind in kinds) for name in _FLAGS}
        return cls(not ks, ks.pop() if len(ks) == 1 else -bool(ks), told=told, **flags)

    def __str__(self) -> str:
        parts = ["greedy"] if self.greedy else ["sampled"]
        parts += [f"top {self.top_k}" if self.top_k > 0 else "top k"] if self.top_k else []
        parts += [word for word, name in zip(_WORDS, _FLAGS, strict=True) if getattr(self, name)]
        parts += [f"log-probabilities of {self.told}"] if self.told else []
        return ", ".join(parts)


_FLAGS = ("nucleus", "penalty", "least", "counting", "biased")
_WORDS = ("nucleus", "penalty", "min p", "counts", "bias")
_BELOW_ONE = 1 - 2.0**-22  # so that a product with a float32 sum stays below the sum


class Sampler:
    """The memory that sampling reads, for `batch` rows and at most `capacity` positions.

    Random numbers are drawn before the first step, for each row from its own seed and one for each token of its own, so
    that a step is a function of memory, a seed gives the same tokens whether the step replays or not, and a row's
    tokens do not depend on its neighbours: what an option of theirs adds to the step leaves this row as it is.
    """

    def __init__(self, batch: int, capacity: int, vocabulary: int, device: torch.device) -> None:
        self._temperature, self._top_p, self._penalty = (torch.ones(batch, 1, device=device) for _ in range(3))
        self._min_p, self._presence, self._frequency = (torch.zeros(batch, 1, device=device) for _ in range(3))
        self._top_k = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._noise = torch.zeros(capacity + 1, batch, device=device)
        self._seen = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device)
        self._counts = torch.zeros(0, device=device)  # [B, V] float32 from its first use on
        self._bias = torch.zeros(0, device=device)
        self.vocabulary, self._device = vocabulary, device
        self.told_values = torch.zeros(batch, MOST + 1, device=device)
        self.told_tokens = torch.zeros(batch, MOST + 1, dtype=torch.int64, device=device)

    def prepare(
        self,
        sampling: Sampling | Sequence[Sampling],
        seed: int | Sequence[int | None] | None,
        tokens: torch.Tensor,
        told: int = 0,
    ) -> SamplingKind:
        """Fill the memory for answers to `tokens`, [B, L] int64.

        Args:
            sampling: of all rows, or of each.
            seed: of each row; one for all gives each row another one, counted from it. None is another one each time.
            told: for how many tokens a step keeps log-probabilities.

        Returns:
            The ops that it takes.
        """
        batch = self._noise.shape[1]
        rows = [sampling] * batch if isinstance(sampling, Sampling) else list(sampling)
        if seed is None or isinstance(seed, int):
            seeds = [seed if seed is None else seed + row for row in range(batch)]
        else:
            seeds = list(seed)
        kind = SamplingKind.of(rows, told)
        column = {"device": self._device}
        if not kind.greedy:
            temperatures = [row.temperature for row in rows]
            self._temperature.copy_(torch.tensor(temperatures, **column)[:, None])  # type: ignore[arg-type]
            for memory, name in ((self._top_p, "top_p"), (self._min_p, "min_p")):
                memory.copy_(torch.tensor([float(getattr(row, name)) for row in rows])[:, None])
            limits = [row.top_k if 0 < row.top_k < self.vocabulary else self.vocabulary for row in rows]
            self._top_k.copy_(torch.tensor(limits)[:, None])
            for index, (row, each) in enumerate(zip(rows, seeds, strict=True)):
                if row.temperature:
                    generator = torch.Generator()
                    generator.seed() if each is None else generator.manual_seed(each)
                    noise = torch.rand(self._noise.shape[0], generator=generator).mul_(_BELOW_ONE)
                    self._noise[:, index].copy_(noise)
        if kind.penalty:
            self._penalty.copy_(torch.tensor([float(row.repetition_penalty) for row in rows])[:, None])
            self._seen.zero_().scatter_(1, tokens.to(self._device), True)
        if kind.counting:
            self._presence.copy_(torch.tensor([float(row.presence_penalty) for row in rows])[:, None])
            self._frequency.copy_(torch.tensor([float(row.frequency_penalty) for row in rows])[:, None])
            if not self._counts.numel():
                self._counts = torch.zeros(batch, self.vocabulary, device=self._device)
            self._counts.zero_()
        if kind.biased:
            if not self._bias.numel():
                self._bias = torch.zeros(batch, self.vocabulary, device=self._device)
            self._bias.zero_()
            for index, row in enumerate(rows):
                for token, bias in row.logit_bias.items():
                    self._bias[index, token] = bias
        return kind

    def choose(self, kind: SamplingKind, logits: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The next tokens, [B] int64.

        Args:
            logits: [B, V].
            position: of the chosen tokens; int64, [B] or without dimensions.
        """
        logits = plain = logits.float()
        if kind.biased:
            logits = logits + self._bias
        if kind.penalty:
            held = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)
            logits = torch.where(self._seen, held, logits)
        if kind.counting:
            logits = logits - self._counts * self._frequency - (self._counts > 0) * self._presence
        chosen = logits.argmax(-1)
        if not kind.greedy:
            chosen = torch.where(self._temperature[:, 0] == 0, chosen, self._draw(kind, logits, position))
        if kind.penalty:
            self._seen.scatter_(1, chosen[:, None], True)
        if kind.counting:
            self._counts.scatter_add_(1, chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.float32))
        if kind.told:
            self._tell(plain, chosen, kind.told)
        return chosen

    def _draw(self, kind: SamplingKind, logits: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """By inverting the distribution function, over the tokens in the order of their numbers."""
        logits = logits / torch.where(self._temperature == 0, 1.0, self._temperature)
        if kind.top_k > 0:
            least = logits.topk(min(kind.top_k, self.vocabulary), dim=-1).values[:, -1:]
            logits = torch.where((logits >= least) | (self._temperature == 0), logits, -math.inf)
        if kind.nucleus or kind.top_k < 0:
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            if kind.top_k < 0:
                least = ordered.gather(1, self._top_k - 1)
                logits = torch.where(logits >= least, logits, -math.inf)
                ordered = torch.where(ordered >= least, ordered, -math.inf)
            if kind.nucleus:
                weights = ordered.softmax(-1)
                kept = (weights.cumsum(-1) - weights < self._top_p) | (self._top_p >= 1)
                logits = torch.where(torch.zeros_like(kept).scatter(1, order, kept), logits, -math.inf)
        weights = logits.softmax(-1)
        if kind.least:
            weights = torch.where(weights >= self._min_p * weights.amax(-1, keepdim=True), weights, 0.0)
        heights = weights.cumsum(-1)
        noise = self._noise.gather(0, position.expand(1, weights.shape[0]))[0]
        return (heights <= noise[:, None] * heights[:, -1:]).sum(-1)

    def _tell(self, logits: torch.Tensor, chosen: torch.Tensor, told: int) -> None:
        """Keep the log-probabilities of the chosen token and of the most likely ones, as the model gives them."""
        likelihoods = logits.log_softmax(-1)
        self.told_values[:, :1].copy_(likelihoods.gather(1, chosen[:, None]))
        self.told_tokens[:, :1].copy_(chosen[:, None])
        if told > 1:
            best = likelihoods.topk(min(told - 1, self.vocabulary), dim=-1)
            count = best.values.shape[1]
            self.told_values[:, 1 : 1 + count].copy_(best.values)
            self.told_tokens[:, 1 : 1 + count].copy_(best.indices)


def rectangle(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows as one tensor, [B, L] int64; short ones repeat their last token, which says nothing new."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (longest - len(row))] if row else [0] * longest for row in rows])


def check_rows(rows: Sequence[Sequence[int]], capacity: int) -> None:
    """Whether prompts can be answered.

    Raises:
        CaptureError: one is empty, or leaves no room.
    """
    if not all(rows):
        raise CaptureError("a prompt is empty")
    longest = max(map(len, rows))
    if longest >= capacity:
        raise CaptureError(
            f"the prompt has {longest} tokens, and the cache {capacity} slots, one of them for an answer: shorten it, "
            "or take a larger max_length"
        )
