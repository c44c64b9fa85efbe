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
        self._lock = threading.Lock()
        self._turn: object | None = None  # a local variable of the replay that has the arenas
        self._holder = 0  # the thread whose replay that is
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
        """Take the arenas for a replay that keeps `turn` in a variable of that name; False where another has them."""
        with self._lock:
            if self._turn is not None and self._is_held():
                return False
            self._turn, self._holder = turn or self, threading.get_ident()
        return True

    def leave(self, turn: object = None) -> None:
        """Give them back, if they were taken."""
        if self._turn is (turn or self):
            self._turn = None

    def _is_held(self) -> bool:
        """Whether who has taken the arenas still runs: an interrupt between two lines may have ended it."""
        frame = sys._current_frames().get(self._holder)
        if self._turn is self:
            return frame is not None
        while frame is not None:
            if frame.f_code in HOLDERS and frame.f_locals.get("turn") is self._turn:
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
        if self._holder != threading.get_ident():
            self._turn = None


_memories: weakref.WeakSet[Memory] = weakref.WeakSet()


def _after_fork() -> None:
    for memory in _memories:
        memory.after_fork()


os.register_at_fork(after_in_child=_after_fork)
