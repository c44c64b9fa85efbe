"""What ``generate`` of transformers carries as its cache while a session keeps keys and values."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from graph_capture.errors import CaptureError
from graph_capture.runtime.llm.engine import InferEnginePython
from graph_capture.runtime.llm.session import Session


class NotServed(CaptureError):
    """A call of the model that captured steps do not serve."""


class SessionCache(Cache):
    """Stands for the slots of a session; the steps are the session's."""

    def __init__(self, engine: InferEnginePython) -> None:
        super().__init__(layers=[])
        self._engine = engine
        self._session: Session | None = None

    def serve(
        self, input_ids: Any = None, attention_mask: Any = None, logits_to_keep: Any = 1, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """One call of the model: a prompt, or a token."""
        if not isinstance(input_ids, torch.Tensor):
            raise NotServed("there are no input_ids")
        if self._session is None:
            self._session = self._engine.session(input_ids.shape[0])
            self._session.truncate(0)
        logits = _served(self._session, input_ids, attention_mask)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=self)

    def close(self) -> None:
        """Forget what was generated: which tokens the slots hold is not known here."""
        if self._session is not None:
            self._session.truncate(0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._session.filled if self._session is not None else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self._engine.capacity

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self._session is not None:
            self._session.cache.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        if self._session is not None and tokens_to_remove:
            self._session.truncate(self._session.filled - tokens_to_remove)

    @property
    def batch_size(self) -> int:
        return self._session.batch if self._session is not None else -1

    @property
    def is_initialized(self) -> bool:
        return self._session is not None


def _served(session: Session, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The logits of the next tokens, [B, V], for a call of the model.

    Args:
        session: prefilled where it has filled slots.
        ids: [B, L] int64.
        mask: [B, all tokens so far], 0 for padding on the left.

    Raises:
        NotServed: padding is elsewhere, or a prompt comes in pieces.
    """
    if session.filled:
        if ids.shape[1] != 1:
            raise NotServed("several tokens follow a prompt at once")
        session.tokens.copy_(ids)
        return session.decode(None)
    rows = ids.tolist()
    if mask is not None:
        if mask.dim() != 2:
            raise NotServed("the attention mask is not [B, L]")
        kept = mask.bool()
        if bool((kept[:, 1:] < kept[:, :-1]).any()) or not bool(kept[:, -1].all()):
            raise NotServed("padding is not on the left")
        rows = [row[len(row) - count :] for row, count in zip(rows, kept.sum(1).tolist(), strict=True)]
    return session.prefill(rows, None)
