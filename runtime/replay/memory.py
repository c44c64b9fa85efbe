"""Memory that several plans share: arenas for intermediate values, what captures, and how much graphs may keep."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from types import CodeType
from typing import Any, Protocol

import torch

from graph_capture.log import log
from graph_capture.runtime.replay.arena import Arena
from graph_capture.runtime.replay.first_run import Forms

HOLDERS: set[CodeType] = set()  # what has a variable `turn`


class Holder(Protocol):
    """A replay: something that has plans and graphs, and can do without them."""

    def forget(self) -> None:
        """Drop everything that was made of what was seen."""

    def release(self) -> None:
        """Drop the graphs."""

    def move(self) -> None:
        """Leave the arenas; the next replay plans anew, by what was seen."""


class Memory:
    """Arenas that several plans share: one replay at a time has them.

    Args:
        budget: bytes that graphs may keep, all together; None sets no limit.

    Attributes:
        forms: how ops can be called, as far as a replay has tried it.
        captures: what captures replays as CUDA graphs, if anything does; its private pool is shared as the arenas are.
        arenas: the arena of each device.
        planning: whose plan is being made.
    """

    captures: Any = None
    planning: Holder | None = None

    def __init__(self, budget: int | None = None) -> None:
        self.arenas: dict[torch.device, Arena] = {}
        self.forms: Forms = {}
        self.budget = budget
        self._users: weakref.WeakSet[Holder] = weakref.WeakSet()
        self._graphs: OrderedDict[weakref.ref[Holder], int] = OrderedDict()  # bytes; those used longest ago first
        self._turns: dict[str, tuple[object, int]] = {}  # who has the arenas: a variable of a replay, and its thread
        self._lock = threading.Lock()  # of who takes them from one that is gone
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # where the latest replay ran
        _memories.add(self)

    def arena(self, device: torch.device) -> Arena:
        """The arena of a device."""
        if device not in self.arenas:
            self.arenas[device] = Arena(device, self._empty)
        return self.arenas[device]

    def _empty(self) -> None:
        """Have all plans leave the arenas, but the one that is being made."""
        for user in tuple(self._users):
            if user is not self.planning:
                user.move()
        self._graphs.clear()

    def joins(self, user: Holder) -> None:
        """A replay uses this memory from now on."""
        self._users.add(user)

    def captured(self, user: Holder, nbytes: int) -> bool:
        """A replay has graphs that keep so many bytes; False where that is too much even alone. Graphs that were used
        longest ago go, until all fit."""
        self.used(user, nbytes)
        total = sum(self._graphs.values())
        while self.budget is not None and total > self.budget:
            oldest, size = self._graphs.popitem(last=False)
            holder = oldest()
            total -= size
            if holder is not None:
                holder.release()
            if holder is user:
                return False
            log.info("%d bytes of CUDA graphs were dropped: the budget is %d", size, self.budget)
        return True

    def used(self, user: Holder, nbytes: int | None = None) -> None:
        """The graphs of a replay run, or are new."""
        key = weakref.ref(user)
        self._graphs[key] = self._graphs[key] if nbytes is None else nbytes
        self._graphs.move_to_end(key)
        for gone in [ref for ref in self._graphs if ref() is None]:
            del self._graphs[gone]

    def release(self) -> None:
        """Give back what is kept for replays to be fast: graphs, plans, arenas. They are made again."""
        for user in tuple(self._users):
            user.forget()
        self._graphs.clear()
        self.arenas.clear()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # it may be of use on another stream
            torch.cuda.empty_cache()

    def enter(self, turn: object = None) -> bool:
        """Take the arenas for a replay that keeps `turn` in a variable of that name; False where another has them.

        One call of C takes them, so that there is nothing between having them and knowing it.
        """
        mine = (turn or self, threading.get_ident())
        held = self._turns.setdefault("arenas", mine)
        if held is mine:
            return True
        if self._is_held(*held) or not self._lock.acquire(blocking=False):
            return False
        try:
            if self._turns.get("arenas") is held:
                self._turns["arenas"] = mine
            return self._turns.setdefault("arenas", mine) is mine
        finally:
            self._lock.release()

    def leave(self, turn: object = None) -> None:
        """Give them back, if they were taken."""
        held = self._turns.get("arenas")
        if held is not None and held[0] is (turn or self):
            self._turns.pop("arenas", None)

    def _is_held(self, turn: object, thread: int) -> bool:
        """Whether who has taken the arenas still runs: an interrupt between two lines may have ended it."""
        frame = sys._current_frames().get(thread)
        if turn is self:
            return frame is not None
        while frame is not None:
            if frame.f_code in HOLDERS and frame.f_locals.get("turn") is turn:
                return True
            frame = frame.f_back
        return False

    def on_this_stream(self, devices: Sequence[torch.device]) -> bool:
        """Order a replay after the one before, which may have run on another stream; False where that cannot be."""
        if torch.cuda.is_current_stream_capturing():  # a graph of the caller's must not share buffers with replays
            return False
        for device in devices:
            stream = torch.cuda.current_stream(device)
            before = self._streams.get(device)
            if before is not None and before != stream:
                stream.wait_stream(before)
            self._streams[device] = stream
        return True

    def after_fork(self) -> None:
        """In a child process: the parent's other threads, and their replays, are gone."""
        self._lock = threading.Lock()
        if self._turns.get("arenas", (None, 0))[1] != threading.get_ident():
            self._turns.clear()


_memories: weakref.WeakSet[Memory] = weakref.WeakSet()


def _after_fork() -> None:
    for memory in _memories:
        memory.after_fork()


os.register_at_fork(after_in_child=_after_fork)
