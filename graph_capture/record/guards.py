"""What a recording relies on outside its arguments: everything that its run read.

The captured tensors are read at each replay, so new *values* are honoured by themselves. Guards notice everything else
that `graph_capture.record.state` has seen: another tensor or submodule under a name, new memory behind a parameter, an
attribute of any kind that changed, came or went, a hook, a class, a global, a default.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from graph_capture.calls.foreign import handle_of
from graph_capture.calls.structure import VALUES
from graph_capture.record.entries import Entry, Table, text
from graph_capture.record.source import ModulePaths
from graph_capture.record.words import Words

_moved: MutableMapping[torch.Tensor, set[int]] = WeakTensorKeyDictionary()  # where a tensor's memory was before
SHOWN = 400  # lines of guards that are printed


class Guards:
    """The captured tensors' names and addresses, and everything else that must be as it was.

    Args:
        captured: the captured tensors, by name.
        entries: what else was read.
        modules: where modules hold tensors.
        changed: what the run itself changed: name, what it was, what it is.

    Attributes:
        addresses: address (`data_ptr`) of each captured tensor -> its value name.
        moves: how many times captured tensors have been found at new addresses (see `move`).
    """

    def __init__(
        self,
        captured: Mapping[str, torch.Tensor],
        entries: Sequence[Entry] = (),
        modules: ModulePaths | None = None,
        changed: Sequence[tuple[str, Any, Any]] = (),
    ) -> None:
        self.moves = 0
        self.changed = tuple(changed)
        self._entries = [*entries, *_wrappers(captured, modules)]
        self._tensors = _Tensors(captured)
        self._words: Words | None = None
        self._watched: list[Entry] = []  # of which entry each of the words is a part
        self._loose: list[Entry] = []  # compared at each call

    @property
    def addresses(self) -> Mapping[int, str]:
        """Address of each captured tensor -> its value name."""
        return self._tensors.addresses

    def broken(self) -> str | None:
        """The first guard that no longer holds, as a sentence; None where all hold."""
        if self._words is None:
            return self._first()
        touched = self._loose
        if not self._words.same():
            touched = [*dict.fromkeys(self._watched[place] for place in self._words.changed()), *touched]
        found = _first_of(touched)
        if found is None and touched is not self._loose:
            self._words.settle()
        return found or self._broken_tensor()

    def _first(self) -> str | None:
        """Compare everything in full; watch it from now on if it holds."""
        found = _first_of(self._entries)
        if found is None:
            words = Words()
            self._watched, self._loose = [], []
            for entry in self._entries:
                before = len(words)
                words.unsure = False
                entry.watch(words)
                self._watched += [entry] * (len(words) - before)
                if words.unsure:
                    self._loose.append(entry)
            words.settle()
            self._words = words
        return found or self._broken_tensor()

    def _broken_tensor(self) -> str | None:
        if self._tensors.untouched():
            return None
        self.moves += self._tensors.follow()
        return self._tensors.broken()

    def __iter__(self) -> Iterator[str]:
        """The guards, a line each: plain values, where tensors lie, and how many others there are."""
        others = 0
        shown = set()
        for entry in self._entries:
            for name, value in entry.lines():
                line = f"{name} is {text(value)}"
                if isinstance(value, VALUES) and "__" not in name and "_is_full_backward" not in name:
                    shown.add(line)
                    if len(shown) <= SHOWN:
                        yield line
                else:
                    others += 1
        yield from self._tensors.lines()
        yield f"... and {others + max(0, len(shown) - SHOWN)} more: objects, functions, names and order"

    def __len__(self) -> int:
        return len(self._entries) + len(self._tensors.addresses)


def _first_of(entries: Sequence[Entry]) -> str | None:
    for entry in entries:
        found = entry.difference()
        if found is not None:
            name, before, now = found
            return f"{name} was {text(before)} and is now {text(now)}"
    return None


def _wrappers(captured: Mapping[str, torch.Tensor], modules: ModulePaths | None) -> Iterator[Entry]:
    """Where modules hold the captured tensors; a wrapper of another library's may get other memory."""
    for tensor in captured.values():
        owner = modules.owner_of(tensor) if modules is not None else None
        if owner is None:
            continue
        parent = owner.path.rpartition(".")[0]
        yield Table(owner.table, parent, (owner.key,), (owner.value,), whole=False)
        handle = handle_of(owner.value)
        if handle is not None:
            held = vars(owner.value)
            keys = tuple(key for key in held if held[key] is handle)
            yield Table(held, owner.path, keys, (handle,) * len(keys), whole=False)


class _Tensors:
    """The captured tensors: where they lie, and how."""

    def __init__(self, captured: Mapping[str, torch.Tensor]) -> None:
        self._names = list(captured)
        self._tensors = list(captured.values())
        self._layouts = [_layout(tensor) for tensor in self._tensors]
        strided = [t for t in self._tensors if t.layout == torch.strided and type(t) in _PLAIN]
        self._strided, self._pointers = strided, [tensor.data_ptr() for tensor in strided]
        self._others = [place for place, t in enumerate(self._tensors) if t.layout != torch.strided]
        self._all = [_address(tensor) for tensor in self._tensors]
        self._checks: dict[tuple[bool, bool], Any] = {}  # torch's own checks of layouts, by the modes around them
        self.addresses = dict(zip(self._all, self._names, strict=True))

    def untouched(self) -> bool:
        """Whether all of them lie where they did, as they did."""
        if not all(map(operator.eq, map(torch.Tensor.data_ptr, self._strided), self._pointers)):
            return False
        mode = (torch.is_inference_mode_enabled(), torch._C._is_any_autocast_enabled())
        check = self._checks.get(mode)
        if check is None:
            if self.broken() is not None:
                return False
            check = self._checks[mode] = _check_of(self._strided)
        return bool(check(*self._strided)) or self.broken() is None

    def follow(self) -> int:
        """Take over the new addresses of tensors that `move` has moved; how many there are."""
        count = 0
        for place, tensor in enumerate(self._tensors):
            if _address(tensor) != self._all[place] and self._all[place] in _moved.get(tensor, ()):
                self._all[place], self._layouts[place] = _address(tensor), _layout(tensor)
                count += 1
        if count:
            self._pointers = [tensor.data_ptr() for tensor in self._strided]
            self._checks.clear()
            self.addresses = dict(zip(self._all, self._names, strict=True))
        return count

    def broken(self) -> str | None:
        """The first of them that does not, as a sentence."""
        for name, tensor, address, layout in zip(self._names, self._tensors, self._all, self._layouts, strict=True):
            if _address(tensor) != address:
                return f"the memory of {name!r} was replaced (.data = ..., .to(...), load_state_dict(assign=True))"
            if _layout(tensor) != layout:
                return f"{name!r} was {layout} and is now {_layout(tensor)}"
        return None

    def lines(self) -> Iterator[str]:
        """A line for each."""
        for name, address in zip(self._names, self._all, strict=True):
            yield f"{name} is at {address:#x}"


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _check_of(tensors: Sequence[torch.Tensor]) -> Any:
    """A check that tensors have the layouts that they have now; it may refuse what has not changed."""
    if not tensors:
        return lambda: True
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes: Any = [list(t.shape) for t in tensors]
        strides: Any = [list(t.stride()) for t in tensors]
        return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    except (ImportError, TypeError, RuntimeError):  # no public interface: it may be another one
        return lambda *given: False


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.layout != torch.strided:
        return (tensor.shape, tensor.layout, tensor.dtype)
    bits = (tensor.is_conj(), tensor.is_neg())
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad, bits)


def move(tensor: torch.Tensor, memory: torch.Tensor) -> None:
    """Let `tensor` live in `memory`, which holds the same values; no guard takes that for a replacement."""
    _moved.setdefault(tensor, set()).add(_address(tensor))
    tensor.data = memory


def _address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else 0
