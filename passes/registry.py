"""Where patterns are kept: one registry for the process, others for single configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from graph_capture.errors import CaptureError
from graph_capture.passes.pattern import Function, Pattern
from graph_capture.passes.spellings import prepare


class PatternRegistry:
    """Patterns by name, in the order in which they are tried."""

    def __init__(self, patterns: Iterable[Pattern] = ()) -> None:
        self._patterns: dict[str, Pattern] = {}
        for item in patterns:
            self.add(item)

    def add(self, item: Pattern) -> None:
        """Append a pattern.

        Raises:
            CaptureError: another one has its name.
        """
        known = self._patterns.get(item.name)
        if known is not None and known.function is not item.function:
            raise CaptureError(f"a pattern named {item.name!r} is registered already; choose another name")
        self._patterns[item.name] = item

    def __iter__(self) -> Iterator[Pattern]:
        return iter(tuple(self._patterns.values()))

    def __getitem__(self, name: str) -> Pattern:
        return self._patterns[name]


DEFAULT = PatternRegistry()


def pattern(name: str, *, registry: PatternRegistry = DEFAULT, **options: Any) -> Callable[[Function], Function]:
    """Register a function as a pattern: its ops, wherever they occur connected like this, become one region.

    It may be written in any spelling that the canonicaliser knows. `options` are the other attributes of `Pattern`;
    `registry` is the process-wide one unless given.

    Raises:
        CaptureError: the name is taken.
    """

    def register(function: Function) -> Function:
        registry.add(Pattern(name, function, **{"prepare": prepare} | options))
        return function

    return register
