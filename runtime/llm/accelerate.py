"""`accelerate`: the user's own ``model.generate`` over captured steps."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

from graph_capture.errors import CaptureError
from graph_capture.log import log
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.llm.calling import generating, slots_for
from graph_capture.runtime.llm.phases import Progress
from graph_capture.runtime.llm.serving import ENGINE, Serving

_METHODS = ("generate", "forward", "_prepare_cache_for_generation")
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")  # a prompt, then a token a row


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
        self._config, self._max_length, self._progress = config, max_length, progress
        self._engine: Serving | None = None
        self._handles: list[Any] = []  # of the call under way
        self._own = {name: vars(target).get(name) for name in _METHODS}  # a library's, if any

    @property
    def engine(self) -> Serving:
        """It has the captured steps: ``explain()``, ``stats()``, ``enable_fusion``, ``reset()``."""
        if self._engine is None:
            capacity = slots_for(self._target, self._max_length)
            self._engine = Serving(self._target, self._target, capacity, self._config or ENGINE, self._progress)
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_engine": None, "_progress": None, "declined": None, "_handles": []}

    def explain(self) -> str:
        """See `Serving.explain`."""
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

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, over captured steps where they serve."""
        generate = self.original("generate")
        with ExitStack() as stack:
            try:
                engine = self.engine
                stack.enter_context(engine.alone())
                self.declined = engine.hindrance()
            except CaptureError as error:  # a model that no engine takes, or a call within a call
                self.declined = str(error)
            if self.declined is None:
                return self._served(engine, generate, args, kwargs)
            stack.close()
            log.info("generate() runs as it is: %s", self.declined)
            before = _serving.set(None)
            try:
                return generate(*args, **kwargs)
            finally:
                _serving.reset(before)

    def _served(self, engine: Serving, generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """With `engine` ours alone: generate, and record what it ran as it is."""
        before = _serving.set(self)
        self._handles, self.declined = [], "no cache is prepared"  # but where one is
        try:
            result = generate(*args, **kwargs)
            cache = getattr(result, "past_key_values", None)
            if self._handles and cache is self._handles[-1]:
                result.past_key_values = cache.released()
        finally:
            _serving.reset(before)
            handles, self._handles = self._handles, []
            for handle in handles:
                self.declined = handle.declined or self.declined
                handle.close()
        for handle in handles:
            if handle.witness is not None:
                engine.learn(handle.witness)
        engine.settle(sum(handle.served for handle in handles))
        return result

    def _prepare_cache_for_generation(self, config: Any, model_kwargs: dict[str, Any], mode: Any, *rest: Any) -> Any:
        """As transformers' own; where our steps may serve, a handle takes the place of its cache."""
        from transformers import GenerationMixin

        from graph_capture.runtime.llm.handle import SessionCache

        serving = _serving.get() is self
        name = self.engine.calling.cache_name if serving else ""
        given = serving and model_kwargs.get(name) is not None
        result = self.original("_prepare_cache_for_generation")(config, model_kwargs, mode, *rest)
        if not serving:
            return result
        limit, capacity = config.max_length, self.engine.capacity
        asked = [option for option in ("cache_implementation", "prefill_chunk_size") if getattr(config, option, None)]
        self.declined = None
        if given:
            self.declined = f"{name} is passed"
        elif model_kwargs.get(name) is None:
            self.declined = "use_cache is False" if config.use_cache is False else "the model keeps a cache of its own"
        elif mode not in _MODES or config.is_assistant:
            self.declined = f"{getattr(mode, 'value', mode)} is asked for"
        elif asked:
            self.declined = f"{asked[0]} is asked for"
        elif limit > capacity:
            self.declined = f"{limit} tokens do not fit into {capacity} slots: take a larger max_length"
        elif config.return_dict_in_generate and type(self._target).generate is not GenerationMixin.generate:
            self.declined = "the model's own generate() takes caches apart"
        else:
            for handle in self._handles:  # that one calls transformers' several times
                handle.close()
            self._handles.append(SessionCache(self.engine, model_kwargs[name], limit))
            model_kwargs[name] = self._handles[-1]
        return result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; a step of a captured session where that is whose cache comes."""
        from graph_capture.runtime.llm.handle import SessionCache

        own = self.original("forward")
        cache = kwargs.get("past_key_values", kwargs.get("cache_params"))
        if isinstance(cache, SessionCache):
            return cache.serve(own, {**dict(zip(inspect.signature(own).parameters, args, strict=False)), **kwargs})
        output = own(*args, **kwargs)
        if cache is not None:
            for handle in self._handles:
                if handle.witness is not None and handle.witness.cache is cache:
                    handle.witness.saw(kwargs, output.logits)
        return output


_serving: ContextVar[Accelerated | None] = ContextVar("accelerated", default=None)  # whose call is under way


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


def accelerate(
    model: Any,
    config: FusionConfig | None = None,
    *,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Have a model of transformers generate over captured, fused steps.

    ``model.generate`` goes on taking what it took, logits processors, streamers and beams included, and gives the same
    tokens but for rounding. Models with an encoder, and those that see, read their prompt as they are and decode over
    captured steps, from the second call of a form on. Calls that captured steps cannot serve run as they are;
    ``model.accelerated.declined`` says why, ``model.accelerated.explain()`` shows the receipts, `unaccelerate` leaves
    the model as it was.

    Args:
        model: changed in place; a wrapper around one (of an adapter library) has the model within it changed.
        config: how steps are fused.
        max_length: slots of the cache, for prompt and answer together (default: what the model was made for, at most
            2048). Longer calls run as they are.
        progress: is told, in words, what takes long.

    Returns:
        The model.

    Raises:
        CaptureError: it is no model of transformers that generates.
    """
    target = generating(model, encoders=True)
    unaccelerate(model)
    ours = Accelerated(model, target, config, max_length, progress)
    for name in _METHODS:
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
