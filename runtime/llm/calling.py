"""How a model of transformers is called: which module generates, and what its forward takes."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch

from graph_capture.errors import CaptureError

SLOTS = 2048  # of a cache, where neither the model nor the caller asks for fewer


def generating(model: Any, encoders: bool = False) -> Any:
    """The module within `model` whose ``generate`` is transformers' own: the model itself, or what a wrapper holds.

    Args:
        encoders: whether it may have an encoder.

    Raises:
        CaptureError: there is none, or it is no causal language model.
    """
    from transformers import GenerationMixin, PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(f"a {name} is no model: pass a causal language model of transformers")
    generators = (m for m in model.modules() if isinstance(m, PreTrainedModel) and isinstance(m, GenerationMixin))
    target = next(generators, None)
    if target is None or not target.can_generate():
        raise CaptureError(
            f"{name} is not a causal language model of transformers: it has no generate(). Load it with "
            "AutoModelForCausalLM"
        )
    if target.config.is_encoder_decoder and not encoders:
        raise CaptureError(
            f"{name} is not a causal language model: it has an encoder. accelerate(model).generate(...) answers with it"
        )
    return target


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


def slots_for(model: Any, asked: int | str | None) -> int:
    """How many tokens of prompt and answer a cache is to hold; see `InferEnginePython`.

    Raises:
        CaptureError: it is no number, or too small.
    """
    text = model.config.get_text_config(decoder=True)
    made_for = getattr(text, "max_position_embeddings", None) or SLOTS
    if asked == "most":
        return max(2, min(made_for, max(SLOTS, _room(model, text))))
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int)):
        raise CaptureError(f"max_length must be a whole number, got {asked!r:.80}")
    slots = min(SLOTS if asked is None else asked, made_for)
    if slots < 2:
        raise CaptureError(f"max_length must be at least 2, got {asked}")
    return slots


def _room(model: Any, text: Any) -> int:
    """Tokens whose keys and values fit into an eighth of the memory that is free: recording copies them for a while."""
    heads = getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 1) // heads
    size = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):  # where the system does not say
            return SLOTS
    return free // 8 // max(1, size * model.dtype.itemsize)


class Calling:
    """The arguments of a causal language model's forward.

    Args:
        model: is called.
        known_by: whose signature says what can be passed (a wrapper passes everything on).

    Attributes:
        cache_name, ids_name, mask_name, places_name: what it calls its cache, tokens, their mask and positions.
        encoder: whether it has one; `pads` whether what that gives may be padded, because a mask says so.
        vocabulary: how many tokens it knows.
        asks_for_mask: whether it looks, in Python, for padding among the tokens where no mask comes.
        goes_back: whether a cache that is cut short is as if the rest had never been: a model may keep more elsewhere.

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
        self.encoder = bool(known_by.config.is_encoder_decoder)
        self.pads = known_by.main_input_name == "input_ids"  # what is heard or seen has one length, and no mask
        prefix = "decoder_" if self.encoder else ""
        self.ids_name, self.mask_name, self.places_name = (
            prefix + name for name in ("input_ids", "attention_mask", "position_ids")
        )
        self.goes_back = True
        self.vocabulary = vocabulary_of(known_by)
        self._keeps = "logits_to_keep" in names
        self._places = "position_ids" in names
        self._masks = "attention_mask" in names
        self._caches = "use_cache" in names
        self.asks_for_mask = self._masks and any(map(_looks_for_padding, known_by.modules()))

    def __call__(
        self,
        ids: torch.Tensor,
        cache: Any,
        keep: int | torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The logits of one token a row, [B, V]; the call is what ``generate`` would make.

        Args:
            ids: [B, L] int64.
            cache: is read and written.
            keep: of which token: 1 is the last one; an index, [1] int64; 0 of all, [B, L, V].
            positions: [1 or B, L] int64.
            mask: of padded rows.
        """
        more: dict[str, Any] = {self.cache_name: cache, "use_cache": True, **self._where(positions, mask)}
        if self._keeps:
            more["logits_to_keep"] = keep
        logits = self.model(input_ids=ids, **more).logits
        if isinstance(keep, int) and keep == 0:
            return logits
        if self._keeps:
            return logits[:, -1]
        return logits[:, -keep] if isinstance(keep, int) else logits.index_select(1, keep)[:, 0]

    def without_cache(self, ids: torch.Tensor, last: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The logits of the `last` tokens, [B, last, V], from one forward that keeps nothing.

        Args:
            mask: [B, L] bool; False for padding on the left.
        """
        if mask is None:
            more = self._where(torch.arange(ids.shape[1], device=ids.device)[None], None)
        else:
            more = self._where((mask.long().cumsum(-1) - 1).clamp(min=0), mask.long())
        if self._caches:
            more["use_cache"] = False
        if self._keeps:
            more["logits_to_keep"] = last
        return self.model(input_ids=ids, **more).logits[:, -last:]

    def _where(self, positions: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
        more: dict[str, Any] = {"position_ids": positions} if self._places else {}
        if mask is not None:
            if not self._masks:
                raise CaptureError(f"the forward of {type(self.model).__name__} takes no mask for padding")
            more["attention_mask"] = mask
        return more


def _looks_for_padding(module: torch.nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return "warn_if_padding_and_no_attention_mask" in getattr(code, "co_names", ())
