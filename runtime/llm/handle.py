"""What ``generate`` of transformers carries as its cache while a session keeps keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from graph_capture.errors import CaptureError
from graph_capture.runtime.llm.engine import InferEnginePython
from graph_capture.runtime.llm.session import Session


class NotServed(CaptureError):
    """A call of the model that captured steps do not serve."""


# What a call may have besides tokens, mask, positions and cache: arguments that say what is so anyway.
_IMPLIED: dict[str, tuple[Any, ...]] = {
    "use_cache": (None, True),
    "return_dict": (None, True),
    "logits_to_keep": (0, 1),
}


@dataclass
class _OutputWithStates(ModelOutput):
    """What models give that call their cache so."""

    logits: torch.Tensor | None = None
    cache_params: Cache | None = None


class SessionCache(Cache):
    """Stands for the slots of a session; the steps are the session's.

    Nothing but `serve` can use it: a model to which it gets on another way would find no keys and values in it.

    Args:
        engine: has the sessions.
        limit: tokens that there may be in the end.
        returned: whether the caller gets the cache in the end.

    Attributes:
        served: how many calls it has answered.
    """

    def __init__(self, engine: InferEnginePython, limit: int, returned: bool = False) -> None:
        self._engine: InferEnginePython | None = engine
        self._session: Session | None = None
        self._limit, self._returned = limit, returned
        self._cut = 0  # columns of padding that all prompts have, and the slots do not
        self.served = 0

    def serve(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any
    ) -> ModelOutput:
        """One call of the model: a prompt, or a token a row.

        Raises:
            NotServed: it has an argument that the steps do not know, or a form that they do not have.
            CaptureError: the handle is closed.
        """
        engine = self._open()
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
            raise NotServed("there are no input_ids")
        for name, value in kwargs.items():
            if name not in ("past_key_values", "cache_params") and not _is_implied(name, value):
                raise NotServed(f"{name} is passed to the model")
        rows = _rows(input_ids, attention_mask, position_ids, self.get_seq_length())
        if rows is None:
            assert self._session is not None
            self._session.tokens.copy_(input_ids)
            logits = self._session.decode(None)
        else:
            if self._session is not None:
                raise NotServed("several tokens follow a prompt at once")
            longest = max(map(len, rows))
            self._cut = input_ids.shape[1] - longest
            if self._cut and self._returned:
                raise NotServed("all prompts begin with padding, and the cache is to be returned")
            session, reason = engine.proven(len(rows), any(len(row) < longest for row in rows), self._limit)
            if session is None:
                raise NotServed(reason)
            session.truncate(0)
            logits = session.prefill(rows, None)
            self._session = session
        self.served += 1
        if self._session.calling.cache_name == "cache_params":
            return _OutputWithStates(logits=logits[:, None], cache_params=self)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=self)

    def released(self) -> Cache:
        """A filled cache of transformers' own, for a caller who goes on from here."""
        self._open()
        if self._session is None:
            raise NotServed("nothing has been generated")
        return self._session.cache.released(self._session.model.config, self._session.filled)

    def close(self) -> None:
        """Forget what was generated: which tokens the slots hold is not known here. The handle serves nothing more."""
        if self._session is not None:
            self._session.truncate(0)
        self._engine = self._session = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        self._open()
        return self._cut + self._session.filled if self._session is not None else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self._open().capacity + self._cut

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._open()
        if self._session is not None:
            self._session.cache.reorder_cache(beam_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        self._open()
        return self._session is not None

    @property
    def batch_size(self) -> int:
        self._open()
        return self._session.batch if self._session is not None else -1

    @property
    def is_initialized(self) -> bool:
        self._open()
        return self._session is not None

    @property
    def is_compileable(self) -> bool:
        return False

    def __len__(self) -> int:
        return 1  # truthy: it is there

    def __getattribute__(self, name: str) -> Any:
        if name in _OTHERS:
            raise NotServed(f"the model uses {name!r} of a cache whose memory belongs to captured steps")
        return super().__getattribute__(name)

    def _open(self) -> InferEnginePython:
        if self._engine is None:
            raise CaptureError(
                "this cache belongs to a call of generate() that has ended: ask for return_dict_in_generate=True, and "
                "go on with the past_key_values of its result"
            )
        return self._engine


# What else a cache of transformers has: all of it would be wrong.
_OTHERS = frozenset(name for name in dir(Cache) if not name.startswith("__") and name not in vars(SessionCache)) | {
    "layers",
    "key_cache",
    "value_cache",
    "self_attention_cache",
    "cross_attention_cache",
}


def _is_implied(name: str, value: Any) -> bool:
    if name in _IMPLIED:
        return not isinstance(value, torch.Tensor) and value in _IMPLIED[name]
    return value is None or value is False or (isinstance(value, (dict, list, tuple)) and not value)


def _rows(
    ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None, filled: int
) -> list[list[int]] | None:
    """The tokens of each prompt without its padding; None where one token a row follows.

    Args:
        ids: [B, L] int64.
        mask: [B, all tokens so far], 0 for padding on the left.
        positions: [B or 1, L] int64, those that follow from the mask.

    Raises:
        NotServed: padding is elsewhere, or tokens have other positions.
    """
    length = ids.shape[1]
    if mask is not None:
        if mask.dim() != 2 or mask.shape[1] != filled + length:
            raise NotServed("the attention mask is not [B, L]")
        kept = mask.bool()
        if not bool((mask == kept).all()):
            raise NotServed("the attention mask has other values than 0 and 1")
        if bool((kept[:, 1:] < kept[:, :-1]).any()) or not bool(kept[:, -1].all()):
            raise NotServed("padding is not on the left")
        counts = kept.sum(1).tolist()
    else:
        counts = [filled + length] * ids.shape[0]
    if positions is not None:
        usual = torch.arange(filled, filled + length, device=positions.device)
        padding = torch.tensor([filled + length - count for count in counts], device=positions.device)
        if positions.dim() != 2 or not bool((positions == (usual - padding[:, None]).clamp(min=0)).all()):
            raise NotServed("position_ids are not those that follow from the mask")
    if filled and length == 1:
        return None
    return [row[len(row) - count :] for row, count in zip(ids.tolist(), counts, strict=True)]
