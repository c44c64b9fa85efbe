"""`capture`: wrap a model so that each new signature is recorded once and replayed afterwards."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.fused import FusedGraph
from graph_capture.runtime.scheduler import FusionScheduler

from graph_capture.recorder import record
from graph_capture.signature import signature_key


class Captured:
    """A callable that records at the first call of each signature and replays the fused graph afterwards.

    A signature is the structure of the arguments, the shape, stride, dtype, device and aliasing of each tensor, and the
    value of everything else. At most `max_signatures` are kept; the one used longest ago goes first.

    Attributes:
        graphs: the fused graphs, the most recently used last.
    """

    def __init__(self, function: Callable[..., Any], config: FusionConfig | None, max_signatures: int) -> None:
        functools.update_wrapper(self, function, updated=())
        self._function = function
        self._scheduler = FusionScheduler(config)
        self._max_signatures = max_signatures
        self._graphs: OrderedDict[tuple[Any, ...], FusedGraph] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def graphs(self) -> tuple[FusedGraph, ...]:
        """The fused graphs, the most recently used last."""
        return tuple(self._graphs.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay, or record and return the recording's own result.

        Raises:
            CaptureError: the call cannot be recorded; see `record`.
        """
        key = signature_key(args, kwargs)
        with self._lock:
            fused = self._graphs.get(key)
            if fused is None:
                return self._record(key, args, kwargs)
            self._graphs.move_to_end(key)
        return fused(*args, **kwargs)

    def _record(self, key: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with record(*args, **kwargs) as recording:
            result = self._function(*args, **kwargs)
            recording.output(result)
        self._graphs[key] = self._scheduler.analyze(recording.graph)
        while len(self._graphs) > self._max_signatures:
            self._graphs.popitem(last=False)
        return result

    def explain(self) -> str:
        """The receipts of every signature seen so far."""
        return "\n\n".join(f"{fused.recorded.inputs}\n{fused.explain()}" for fused in self.graphs)

    def __repr__(self) -> str:
        return f"<captured {self._function!r:.60}: {len(self._graphs)} signatures>"


def capture(function: Callable[..., Any], config: FusionConfig | None = None, *, max_signatures: int = 16) -> Captured:
    """Wrap a module or function for inference: recorded at the first call of each new signature, replayed afterwards.

    Raises:
        ValueError: `max_signatures` is less than 1.
    """
    if max_signatures < 1:
        raise ValueError(f"max_signatures must be at least 1, got {max_signatures}")
    return Captured(function, config, max_signatures)
