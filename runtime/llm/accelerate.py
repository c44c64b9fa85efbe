"""`accelerate`: the user's own ``model.generate`` over captured steps."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from graph_capture.errors import CaptureError
from graph_capture.log import log
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.llm.calling import generating
from graph_capture.runtime.llm.engine import InferEnginePython
from graph_capture.runtime.llm.session import Progress

# What generate() may be given besides options: it goes through the loop that is transformers' own.
_SERVED = frozenset(
    {
        *("input_ids", "attention_mask", "tokenizer", "streamer"),
        *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"),
    }
)
# Options that choose among logits, or say when to end. Any other, also of a transformers to come, may change how the
# model is called.
_OPTIONS = frozenset(
    {
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time", "stop_strings"),
        *("do_sample", "num_beams", "use_cache", "num_return_sequences", "return_dict_in_generate"),
        *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids", "renormalize_logits"),
        *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
        *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "sequence_bias"),
        *("suppress_tokens", "begin_suppress_tokens", "watermarking_config", "output_scores", "output_logits"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
        *("compile_config", "disable_compile", "transformers_version"),
    }
)
_ASSISTING = ("is_assistant", "num_assistant", "assistant_", "max_matching", "target_lookbehind", "speculation_type")


class Accelerated:
    """What `accelerate` puts beside a model, as ``model.accelerated``.

    A copy of the model, or one that was saved and loaded whole, is accelerated on its own: it has an engine of its own,
    made at its first call.

    Attributes:
        declined: why the latest call of ``generate`` ran as it is; None where it did not.
    """

    def __init__(
        self, model: Any, target: Any, config: FusionConfig | None, max_length: int | None, progress: Progress | None
    ):
        self.declined: str | None = None
        self._model, self._target = model, target
        self._options: dict[str, Any] = {"config": config, "max_length": max_length}
        self._progress = progress
        self._engine: InferEnginePython | None = None
        self._own = {name: vars(target).get(name) for name in ("generate", "forward")}  # a library's, if any

    @property
    def engine(self) -> InferEnginePython:
        """It has the captured steps: ``explain()``, ``stats()``, ``enable_fusion``, ``reset()``."""
        if self._engine is None:
            self._engine = InferEnginePython(self._target, progress=self._progress, **self._options)
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_engine": None, "_progress": None, "declined": None}

    def explain(self) -> str:
        """See `InferEnginePython.explain`."""
        return self.engine.explain()

    def undo(self) -> None:
        """Leave the model as it was."""
        for name, own in self._own.items():
            if isinstance(vars(self._target).get(name), _Method):
                if own is None:
                    del vars(self._target)[name]
                else:
                    vars(self._target)[name] = own
        for holder in (self._model, self._target):
            if vars(holder).get("accelerated") is self:
                del vars(holder)["accelerated"]

    def original(self, name: str) -> Any:
        """The model's own method of that name."""
        own = self._own[name]
        return own if own is not None else getattr(type(self._target), name).__get__(self._target)

    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, over captured steps where they serve."""
        from graph_capture.runtime.llm.handle import NotServed, SessionCache

        generate = self.original("generate")
        try:
            self.declined = self._reason(inputs, generation_config, args, kwargs)
        except CaptureError as error:  # a model that no engine takes
            self.declined = str(error)
        if self.declined is None:
            streamer = kwargs.get("streamer")
            handed = kwargs if streamer is None else {**kwargs, "streamer": _Streamer(streamer)}
            cache: SessionCache | None = None
            try:
                with self.engine.alone():
                    reason = self.engine.hindrance()
                    if reason is not None:
                        raise NotServed(reason)
                    returned = bool(self._asked("return_dict_in_generate", generation_config, kwargs))
                    handle = cache = SessionCache(self.engine, self._total(inputs, generation_config, kwargs), returned)
                    own: dict[str, Any] = {self.engine.calling.cache_name: handle}
                    try:
                        result = generate(inputs, generation_config, **{**handed, **own})
                        if getattr(result, "past_key_values", None) is handle:
                            result.past_key_values = handle.released()
                    finally:
                        handle.close()
                    self.engine.settle(handle.served)
                    return result
            except Exception as error:
                # Before the first token nothing has happened that a second call would repeat: if the call itself is at
                # fault, that one raises the same.
                if cache is not None and cache.served:
                    raise
                known = isinstance(error, NotServed)
                self.declined = str(error) if known else f"{type(error).__name__}: {error}"
            if streamer is not None and handed["streamer"].given:
                kwargs = {**kwargs, "streamer": _Streamer(streamer, handed["streamer"].given)}
        log.info("generate() runs as it is: %s", self.declined)
        return generate(inputs, generation_config, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; a step of a captured session where that is whose cache comes."""
        from graph_capture.runtime.llm.handle import SessionCache

        for name in ("past_key_values", "cache_params"):
            if isinstance(kwargs.get(name), SessionCache):
                return kwargs[name].serve(*args, **kwargs)
        return self.original("forward")(*args, **kwargs)

    def _reason(self, inputs: Any, generation_config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the call is not one for captured steps; None where it may be."""
        if args:
            return "logits_processor and what follows it are passed by position"
        configs = [config for config in (generation_config, self._target.generation_config) if config is not None]
        options = vars(type(configs[-1])())
        for name, value in kwargs.items():
            known = name in _SERVED or (name in options and (name in _OPTIONS or not _is_set(value)))
            if not known and value is not None:
                return f"{name} is asked for"
        for name, value in ((name, value) for config in configs for name, value in vars(config).items()):
            plain = name in _OPTIONS or name.startswith(("_", *_ASSISTING))
            if not plain and _is_set(value) and value != options.get(name):
                return f"{name} is asked for"
        if self._asked("use_cache", generation_config, kwargs) is False:
            return "use_cache is False"
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
            return "there are no input_ids"
        total = self._total(inputs, generation_config, kwargs)
        if total > self.engine.capacity:
            return f"{total} tokens do not fit into {self.engine.capacity} slots: take a larger max_length"
        return None

    def _total(self, inputs: Any, generation_config: Any, kwargs: dict[str, Any]) -> int:
        """How many tokens there may be at the end."""
        length = (kwargs["input_ids"] if inputs is None else inputs).shape[1]
        new = self._asked("max_new_tokens", generation_config, kwargs)
        return length + new if new else (self._asked("max_length", generation_config, kwargs) or length + 20)

    def _asked(self, name: str, generation_config: Any, kwargs: dict[str, Any]) -> Any:
        """An option: of the call, of the configuration that it passes, or of the model's own."""
        for found in (kwargs, vars(generation_config or self), vars(self._target.generation_config)):
            if found.get(name) is not None:
                return found[name]
        return None


class _Method:
    """A method of an accelerated model, with the signature that the model's own has; transformers looks at it."""

    def __init__(self, accelerated: Accelerated, name: str) -> None:
        self._accelerated, self.__name__ = accelerated, name

    @property
    def __wrapped__(self) -> Any:
        return self._accelerated.original(self.__name__)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._accelerated, self.__name__)(*args, **kwargs)


class _Streamer:
    """Hands on what a streamer is given, but for the first `skipped` pieces, which it has."""

    def __init__(self, inner: Any, skipped: int = 0) -> None:
        self._inner, self._skipped = inner, skipped
        self.given = 0

    def put(self, value: Any) -> None:
        """A piece."""
        self.given += 1
        if self.given > self._skipped:
            self._inner.put(value)

    def end(self) -> None:
        """There is no more."""
        self._inner.end()


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
    why, ``model.accelerated.explain()`` shows the receipts, `unaccelerate` leaves the model as it was.

    Args:
        model: changed in place; a wrapper around one (of an adapter library) has the model within it changed.
        config: how steps are fused.
        max_length: slots of the cache, for prompt and answer together (default: what the model was made for, at most
            2048). Longer calls run as they are.
        progress: is told, in words, what takes long.

    Returns:
        The model.

    Raises:
        CaptureError: it is not a causal language model of transformers.
    """
    target = generating(model)
    unaccelerate(model)
    ours = Accelerated(model, target, config, max_length, progress)
    for name in ("generate", "forward"):
        vars(target)[name] = _Method(ours, name)
    for holder in (model, target):
        vars(holder)["accelerated"] = ours
    return model


def unaccelerate(model: Any) -> Any:
    """Leave a model as it was before `accelerate`; one that was not accelerated is left alone.

    Returns:
        The model.
    """
    for module in model.modules():
        ours = vars(module).get("accelerated")
        if isinstance(ours, Accelerated):
            ours.undo()
    return model


def _is_set(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (value is not None and value is not False and value != [])
