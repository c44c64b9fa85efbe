"""What a captured function uses besides its arguments: its closure, its globals, its `self`.

They are part of a call's signature, so that what the function assigns to them a replay assigns too, and so that two of
their values have a recording each. Everything that lies behind them is guarded by what the recording reads.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch

from graph_capture.calls.foreign import is_module
from graph_capture.calls.structure import GlobalName, Walk, is_bound
from graph_capture.record.reads import chains

LARGE = 10_000  # values; something around a function that holds more (a tokenizer) is guarded by identity
_GUARDED = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, torch.nn.Module)


def surroundings(function: Any) -> dict[str, Any]:
    """What `function` uses besides its arguments, by name: its closure's variables, names in its globals, its owner."""
    if isinstance(function, torch.nn.Module) or is_module(function):
        return {}
    if isinstance(function, functools.partial):
        return {"partial": (function.args, function.keywords), **surroundings(function.func)}
    if isinstance(function, types.MethodType):
        owner = function.__self__
        held = {} if isinstance(owner, _GUARDED) else {"self": owner}
        return held | surroundings(function.__func__)
    if not isinstance(function, types.FunctionType):
        call = getattr(type(function), "__call__", None)  # noqa: B004
        return surroundings(types.MethodType(call, function)) if isinstance(call, types.FunctionType) else {}
    code, around = function.__code__, function.__globals__
    found: dict[str, Any] = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    found |= {name: GlobalName(around, name) for name in _globals_of(code) if name in around}
    return {name: value for name, value in found.items() if not _is_left_to_guards(value)}


def _globals_of(code: types.CodeType) -> Iterator[str]:
    """The globals that a function's own code reads or assigns."""
    yield from (chain.root for chain in chains(code) if chain.kind == "global")
    yield from (i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL")


def _is_left_to_guards(name: Any) -> bool:
    if not is_bound(name):
        return False
    value = name.cell_contents
    if isinstance(value, _GUARDED):
        return True
    walk = Walk()
    walk.spec(value)
    return len(walk.objects) + sum(len(content[2]) for content in walk.contents) > LARGE
