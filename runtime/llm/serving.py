"""Who may be served by captured steps: an engine's sessions, what they rest on, and when they are given up."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from graph_capture.errors import CaptureError
from graph_capture.log import log
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.fuse import FusionScheduler
from graph_capture.runtime.llm.calling import Calling
from graph_capture.runtime.llm.given import STEPS, Form, ModelCall, Witness
from graph_capture.runtime.llm.memory import OutOfSlots, bucket
from graph_capture.runtime.llm.own import OwnSession
from graph_capture.runtime.llm.phases import Progress
from graph_capture.runtime.llm.proof import goes_further, prove, prove_form, shortly
from graph_capture.runtime.llm.session import SHORT, Session
from graph_capture.runtime.llm.state import AROUND, ModelState, Observer

SESSIONS = 2  # batch sizes whose caches are kept
ENGINE = FusionConfig(fusion_ratio=0.95)  # a step that is replayed for every token is worth it
FEW = 12  # tokens of prompts on which a batch proves itself ahead of its first use


class Serving:
    """The sessions of one model.

    A session's recordings, its slots and the proofs rest on the model that made them. Before each call the model is
    looked at: other weights cost what the slots hold, other parts or settings everything.

    Attributes:
        model: what is called.
        target: the module of transformers in it that generates.
        capacity: slots of a cache.
        sessions: by batch size (and places for what an encoder gives), the latest last.
        declined: why the latest call was left to the model's own ``generate``; None where it was not.
        eager_first: whether a new length of prompts is first answered as the model does it, and recorded afterwards.
    """

    def __init__(
        self, model: Any, target: Any, capacity: int, config: FusionConfig, progress: Progress | None = None
    ) -> None:
        self.model, self.target, self.capacity = model, target, capacity
        self.enable_fusion = self.eager_first = True
        self.sessions: OrderedDict[Any, Session] = OrderedDict()
        self.declined: str | None = None
        self.scheduler = FusionScheduler(config)
        self._progress = progress or (lambda _: None)
        self._proofs: dict[Form, tuple[int, str | None]] = {}  # as far as so many tokens; why not
        self._observer = Observer(model)
        self._seen: ModelState | None = None
        self._calling: Calling | None = None
        self._current: Session | OwnSession | None = None
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def calling(self) -> Calling:
        """How the model is called.

        Raises:
            CaptureError: its forward takes no cache.
        """
        if self._calling is None:
            self._calling = Calling(self.model, self.target)
        return self._calling

    def reset(self) -> None:
        """Forget what was said: nothing that was computed with earlier weights is used again.

        Needed only after a write that torch does not count and that reaches but a few values of a weight
        (``weight.data[3] = 0``); other changes are seen.
        """
        with self.alone():
            self.forget_prompts()
            for session in self.sessions.values():
                for phase in session.phases.values():
                    if phase.fused is not None:
                        phase.fused.refresh()

    def forget_prompts(self) -> None:
        """Let no prompt go on from what the slots hold."""
        for session in self.sessions.values():
            session.truncate(0)

    def explain(self) -> str:
        """What became of every captured step: the receipts, and what runs as it is and why."""
        parts = [] if self.declined is None else [f"the model runs as it is: {self.declined}"]
        for session in self.sessions.values():
            if session.lookup.cost:
                parts.append(str(session.lookup))
            for phase in session.phases.values():
                what = f"runs as it is: {phase.reason}" if phase.fused is None else str(phase.fused.explain())
                parts.append(f"{phase.name} ({phase.replays} replays)\n{what}")
        return "\n\n".join(parts) or "nothing has been captured yet"

    def stats(self) -> dict[str, Any]:
        """The cache and the steps, for programs."""
        phases = [phase for session in self.sessions.values() for phase in session.phases.values()]
        eager = {phase.name: phase.reason for phase in phases if phase.fused is None}
        return {
            "enable_fusion": self.enable_fusion,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "capacity": self.capacity,
            "filled": {batch: session.filled for batch, session in self.sessions.items()},
            "captured": {phase.name: phase.replays for phase in phases if phase.fused is not None},
            "eager": eager | ({} if self.declined is None else {"the model": self.declined}),
        }

    def session(self, batch: int, encoded: int = 0) -> Session:
        """The cache and the captured steps for so many sequences; made at the first use, the latest two are kept.

        Args:
            encoded: places for what an encoder gives.

        Raises:
            CaptureError: see `Session`.
        """
        key = (batch, encoded) if encoded else batch
        session = self.sessions.get(key)
        if session is None:
            while len(self.sessions) >= SESSIONS:
                self.sessions.popitem(last=False)
            self._progress(f"making a cache of {self.capacity} slots for {batch} sequences")
            scheduler, progress, recording = self.scheduler, self._progress, self._without_other_changes
            session = Session(self.calling, scheduler, batch, self.capacity, progress, recording, encoded)
            self.sessions[key] = session
        self.sessions.move_to_end(key)
        session.steps.fusing, session.eager_first = self.enable_fusion, self.eager_first
        return session

    def session_for(self, batch: int, padded: bool, total: int) -> Session | OwnSession:
        """What answers a call: captured steps, or the model as it is where they do not serve.

        Raises:
            CaptureError: there is no memory for a cache.
        """
        self.declined = self.hindrance()
        session: Session | OwnSession | None = None
        if self.declined is None:
            session, self.declined = self.proven(batch, padded, total)
        if session is None:
            log.info("the model answers as it is: %s", self.declined)
            session = OwnSession(self.model, batch, self.capacity, self.declined or "")
        self._current = session
        return session

    def proven(self, batch: int, padded: bool, total: int) -> tuple[Session | None, str | None]:
        """The session for so many rows, if the model has proved itself over it; else None, and the reason.

        Args:
            padded: whether rows differ in length.
            total: tokens that there may be in the end.

        Raises:
            OutOfSlots: there is no memory for a cache.
        """
        total = min(total, self.capacity)
        key = (batch > 1, padded)
        reached, reason = self._proofs.get(key, (0, None))
        if reason is not None:
            return None, reason
        try:
            session = self.session(batch)
        except OutOfSlots:
            raise
        except Exception as error:  # whatever the model's own code makes of our cache
            reason = str(error) if isinstance(error, CaptureError) else shortly(error)
            self.sessions.pop(batch, None)
            self._proofs[key] = (0, reason)
            return None, reason
        if reached == 0 or goes_further(self.target.config, reached, total):
            self._progress("comparing the model with itself over a cache of fixed slots")
            reason = prove(session, padded, total)
            self._proofs[key] = (max(reached, total), reason)
            self._absorb(session)
        self._current = session
        return (None, reason) if reason is not None else (session, None)

    def proven_form(self, call: ModelCall, padded: bool, total: int) -> tuple[Session | None, str | None, Form]:
        """As `proven`, for a call with more than tokens; without session and reason where its form was not met yet.

        Returns:
            Also what `learn` is to know it by.

        Raises:
            OutOfSlots: there is no memory for a cache.
        """
        key = (call.ids.shape[0] > 1, padded, call.form)
        reached, reason = self._proofs.get(key, (0, None))
        if reason is None and reached and goes_further(self.target.config, reached, total):
            if self.calling.encoder:
                reached = 0
            else:  # what tokens alone show holds for them here too
                _, reason = self.proven(*key[:2], total)
        if reason is not None or not reached:
            return None, reason, key
        self._current = session = self._session_of(call)
        lost = next((step.reason for name, step in session.phases.items() if name.form and step.fused is None), None)
        if lost is not None and self.enable_fusion:
            return None, f"its step cannot be captured: {lost}", key
        return session, None, key

    def learn(self, witness: Witness) -> None:
        """See whether captured steps give what the model gave in a call, so that they serve the next of its form."""
        if self._seen is not None:  # nobody but the model has run since
            before, self._seen = self._seen, self._observer.look()
            self._observer.disturbs(before, self._seen)
        if witness.prompt is None or (witness.steps < STEPS and witness.reason is None):
            return  # too short to say
        try:
            self._current = self._session_of(witness.prompt)
            reason = prove_form(self._current, witness)
        except Exception as error:  # whatever the model's own code makes of our cache
            reason = shortly(error)
        log.info("calls with %s: %s", witness.prompt.form, reason or "captured steps give the same")
        self._proofs[witness.key] = (witness.filled, reason)

    def _session_of(self, call: ModelCall) -> Session:
        length = call.encoded()
        if length and self.calling.pads:  # one place more than there is to hold: a mask always hides something
            length = bucket(length + 1)
        session = self.session(call.ids.shape[0], length)
        for path, name in self._observer.restless:  # a tensor that the model replaces at each call stays one memory
            held = vars(self.model.get_submodule(path)).get(name) if path != AROUND else None
            if isinstance(held, torch.Tensor):
                memory = session.kept.setdefault((path, name), held)
                if memory is not held and memory.shape == held.shape and memory.dtype == held.dtype:
                    memory.copy_(held)
                    setattr(self.model.get_submodule(path), name, memory)
        return session

    def settle(self, tokens: int) -> None:
        """After an answer of so many tokens: record what it ran as it is, and see whether batches may be served, so
        that neither is to be waited for when it comes."""
        session = self._current
        if session is None:
            return
        session.settle(tokens <= SHORT)
        plain = isinstance(session, Session) and (False, False) in self._proofs
        if tokens > SHORT and plain and (True, True) not in self._proofs:
            few = Session(self.calling, self.scheduler, 2, FEW + STEPS)
            for padded in (False, True):
                self._proofs.setdefault((True, padded), (1, prove(few, padded, few.capacity)))

    def hindrance(self) -> str | None:
        """Why no captured step may run here and now; None where nothing speaks against it."""
        if self._seen is not None and self._seen.hooked is not None:
            return f"a hook is registered on {self._seen.hooked}, and a replay calls none"
        if any(module.training for module in self.model.modules()):
            return "the model is in training mode"
        if torch._C._is_any_autocast_enabled():
            return "autocast is on"
        modes = [m for m in _get_current_function_mode_stack() if not isinstance(m, DeviceContext)]
        modes += _get_current_dispatch_mode_stack()
        if modes:
            return f"a {type(modes[0]).__name__} is active"
        try:
            self.calling  # noqa: B018
        except CaptureError as error:
            return str(error)
        return None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other threads' calls waiting, and look at the model.

        Raises:
            CaptureError: this thread has a stream under way.
        """
        if self._owner == threading.get_ident():
            raise CaptureError("this thread has a stream under way: read it to its end, or close() it")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                self._look()
                yield
            finally:
                self._owner = None

    def _look(self) -> None:
        """See what became of the model, and give up what does not hold any more."""
        state, before = self._observer.look(), self._seen
        self._seen = state
        if before is None:
            return
        changed = state.changed(before, self._observer.restless)
        if changed:
            log.info("the model has changed (%s): its steps are recorded again", ", ".join(changed[:3]))
            self.sessions.clear()
            self._proofs.clear()
            self._calling = self._current = None
        elif not state.same_weights(before):
            self.forget_prompts()

    @contextmanager
    def _without_other_changes(self) -> Iterator[None]:
        """What becomes of the model in here is our own doing."""
        before = self._observer.look()
        yield
        if self._seen is not None:
            quiet = not before.changed(self._seen, self._observer.restless) and before.same_weights(self._seen)
            if quiet:
                self._seen = self._observer.look()

    def _absorb(self, session: Session) -> None:
        """Find what the model changes in itself at each call: it says nothing about others' changes."""
        before = self._observer.look()
        try:
            session.prove_prompt([[0]] * session.batch)
            after = self._observer.look()
            session.prove_prompt([[0]] * session.batch)
        except Exception:  # it does not run over our cache, and is not served
            return
        finally:
            session.truncate(0)
        self._seen = self._observer.look()
        self._observer.disturbs(before, after)
        self._observer.disturbs(after, self._seen)
