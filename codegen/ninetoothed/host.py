"""Loading generated ninetoothed programs, on machines with a GPU and without.

ninetoothed needs an active Triton driver. Without CUDA a stand-in answers its questions, and kernels run in Triton's
interpreter.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from graph_capture.cache import DiskCache, workspace
from graph_capture.codegen.ninetoothed.workers import POOL
from graph_capture.errors import FusionError
from graph_capture.log import log

_lock = threading.RLock()  # ninetoothed's and the interpreter's state is global


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: on a machine without CUDA."""
    return not torch.cuda.is_available()


def capability() -> int:
    """Of the current device, 90 for sm_90; 0 in the interpreter, and where the device is not NVIDIA's."""
    if interpreted() or torch.version.cuda is None:
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@cache
def import_triton() -> Any:
    """`aot_worker`, and with it Triton, imported so that it works on this machine.

    Raises:
        FusionError: it cannot be imported.
    """
    try:
        from graph_capture.codegen.ninetoothed import aot_worker
    except ImportError as error:
        raise FusionError(f"ninetoothed cannot be imported: {error}") from error
    if interpreted():
        sys.modules["triton"].runtime.driver.set_active(aot_worker.NoDevice())
    return aot_worker


@cache
def import_ninetoothed() -> Any:
    """ninetoothed, imported so that it works on this machine.

    Raises:
        FusionError: it, or Triton, cannot be imported.
    """
    import_triton()
    try:
        import ninetoothed
    except ImportError as error:
        raise FusionError(f"ninetoothed cannot be imported: {error}") from error
    return ninetoothed


@contextlib.contextmanager
def triton_mode(interpret: bool) -> Iterator[None]:
    """Whether functions decorated inside are interpreted or compiled: Triton looks at the environment."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


@contextlib.contextmanager
def _interpreted_reductions() -> Iterator[None]:
    """Triton's own reductions were decorated when it was imported, for compiling; lend the interpreter its form.

    And arithmetic like torch's on the CPU: it cuts bfloat16 off, NaN too, and which of two zeros is the larger is open.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return cast(self, source, target)
        if before == tl.bfloat16:  # its numbers are bits
            wide = (source.data.astype(numpy.uint32) << 16).view(numpy.float32)
            return cast(self, TensorHandle(wide, tl.float32), target)
        data = torch.from_numpy(numpy.array(source.data, copy=True, ndmin=1)).to(torch.bfloat16)
        return TensorHandle(data.view(torch.uint16).numpy().reshape(numpy.shape(source.data)), tl.bfloat16)

    def pick(larger: bool) -> Callable[..., Any]:
        def function(left: Any, right: Any) -> Any:
            first = (left >= right) if larger else (left <= right)
            return numpy.where(first | (left != left), left, right)

        return lambda self, lhs, rhs: self.binary_op(lhs, rhs, function)

    lent: list[tuple[Any, str, Any]] = [(InterpreterBuilder, "cast_impl", cast_impl)]
    lent += [(InterpreterBuilder, f"create_{name}imumf", pick(name == "max")) for name in ("max", "min")]
    for name in ("sum", "max", "min"):
        if not isinstance(getattr(tl, name), InterpretedFunction):
            lent.append((tl, name, InterpretedFunction(getattr(tl, name).fn)))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in lent]
    try:
        for owner, name, function in lent:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


@dataclass(frozen=True)
class GeneratedProgram:
    """One generated program.

    Attributes:
        source: a module with an ``arrangement`` and an ``application``.
        ranks: the dimensions of each operand as the program takes it.
        dtypes: of each operand.
        aligned: of each operand, whether its sizes and strides are multiples of 16, as far as they are not static.
        warps: that work on one block.
        stages: of software pipelining.
        other: what is read beyond the end of an operand; None where nobody looks.
        overlapped: whether it starts while the kernel before it still runs, and waits for that itself (from sm_90 on).
        light: whether the kernel after it may start even before that wait: its blocks leave room for them.
    """

    source: str
    ranks: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    aligned: tuple[bool, ...]
    warps: int = 4
    stages: int = 1
    other: float | None = None
    overlapped: bool = False
    light: bool = False

    def made_of(self) -> dict[str, Any]:
        """What `aot_worker.make` takes, but for the name."""
        names = ("source", "ranks", "other", "warps", "stages", "overlapped", "light")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Built:
    """A loaded program: how to launch it (operands in order), and the file of Triton source behind it."""

    program: GeneratedProgram
    launch: Callable[..., Any]
    triton_file: str
    kernel_name: str


@functools.lru_cache(maxsize=256)
def build(program: GeneratedProgram, kernel_name: str, cache: DiskCache | None = None) -> Built:
    """Load a program, from `cache` where it is there; its kernels are compiled when they are first launched.

    Raises:
        FusionError: ninetoothed cannot be used here.
    """
    worker = import_triton()  # first: Triton's own functions are to be decorated for compiling
    cache = None if interpreted() else cache
    with _lock, triton_mode(interpreted()):
        text = stored_source(program, kernel_name, cache) if cache is not None else None
        if text is not None:
            module = worker.load_source(kernel_name, text, workspace())
            launch, file = getattr(module, f"launch_{kernel_name}"), module.__file__
        else:
            import_ninetoothed()
            launch, file = worker.make(kernel_name, folder=workspace(), **program.made_of())
            text = Path(file).read_text(encoding="utf-8")
            if cache is not None:
                store_source(program, kernel_name, cache, text)
        if interpreted():
            return Built(program, _serialised(launch), file, kernel_name)
        if cache is not None:
            worker.compile_with(launch.__globals__[kernel_name], functools.partial(_compiled, cache, text, worker))
        return Built(program, launch, file, kernel_name)


def _serialised(handle: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter patches Triton's language module while it runs: one kernel at a time."""

    def launch(*tensors: torch.Tensor) -> None:
        with _lock, _interpreted_reductions(), numpy.errstate(all="ignore"):  # masked lanes divide by zero
            handle(*tensors)

    return launch


# --- what is kept on disk: the generated sources, and Triton's files of each kernel that is compiled of one


class _NotStoredError(Exception):
    """A kernel is not in the cache, and is not to be compiled here."""


_only = threading.local()  # `stored`: whether this thread takes nothing but what is stored


def stored_source(program: GeneratedProgram, kernel_name: str, cache: DiskCache) -> str | None:
    """The Triton source of a program, as it was made before."""
    data = cache.read(cache.key("source", repr(program), kernel_name), ".py")
    return None if data is None else data.decode()


def store_source(program: GeneratedProgram, kernel_name: str, cache: DiskCache, text: str) -> None:
    """Keep the Triton source of a program."""
    cache.put(cache.key("source", repr(program), kernel_name), {".py": text.encode()})


def store_kernel(source: str, digest: str, cache: DiskCache, files: Mapping[str, bytes]) -> None:
    """Keep Triton's files (``.json``, ``.cubin``) of a kernel; `digest` says what `source` was compiled for."""
    cache.put(_kernel_key(source, digest, cache), files)


def _kernel_key(source: str, digest: str, cache: DiskCache) -> str:
    return cache.key("kernel", source, digest, repr(_settings()))


def _settings() -> list[tuple[str, str]]:
    """What the environment tells Triton, but for where its own cache is."""
    return sorted(item for item in os.environ.items() if re.match(r"TRITON_(?!INTERPRET|CACHE)", item[0]))


def _compiled(cache: DiskCache, source: str, worker: Any, src: Any, target: Any, options: Mapping[str, Any]) -> Any:
    """Triton's kernel from `cache`; compiled and kept where it is not there."""
    from triton import compile
    from triton.compiler import CompiledKernel

    digest = worker.digest(src, target, options)
    key = _kernel_key(source, digest, cache)
    paths = {suffix: cache.get(key, suffix) for suffix in (".json", ".cubin")}
    if None not in paths.values():
        with contextlib.suppress(Exception):  # what it is, whoever compiles again finds out
            return CompiledKernel(src, {f"kernel{suffix}": str(path) for suffix, path in paths.items()}, key)
    if getattr(_only, "stored", False):
        raise _NotStoredError
    made = compile(src, target=target, options=options)
    with contextlib.suppress(OSError, KeyError):  # somebody else's cache manager has no such files
        files = {Path(path).suffix: Path(path).read_bytes() for path in made.metadata_group.values()}
        store_kernel(source, digest, cache, {suffix: files[suffix] for suffix in paths})
    return made


class Job(NamedTuple):
    """A program to be compiled for operands like these (`aot_worker.Mock`)."""

    program: GeneratedProgram
    kernel_name: str
    operands: tuple[Any, ...]

    @classmethod
    def of(cls, program: GeneratedProgram, kernel_name: str, tensors: Sequence[torch.Tensor]) -> Job:
        """Of operands, as far as the machine code depends on them; their addresses are taken for aligned."""
        mocks = []
        for tensor in tensors:
            dtype = str(tensor.dtype).removeprefix("torch.")
            aligned = tensor.storage_offset() * tensor.itemsize % 16 == 0
            sizes, strides = (tuple(map(_alike, numbers)) for numbers in (tensor.shape, tensor.stride()))
            mocks.append(import_triton().Mock(dtype, sizes, strides, aligned))
        return cls(program, kernel_name, tuple(mocks))


def _alike(number: int) -> int:
    """The least number that Triton compiles the same code for: 1, multiples of 16, and 64 bits stand apart."""
    if number < 2:
        return 16 * (1 - number) + number
    small = 16 if number % 16 == 0 else 17
    return small if number < 2**31 else small + 2**31


def compile_side_by_side(jobs: Sequence[Job], cache: DiskCache) -> None:
    """Compile what is not in `cache` in other processes, and keep it there."""
    missing = [job for job in dict.fromkeys(jobs) if _stored(job, cache) is None]
    missing.sort(key=lambda job: len(job.operands), reverse=True)  # the longest first, so that all end together
    target = sys.modules["triton"].runtime.driver.active.get_current_target() if missing else None
    if target is None or target.backend != "cuda":
        return
    kernels: list[Any] = []
    while missing:
        # A program once: the other operands may need the same machine code, which its source alone can tell.
        first: dict[Any, Job] = {}
        for job in missing:
            first.setdefault((job.program, job.kernel_name), job)
        tried = set(first.values())
        kernels += _compile(list(first.values()), target.arch, cache)
        missing = [job for job in missing if job not in tried and _stored(job, cache) is None]
    _make_launchers(kernels)


def _compile(jobs: Sequence[Job], architecture: int, cache: DiskCache) -> Iterator[Any]:
    """The kernels of jobs, loaded, once they are compiled and stored; not those that could not be."""
    requests = [
        {
            "program": job.program.made_of(),
            "name": job.kernel_name,
            "operands": [asdict(operand) for operand in job.operands],
            "capability": architecture,
        }
        for job in jobs
    ]
    for job, answer in zip(jobs, POOL.answers(requests), strict=True):
        if "error" in answer:
            log.debug("%s was not compiled ahead: %s", job.kernel_name, answer["error"])
            continue
        store_source(job.program, job.kernel_name, cache, answer["source"])
        files = {suffix: base64.b64decode(data) for suffix, data in answer["files"].items()}
        store_kernel(answer["source"], answer["digest"], cache, files)
        if (kernel := _stored(job, cache)) is not None:
            yield kernel


def _stored(job: Job, cache: DiskCache) -> Any:
    """Triton's kernel that a launch will find, loaded; None where it will have to be compiled."""
    if stored_source(job.program, job.kernel_name, cache) is None:
        return None
    built = build(job.program, job.kernel_name, cache)
    _only.stored = True
    try:
        return import_triton().compile_launch(built.launch, job.kernel_name, job.operands)
    except _NotStoredError:
        return None
    finally:
        _only.stored = False


def _make_launchers(kernels: Sequence[Any]) -> None:
    """Have Triton make its launchers side by side, before the first launches do it one by one: it calls the C compiler
    for each signature, and keeps the results in its own cache."""
    make = getattr(sys.modules["triton"].runtime.driver.active, "launcher_cls", None)
    if make is None:  # no CUDA: nothing will be launched
        return
    distinct = {repr((kernel.src.signature, kernel.src.constants)): kernel for kernel in kernels}

    def one(kernel: Any) -> None:
        with contextlib.suppress(Exception):  # the launch says what is wrong
            make(kernel.src, kernel.metadata)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(one, distinct.values()))
