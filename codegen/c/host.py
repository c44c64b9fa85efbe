"""Compiling C with the system's compiler, and calling what comes out: no shell, prebound arguments.

The compiler is what ``CC`` names, or cc, gcc or clang. ``GRAPH_CAPTURE_CFLAGS`` adds flags. Threads are those of the
OpenMP runtime that torch has loaded (``c/runtime.c``).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from graph_capture.cache import DiskCache, workspace
from graph_capture.codegen.c import compiler_process
from graph_capture.codegen.launches import HalfwayError
from graph_capture.errors import FusionError
from graph_capture.log import log

FOLDER = Path(__file__).parent
# Reassociation is allowed where a reduction's pragma says so, and nowhere else: infinities, NaN, signed zeros and the
# reductions of arguments in the prelude stay what they are.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fopenmp-simd", "-fwrapv", "-fno-math-errno", "-fno-trapping-math")
NATIVE = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
CFLAGS = "GRAPH_CAPTURE_CFLAGS"
VERSION_SECONDS = 20.0  # within which a compiler must say what it is
_lock = threading.Lock()
# Kernels' texts -> the libraries that are in use, and those that were lately compiled for kernels to come.
_loaded: weakref.WeakValueDictionary[tuple[str, Toolchain], ctypes.CDLL] = weakref.WeakValueDictionary()
_ahead: deque[ctypes.CDLL] = deque(maxlen=8)
_toolchains: dict[tuple[str, str, str], Toolchain] = {}


@dataclass(frozen=True)
class Toolchain:
    """A C compiler (its command, what it says of its version, the flags that it takes), and what runs its kernels."""

    command: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    runtime: ctypes.CDLL


def toolchain(cache: DiskCache | None = None) -> Toolchain:
    """The C compiler of this machine.

    Raises:
        FusionError: there is none, or it cannot compile.
    """
    settings = (os.environ.get("CC", ""), os.environ.get("PATH", ""), os.environ.get(CFLAGS, ""))
    with _lock:
        if settings not in _toolchains:
            _toolchains[settings] = _found(*settings, cache)
        return _toolchains[settings]


def _found(chosen: str, path: str, extra: str, cache: DiskCache | None) -> Toolchain:
    names = [compiler_process.words(chosen, "CC")] if chosen.strip() else [["cc"], ["gcc"], ["clang"]]
    flags_of_user = compiler_process.words(extra, CFLAGS)
    found = next((found for name in names if (found := shutil.which(name[0], path=path))), None)
    if found is None:
        raise FusionError(f"there is no C compiler ({', '.join(name[0] for name in names)}); install one, or set CC")
    command = (found, *names[0][1:]) if chosen.strip() else (found,)
    version = compiler_process.run([*command, "--version"], seconds=VERSION_SECONDS).output
    source, failure = prelude() + _text("runtime.c") + _text("library.c"), ""
    for native in NATIVE:
        flags = (*FLAGS, *native, *flags_of_user)
        try:
            runtime = _opened(source, command, version, flags, cache)
        except FusionError as error:
            failure = failure or str(error)
            if isinstance(error.__cause__, subprocess.TimeoutExpired):  # other flags would hang as well
                break
            continue
        for function in (runtime.run, runtime.run_chain):
            function.argtypes, function.errcheck = [ctypes.c_void_p], _raised
        os.register_at_fork(after_in_child=functools.partial(_leave_alone, runtime))
        return Toolchain(command, version, flags, runtime)
    raise FusionError(failure)


def _raised(failed: Any, *_: Any) -> Any:
    if failed:
        raise HalfwayError("an op of torch's failed, called from C; what it said is in the standard error output")


def _leave_alone(runtime: ctypes.CDLL) -> None:
    """In a forked child: the parent's threads are not there."""
    ctypes.c_int.in_dll(runtime, "alone").value = 1


def _opened(
    source: str, command: Sequence[str], version: str, flags: Sequence[str], cache: DiskCache | None
) -> ctypes.CDLL:
    """`source` as a shared library, from the cache or compiled; what is in the cache and does not load is made again.

    Raises:
        FusionError: the compiler fails, and the message is its own; or what it made does not load.
    """
    key = DiskCache.key(source, *command, version, *flags)
    if cache is not None and (known := cache.get(key, ".so")) is not None:
        try:
            return ctypes.CDLL(str(known))
        except OSError as error:
            log.info("%s does not load and is made again: %s", known, error)
            cache.drop(key)
    path = _built(source, command, flags)
    found = _load(path)
    if cache is not None:
        cache.put(key, {".so": path.read_bytes()})
    return found


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise FusionError(f"what the C compiler made cannot be loaded: {error}") from error


def _built(source: str, command: Sequence[str], flags: Sequence[str]) -> Path:
    """`source` as a shared library in this process's folder.

    Raises:
        FusionError: the compiler fails; the message is its own.
    """
    try:
        folder = workspace()
        descriptor, name = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(descriptor)
    except OSError as error:
        raise FusionError(f"there is no room for what the C compiler makes: {error}") from error
    done = compiler_process.run([*command, *flags, "-x", "c", "-", "-o", name, "-lm"], source, folder)
    if done.status:
        raise FusionError(f"the C compiler failed: {(done.errors or done.output).strip()[:2000]}")
    if not os.path.getsize(name):
        raise FusionError(f"the C compiler {command[0]} made nothing, and said that all was well")
    return Path(name)


def assembly(source: str) -> str:
    """What the compiler makes of a whole file, as assembly.

    Raises:
        FusionError: there is no compiler, or it fails.
    """
    chosen = toolchain()
    line = [*chosen.command, *(flag for flag in chosen.flags if flag != "-shared"), "-x", "c", "-", "-S", "-o", "-"]
    done = compiler_process.run(line, source)
    if done.status:
        raise FusionError(f"the C compiler failed: {done.errors.strip()[:2000]}")
    return f"# {shlex.join(line)}\n{done.output}"


def library(text: str, cache: DiskCache | None = None) -> ctypes.CDLL:
    """A kernel's `text`, which follows the prelude, compiled and loaded; equal ones once a process.

    Raises:
        FusionError: there is no compiler, or it fails.
    """
    chosen = toolchain(cache)
    with _lock:
        if (known := _loaded.get((text, chosen))) is not None:
            return known
    found = _opened(prelude() + text, chosen.command, chosen.version, chosen.flags, cache)
    return _keep([text], chosen, found)


def _keep(texts: Sequence[str], chosen: Toolchain, found: ctypes.CDLL) -> ctypes.CDLL:
    """Remember the library of these kernels for as long as a function of it is in use; then it is closed."""
    with _lock:
        known = _loaded.get((texts[0], chosen))
        if known is not None:
            return known
        weakref.finalize(found, _close, found._handle).atexit = False
        for text in texts:
            _loaded[text, chosen] = found
    return found


def _close(handle: int) -> None:
    import _ctypes

    _ctypes.dlclose(handle)


def compile_ahead(texts: Sequence[str], cache: DiskCache | None = None) -> None:
    """Compile several kernels for `library` to find: on each core one compiler, which starts once.

    What cannot be compiled is passed over, with what was to be compiled along with it; `library` says why.

    Raises:
        FusionError: there is no compiler.
    """
    chosen = toolchain(cache)
    keys = {t: DiskCache.key(prelude() + t, *chosen.command, chosen.version, *chosen.flags) for t in texts}
    missing = [t for t, key in keys.items() if (t, chosen) not in _loaded and not (cache and cache.get(key, ".so"))]
    if not missing:
        return
    groups: list[list[str]] = [[] for _ in range(min(len(missing), os.cpu_count() or 1))]
    for text in sorted(missing, key=len, reverse=True):
        min(groups, key=lambda group: sum(map(len, group))).append(text)

    def build(group: Sequence[str]) -> None:
        try:
            path = _built(prelude() + "".join(group), chosen.command, chosen.flags)
            found = _load(path)
        except FusionError:
            return
        for text in group:
            if cache is not None:
                cache.put(keys[text], {".so": path.read_bytes()})
        _ahead.append(_keep(group, chosen, found))

    with ThreadPoolExecutor(len(groups)) as pool:
        try:
            list(pool.map(build, groups))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            compiler_process.end_all()
            raise


@functools.cache
def prelude() -> str:
    """The text that every kernel starts with."""
    return _text("prelude.h")


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


# --- launches


class _Work(ctypes.Structure):
    """``struct launch`` of the runtime."""

    _fields_ = (
        ("body", ctypes.c_void_p),
        ("operands", ctypes.c_void_p),
        ("geometry", ctypes.c_void_p),
        ("units", ctypes.c_int64),
        ("grain", ctypes.c_int64),
    )


class _Works(ctypes.Structure):
    """``struct chain`` of the runtime."""

    _fields_ = (("launches", ctypes.c_void_p), ("count", ctypes.c_int64))


class Place(NamedTuple):
    """An address that a function gets: in which tensor of the call, at which byte, and how many bytes it may touch from
    there on."""

    tensor: int
    offset: int = 0
    reach: int = 0


def place(tensor: int, view: torch.Tensor, whole: torch.Tensor) -> Place:
    """The place of a `view` of the call's tensor of this number, which is `whole`."""
    return Place(tensor, view.data_ptr() - whole.data_ptr(), reach(view.shape, view.stride(), view.dtype))


def reach(sizes: Sequence[int], steps: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes from the first to behind the last element of what has these sizes and strides."""
    if 0 in sizes:
        return 0
    return (1 + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))) * dtype.itemsize


def check_reach(layouts: Sequence[Layout], tensors: Sequence[torch.Tensor]) -> None:
    """Whether launches touch nothing but the elements of these tensors.

    Raises:
        FusionError: they would.
    """
    for layout in layouts:
        for at in layout.operands:
            if at.tensor == len(tensors):  # their own memory
                continue
            tensor = tensors[at.tensor]
            if at.offset < 0 or at.offset + at.reach > reach(tensor.shape, tensor.stride(), tensor.dtype):
                raise FusionError(f"it reaches beyond a tensor {list(tensor.shape)} with strides {tensor.stride()}")


@dataclass(frozen=True)
class Layout:
    """What a launch passes.

    Attributes:
        numbers: sizes and strides, as the function expects them.
        units: of work.
        grain: the fewest units that are worth a thread.
        operands: where each address is.
        part: what the function's name ends in, where a kernel has several.
        scratch: float32 elements that the launches share, which come after the call's tensors.
    """

    numbers: tuple[int, ...]
    units: int
    grain: int
    operands: tuple[Place, ...]
    part: str = ""
    scratch: int = 0


class CLaunch(functools.partial[None]):
    """A foreign call whose arguments are bound: calling it is one call of C.

    Attributes:
        works: what it runs, in order.
        held: what must live as long: the memory of its arguments, not that of the tensors.
        places: for each tensor, the arrays of addresses that it is in: array, index, offset in bytes.
    """

    works: tuple[_Work, ...]
    held: tuple[Any, ...]
    places: dict[int, list[tuple[Any, int, int]]]

    def move(self, tensor: int, address: int) -> None:
        """From now on the tensor of this number lies there."""
        for array, index, offset in self.places.get(tensor, ()):
            array[index] = address + offset

    def join(self, others: Sequence[CLaunch]) -> CLaunch:
        """This launch and then the others, in one foreign call, which follows when they are moved."""
        return chain([self, *others])


def launch(functions: Sequence[Any], tensors: Sequence[torch.Tensor], layouts: Sequence[Layout]) -> CLaunch:
    """A launch of a kernel's functions on the memory of these tensors, which the caller keeps alive."""
    shared = torch.empty(sum(layout.scratch for layout in layouts))
    base = [tensor.data_ptr() for tensor in (*tensors, shared)]
    parts, places = [], dict[int, list[tuple[Any, int, int]]]()
    for function, layout in zip(functions, layouts, strict=True):
        addresses = [base[at.tensor] + at.offset for at in layout.operands]
        made = call(function, addresses, layout.numbers, layout.units, layout.grain, shared)
        for number, at in enumerate(layout.operands):
            places.setdefault(at.tensor, []).append((made.held[0], number, at.offset))
        parts.append(made)
    made = parts[0] if len(parts) == 1 else chain(parts)
    made.places = places
    return made


def call(
    function: Any, addresses: Sequence[int], numbers: Sequence[int], units: int, grain: int, held: Any = None
) -> CLaunch:
    """A launch of one function with these operands; it keeps `held` alive."""
    operands, geometry = (ctypes.c_void_p * len(addresses))(*addresses), (ctypes.c_int64 * len(numbers))(*numbers)
    body = ctypes.cast(function, ctypes.c_void_p)
    work = _Work(body, ctypes.addressof(operands), ctypes.addressof(geometry), units, grain)
    made = CLaunch(toolchain().runtime.run, ctypes.addressof(work))
    made.works, made.held, made.places = (work,), (operands, geometry, function, held), {}
    return made


def chain(launches: Sequence[CLaunch]) -> CLaunch:
    """Several launches, in order, in one foreign call."""
    works = tuple(work for one in launches for work in one.works)
    addresses = (ctypes.c_void_p * len(works))(*map(ctypes.addressof, works))
    listed = _Works(ctypes.addressof(addresses), len(works))
    made = CLaunch(toolchain().runtime.run_chain, ctypes.addressof(listed))
    made.works, made.held, made.places = works, (addresses, listed, *(one.held for one in launches)), {}
    return made
