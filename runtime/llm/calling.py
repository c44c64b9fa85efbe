"""How a model of transformers is called: which module generates, and what its forward takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from graph_capture.errors import CaptureError


def generating(model: Any) -> Any:
    """The module within `model` whose ``generate`` is transformers' own: the model itself, or what a wrapper holds.

    Raises:
        CaptureError: there is none, or it is no causal language model.
    """
    from transformers import GenerationMixin, PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(f"a {name} is no model: pass a causal language model of transformers")
    found = next(
        (m for m in model.modules() if isinstance(m, PreTrainedModel) and isinstance(m, GenerationMixin)), None
    )
    if found is None or not found.can_generate():
        raise CaptureError(
            f"{name} is not a causal language model of transformers: it has no generate(). Load it with "
            "AutoModelForCausalLM"
        )
    if getattr(found.config, "is_encoder_decoder", False):
        raise CaptureError(
            f"{name} is not a causal language model: it has an encoder. transformers' own generate() answers with it"
        )
    return found


def vocabulary_of(model: Any) -> int:
    """How many tokens a model knows.

    Raises:
        CaptureError: it has no head that says so.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return weight.shape[0]
    size = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    if not isinstance(size, int):
        raise CaptureError(f"{type(model).__name__} is not a causal language model: it has no head over a vocabulary")
    return size


class Calling:
    """The arguments of a causal language model's forward.

    Args:
        model: is called.
        known_by: whose signature says what can be passed (a wrapper passes everything on).

    Raises:
        CaptureError: it takes no cache.
    """

    def __init__(self, model: Any, known_by: Any) -> None:
        self.model = model
        names = set(inspect.signature(type(known_by).forward).parameters)
        cache = next((name for name in ("past_key_values", "cache_params") if name in names), None)
        if cache is None:
            raise CaptureError(f"the forward of {type(known_by).__name__} takes no cache")
        self.cache_name = cache
        self.vocabulary = vocabulary_of(known_by)
        self._keeps = "logits_to_keep" in names
        self._places = "position_ids" in names
        self._masks = "attention_mask" in names
        self._caches = "use_cache" in names

    def __call__(
        self,
        ids: torch.Tensor,
        cache: Any,
        keep: int | torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The logits of one token a row, [B, V].

        Args:
            ids: [B, L] int64.
            cache: is read and written.
            keep: of which token: 1 is the last one; an index, [1] int64.
            mask, positions: of padded rows.
        """
        more: dict[str, Any] = {self.cache_name: cache, "use_cache": True, **self._of_padding(mask, positions)}
        if self._keeps:
            return self.model(input_ids=ids, logits_to_keep=keep, **more).logits[:, -1]
        logits = self.model(input_ids=ids, **more).logits
        return logits[:, -keep] if isinstance(keep, int) else logits.index_select(1, keep)[:, 0]

    def without_cache(self, ids: torch.Tensor, last: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The logits of the `last` tokens, [B, last, V], from one forward that keeps nothing.

        Args:
            mask: [B, L] bool; False for padding on the left.
        """
        positions = None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)
        more = self._of_padding(mask if mask is None else mask.long(), positions)
        if self._caches:
            more["use_cache"] = False
        if self._keeps:
            more["logits_to_keep"] = last
        return self.model(input_ids=ids, **more).logits[:, -last:]

    def _of_padding(self, mask: torch.Tensor | None, positions: torch.Tensor | None) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if mask is not None:
            if not self._masks:
                raise CaptureError(f"the forward of {type(self.model).__name__} takes no mask for padding")
            more["attention_mask"] = mask
            if self._places:
                more["position_ids"] = positions
        return more
