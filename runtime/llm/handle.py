"""What ``generate`` of transformers carries as its cache while a session keeps keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from graph_capture.errors import CaptureError
from graph_capture.log import log
from graph_capture.runtime.llm.given import ModelCall, NotServed, Witness
from graph_capture.runtime.llm.serving import Serving
from graph_capture.runtime.llm.session import Session


@dataclass
class StepOutput(ModelOutput):
    """What a step gives: the logits for the next tokens, [B, 1, V], and the cache under the model's name for it."""

    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    cache_params: Cache | None = None


class SessionCache(Cache):
    """Stands for the slots of a session; the steps are the session's.

    Nothing but `serve` can use it: a model to which it gets on another way would find no keys and values in it.

    Args:
        engine: has the sessions.
        own: an empty cache of transformers', for calls that are not served.
        limit: tokens that there may be in the end.

    Attributes:
        declined: why the model has gone on as it is; None where it has not.
        witness: watches it, where a form of call was not met before.
        served: how many calls were answered.
    """

    def __init__(self, engine: Serving, own: Cache, limit: int) -> None:
        self._engine: Serving | None = engine
        self._session: Session | None = None
        self._own, self._limit = own, limit
        self._padding: list[int] = []
        self._cut = 0  # columns of padding that all prompts have, and the slots do not
        self.declined: str | None = None
        self.witness: Witness | None = None
        self.served = 0

    def serve(self, forward: Callable[..., ModelOutput], kwargs: Mapping[str, Any]) -> ModelOutput:
        """One call of the model: a prompt, or a token a row. What steps do not know, the model does as it is.

        Raises:
            CaptureError: the handle is closed.
        """
        engine = self._open()
        try:
            call = ModelCall.of(kwargs, engine.calling, self.get_seq_length())
            output = self._prompt(engine, call) if self._session is None else self._token(self._session, call)
        except NotServed as error:
            self.declined = str(error)
        except Exception as error:
            if self._session is not None:
                raise
            self.declined = f"{type(error).__name__}: {error}"  # if the call is at fault, it raises the same below
        else:
            self.served += 1
            output[engine.calling.cache_name] = self
            return output
        log.info("the model goes on as it is: %s", self.declined)
        own = self._own if self._session is None else self.released()
        output = forward(**{**kwargs, engine.calling.cache_name: own})
        if self.witness is not None:
            self.witness.saw(kwargs, output.logits)
        return output

    def _prompt(self, engine: Serving, call: ModelCall) -> ModelOutput:
        padded = len(set(call.padding)) > 1 or (not call.usual and call.padding[0] > 0)
        batch = call.ids.shape[0]
        if call.usual:
            session, reason = engine.proven(batch, padded, self._limit)
        else:
            session, reason, key = engine.proven_form(call, padded, self._limit)
            if session is None and reason is None:
                self.witness = Witness(key, engine.calling, self._own)
                reason = (
                    f"{', '.join(call.form) or 'this form'} is passed for the first time: the model runs as it is, and "
                    "is compared with captured steps afterwards"
                )
        if session is None:
            raise NotServed(reason or "")
        if call.usual:
            self._cut = min(call.padding)
            rows = [row[padding:] for row, padding in zip(call.ids.tolist(), call.padding, strict=True)]
            session.truncate(0)
            output = StepOutput(session.prefill(rows, None)[:, None])
        else:
            output = session.given_prompt(call)
        self._session, self._padding = session, call.padding
        return output

    def _token(self, session: Session, call: ModelCall) -> ModelOutput:
        if call.ids.shape[1] != 1:
            raise NotServed("several tokens follow a prompt at once")
        if call.padding != self._padding and call.arguments.get(session.calling.mask_name) is not None:
            raise NotServed("the attention mask is another one than the prompt's")
        return StepOutput(session.given_token(call)[:, None])

    def released(self) -> Cache:
        """A filled cache of transformers' own, for a caller who goes on from here."""
        self._open()
        if self._session is None:
            return self._own
        return self._session.cache.released(self._session.model.config, self._session.filled, self._cut)

    def close(self) -> None:
        """Forget what was generated: which tokens the slots hold is not known here. The handle serves nothing more."""
        if self._session is not None:
            self._session.truncate(0)
        self._engine = self._session = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        self._open()
        if self._session is None:  # a model that gives no cache back may have filled it all the same
            try:
                return int(self._own.get_seq_length())
            except ValueError:  # layers that keep a state alone have no length
                return 0
        return self._cut + self._session.filled

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self._open().capacity + self._cut

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._open()
        (self._own if self._session is None else self._session.cache).reorder_cache(beam_idx)

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

    def _open(self) -> Serving:
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
