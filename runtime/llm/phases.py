"""The steps of a session: what one recording serves, what became of it, and what is still to be recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from graph_capture.runtime.fused import FusedGraph
from graph_capture.runtime.llm.sampling import SamplingKind


class Pending:
    """A small tensor on its way to the host: what is launched after it is not waited for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor.clone()
        self._copied = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def tolist(self) -> list[Any]:
        """Its values."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()


class Key(NamedTuple):
    """What one recording serves."""

    what: str
    size: int
    kind: SamplingKind | None
    padded: bool


@dataclass
class Phase:
    """One captured step.

    Attributes:
        name: what it is.
        fused: its replay; None where it cannot be captured.
        reason: why it cannot.
        replays: how often it was replayed.
    """

    name: str
    fused: FusedGraph | None
    reason: str = ""
    replays: int = 0


class Wanted(NamedTuple):
    """A step that has run as it is, and is to be recorded when nobody waits: the step, its inputs, how many slots were
    filled before it, and how often it was wanted."""

    step: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    filled: int
    uses: int = 1
