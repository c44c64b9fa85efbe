"""A cache of fixed memory, as transformers' models use one: slots for keys and values, and states."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticLayer

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

    Unlike its base, it leaves counting to `Slots`: once a step rather than once a layer. Nor does it load torch's
    compiler to tell it of its memory.
    """

    def __init__(self, capacity: int, slots: Slots) -> None:
        super().__init__(max_cache_len=capacity)
        self.slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.keys, self.values = (
            torch.zeros(
                (*states.shape[:2], self.max_cache_len, states.shape[-1]), dtype=states.dtype, device=states.device
            )
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            SlotLayer.lazy_initialization(self, key_states, value_states)
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
            if held is not None:  # a layer of another kind may never have come to it
                held.copy_(held.index_select(0, beam_idx))


_STATES: Any = getattr(cache_utils, "LinearAttentionLayer", object)  # since transformers 5.3 or so


class StateLayer(_STATES):
    """The states of one layer that keeps no keys and values: of a convolution, of a recurrence.

    They are made at the first step, and written in place from then on.
    """

    dtype: Any
    device: Any

    def lazy_initialization(
        self,
        conv_states: torch.Tensor | None = None,
        recurrent_states: torch.Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        if conv_states is not None:
            if self.device is None:
                self.dtype, self.device = conv_states.dtype, conv_states.device
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self.conv_kernel_size[state_idx] = size
            self.conv_states[state_idx] = conv_states.new_zeros((*conv_states.shape[:-1], size))
            self.is_conv_states_initialized[state_idx] = True
        if recurrent_states is not None:
            self.recurrent_states[state_idx] = torch.zeros_like(recurrent_states)
            self.is_recurrent_states_initialized[state_idx] = True

    def forget(self) -> None:
        """Begin anew: what comes next is a beginning."""
        for number in self.has_previous_state:
            self.has_previous_state[number] = False

    def go_on(self) -> None:
        """What comes next follows what is held."""
        for number in self.has_previous_state:
            self.has_previous_state[number] = True

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """In place: the recorded steps know the memory."""
        for held in (*self.conv_states.values(), *self.recurrent_states.values()):
            if held is not None:
                held.copy_(held.index_select(0, beam_idx))


class HybridLayer(StateLayer, SlotLayer):
    """Keys and values, and states beside them."""

    def __init__(self, capacity: int, slots: Slots, states: int) -> None:
        SlotLayer.__init__(self, capacity, slots)
        _STATES.__init__(self, number_of_states=states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        (SlotLayer if len(args) == 2 and not kwargs else StateLayer).lazy_initialization(self, *args, **kwargs)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        SlotLayer.reorder_cache(self, beam_idx)
        StateLayer.reorder_cache(self, beam_idx)


class SlotCache(Cache):
    """The layers of one model.

    Attributes:
        slots: what they share.
        stateful: whether one of them keeps a state, which cannot be cut short, and which padding would get into.
        slotted: whether one of them keeps keys and values, so that a token needs a mask over those before it.
    """

    def __init__(self, layers: list[Any], slots: Slots) -> None:
        super().__init__(layers=layers)
        self.slots = slots
        self._states = [layer for layer in layers if isinstance(layer, StateLayer)]
        self.stateful = bool(self._states)
        self.slotted = any(isinstance(layer, SlotLayer) for layer in layers)

    def begin(self, length: int, fresh: bool) -> None:
        """See `Slots.begin`."""
        self.slots.begin(length, fresh)
        for layer in self._states:
            layer.forget() if fresh else layer.go_on()

    def released(self, config: Any, filled: int, cut: int = 0) -> Cache:
        """A cache of transformers' own with a copy of the first `filled` slots behind `cut` columns of padding, and of
        the states."""
        made = DynamicCache(config=config)
        for number, ours in enumerate(self.layers):
            if isinstance(ours, SlotLayer):
                copies = (pad(held[:, :, :filled], (0, 0, cut, 0)).clone() for held in (ours.keys, ours.values))
                made.update(*copies, number)
            theirs = made.layers[number]
            if isinstance(ours, StateLayer):
                for number, states in ours.conv_states.items():
                    if states is not None:
                        theirs.update_conv_state(states.clone(), state_idx=number)
                for number, states in ours.recurrent_states.items():
                    if states is not None:
                        theirs.update_recurrent_state(states.clone(), state_idx=number)
        return made


class EncodedLayer(StaticLayer):
    """Keys and values of what an encoder gave, [B, H, size, E] each; written once an answer."""

    def __init__(self, size: int) -> None:
        super().__init__(max_cache_len=size)
        self.filled = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.filled = key_states.shape[2]
        if not self.is_initialized:
            SlotLayer.lazy_initialization(self, key_states, value_states)
        self.keys[:, :, : self.filled].copy_(key_states)
        self.values[:, :, : self.filled].copy_(value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.filled

    reorder_cache = SlotLayer.reorder_cache


class PairCache(EncoderDecoderCache):
    """The slots of a decoder, and what its encoder gave: see `SlotCache`.

    Args:
        size: places for what the encoder gives.
    """

    stateful, slotted = False, True

    def __init__(self, capacity: int, size: int, device: torch.device) -> None:
        self.size, self.slots = size, Slots(device)
        own = Cache(layer_class_to_replicate=lambda: SlotLayer(capacity, self.slots))
        super().__init__(own, Cache(layer_class_to_replicate=lambda: EncodedLayer(size)))

    def begin(self, length: int, fresh: bool) -> None:
        """See `Slots.begin`."""
        self.slots.begin(length, fresh)
        self.is_updated = dict.fromkeys(range(len(self.cross_attention_cache.layers)), not fresh)

    def released(self, config: Any, filled: int, cut: int = 0) -> Cache:
        """See `SlotCache.released`."""
        text = config.get_text_config(decoder=True)
        made = EncoderDecoderCache(DynamicCache(config=text), DynamicCache(config=text))
        for number, layer in enumerate(self.self_attention_cache.layers):
            made.self_attention_cache.update(
                layer.keys[:, :, :filled].clone(), layer.values[:, :, :filled].clone(), number
            )
        for number, layer in enumerate(self.cross_attention_cache.layers):
            held = (memory[:, :, : layer.filled].clone() for memory in (layer.keys, layer.values))
            made.cross_attention_cache.update(*held, number)
            made.is_updated[number] = True
        return made


def slot_cache(config: Any, capacity: int, device: torch.device) -> SlotCache:
    """A cache for a model of this transformers configuration, without memory until the first use.

    Raises:
        CaptureError: the model keeps something else than keys and values of each token, and states.
    """
    slots, layers = Slots(device), list[Any]()
    try:
        known = DynamicCache(config=config).layers
    except Exception as error:
        raise CaptureError(f"transformers has no cache for a {type(config).__name__}: {error}") from error
    for layer in known:
        kind = type(layer).__name__
        states = getattr(layer, "number_of_states", 1)
        if kind in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            layers.append(SlotLayer(capacity, slots))
        elif kind == "LinearAttentionLayer":
            layers.append(StateLayer(number_of_states=states))
        elif kind in ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"):
            layers.append(HybridLayer(capacity, slots, states))
        elif kind == "DummyLayer":
            layers.append(layer)
        else:
            raise CaptureError(
                f"{type(config).__name__} keeps its past in a {kind}, which memory of fixed slots cannot hold"
            )
    if not layers:  # nothing is said of them: one for each layer, of keys and values
        text = config.get_text_config(decoder=True)
        layers = [SlotLayer(capacity, slots) for _ in range(text.num_hidden_layers)]
    return SlotCache(layers, slots)
