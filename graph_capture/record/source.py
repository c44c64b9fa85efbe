"""Where the user's code is: the module path and the source line of the op being called."""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from graph_capture.cache import source_folders
from graph_capture.calls.foreign import LIBRARIES, adapters, handle_of
from graph_capture.ir.values import Source
from graph_capture.record.state import State

OUR_CODE = ("<signature>", "<plan>")  # where code that is written here says it comes from
# These leave their fast path where a torch function mode is active.
_SHY = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer, torch.nn.TransformerEncoder)
_TORCH = os.path.dirname(torch.__file__) + os.sep


@functools.cache
def _not_users() -> tuple[str, ...]:
    """How the names of files begin that are torch's or this package's."""
    return (_TORCH, *(os.path.join(os.path.abspath(folder), "") for folder in source_folders()))


@functools.cache
def is_user_file(file: str, unnamed: bool = False) -> bool:
    """Whether a file is the user's; code that was never in one (typed in, made by `exec`) only if `unnamed`."""
    if file.startswith("<") and (not unnamed or file.startswith(("<frozen", "<eval_with_key", *OUR_CODE))):
        return False
    return not file.startswith(_not_users()) and not file.endswith("contextlib.py")


def _is_users(frame: FrameType) -> bool:
    if not is_user_file(frame.f_code.co_filename):
        return False
    return str(frame.f_globals.get("__name__")).partition(".")[0] not in LIBRARIES


def caller() -> Source:
    """The innermost frame outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_users(frame):
        frame = frame.f_back
    return Source() if frame is None else Source("", frame.f_code.co_filename, frame.f_lineno)


def _hooks_in(table: dict[int, Any]) -> tuple[Any, ...]:
    """The hooks in one of torch's tables but for those of recordings."""
    owners = ((hook, getattr(hook, "__self__", None)) for hook in tuple(table.values()))
    return tuple([hook for hook, owner in owners if not isinstance(owner, ModulePaths)])


class Owner(NamedTuple):
    """Where a module holds a tensor: the table, the key in it, the path, and what lies there (maybe a wrapper)."""

    table: dict[str, Any]
    key: str
    path: str
    held: weakref.ref[Any]  # what the code replaces must not be kept alive

    @property
    def value(self) -> Any:
        """What lies there, while it does."""
        return self.held() if self.table.get(self.key) is self.held() else None


class ModulePaths:
    """Follows, through global forward hooks, which module this thread is in.

    A module called by the user's own code is a root; inside it, modules, parameters and buffers go by their names
    under that root. (torch's ModuleTracker is not used: its hooks act on every thread's calls.)

    Args:
        state: where to note what modules hold, before they run.

    Attributes:
        owners: id of a tensor that a module holds (of another library: of its handle) -> where.
        at: where the code is, if not where the interpreter is: an FX graph runs in its place.
    """

    def __init__(self, state: State | None = None) -> None:
        self.owners: dict[int, Owner] = {}
        self.at: Source | None = None
        self._state = state or State()
        self._foreign = bool(adapters())
        self._paths: dict[int, str] = {}  # id of a module -> its path
        self._roots: list[torch.nn.Module] = []  # kept alive, so that the ids stay valid
        self._stack: list[str] = []
        self._shy: list[Any] = []  # guards
        self._thread = threading.get_ident()
        self._handles: list[Any] = []
        for table in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
            self._state.see(_hooks_in(table), "a hook on all modules")
            self._state.probe(functools.partial(_hooks_in, table), "the hooks on all modules")

    def source(self) -> Source:
        """The current module path with the user's file and line."""
        at = self.at or caller()
        return Source(at.module or (self._stack[-1] if self._stack else ""), at.file, at.line)

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        if id(module) not in self._paths:
            # A module met inside a known one without being its child (built in forward) is named under it.
            self._roots.append(module)
            path = self._stack[-1] if self._stack else ""
            self._state.see(module, path)
            self._add(module, path)
        path = self._paths[id(module)]
        self._stack.append(path)
        if isinstance(module, _SHY):
            self._shy.append(torch._C.DisableTorchFunction())
            self._shy[-1].__enter__()

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == self._thread and self._stack:
            self._stack.pop()
            if isinstance(module, _SHY) and self._shy:
                self._shy.pop().__exit__(None, None, None)

    def _add(self, module: torch.nn.Module, path: str) -> None:
        if id(module) in self._paths:
            return
        self._paths[id(module)] = path
        if isinstance(module, torch.jit.ScriptModule):  # its parts live in C++ and are never called from Python
            kept = dict([*module.named_parameters(), *module.named_buffers()])
            for name, tensor in kept.items():
                self.owners.setdefault(
                    id(tensor), Owner(kept, name, f"{path}.{name}" if path else name, weakref.ref(tensor))
                )
            return
        held = vars(module)
        for table in (module._parameters, module._buffers, held):
            for name, value in table.items():
                foreign = self._foreign and not isinstance(value, torch.Tensor)
                held_as = handle_of(value) if foreign else value
                if (foreign and held_as is not None) or isinstance(held_as, torch.Tensor):
                    where = f"{path}.{name}" if path else name
                    self.owners.setdefault(id(held_as), Owner(table, name, where, weakref.ref(value)))
        for name, child in module._modules.items():
            if child is not None:
                self._add(child, f"{path}.{name}" if path else name)

    def owner_of(self, tensor: Any) -> Owner | None:
        """Where a module holds `tensor` (or a handle of another library's), if one does."""
        owner = self.owners.get(id(tensor))
        return owner if owner is not None and owner.value is not None else None

    def enter(self, module: Any) -> None:
        """`module`, of another library, is about to run."""
        self._enter(module, ())

    def leave(self, module: Any) -> None:
        """`module`, of another library, has run."""
        self._leave(module, (), None)

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
