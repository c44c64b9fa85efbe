"""Where the user's code is: the module path and the source line of the op being called."""

from __future__ import annotations

import os
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from graph_capture.graph import Source

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep


def _is_user_code(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return not file.startswith((_TORCH, _OURS, "<")) and not file.endswith("contextlib.py")


def caller() -> Source:
    """The innermost frame outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_user_code(frame):
        frame = frame.f_back
    return Source() if frame is None else Source("", frame.f_code.co_filename, frame.f_lineno)


class ModulePaths:
    """Follows, through global forward hooks, which module this thread is in.

    A module called by the user's own code is a root; inside it, modules, parameters and buffers go by their names
    under that root. (torch's ModuleTracker is not used: its hooks act on every thread's calls.)
    """

    def __init__(self) -> None:
        self.parameter_names: dict[int, str] = {}  # id of a parameter or buffer -> its name
        self._paths: dict[int, str] = {}  # id of a module -> its path
        self._roots: list[torch.nn.Module] = []  # kept alive, so that the ids stay valid
        self._stack: list[str] = []
        self._thread = threading.get_ident()
        self._handles: list[Any] = []

    def source(self) -> Source:
        """The current module path with the user's file and line."""
        at = caller()
        return Source(self._stack[-1] if self._stack else "", at.file, at.line)

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        if id(module) not in self._paths:
            self._add_root(module)
        self._stack.append(self._paths[id(module)])

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == self._thread and self._stack:
            self._stack.pop()

    def _add_root(self, module: torch.nn.Module) -> None:
        # A module met inside a known one without being its child (built in forward) is named under it.
        prefix = self._stack[-1] if self._stack else ""
        self._roots.append(module)
        for name, child in module.named_modules():
            self._paths.setdefault(id(child), ".".join(filter(None, (prefix, name))) or "")
        for tensors in (module.named_parameters(), module.named_buffers()):
            for name, tensor in tensors:
                self.parameter_names.setdefault(id(tensor), ".".join(filter(None, (prefix, name))))

    def __enter__(self) -> ModulePaths:
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._roots.clear()
