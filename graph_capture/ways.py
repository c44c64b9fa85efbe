"""The ways that ``graph-capture bench`` compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from graph_capture import FusionConfig, InferEngine
from graph_capture.models import load_model
from graph_capture.runtime.llm import Sampling

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
        return self.prompt + self.tokens + 1

    def load(self) -> Any:
        """The model."""
        if self.threads:
            torch.set_num_threads(self.threads)
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        return load_model(self.model, dtype=dtype, device=self.device)


class Way(Protocol):
    """A model that is asked for tokens, greedily; each call ends when they are on the host."""

    def prefill(self, ids: torch.Tensor) -> list[int]:
        """Forget everything, read prompts [B, L], and give the next tokens."""

    def decode(self) -> list[int]:
        """Give the tokens after those."""


class Eager:
    """transformers as it comes."""

    def __init__(self, model: Any, setting: Setting) -> None:
        self._model = model

    def prefill(self, ids: torch.Tensor) -> list[int]:
        from transformers import DynamicCache

        self._cache, self._token = DynamicCache(config=self._model.config), ids
        return self.decode()

    def decode(self) -> list[int]:
        with torch.no_grad():
            result = self._model(
                input_ids=self._token, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            ).logits
            self._token = result[:, -1:].argmax(-1)
        return self._token[:, 0].tolist()


class Compiled:
    """torch.compile, each step with the choice of its token in it."""

    def __init__(self, model: Any, setting: Setting) -> None:
        from transformers import StaticCache

        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=setting.capacity)
        graphs = {"mode": "reduce-overhead"} if setting.device == "cuda" else {}
        self._step = torch.compile(self._forward, dynamic=False, **graphs)
        self._token = torch.zeros(setting.batch, 1, dtype=torch.int64, device=setting.device)
        with torch.no_grad():
            self._forward(self._token, self._cache)  # makes the cache

    def _forward(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        result = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return result[:, -1:].argmax(-1)

    def prefill(self, ids: torch.Tensor) -> list[int]:
        self._cache.reset()
        return self._run(ids)

    def decode(self) -> list[int]:
        return self._run(self._token)

    def _run(self, ids: torch.Tensor) -> list[int]:
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            self._token = self._step(ids, self._cache).clone()
        return self._token[:, 0].tolist()


class Ours:
    """The engine's steps."""

    def __init__(self, model: Any, setting: Setting, config: FusionConfig) -> None:
        self.engine = InferEngine(model, max_length=setting.capacity, config=config)
        self._session = self.engine.session(setting.batch)

    def prefill(self, ids: torch.Tensor) -> list[int]:
        self._session.truncate(0)
        return self._session.prefill(ids.tolist(), GREEDY).tolist()

    def decode(self) -> list[int]:
        return self._session.decode(GREEDY).tolist()


def make(way: str, model: Any, setting: Setting) -> Way:
    """A way of running `model`."""
    if way == EAGER:
        return Eager(model, setting)
    if way == COMPILED:
        return Compiled(model, setting)
    return Ours(model, setting, FusionConfig(enable_fusion=way == FUSED))
