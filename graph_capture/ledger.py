"""What a recording relies on outside its arguments: which weights, of which modules, in which mode.

The captured tensors are read at each replay, so new *values* are honoured by themselves. What the ledger notices is a
*rebinding*: new memory behind a parameter, another parameter or submodule under the same name, a plain attribute or the
training flag of a module that ran, a hook.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from graph_capture.ops import same_value
from graph_capture.source import PLAIN, ModulePaths

_MISSING = object()


class Ledger:
    """The captured tensors' names and addresses, and the guards on the modules that ran.

    Attributes:
        addresses: address (`data_ptr`) of each captured tensor -> its value name.
        rebound: plain attributes (full paths) that the recorded code itself changed.
    """

    def __init__(self, modules: ModulePaths, captured: Mapping[str, torch.Tensor]) -> None:
        self._guards: list[tuple[dict[str, Any], str, Any, str]] = []
        self._pointers = [(tensor, _address(tensor), name) for name, tensor in captured.items()]
        self._hooks: list[tuple[dict[Any, Any], int, str]] = []
        self.addresses: Mapping[int, str] = {pointer: name for _, pointer, name in self._pointers}
        for tensor in captured.values():
            if id(tensor) in modules.owners:
                table, key, path = modules.owners[id(tensor)]
                self._guards.append((table, key, tensor, path))
        self.rebound = frozenset(
            _join(path, name)
            for module, path in modules.entered.items()
            for name, value in modules.attributes[id(module)].items()
            if not _equal(vars(module).get(name, _MISSING), value)
        )
        linked: set[int] = set()
        for module, path in modules.entered.items():
            for name, value in modules.attributes[id(module)].items():
                self._guards.append((vars(module), name, value, _join(path, name)))
            self._hooks += [(hooks, len(hooks), path) for hooks in (module._forward_hooks, module._forward_pre_hooks)]
            child = module
            while id(child) in modules.parents and id(child) not in linked:
                linked.add(id(child))
                parent, name = modules.parents[id(child)]
                self._guards.append((parent._modules, name, child, modules.entered.get(child, name)))
                child = parent

    def broken(self) -> str | None:
        """The first guard that no longer holds, as a sentence; None where all hold."""
        for table, key, value, name in self._guards:
            now = table.get(key, _MISSING)
            if now is not value and not _equal(now, value):
                return f"{name or key!r} was {_text(value)} and is now {_text(now)}"
        for tensor, pointer, name in self._pointers:
            if _address(tensor) != pointer:
                return f"the memory of {name!r} was replaced (.data = ..., .to(...), load_state_dict(assign=True))"
        for hooks, count, path in self._hooks:
            if len(hooks) != count:
                return f"the forward hooks of {path or 'the module'!r} changed"
        return None

    def without(self, names: Iterable[str]) -> None:
        """Drop the guards on the plain attributes `names` (full paths)."""
        dropped = set(names)
        self._guards = [guard for guard in self._guards if guard[3] not in dropped]

    def __iter__(self) -> Iterator[str]:
        """The guards, a line each."""
        for _, _, value, name in self._guards:
            yield f"{name} is {_text(value)}"
        for _, pointer, name in self._pointers:
            yield f"{name} is at {pointer:#x}"

    def __len__(self) -> int:
        return len(self._guards) + len(self._pointers) + len(self._hooks)


def _address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def _equal(now: Any, value: Any) -> bool:
    return now is value or (isinstance(value, PLAIN) and same_value(now, value))


def _text(value: Any) -> str:
    if value is _MISSING:
        return "absent"
    if isinstance(value, torch.Tensor):
        return f"a {type(value).__name__} at {_address(value):#x}"
    return f"a {type(value).__name__}" if isinstance(value, torch.nn.Module) else repr(value)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
