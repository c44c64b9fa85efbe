"""Calls with arguments that the steps hand on: what stands for images, what an encoder gave, a caller's positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from graph_capture.errors import CaptureError
from graph_capture.runtime.llm.calling import Calling

if TYPE_CHECKING:
    from graph_capture.runtime.llm.session import Session

STEPS = 2  # decoded tokens that a proof looks at
# Tensors are inputs of a recording; whatever else is passed is part of what it was made for.
Form = tuple[Any, ...]


class NotServed(CaptureError):
    """A call of the model that captured steps do not serve."""


# Arguments that say what is so anyway.
_IMPLIED: dict[str, tuple[Any, ...]] = {
    "use_cache": (None, True),
    "return_dict": (None, True),
    "logits_to_keep": (0, 1),
}
# Whatever asks for more than the logits of the last token, or comes in the place of tokens.
_REFUSED = ("inputs_embeds", "decoder_inputs_embeds", "labels", *_IMPLIED)


@dataclass(frozen=True)
class ModelCall:
    """One call of a model's forward, taken apart.

    Attributes:
        ids: [B, L] int64.
        padding: columns of padding on the left of each row.
        usual: whether positions are those that follow from padding, and nothing else is passed.
        arguments: all of it, without the cache.
        more: of them, what is neither tokens nor their mask nor implied.
    """

    ids: torch.Tensor
    padding: list[int]
    usual: bool
    arguments: dict[str, Any]
    more: dict[str, Any]

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], calling: Calling, filled: int) -> ModelCall:
        """
        Args:
            filled: tokens of each row that the cache has.

        Raises:
            NotServed: it asks for what steps do not give, or there are no tokens, or padding is not on the left.
        """
        arguments = {name: value for name, value in kwargs.items() if name != calling.cache_name}
        more = {name: value for name, value in arguments.items() if not _is_implied(name, value)}
        ids, mask = more.pop(calling.ids_name, None), more.pop(calling.mask_name, None)
        for name in more:
            if name in _REFUSED or name.startswith("output_"):
                raise NotServed(f"{name} is passed to the model")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            raise NotServed("there are no input_ids")
        total = filled + ids.shape[1]
        padding = _padding(mask, total) or [0] * ids.shape[0]
        usual = not calling.encoder and set(more) <= {calling.places_name}
        positions = more.get(calling.places_name)
        if usual and positions is not None:
            numbers = torch.arange(filled, total, device=positions.device)
            follow = (numbers - torch.tensor(padding, device=positions.device)[:, None]).clamp(min=0)
            usual = positions.dim() == 2 and bool((positions == follow).all())
        return cls(ids, padding, usual, arguments, more)

    @property
    def form(self) -> Form:
        """What the model has to prove itself for: the names of what is passed."""
        return tuple(sorted(self.more))

    def encoded(self) -> int:
        """The length of what the encoder gave; 0 where there is none."""
        outputs = self.more.get("encoder_outputs")
        return outputs[0].shape[1] if outputs else 0

    def step(self, encoding: Mapping[str, Any]) -> tuple[Form, Any, list[torch.Tensor]]:
        """For a token that follows: what a recording is made for, how its arguments are put together, the tensors.

        Args:
            encoding: takes the place of what the encoder gave.

        Raises:
            NotServed: there is something among the arguments that cannot be compared.
        """
        more = dict(self.more)
        for name in more:
            if name.endswith("token_type_ids"):  # some versions pass those of all tokens so far
                more[name] = more[name][..., -1:]
        more |= encoding
        leaves, spec = pytree.tree_flatten(more)
        tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, torch.Tensor)]  # a slice's strides may grow
        rest = tuple(torch.Tensor if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        form = (tuple(sorted(more)), str(spec), rest, tuple((tensor.shape, tensor.dtype) for tensor in tensors))
        try:
            hash(form)
        except TypeError as error:
            raise NotServed(f"the model is passed something that cannot be compared ({error})") from error

        def together(inputs: tuple[torch.Tensor, ...]) -> dict[str, Any]:
            each = iter(inputs)
            held = [next(each) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            return pytree.tree_unflatten(held, spec)

        return form, together, [self.ids, *tensors]

    def padded_encoding(self, size: int) -> dict[str, Any]:
        """What the encoder gave, as the steps after a prompt are passed it: `size` long, with a mask."""
        outputs = self.more["encoder_outputs"]
        states = outputs[0]
        rest = size - states.shape[1]
        if rest == 0:
            return {}
        mask = self.more.get("attention_mask")
        mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device) if mask is None else mask
        longer = torch.nn.functional.pad(states, (0, 0, 0, rest))
        return {
            "encoder_outputs": type(outputs)(longer) if not isinstance(outputs, tuple) else (longer,),
            "attention_mask": torch.nn.functional.pad(mask, (0, rest)),
        }


class Witness:
    """What a model itself did in a call of a form that was not met before: its first calls, and their logits.

    Args:
        key: of the proof that is wanted.
        cache: transformers' own, by which the model's calls are known; it is watched.

    Attributes:
        prompt: its first call.
        filled, steps: tokens that it has read, and steps after the prompt.
        reason: why nothing can be learned.
    """

    def __init__(self, key: Form, calling: Calling, cache: Any) -> None:
        self.key, self.cache = key, cache
        self._calling = calling
        self._doings: list[tuple[ModelCall, torch.Tensor] | torch.Tensor] = []
        self.reason: str | None = None
        self.filled, self.steps = 0, -1
        self.prompt: ModelCall | None = None
        reorder = cache.reorder_cache

        def reordered(rows: torch.Tensor) -> None:
            self._doings.append(rows)
            reorder(rows)

        cache.reorder_cache = reordered

    def saw(self, kwargs: Mapping[str, Any], logits: torch.Tensor) -> None:
        """The model was called with its cache and gave these logits, [B, L, V]."""
        if self.steps >= STEPS or self.reason is not None:
            return
        try:
            call = ModelCall.of(kwargs, self._calling, self.filled)
        except NotServed as error:
            self.reason = str(error)
            return
        self.filled += call.ids.shape[1]
        self.prompt = self.prompt or call
        self._doings.append((call, logits[:, -1].clone()))
        self.steps += 1

    def repeated(self, session: Session) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Our logits and the model's own, [B, V] each, after the prompt and each step."""
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for doing in self._doings:
            if isinstance(doing, torch.Tensor):  # beams
                session.cache.reorder_cache(doing)
                continue
            call, logits = doing
            ours = session.given_token(call, proving=True) if pairs else session.given_prompt(call).logits[:, -1]
            pairs.append((ours.clone(), logits))
            if len(pairs) > self.steps:
                break
        return pairs


def _is_implied(name: str, value: Any) -> bool:
    if name in _IMPLIED:
        return not isinstance(value, torch.Tensor) and value in _IMPLIED[name]
    return value is None or value is False or (isinstance(value, (dict, list, tuple)) and not value)


def _padding(mask: torch.Tensor | None, total: int) -> list[int] | None:
    """Columns of padding on the left of each row.

    Args:
        mask: [B, total], 0 for padding.

    Raises:
        NotServed: it is of another shape, has other values, or padding elsewhere.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[1] != total:
        raise NotServed("the attention mask is not [B, L]")
    kept = mask.bool()
    if not bool((mask == kept).all()):
        raise NotServed("the attention mask has other values than 0 and 1")
    if bool((kept[:, 1:] < kept[:, :-1]).any()) or not bool(kept[:, -1].all()):
        raise NotServed("padding is not on the left")
    return (total - kept.sum(1)).tolist()
