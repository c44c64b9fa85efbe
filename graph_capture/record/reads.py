"""What a run reads: follows, through a profile function, which Python functions really run, and what their code names.

At the first call of each function, before its body runs, what its bytecode names is noted in a `State`: globals and the
attributes of modules and classes behind them, closures, defaults, names that are imported inside. Functions of torch
and of the standard library are passed over.
"""

from __future__ import annotations

import contextlib
import ctypes
import dis
import functools
import gc
import importlib.util
import inspect
import os
import random
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy
import torch

from graph_capture.calls.foreign import LIBRARIES
from graph_capture.errors import CaptureError
from graph_capture.record.entries import MISSING, Probe
from graph_capture.record.source import caller, is_user_file
from graph_capture.record.state import State, builtins_of, chained

_PACKAGES = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("purelib", "platlib"))
_STANDARD = os.path.realpath(sysconfig.get_path("stdlib")) + os.sep
_PASSED_OVER = {"torch", "numpy", "triton", "ninetoothed", *LIBRARIES}
# Functions that give Python something which no guard can hold on to.
_CLOCKS = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime", "urandom", "uuid1", "uuid4"}
_CLOCK_OWNERS = {"time", "datetime", "posix", "nt"}
_MODES = {"is_grad_enabled"}
# Functions without arguments that ask Python or torch for a setting: asked again at each call.
_PROBED = {"getrecursionlimit", "getcwd", "getpid", "get_num_threads", "get_num_interop_threads", "initial_seed"}
_FINDERS = {"globals", "eval", "exec"}  # what finds globals by their names at run time


_ENVIRONMENT = frozenset(getattr(os._Environ, name).__code__ for name in ("__getitem__", "__iter__", "__len__"))


class NameChain(NamedTuple):
    """A name in some code, and the attributes that are asked of it.

    Attributes:
        kind: "global", "free" (a variable of the closure), or "import" (`root` is a module, as the code names it).
    """

    kind: str
    root: str
    attributes: tuple[str, ...]
    level: int = 0


_chains: weakref.WeakKeyDictionary[types.CodeType, tuple[NameChain, ...]] = weakref.WeakKeyDictionary()


def chains(code: types.CodeType) -> tuple[NameChain, ...]:
    """What the bytecode of a function names, with the attributes that follow each name."""
    found = _chains.get(code)
    if found is None:
        found = _chains[code] = tuple(dict.fromkeys(_chains_of(code)))
    return found


def _chains_of(code: types.CodeType) -> Iterator[NameChain]:
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PUSH_NULL", "PRECALL")]
    imported: dict[str, tuple[str, int]] = {}  # local variable -> the module in it
    latest: tuple[str, int] | None = None
    for index, instruction in enumerate(instructions):
        name, value = instruction.opname, instruction.argval
        following = instructions[index + 1 :]
        if name in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            yield NameChain("global", value, _attributes(following))
        elif name in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"):
            yield NameChain("free", value, _attributes(following))
        elif name == "IMPORT_NAME":
            level = instructions[index - 2].argval if index >= 2 else 0
            latest = (value, level if isinstance(level, int) else 0)
            if following and following[0].opname in ("STORE_FAST", "STORE_DEREF"):
                imported[following[0].argval] = latest
        elif name == "IMPORT_FROM" and latest is not None:
            yield NameChain("import", latest[0], (value,), latest[1])
        elif name.startswith("LOAD_FAST") and value in imported:
            module, level = imported[value]
            top = module if "." not in module or level else module.partition(".")[0]
            yield NameChain("import", top, _attributes(following), level)


def _attributes(instructions: list[dis.Instruction]) -> tuple[str, ...]:
    found = []
    for instruction in instructions:
        if instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            break
        found.append(instruction.argval)
    return tuple(found)


class Reads:
    """Follows one thread's calls while it is open.

    Args:
        state: where to note what the code reads.
        grad: whether gradients were enabled around the recording, which itself runs without.

    Attributes:
        codes: the code that ran, of functions that are looked at.
    """

    def __init__(self, state: State, *, grad: bool = False) -> None:
        self.state = state
        self.codes: list[types.CodeType] = []
        self._suspended = 0  # how many reasons there are not to look
        self._grad = grad
        self._done: set[int] = set()  # ids of code that is not looked at (again)
        self._kept: list[types.CodeType] = []  # so that the ids stay valid
        self._functions: set[int] = set()
        self._inner: set[int] = set()  # ids of the code of functions that may have been made inside
        self._unreached: list[weakref.ref[types.FunctionType]] = []
        self._before: Any = None
        self._thread = threading.get_ident()

    def __enter__(self) -> Reads:
        self.state.generators += [
            Probe(random.getstate, "the random numbers of Python's `random`"),
            Probe(lambda: repr(numpy.random.get_state()), "the random numbers of `numpy.random`"),
        ]
        self._before = sys.getprofile()
        gc.callbacks.insert(0, self._collecting)
        gc.callbacks.append(self._collected)
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        before = self._before
        gc.callbacks.remove(self._collecting)
        gc.callbacks.remove(self._collected)
        sys.setprofile(before if callable(before) else None)

    def finish(self) -> None:
        """Note what functions hold that ran, were not reached from anywhere, and are still there."""
        for reference in self._unreached:
            function = reference()
            if function is not None:
                self.state.function(function, function.__qualname__)

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What runs meanwhile runs anew at each replay: what it reads does not count."""
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1

    # --- events

    def _collecting(self, phase: str, info: Any) -> None:
        """Garbage is collected: what runs meanwhile is not the code's doing."""
        if threading.get_ident() == self._thread:
            self._suspended += 1 if phase == "start" else 0

    def _collected(self, phase: str, info: Any) -> None:
        if phase == "stop" and threading.get_ident() == self._thread and self._suspended:
            self._suspended -= 1

    def _event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if self._suspended:
            pass
        elif event == "call":
            if frame.f_code in _ENVIRONMENT:
                self._environment(frame)
            elif id(frame.f_code) not in self._done:
                self._met(frame)
        elif event == "c_call":
            name = getattr(arg, "__name__", None)
            if name in _CLOCKS or name in _MODES or name in _PROBED:
                self._asks(frame, name, arg)
        if callable(self._before):
            self._before(frame, event, arg)

    def _met(self, frame: types.FrameType) -> None:
        code = frame.f_code
        plain = not code.co_freevars
        if code.co_flags & inspect.CO_GENERATOR and id(frame) in self.state.frames:
            raise CaptureError(
                f"the code goes on with a generator that was there before ({caller()}), which a replay would not. Pass "
                "a list, or what it gives next"
            )
        if not is_looked_at(frame):
            self._skip(code)
            if is_higher_order(code):
                raise CaptureError(
                    f"{frame.f_globals.get('__name__')}.{code.co_name} was called at {caller()}: higher-order "
                    "operators are not recorded. Write the choice with torch.where, or leave this part uncaptured"
                )
            return
        function = _function_of(frame)
        if plain and not code.co_flags & inspect.CO_GENERATOR:
            self._skip(code)
        elif id(function) in self._functions:
            return
        self.codes.append(code)
        self._inner.update(id(const) for const in code.co_consts if isinstance(const, types.CodeType))
        if function is None:
            self._names(code, frame.f_globals, None)
            return
        self._functions.add(id(function))
        if plain or id(function) in self.state.seen or id(code) not in self._inner:
            self.state.function(function, function.__qualname__)
            self._names(code, frame.f_globals, function)
        else:  # made inside, or reached in a way that is not followed
            self._unreached.append(weakref.ref(function))
            self._names(code, frame.f_globals, None)

    def _environment(self, frame: types.FrameType) -> None:
        """The code reads the environment: one variable of it, or all."""
        asking: types.FrameType | None = frame
        while asking is not None and asking.f_globals.get("__name__") in ("os", "collections.abc"):
            asking = asking.f_back
        if asking is None or not is_looked_at(asking):
            return
        environment, key = frame.f_locals["self"], frame.f_locals.get("key")
        if key is None:
            self.state.see(environment._data, "os.environ")
        else:
            with contextlib.suppress(TypeError):  # which the code is about to get, too
                self.state.name(environment._data, environment.encodekey(key), "os.environ")

    def _skip(self, code: types.CodeType) -> None:
        self._done.add(id(code))
        self._kept.append(code)

    def _names(self, code: types.CodeType, table: dict[str, Any], function: types.FunctionType | None) -> None:
        cells = dict(zip(code.co_freevars, (function and function.__closure__) or (), strict=False))
        for chain in chains(code):
            if chain.kind == "global":
                value = self.state.name(table, chain.root)
                signed = self.state.is_signed((id(table), chain.root))
                if value is MISSING:
                    value = builtins_of(table).get(chain.root, MISSING)
            elif chain.kind == "free":
                cell = cells.get(chain.root)
                value = MISSING if cell is None else _content(cell)
                signed = self.state.is_signed(id(cell))
            else:
                value, signed = _module(chain, table), False
            if chain.root in _FINDERS and chain.kind == "global":
                self.state.namespace(table, "")
            if value is not MISSING and not (signed and isinstance(value, torch.Tensor)):
                self._follow(value, chain.root, chain.attributes)

    def _follow(self, value: Any, path: str, attributes: tuple[str, ...]) -> None:
        """Note what a chain of attributes reads."""
        self.state.see(value, path)
        if isinstance(value, types.ModuleType) and not attributes and _is_users(value):
            self.state.namespace(vars(value), path)
        for index, name in enumerate(attributes):
            path = f"{path}.{name}"
            if isinstance(value, types.ModuleType):
                if value.__name__.partition(".")[0] in _PASSED_OVER - {"torch", "numpy"}:
                    return
                lazy = type(value) is not types.ModuleType or "__getattr__" in vars(value)
                if lazy and name not in vars(value):
                    return
                value = self.state.name(vars(value), name, path.rpartition(".")[0])
                if value is MISSING:
                    return
                self.state.see(value, path)
                continue
            for step, (part, holder) in zip(attributes[index:], chained(value, attributes[index:]), strict=False):
                own = getattr(holder, "__dict__", None)
                if type(own) is dict:  # where the holder as a whole is not looked at: a function, an object of torch's
                    self.state.name(own, step, path.rpartition(".")[0])
                self.state.see(part, path)
            return

    def _asks(self, frame: types.FrameType, name: str, function: Any) -> None:
        if name in _PROBED:
            if name == "initial_seed" or is_user_file(frame.f_code.co_filename, unnamed=True):
                self.state.probe(function, f"{name}()")
            return
        if not is_user_file(frame.f_code.co_filename) or frame.f_code.co_filename.startswith(_STANDARD):
            return
        if name in _MODES:
            if self._grad and function in (torch.is_grad_enabled, torch._C.is_grad_enabled):
                raise CaptureError(
                    f"the code asks whether gradients are enabled ({caller()}): they are, and a recording computes "
                    "none. Call it under torch.no_grad()"
                )
            return
        owner = getattr(function, "__self__", None)
        origin = owner.__name__ if isinstance(owner, types.ModuleType) else getattr(owner, "__module__", "")
        if origin in _CLOCK_OWNERS:
            raise CaptureError(
                f"the code reads {origin}.{name}() ({caller()}), which is another value at each call: a replay would "
                "keep the first one. Pass it in"
            )


def _is_users(module: types.ModuleType) -> bool:
    """Whether a Python module is neither torch's, nor of a library of kernels, nor of the standard library."""
    package = module.__name__.partition(".")[0]
    return package not in _PASSED_OVER and package not in sys.stdlib_module_names


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _module(chain: NameChain, table: dict[str, Any]) -> Any:
    """The module that code imports inside a function, if it has been imported."""
    name = chain.root
    if chain.level:
        try:
            name = importlib.util.resolve_name("." * chain.level + name, str(table.get("__package__") or ""))
        except ImportError:
            return MISSING
    return sys.modules.get(name, MISSING)


def is_looked_at(frame: types.FrameType) -> bool:
    """Whether what a frame's code reads is noted: it is neither torch's nor a library's of kernels."""
    return _is_noted(frame.f_code.co_filename, str(frame.f_globals.get("__name__")))


@functools.cache
def _is_noted(file: str, module: str) -> bool:
    if module == "os":
        return True  # it reads the environment for the code
    if not is_user_file(file, unnamed=True) or module.partition(".")[0] in _PASSED_OVER:
        return False
    real = os.path.realpath(file)
    return not real.startswith(_STANDARD) or real.startswith(_PACKAGES)


def is_higher_order(code: types.CodeType) -> bool:
    """Whether code is one of torch's functions that take other functions apart by themselves."""
    if code is torch._ops.HigherOrderOperator.__call__.__code__:
        return True
    folder, file = os.path.split(code.co_filename)
    named = code.co_name == file.removesuffix(".py")
    return named and os.path.basename(folder) in ("_higher_order_ops", "attention") and folder.startswith(_TORCH)


_TORCH = os.path.dirname(torch.__file__)


# --- from a frame to its function


def _at(address: int) -> int | None:
    return ctypes.c_void_p.from_address(address).value


def _by_address(frame: types.FrameType, offset: int) -> Any:
    inner = _at(id(frame) + 3 * ctypes.sizeof(ctypes.c_void_p))
    address = _at(inner + offset) if inner else None
    return ctypes.cast(address, ctypes.py_object).value if address else None


def _by_referrers(frame: types.FrameType) -> Any:
    code = frame.f_code
    found = [f for f in gc.get_referrers(code) if isinstance(f, types.FunctionType) and f.__code__ is code]
    return found[0] if len(found) == 1 else None


@functools.cache
def _finder() -> Callable[[types.FrameType], Any]:
    """How to find the function of a frame: the frame knows it, but does not show it."""
    offset = {(3, 11): 0, (3, 12): 16, (3, 13): 16}.get(sys.version_info[:2])
    if offset is None or sys.implementation.name != "cpython":
        return _by_referrers
    return functools.partial(_by_address, offset=offset)


def _function_of(frame: types.FrameType) -> types.FunctionType | None:
    found = _finder()(frame)
    return found if isinstance(found, types.FunctionType) and found.__code__ is frame.f_code else None
