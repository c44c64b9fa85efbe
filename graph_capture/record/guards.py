"""What a recording relies on outside its arguments: which weights, of which modules, in which mode.

The captured tensors are read at each replay, so new *values* are honoured by themselves. What the guards notices is a
*rebinding*: new memory behind a parameter, another parameter or submodule under the same name, a plain attribute or the
training flag of a module that ran, what its lists, dicts and objects (a config) hold themselves, a hook.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from graph_capture.calls.foreign import handle_of, is_module
from graph_capture.calls.structure import items_of, slots_of
from graph_capture.ir.values import same_value
from graph_capture.record.source import PLAIN, ModulePaths

_MISSING = object()
_moved: MutableMapping[torch.Tensor, set[int]] = WeakTensorKeyDictionary()  # where a tensor's memory was before
_get = dict.get


class Guards:
    """The captured tensors' names and addresses, and the guards on the modules that ran.

    Attributes:
        addresses: address (`data_ptr`) of each captured tensor -> its value name.
        rebound: plain attributes (full paths) that the recorded code itself changed.
        moves: how many times captured tensors have been found at new addresses (see `move`).
    """

    def __init__(self, modules: ModulePaths, captured: Mapping[str, torch.Tensor]) -> None:
        self.moves = 0
        self._guards: list[tuple[dict[str, Any], str, Any, str]] = []
        self._pointers = [(tensor, _address(tensor), name) for name, tensor in captured.items()]
        self._sizes: list[tuple[Mapping[Any, Any], int, str]] = []
        self._held: list[tuple[Any, tuple[Any, ...], str]] = []
        self.addresses: Mapping[int, str] = {pointer: name for _, pointer, name in self._pointers}
        for tensor in captured.values():
            owner = modules.owner_of(tensor)
            if owner is not None:
                self._guards.append((owner.table, owner.key, owner.value, owner.path))
                handle = handle_of(owner.value)
                if handle is not None:  # a wrapper may get other memory
                    held = vars(owner.value)
                    self._guards += [(held, key, handle, owner.path) for key in held if held[key] is handle]
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
            for name, (value, items) in modules.containers[id(module)].items():
                if vars(module).get(name) is value and _alike(
                    items_of(value), items
                ):  # else the code changes it itself
                    self._guards.append((vars(module), name, value, _join(path, name)))
                    self._held.append((value, items, _join(path, name)))
            tables: dict[str, Mapping[Any, Any]] = {
                "hooks": getattr(module, "_forward_hooks", {}),
                "pre-hooks": getattr(module, "_forward_pre_hooks", {}),
            }
            for name, part in module._modules.items():
                if part is not None and (
                    isinstance(part, (torch.nn.ModuleList, torch.nn.ModuleDict)) or is_module(part)
                ):
                    tables[f"modules in {name!r}"] = part._modules
            self._sizes += [(table, len(table), f"{what} of {path!r}") for what, table in tables.items()]
            child = module
            while id(child) in modules.parents and id(child) not in linked:
                linked.add(id(child))
                parent, name = modules.parents[id(child)]
                self._guards.append((parent._modules, name, child, modules.entered.get(child, name)))
                child = parent

    def broken(self) -> str | None:
        """The first guard that no longer holds, as a sentence; None where all hold."""
        if self._holds():
            return None
        for table, key, value, name in self._guards:
            now = table.get(key, _MISSING)
            if now is not value and not _equal(now, value):
                return f"{name or key!r} was {_text(value)} and is now {_text(now)}"
        self._follow()
        for tensor, pointer, name in self._pointers:
            if _address(tensor) != pointer:
                return f"the memory of {name!r} was replaced (.data = ..., .to(...), load_state_dict(assign=True))"
        for entries, count, what in self._sizes:
            if len(entries) != count:
                return f"there were {count} {what} and are now {len(entries)}"
        for value, items, name in self._held:
            if not _alike(items_of(value), items):
                return f"what {name!r} holds changed"
        return None

    def _holds(self) -> bool:
        """Whether nothing was even touched. Every replay asks, so the long loops run in C."""
        seen = self._columns
        return (
            all(map(operator.is_, map(_get, seen.tables, seen.keys), seen.values))
            and all(map(operator.eq, map(torch.Tensor.data_ptr, seen.tensors), seen.pointers))
            and all(map(operator.eq, map(len, seen.entries), seen.counts))
            and seen.held.untouched()
        )

    @cached_property
    def _columns(self) -> _Columns:
        tables, keys, values, _ = zip(*self._guards, strict=True) if self._guards else ((), (), (), ())
        strided = [(tensor, pointer) for tensor, pointer, _ in self._pointers if tensor.layout == torch.strided]
        held = {id(value): (value, items) for value, items, _ in self._held}
        return _Columns(
            tables,
            keys,
            values,
            [tensor for tensor, _ in strided],
            [pointer for _, pointer in strided],
            [entries for entries, _, _ in self._sizes],
            [count for _, count, _ in self._sizes],
            _Held(list(held.values())),
        )

    def _follow(self) -> None:
        """Take over the new addresses of tensors that `move` has moved."""
        for index, (tensor, pointer, name) in enumerate(self._pointers):
            if _address(tensor) != pointer and pointer in _moved.get(tensor, ()):
                self._pointers[index] = (tensor, _address(tensor), name)
                self.moves += 1
                self.__dict__.pop("_columns", None)
        self.addresses = {pointer: name for _, pointer, name in self._pointers}

    def without(self, names: Iterable[str]) -> None:
        """Drop the guards on the plain attributes `names` (full paths)."""
        dropped = set(names)
        self._guards = [guard for guard in self._guards if guard[3] not in dropped]
        self.__dict__.pop("_columns", None)

    def __iter__(self) -> Iterator[str]:
        """The guards, a line each."""
        for _, _, value, name in self._guards:
            yield f"{name} is {_text(value)}"
        for _, pointer, name in self._pointers:
            yield f"{name} is at {pointer:#x}"

    def __len__(self) -> int:
        return len(self._guards) + len(self._pointers) + len(self._sizes) + len(self._held)


class _Columns(NamedTuple):
    """The guards, column by column."""

    tables: Sequence[dict[str, Any]]
    keys: Sequence[str]
    values: Sequence[Any]
    tensors: Sequence[torch.Tensor]
    pointers: Sequence[int]
    entries: Sequence[Mapping[Any, Any]]
    counts: Sequence[int]
    held: _Held


class _Held:
    """What containers and instances hold, side by side, so that a few sweeps in C find it untouched."""

    def __init__(self, held: Sequence[tuple[Any, tuple[Any, ...]]]) -> None:
        self._all, self._others = held, list[tuple[Any, tuple[Any, ...]]]()
        self._instances: list[Any] = []
        self._own: list[dict[str, Any]] = []  # their attributes
        self._iterables: list[Any] = []
        self._lengths: list[int] = []
        self._elements: list[Any] = []
        self._tables: list[dict[Any, Any]] = []
        self._values: list[Any] = []
        for value, items in held:
            kind: Any = type(value)
            plain = kind in (list, tuple, set)
            table = value if kind is dict else None
            if table is None and not plain and not isinstance(value, (dict, list, tuple, set)):
                table = _attributes(value)
                if table is not None:
                    self._instances.append(value)
                    self._own.append(table)
            if table is None and not plain:
                self._others.append((value, items))
                continue
            self._iterables.append(value if table is None else table)
            count = len(items) if table is None else len(items) // 2
            self._lengths.append(count)
            self._elements += items[:count]
            if table is not None:
                self._tables.append(table)
                self._values += items[count:]

    def untouched(self) -> bool:
        """Whether all of it is as it was; what is unsure is compared in full."""
        chain = itertools.chain.from_iterable
        same = (
            all(map(operator.is_, map(_attributes, self._instances), self._own))
            and all(map(operator.eq, map(len, self._iterables), self._lengths))
            and all(map(operator.is_, chain(self._iterables), self._elements))
            and all(map(operator.is_, chain(map(dict.values, self._tables)), self._values))
        )
        return all(itertools.starmap(_untouched, self._others if same else self._all))


def _attributes(value: Any) -> dict[str, Any] | None:
    """Where an instance holds its attributes, if that is one dict."""
    kind: Any = type(value)
    return object.__getattribute__(value, "__dict__") if kind.__dictoffset__ and not slots_of(kind) else None


def _untouched(value: Any, items: tuple[Any, ...]) -> bool:
    """Whether a container or an instance holds the very objects `items`; what is unsure is compared in full."""
    if type(value) is list or type(value) is tuple:
        same = len(value) == len(items) and all(map(operator.is_, value, items))
    else:
        table = value if isinstance(value, dict) else _attributes(value)
        same = (
            table is not None
            and 2 * len(table) == len(items)
            and all(map(operator.is_, itertools.chain(table, table.values()), items))
        )
    return same or _alike(items_of(value), items)


def move(tensor: torch.Tensor, memory: torch.Tensor) -> None:
    """Let `tensor` live in `memory`, which holds the same values; no guard takes that for a replacement."""
    _moved.setdefault(tensor, set()).add(_address(tensor))
    tensor.data = memory


def _address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def _equal(now: Any, value: Any) -> bool:
    return now is value or (isinstance(value, PLAIN) and same_value(now, value))


def _alike(now: tuple[Any, ...] | None, items: tuple[Any, ...]) -> bool:
    return now is not None and len(now) == len(items) and all(map(_equal, now, items))


def _text(value: Any) -> str:
    if value is _MISSING:
        return "absent"
    if isinstance(value, torch.Tensor):
        return f"a {type(value).__name__} at {_address(value):#x}"
    return f"a {type(value).__name__}" if isinstance(value, torch.nn.Module) else repr(value)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
