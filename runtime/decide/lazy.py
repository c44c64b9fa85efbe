"""A kernel that is made when somebody first asks for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class LazyKernel:
    """Stands for a kernel whose measured times are known, so that it need not be made to decide against it.

    Args:
        make: makes the kernel; its FusionError comes out of whatever is asked first.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._made: Any = None

    @property
    def made(self) -> Any:
        """The kernel itself."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def __call__(self, *tensors: Any) -> Any:
        return self.made(*tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)

    def __repr__(self) -> str:
        return f"<LazyKernel {self._made or 'not made yet'}>"
