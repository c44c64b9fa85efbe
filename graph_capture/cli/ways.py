"""The ways that ``graph-capture bench`` compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from graph_capture import FusionConfig, InferEngine
from graph_capture.runtime.llm import Sampling
from graph_capture.runtime.llm.models import load_model
from graph_capture.runtime.llm.phases import Pending

EAGER, COMPILED, UNFUSED, FUSED = WAYS = ("eager", "torch.compile", "unfused", "fused")
GREEDY = Sampling().kind


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: a folder, a built-in configuration, a name on the hub.
        dtype: of the weights, by torch's name; "auto" as they are stored.
        prompt: tokens of the prompt.
        tokens: that are decoded after it, in each round.
        rounds: in which the ways take turns.
        threads: torch's; 0 leaves them as they are.
    """

    model: str
    device: str = "cpu"
    dtype: str = "auto"
    prompt: int = 128
    tokens: int = 64
    batch: int = 1
    rounds: int = 5
    threads: int = 0

    @property
    def capacity(self) -> int:
        """Slots of static caches."""
        return self.prompt + self.tokens + 2

    def load(self) -> Any:
        """The model."""
        if self.threads:
            torch.set_num_threads(self.threads)
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        return load_model(self.model, dtype=dtype, device=self.device)


class Way:
    """A model that is asked for tokens, greedily. On a GPU a step is under way while the tokens of the one before are
    read, as a server would do it.

    Args:
        model: of transformers.
        setting: what is measured.
    """

    ahead: Pending | None = None

    def __init__(self, model: Any, setting: Setting) -> None:
        self.model, self.pipelined = model, setting.device == "cuda"

    def prefill(self, ids: torch.Tensor) -> list[int]:
        """Forget everything, read prompts [B, L], and give the next tokens."""
        self.ahead = None
        with torch.no_grad():
            return Pending(self.begin(ids)).tolist()

    def decode(self) -> list[int]:
        """Give the tokens after those."""
        with torch.no_grad():
            if not self.pipelined:
                return self.step().tolist()
            due = self.ahead or Pending(self.step())
            self.ahead = Pending(self.step())
        return due.tolist()

    def begin(self, ids: torch.Tensor) -> torch.Tensor:
        """Launch the reading of prompts; [B] int64."""
        raise NotImplementedError

    def step(self) -> torch.Tensor:
        """Launch one step; [B] int64."""
        raise NotImplementedError


class Eager(Way):
    """transformers as it comes."""

    def begin(self, ids: torch.Tensor) -> torch.Tensor:
        from transformers import DynamicCache

        self._cache, self._token = DynamicCache(config=self.model.config), ids
        return self.step()

    def step(self) -> torch.Tensor:
        result = self.model(input_ids=self._token, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._token = result.logits[:, -1:].argmax(-1)
        return self._token[:, 0]


class Compiled(Way):
    """torch.compile, each step with the choice of its token in it."""

    def __init__(self, model: Any, setting: Setting) -> None:
        from transformers import StaticCache

        super().__init__(model, setting)
        self._cache = StaticCache(config=model.config, max_cache_len=setting.capacity)
        mode = "reduce-overhead" if setting.device == "cuda" else "default"
        self._compiled = torch.compile(self._forward, dynamic=False, mode=mode)
        self._token = torch.zeros(setting.batch, 1, dtype=torch.int64, device=setting.device)
        with torch.no_grad():
            self._forward(self._token, self._cache)  # makes the cache

    def _forward(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        result = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return result.logits[:, -1:].argmax(-1)

    def begin(self, ids: torch.Tensor) -> torch.Tensor:
        self._cache.reset()
        self._token = ids
        return self.step()

    def step(self) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        self._token = self._compiled(self._token, self._cache).clone()
        return self._token[:, 0]


class Ours(Way):
    """The engine's steps."""

    def __init__(self, model: Any, setting: Setting, config: FusionConfig | None) -> None:
        super().__init__(model, setting)
        self.engine = InferEngine(model, max_length=setting.capacity, config=config)
        self._session = self.engine.session(setting.batch)
        self._session.eager_first = False  # what is timed is a replay

    def begin(self, ids: torch.Tensor) -> torch.Tensor:
        self._session.truncate(0)
        return self._session.prefill(ids.tolist(), GREEDY)

    def step(self) -> torch.Tensor:
        return self._session.decode(GREEDY)


def make(way: str, model: Any, setting: Setting) -> Way:
    """A way of running `model`."""
    if way == EAGER:
        return Eager(model, setting)
    if way == COMPILED:
        return Compiled(model, setting)
    return Ours(model, setting, None if way == FUSED else FusionConfig(enable_fusion=False))
