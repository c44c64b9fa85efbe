"""A key/value cache of fixed slots, as transformers' models use one."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, StaticLayer

from graph_capture.errors import CaptureError


class Slots:
    """What all layers of a cache share.

    Attributes:
        position: how many slots are filled, int64 without dimensions, on the device.
        where: the slots that the tokens of a step go to, [L] int64; the same for all layers.
        fresh: whether what comes is the beginning: it attends to itself alone, so that attention costs the length of
            the prompt, not the number of slots.
    """

    def __init__(self, device: torch.device) -> None:
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.where = torch.zeros(1, dtype=torch.int64, device=device)
        self.fresh = False

    def begin(self, length: int, fresh: bool) -> None:
        """Say where the tokens of a step go, and whether they are the beginning."""
        self.fresh = fresh
        steps = torch.arange(length, device=self.position.device)
        self.where = steps if fresh else steps + self.position


class SlotLayer(StaticLayer):
    """Keys and values of one layer, [B, H, slots, E] each. Every layer keeps all slots: a sliding window is the mask's.

    Unlike its base, it leaves counting to `Slots`: once a step rather than once a layer.
    """

    def __init__(self, capacity: int, slots: Slots) -> None:
        super().__init__(max_cache_len=capacity)
        self.slots = slots

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self.slots.where, key_states)
        self.values.index_copy_(2, self.slots.where, value_states)
        return (key_states, value_states) if self.slots.fresh else (self.keys, self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.slots.fresh else self.max_cache_len), 0

    def get_seq_length(self) -> Any:
        return 0 if self.slots.fresh else self.slots.position

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """In place: the recorded steps know the memory."""
        for held in (self.keys, self.values):
            held.copy_(held.index_select(0, beam_idx))


_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def slot_cache(config: Any, capacity: int, device: torch.device) -> tuple[Cache, Slots]:
    """A cache for a model of this transformers configuration, without memory until the first use.

    Raises:
        CaptureError: the model keeps something else than keys and values of each token.
    """
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    other = sorted(kinds - _ATTENTION)
    if other or getattr(text, "kv_sharing_modes", None):
        what = ", ".join(other) or "layers that share keys"
        raise CaptureError(f"{type(config).__name__} has {what}, which a cache of slots cannot keep")
    slots = Slots(device)
    return Cache(layers=[SlotLayer(capacity, slots) for _ in range(text.num_hidden_layers)]), slots
