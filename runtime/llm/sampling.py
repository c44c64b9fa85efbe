"""Choosing the next token, as ops of the step itself, so that they are captured with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graph_capture.errors import CaptureError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: choose among so many; 0 for all.
        top_p: choose among the fewest tokens that are this likely together (Holtzman et al., 2020); 1 for all.
        repetition_penalty: divides positive logits of tokens that were there before, and multiplies negative ones
            (Keskar et al., 2019); 1 for none.

    Raises:
        CaptureError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, fits, what in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
        ):
            if not fits:
                raise CaptureError(f"{name} must be {what}, got {getattr(self, name)}")

    @property
    def kind(self) -> SamplingKind:
        """What a recorded step depends on; everything else it reads from memory."""
        greedy = self.temperature == 0
        return SamplingKind(
            greedy, 0 if greedy else self.top_k, not greedy and self.top_p < 1, self.repetition_penalty != 1
        )


@dataclass(frozen=True)
class SamplingKind:
    """The ops of a `Sampling`."""

    greedy: bool
    top_k: int
    nucleus: bool
    penalty: bool

    def __str__(self) -> str:
        parts = ["greedy"] if self.greedy else ["sampled"]
        parts += [f"top {self.top_k}"] if self.top_k else []
        parts += ["nucleus"] if self.nucleus else []
        parts += ["penalty"] if self.penalty else []
        return ", ".join(parts)


_BELOW_ONE = 1 - 2.0**-22  # so that a product with a float32 sum stays below the sum


class Sampler:
    """The memory that sampling reads, for `batch` rows and at most `capacity` positions.

    Random numbers are drawn before the first step, one for each row and position, so that a step is a function of
    memory, and a seed gives the same tokens whether it replays or not.
    """

    def __init__(self, batch: int, capacity: int, vocabulary: int, device: torch.device) -> None:
        self._temperature, self._top_p, self._penalty = (torch.ones((), device=device) for _ in range(3))
        self._noise = torch.zeros(capacity + 1, batch, device=device)
        self._seen = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device)
        self._vocabulary = vocabulary

    def prepare(self, sampling: Sampling, seed: int | None, tokens: torch.Tensor) -> None:
        """Fill the memory for an answer to `tokens`, [B, L] int64."""
        kind = sampling.kind
        if not kind.greedy:
            self._temperature.fill_(sampling.temperature)
            self._top_p.fill_(sampling.top_p)
            generator = torch.Generator()
            generator.seed() if seed is None else generator.manual_seed(seed)
            self._noise.copy_(torch.rand(self._noise.shape, generator=generator).mul_(_BELOW_ONE))
        if kind.penalty:
            self._penalty.fill_(sampling.repetition_penalty)
            self._seen.zero_().scatter_(1, tokens.to(self._seen.device), True)

    def choose(self, kind: SamplingKind, logits: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The next tokens, [B] int64.

        Args:
            logits: [B, V].
            position: of the chosen tokens; no dimensions, int64.
        """
        logits = logits.float()
        if kind.penalty:
            held = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)
            logits = torch.where(self._seen, held, logits)
        chosen = logits.argmax(-1) if kind.greedy else self._draw(kind, logits, position)
        if kind.penalty:
            self._seen.scatter_(1, chosen[:, None], True)
        return chosen

    def _draw(self, kind: SamplingKind, logits: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """By inverting the distribution function."""
        logits = logits / self._temperature
        index = None
        if kind.top_k:
            logits, index = logits.topk(min(kind.top_k, self._vocabulary), dim=-1)
        elif kind.nucleus:
            logits, index = logits.sort(dim=-1, descending=True)
        weights = logits.softmax(-1)
        if kind.nucleus:
            before = weights.cumsum(-1) - weights
            weights = torch.where(before < self._top_p, weights, 0.0)
        heights = weights.cumsum(-1)
        noise = self._noise.index_select(0, position[None])[0]
        rank = (heights <= noise[:, None] * heights[:, -1:]).sum(-1, keepdim=True)
        return (rank if index is None else index.gather(1, rank))[:, 0]
