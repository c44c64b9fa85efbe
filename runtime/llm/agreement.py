"""Whether fusion changes what a model says, and if so, how close it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from graph_capture.ir.numerics import MULTIPLE, ROUNDINGS
from graph_capture.runtime.llm.sampling import Sampling

if TYPE_CHECKING:
    from graph_capture.runtime.llm.engine import InferEnginePython


RUNS = 3  # of the model, to learn how much its logits differ by


@dataclass(frozen=True)
class Agreement:
    """Greedy answers with fusion on and off.

    Attributes:
        tokens: how many were compared.
        first: the first that differs; None where none does.
        margin: there, how far the model's own choice lay above the other, in units of its logits.
        rounding: there, what rounding may do to a logit: 64 roundings of the largest one, and a multiple of what the
            model's own logits differ by from run to run.
    """

    tokens: int
    first: int | None = None
    margin: float = 0.0
    rounding: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the answers are equal, or part where the model is undecided."""
        return self.first is None or self.margin <= self.rounding

    def __str__(self) -> str:
        if self.first is None:
            return f"all {self.tokens} greedy tokens equal the model's own"
        verdict = "rounding" if self.ok else "MORE THAN ROUNDING"
        return (
            f"greedy tokens part at token {self.first} of {self.tokens}, where the model's choice was ahead by "
            f"{self.margin:.3g} of a logit: {verdict} ({self.rounding:.3g})"
        )


def agreement(engine: InferEnginePython, prompt: Sequence[int], max_new_tokens: int) -> Agreement:
    """Answer `prompt` with fusion on and off, greedily, and look at the first token that differs."""
    fusing = engine.enable_fusion
    answers = []
    try:
        for engine.enable_fusion in (True, False):
            answers.append(_greedy(engine, prompt, max_new_tokens))
        first = next((i for i, (a, b) in enumerate(zip(*answers, strict=True)) if a != b), None)
        if first is None:
            return Agreement(len(answers[0]))
        logits, *more = (_logits(engine, [*prompt, *answers[1][:first]]) for _ in range(RUNS))
    finally:
        engine.enable_fusion = fusing
    fused, own = (answer[first] for answer in answers)
    noise = MULTIPLE * max(float((other - logits).abs().max()) for other in more)
    rounding = ROUNDINGS * torch.finfo(engine.model.dtype).eps * float(logits.abs().max()) + noise
    return Agreement(len(answers[0]), first, float(logits[own] - logits[fused]), rounding)


def _greedy(engine: InferEnginePython, prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens, or as many as fit; end tokens end nothing."""
    kind = Sampling().kind
    with engine.alone():
        session = engine.session(1)
        session.truncate(0)
        tokens = [int(session.prefill([prompt], kind))]
        while len(tokens) < count and session.filled < session.capacity:
            tokens.append(int(session.decode(kind)))
        session.truncate(0)
    return tokens


def _logits(engine: InferEnginePython, tokens: Sequence[int]) -> torch.Tensor:
    """The model's own logits after `tokens`, [V] float32."""
    with torch.no_grad():
        ids = torch.tensor([tokens], device=engine.model.device)
        return engine.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
