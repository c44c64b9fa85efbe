"""Loading generated ninetoothed programs, on machines with a GPU and without.

ninetoothed needs an active Triton driver. Without CUDA a stand-in answers its questions, and kernels run in Triton's
interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch

from graph_capture.errors import FusionError

_numbers = itertools.count()
_lock = threading.RLock()  # ninetoothed's and the interpreter's state is global


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: on a machine without CUDA."""
    return not torch.cuda.is_available()


@cache
def workspace() -> Path:
    """A private folder of this process for generated sources (ninetoothed's own cache is shared and not atomic)."""
    path = Path(tempfile.mkdtemp(prefix="graph_capture_"))
    atexit.register(_remove, path, os.getpid())
    return path


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        shutil.rmtree(path, ignore_errors=True)


class _NoDevice:
    """What ninetoothed asks of the active driver, on a machine that has none."""

    class utils:  # noqa: N801
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_num_regs": 65536, "max_shared_mem": 232448}

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@cache
def import_ninetoothed() -> Any:
    """ninetoothed, imported so that it works on this machine.

    Raises:
        FusionError: it, or Triton, cannot be imported.
    """
    try:
        import triton

        if interpreted():
            triton.runtime.driver.set_active(_NoDevice())
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
    """Triton's own reductions were decorated when it was imported, for compiling; lend the interpreter its form."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    before = {name: getattr(tl, name) for name in ("sum", "max", "min")}
    try:
        for name, function in before.items():
            if not isinstance(function, InterpretedFunction):
                setattr(tl, name, InterpretedFunction(function.fn))
        yield
    finally:
        for name, function in before.items():
            setattr(tl, name, function)


@dataclass(frozen=True)
class Program:
    """One generated program.

    Attributes:
        source: a module with an ``arrangement`` and an ``application``.
        ranks: the dimensions of each operand as the program takes it.
        dtypes: of each operand.
        aligned: of each operand, whether its sizes and strides are multiples of 16, as far as they are not static.
        warps: that work on one block.
        stages: of software pipelining.
        other: what is read beyond the end of an operand; None where nobody looks.
    """

    source: str
    ranks: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    aligned: tuple[bool, ...]
    warps: int = 4
    stages: int = 1
    other: float | None = None


@dataclass(frozen=True)
class Built:
    """A loaded program: how to launch it (operands in order), and the file of Triton source behind it."""

    program: Program
    launch: Callable[..., Any]
    triton_file: str
    kernel_name: str


def build(program: Program, kernel_name: str) -> Built:
    """Load a program.

    Raises:
        FusionError: ninetoothed cannot be used here.
    """
    ninetoothed = import_ninetoothed()  # first: Triton's own functions are to be decorated for compiling
    with _lock, triton_mode(interpreted()):
        module = _load(kernel_name, program.source)
        tensors = tuple(ninetoothed.Tensor(rank, other=program.other) for rank in program.ranks)
        generation = sys.modules["ninetoothed.generation"]
        before, generation.CACHE_DIR = generation.CACHE_DIR, workspace()  # type: ignore[attr-defined]
        try:
            handle = ninetoothed.make(
                module.arrangement,
                module.application,
                tensors,
                kernel_name=kernel_name,
                num_warps=program.warps,
                num_stages=program.stages,
            )
        finally:
            generation.CACHE_DIR = before  # type: ignore[attr-defined]
        return Built(program, _serialised(handle) if interpreted() else handle, handle._source, kernel_name)


def _serialised(handle: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter patches Triton's language module while it runs: one kernel at a time."""

    def launch(*tensors: torch.Tensor) -> None:
        with _lock, _interpreted_reductions(), numpy.errstate(all="ignore"):  # masked lanes divide by zero
            handle(*tensors)

    return launch


def _load(name: str, source: str) -> Any:
    """Import `source` from a file of its own, which ninetoothed reads back."""
    path = workspace() / f"{name}_{next(_numbers)}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"graph_capture_generated.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
