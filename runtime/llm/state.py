"""What a model is at one moment: its parts and settings, and its weights, as far as an answer depends on them.

An engine keeps recordings, caches and proofs of a model that somebody else may change: load other weights, switch an
adapter, cast it, replace a module, patch a forward. It looks before each answer, and keeps only what still holds.
"""

from __future__ import annotations

import enum
import sys
import types
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SAMPLE = 32  # values of each weight that are compared: writes that torch does not count (`.data`) reach most of them
DEEPEST = 6  # containers within containers that are opened; what lies deeper counts by identity
_MANY = 512  # entries of a container that is opened
_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)
_CLOSED = (nn.Module, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
AROUND = "torch"  # the path of what lies around all modules
# What `accelerate` puts on a model; the methods where they are ours.
_OWN = frozenset({"accelerated", "generate", "forward", "_prepare_cache_for_generation"})
# Where transformers collects hidden states, and leaves hooks behind that do nothing until it does so again.
_COLLECTING = "transformers.utils.output_capturing"
_SEEN_APART = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *_HOOKS})
_SIMPLE = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})  # most of what there is


@dataclass
class ModelState:
    """A look at a model.

    Attributes:
        parts: modules, settings, classes, and which tensors there are, with the name of each.
        places: of each tensor: its version and its address.
        values: a sample of the values of each weight, a tensor for each dtype and device.
        hooked: where a forward hook is registered; None where none is.
    """

    names: list[tuple[str, str]] = field(default_factory=list)
    parts: list[Any] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    hooked: str | None = None

    def changed(self, before: ModelState, but: frozenset[tuple[str, str]] = frozenset()) -> list[str]:
        """The names of parts that are others than they were, `but` these."""
        if self.names == before.names:
            pairs = zip(self.names, before.parts, self.parts, strict=True)
            return [
                _joined(name) for name, old, new in pairs if old is not new and not _same(old, new) and name not in but
            ]
        old, new = (dict(zip(state.names, state.parts, strict=True)) for state in (before, self))
        return [
            _joined(name)
            for name in {**old, **new}
            if name not in but and (name not in old or name not in new or not _same(old[name], new[name]))
        ]

    def same_weights(self, before: ModelState) -> bool:
        """Whether the same tensors, of which no part has changed, hold the same sample of values."""
        return (
            self.places == before.places
            and len(self.values) == len(before.values)
            and all(map(torch.equal, self.values, before.values))
        )


class Observer:
    """Looks at a model again and again.

    Attributes:
        restless: names of parts that the model itself changes at each call; they say nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.restless: frozenset[tuple[str, str]] = frozenset()

    def look(self) -> ModelState:
        """The model as it is now; a few milliseconds for hundreds of modules."""
        state = ModelState()
        tensors: list[torch.Tensor] = []
        opened: set[int] = set()
        for path, module in self._model.named_modules():
            self._module(_Adder(state, tensors, opened, path), module)
        self._global(state)
        state.places = [(_version(tensor), _address(tensor)) for tensor in tensors]
        state.values = self._sample(tensors)
        return state

    def disturbs(self, before: ModelState, after: ModelState) -> None:
        """Nobody but the model has run between these looks: what differs are its own doings."""
        old, new = (dict(zip(state.names, state.parts, strict=True)) for state in (before, after))
        self.restless |= {name for name, part in new.items() if name not in old or not _same(old[name], part)}

    def _module(self, add: _Adder, module: nn.Module) -> None:
        held = vars(module)
        add("", module)
        for table in (held["_parameters"], held["_buffers"]):
            for name, tensor in table.items():
                add(name, tensor)
        for name in _HOOKS:
            hooks = [hook for hook in (held.get(name) or {}).values() if getattr(hook, "__module__", "") != _COLLECTING]
            if hooks:
                add.inside(name, hooks)
                add.state.hooked = add.state.hooked or add.path or type(module).__name__
        for name, child in held["_modules"].items():
            add(f"{name}:", child)
        for name, value in held.items():
            if name not in _SEEN_APART and not (name in _OWN and _is_ours(value)):
                (add.plain if type(value) in _SIMPLE else add.inside)(name, value)
        for base in type(module).__mro__:
            if base is nn.Module:
                break
            if id(base) not in add.opened:
                add.opened.add(id(base))
                add.functions(base.__qualname__, vars(base))
                around = sys.modules.get(base.__module__)
                if around is not None and id(around) not in add.opened:
                    add.opened.add(id(around))
                    add.functions(around.__name__, vars(around))

    def _global(self, state: ModelState) -> None:
        """What lies around all modules."""
        hooks = [nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks]
        if any(hooks):
            state.hooked = state.hooked or "all modules"
        add = _Adder(state, [], set(), AROUND)
        add("default dtype", torch.get_default_dtype())
        add("default device", torch.get_default_device())

    @staticmethod
    def _sample(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # Views of the weights are not kept: linears are merged only where nobody else holds their memory.
        kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        with torch.no_grad():
            for tensor in tensors:
                count = tensor.numel()
                if tensor.layout == torch.strided and not tensor.is_meta and count and _is_dense(tensor):
                    step = max(1, count // SAMPLE)
                    view = tensor.as_strided((-(-count // step),), (step,), tensor.storage_offset())
                    kinds.setdefault((tensor.dtype, tensor.device), []).append(view)
            return [torch.cat(group).view(torch.uint8) for group in kinds.values()]


class _Adder:
    """Adds what one module holds to a state."""

    def __init__(self, state: ModelState, tensors: list[torch.Tensor], opened: set[int], path: str) -> None:
        self.state, self.opened, self.path = state, opened, path
        self._tensors = tensors

    def plain(self, name: str, value: Any) -> None:
        """Something that counts by its value."""
        self.state.names.append((self.path, name))
        self.state.parts.append(value)

    def __call__(self, name: str, value: Any) -> None:
        """Something that counts by its value or its identity."""
        self.plain(name, value if isinstance(value, _PLAIN) else _frozen(value))
        if isinstance(value, torch.Tensor):
            self.plain(f"{name} is", (value.shape, value.dtype, value.device, value.layout))
            self._tensors.append(value)

    def functions(self, owner: str, held: Mapping[str, Any]) -> None:
        """The functions of a class or a Python module: somebody may put others in their places."""
        for name, value in list(held.items()):
            if isinstance(value, types.FunctionType):
                self(f"{owner}.{name}()", value)

    def inside(self, name: str, value: Any, depth: int = 0) -> None:
        """Something that counts by what it holds, where that can be seen."""
        if type(value) in _SIMPLE:
            return self.plain(name, value)
        if id(value) in self.opened or depth > DEEPEST or isinstance(value, (*_PLAIN, torch.Tensor)):
            return self(name, value)  # or seen under another name
        entries = None if isinstance(value, _CLOSED) else _entries(value)
        if entries is None or len(entries) > _MANY:
            return self(name, value)
        self.opened.add(id(value))
        if not isinstance(value, (list, tuple, set, frozenset, dict)):
            self(name, value)
        else:
            self.plain(name, len(entries))
        for key, inner in entries:
            self.inside(f"{name}.{key}", inner, depth + 1)
        return None


def _entries(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container or an instance holds."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if isinstance(value, (set, frozenset)):
        return [(repr(item), item) for item in sorted(value, key=repr)]
    held = getattr(value, "__dict__", None)
    return list(held.items()) if isinstance(held, dict) else None


def _frozen(part: Any) -> Any:
    """What counts by identity, without being kept alive."""
    try:
        return weakref.ref(part)
    except TypeError:
        return part


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if isinstance(old, weakref.ref) or isinstance(new, weakref.ref):
        return isinstance(old, weakref.ref) and isinstance(new, weakref.ref) and old() is new() is not None
    if isinstance(new, (*_PLAIN, tuple)):
        return type(old) is type(new) and (old == new or (old != old and new != new))
    return False


def _is_ours(value: Any) -> bool:
    return type(value).__module__.startswith("graph_capture.")


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided and not tensor.is_meta else 0


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements lie next to each other, in whatever order."""
    return tensor.is_contiguous() or (tensor.dim() == 2 and tensor.t().is_contiguous())


def _joined(name: tuple[str, str]) -> str:
    return ".".join(filter(None, name))
