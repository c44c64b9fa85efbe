"""`accelerate`: the user's own ``model.generate`` over captured steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from graph_capture.errors import CaptureError
from graph_capture.log import log
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.llm.engine import InferEnginePython
from graph_capture.runtime.llm.session import Progress

# What generate() is asked for that steps of fixed memory do not give.
_REFUSED = (
    "past_key_values",
    "inputs_embeds",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "custom_generate",
    "output_attentions",
    "output_hidden_states",
    "prefill_chunk_size",
    "cache_implementation",
    "encoder_outputs",
)


class Accelerated:
    """What `accelerate` puts beside a model, as ``model.accelerated``.

    Attributes:
        engine: has the captured steps: ``explain()``, ``stats()``, ``enable_fusion``.
        declined: why the latest call of ``generate`` ran as it is; None where it did not.
    """

    def __init__(self, model: Any, config: FusionConfig | None, max_length: int | None, progress: Progress | None):
        self.engine = InferEnginePython(model, max_length=max_length, config=config, progress=progress)
        self.declined: str | None = None
        self._model = model
        self._generate, self._forward = model.generate, model.forward

    def explain(self) -> str:
        """See `InferEnginePython.explain`."""
        return self.engine.explain()

    def undo(self) -> None:
        """Leave the model as it was."""
        for name in ("generate", "forward", "accelerated"):
            vars(self._model).pop(name, None)

    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As transformers' own, over captured steps where they serve."""
        self.declined = self._reason(inputs, generation_config, kwargs)
        if self.declined is None:
            from graph_capture.runtime.llm.handle import NotServed, SessionCache

            try:
                with self.engine.alone():
                    cache = SessionCache(self.engine)
                    try:
                        return self._generate(inputs, generation_config, past_key_values=cache, **kwargs)
                    finally:
                        cache.close()
            except NotServed as refused:
                self.declined = str(refused)
        log.info("generate() runs as it is: %s", self.declined)
        return self._generate(inputs, generation_config, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; a step of a captured session where that is whose cache comes."""
        serve = getattr(kwargs.get("past_key_values"), "serve", None)
        return self._forward(*args, **kwargs) if serve is None else serve(*args, **kwargs)

    def _reason(self, inputs: Any, generation_config: Any, kwargs: dict[str, Any]) -> str | None:
        chosen = generation_config or self._model.generation_config

        def asked(name: str) -> Any:
            value = kwargs.get(name)
            return getattr(chosen, name, None) if value is None else value

        for name in _REFUSED:
            value = asked(name)
            if isinstance(value, torch.Tensor) or value:
                return f"{name} is asked for"
        if asked("use_cache") is False:
            return "use_cache is False"
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            return "there are no input_ids"
        new = asked("max_new_tokens")
        total = ids.shape[1] + new if new else (asked("max_length") or ids.shape[1] + 20)
        if total > self.engine.capacity:
            return f"{total} tokens do not fit into {self.engine.capacity} slots: take a larger max_length"
        return None


def accelerate(
    model: Any,
    config: FusionConfig | None = None,
    *,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Have a causal language model of transformers generate over captured, fused steps.

    ``model.generate`` goes on taking what it took, logits processors, streamers and beams included, and gives the same
    tokens but for rounding. Calls that captured steps cannot serve run as they are; ``model.accelerated.declined`` says
    why, ``model.accelerated.explain()`` shows the receipts, ``model.accelerated.undo()`` leaves the model as it was.

    Args:
        model: changed in place.
        config: how steps are fused.
        max_length: slots of the cache, for prompt and answer together (default: what the model was made for, at most
            2048). Longer calls run as they are.
        progress: is told, in words, what takes long.

    Returns:
        The model.

    Raises:
        CaptureError: it is not a causal language model of transformers.
    """
    if not callable(getattr(model, "generate", None)) or getattr(model.config, "is_encoder_decoder", False):
        raise CaptureError(f"{type(model).__name__} is not a causal language model of transformers")
    if "accelerated" in vars(model):
        model.accelerated.undo()
    ours = Accelerated(model, config, max_length, progress)
    model.generate, model.forward = _like(model.generate, ours.generate), _like(model.forward, ours.forward)
    model.accelerated = ours
    return model


def _like(known: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the signature of `known`, which transformers looks at."""

    @functools.wraps(known)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper
