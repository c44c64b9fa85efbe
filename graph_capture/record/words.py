"""Machine words that must stay as they are: how a few microseconds show that thousands of dicts were not touched.

CPython gives a dict another version tag at each change (PEP 509), has an object's class and a cell's content at fixed
places, and an instance's dict before it. All of these are read with one sweep of numpy over the process's memory. Only
objects that are held here are looked at. What this interpreter has at each place is tried out once; where it is not
what is expected, the kind is not watched this way and whoever asks compares in full.
"""

from __future__ import annotations

import ctypes
import functools
import types
from collections.abc import Sequence
from typing import Any

import numpy

_WORD = 8


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


@functools.cache
def _tag_offset() -> int | None:
    """Where a dict has its version; None where it has none."""
    probe = {"a": object()}
    offset = dict.__basicsize__ - 3 * _WORD  # before its keys and its values
    seen = {_word(id(probe) + offset)}
    probe["a"] = object()
    seen.add(_word(id(probe) + offset))
    probe["b"] = 1
    seen.add(_word(id(probe) + offset))
    del probe["b"]
    seen.add(_word(id(probe) + offset))
    settled = _word(id(probe) + offset)
    probe.get("a")
    return offset if len(seen) == 4 and _word(id(probe) + offset) == settled else None


class _Probe:
    pass


@functools.cache
def _class_offset() -> int | None:
    probe = _Probe()
    return _WORD if _word(id(probe) + _WORD) == id(_Probe) else None


@functools.cache
def _dict_offset() -> int | None:
    """Where, before an instance, the address of its dict is."""
    probe = _Probe()
    own = vars(probe)
    return next((-n * _WORD for n in (3, 1) if _word(id(probe) - n * _WORD) == id(own)), None)


@functools.cache
def _cell_offset() -> int | None:
    probe = types.CellType(_Probe)
    offset = types.CellType.__basicsize__ - _WORD
    return offset if _word(id(probe) + offset) == id(_Probe) else None


@functools.cache
def _function_offsets() -> tuple[int, ...] | None:
    """Where a function has its code, its defaults and its keyword defaults."""

    def probe(a: Any = _Probe, *, b: Any = _Probe) -> None:
        pass

    wanted = [id(probe.__code__), id(probe.__defaults__), id(probe.__kwdefaults__)]
    words = [_word(id(probe) + place) for place in range(0, types.FunctionType.__basicsize__, _WORD)]
    return tuple(words.index(word) * _WORD for word in wanted) if all(map(words.count, wanted)) else None


class Words:
    """Words of objects, and what was in them.

    Attributes:
        unsure: whether the latest thing that was to be watched cannot be.
    """

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._held: list[Any] = []
        self.unsure = False
        self._expected = b""

    def __len__(self) -> int:
        return len(self._addresses)

    def table(self, table: dict[Any, Any]) -> None:
        """Watch for any change of a dict."""
        self._add(table, _tag_offset())

    def instance(self, value: Any, own: dict[str, Any] | None) -> None:
        """Watch for another class of an object, and for another dict of its attributes."""
        self._add(value, _class_offset())
        kind: Any = type(value)
        if own is not None:
            managed = kind.__dictoffset__ < 0 and kind.__flags__ & (1 << 4)
            self._add(value, _dict_offset() if managed else kind.__dictoffset__ if kind.__dictoffset__ > 0 else None)

    def cell(self, cell: types.CellType) -> None:
        """Watch for another content of a cell."""
        self._add(cell, _cell_offset())

    def function(self, function: types.FunctionType) -> None:
        """Watch for other code and other defaults of a function."""
        for offset in _function_offsets() or (None,):
            self._add(function, offset)

    def _add(self, value: Any, offset: int | None) -> None:
        self.unsure = offset is None
        if offset is not None:
            self._addresses.append(id(value) + offset)
            self.__dict__.pop("_view", None)
            self._held.append(value)

    @functools.cached_property
    def _view(self) -> tuple[Any, Any]:
        """The process's memory from the lowest of the addresses on, and where in it the words are."""
        base = min(self._addresses)
        count = (max(self._addresses) - base) // _WORD + 1
        memory: Any = numpy.frombuffer((ctypes.c_uint64 * count).from_address(base), dtype=numpy.uint64)  # type: ignore[call-overload]
        return memory, numpy.array([(address - base) // _WORD for address in self._addresses], dtype=numpy.int64)

    def settle(self) -> None:
        """What is there now is right."""
        if self._addresses:
            memory, places = self._view
            self._expected = memory[places].tobytes()

    def same(self) -> bool:
        """Whether all words are as they were."""
        if not self._addresses:
            return True
        memory, places = self._view
        return bool(memory[places].tobytes() == self._expected)

    def changed(self) -> Sequence[int]:
        """The positions of the words that are not, in the order in which they were added."""
        memory, places = self._view
        now = memory[places]
        return numpy.nonzero(now != numpy.frombuffer(self._expected, dtype=numpy.uint64))[0].tolist()
