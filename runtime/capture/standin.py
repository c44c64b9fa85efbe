"""Standing for a captured module: its attributes and methods, and copies that record anew."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch


class StandIn:
    """Gives what a module or a function has as its own.

    Subclasses set `_function` first, and `_made_with`: the further arguments of the class.
    """

    _function: Any
    _made_with: tuple[Any, ...]

    def __getattr__(self, name: str) -> Any:
        """What the captured module or function has; a method that gives the module gives this."""
        if name.startswith("__") or "_function" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(self._function, name)
        if getattr(found, "__self__", None) is not self._function or not isinstance(self._function, torch.nn.Module):
            return found

        @functools.wraps(found)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = found(*args, **kwargs)
            return self if result is self._function else result

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        own = (
            name.startswith("_") or name == "misses" or not isinstance(self.__dict__.get("_function"), torch.nn.Module)
        )
        if own:
            object.__setattr__(self, name, value)
        else:
            setattr(self._function, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        kind: Any = type(self)
        return kind(copy.deepcopy(self._function, memo), *self._made_with)

    def __copy__(self) -> Any:
        kind: Any = type(self)
        return kind(self._function, *self._made_with)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._function, *self._made_with)
