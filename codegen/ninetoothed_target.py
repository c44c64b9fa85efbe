"""A `KernelSpec` as a ninetoothed application and arrangement, and its kernel.

One program handles a block of elements of a flat kernel, or a few whole rows. Block sizes are explicit powers of two.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import keyword
import math
import os
import re
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
from graph_capture.codegen.lower import REDUCTIONS, KernelSpec, Layout, Operand, Statement

from graph_capture.errors import FusionError

_lock = threading.RLock()  # ninetoothed's and the interpreter's state is global


@dataclass(frozen=True)
class Blocks:
    """How the iteration space is cut: elements of a flat block, or rows x columns; and the warps that work on one."""

    rows: int
    columns: int
    warps: int


def choose_blocks(spec: KernelSpec, interpreted: bool) -> Blocks:
    """Sizes that keep 16-byte accesses and a few thousand elements a program; the interpreter wants few programs."""
    wide = max(operand.dtype.itemsize for operand in (*spec.inputs, *spec.outputs)) > 2
    if spec.columns is None:
        return Blocks(1, 65536 if interpreted else 1024 if wide else 2048, 4)
    row = max(1, 1 << (spec.columns - 1).bit_length())
    columns = row if spec.reduces or interpreted else min(row, 1024)
    rows = max(1, (65536 if interpreted else 1024) // columns)
    return Blocks(rows, columns, min(16, max(4, rows * columns // 512)))


# --- source


def print_source(spec: KernelSpec, blocks: Blocks) -> str:
    """The module that ninetoothed compiles: an arrangement and an application."""
    names = _names(spec)
    parameters = ", ".join(names[operand.name] for operand in (*spec.inputs, *spec.outputs))
    lines = ["import ninetoothed.language as ntl", "", ""]
    lines += [f"def arrangement({parameters}):", *(f"    {line}" for line in _arrangement(spec, blocks, names)), "", ""]
    lines += [f"def application({parameters}):", *(f"    {line}" for line in _application(spec, blocks, names))]
    return "\n".join(lines) + "\n"


def _names(spec: KernelSpec) -> dict[str, str]:
    """Operand names as identifiers that collide with nothing in the module (its renaming is textual)."""
    names: dict[str, str] = {}
    reserved = r"v\d+|ntl|inside|grid|.*_value|.*(application|arrangement|ninetoothed|triton).*"
    for prefix, operands in (("x", spec.inputs), ("out", spec.outputs)):
        for index, operand in enumerate(operands):
            name = operand.name
            usable = re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,39}", name) and not keyword.iskeyword(name)
            free = not re.fullmatch(reserved, name) and name not in names.values()
            names[name] = name if usable and free else f"{prefix}{index}"
            while list(names.values()).count(names[name]) > 1:
                names[name] += "_"
    return names


def _arrangement(spec: KernelSpec, blocks: Blocks, names: dict[str, str]) -> list[str]:
    operands = (*spec.inputs, *spec.outputs)
    lines = []
    if spec.columns is None:
        anchor = next(names[o.name] for o in operands if o.layout is Layout.FULL)
        tiles = {o.name: f"{names[o.name]}.tile(({blocks.columns},))" for o in operands if o.layout is Layout.FULL}
        lines.append(f"grid = {anchor}.tile(({blocks.columns},)).shape")
        for operand in operands:
            if operand.layout is Layout.SCALAR:
                tiles[operand.name] = f"{names[operand.name]}.tile((1,)).expand((grid[0],))"
        return [*lines, *_returned([tiles[o.name] for o in operands])]
    for operand in operands:
        name = names[operand.name]
        if operand.layout is Layout.FULL:
            lines.append(f"{name}.shape = ({name}.shape[0], {spec.columns})")
        elif operand.layout is Layout.ROW:
            lines.append(f"{name}.shape = ({spec.columns},)")
    anchor = next(names[o.name] for o in operands if o.layout is Layout.FULL)
    tile = f"({blocks.rows}, {blocks.columns})"
    lines.append(f"grid = {anchor}.tile({tile}).shape")
    forms = {
        Layout.FULL: f"{{}}.tile({tile})",
        Layout.ROW: f"{{}}.tile(({blocks.columns},)).unsqueeze(0).expand((grid[0], -1))",
        Layout.COLUMN: f"{{}}.tile(({blocks.rows}, 1)).expand((-1, grid[1]))",
        Layout.SCALAR: "{}.tile((1,)).unsqueeze(0).expand((grid[0], grid[1]))",
    }
    return [*lines, *_returned([forms[o.layout].format(names[o.name]) for o in operands])]


def _returned(tiles: list[str]) -> list[str]:
    return ["return (", *(f"    {tile}," for tile in tiles), ")"]


def _application(spec: KernelSpec, blocks: Blocks, names: dict[str, str]) -> list[str]:
    # Each mention of a parameter is a load, so each is read into a variable once.
    values = {operand.name: f"{names[operand.name]}_value" for operand in spec.inputs}
    lines = [f"{values[operand.name]} = {names[operand.name]}" for operand in spec.inputs]
    padded = spec.columns is not None and blocks.columns != spec.columns
    if padded and spec.reduces:
        lines.append(f"inside = ntl.arange(0, {blocks.columns})[None, :] < {spec.columns}")
    for statement in spec.statements:
        values[statement.target] = f"v{statement.target[1:]}"
        lines.append(f"{values[statement.target]} = {_print(statement, values, spec, padded)}")
    for operand, stored in zip(spec.outputs, spec.stores, strict=True):
        lines.append(f"{names[operand.name]} = {values[stored]}")
    return lines


def _print(statement: Statement, values: dict[str, str], spec: KernelSpec, padded: bool) -> str:
    function = statement.function
    args = [values[a] if isinstance(a, str) else _number(a) for a in statement.arguments]
    if function == "cast":
        name = "int1" if statement.dtype is torch.bool else str(statement.dtype).removeprefix("torch.")
        return f"ntl.cast({args[0]}, ntl.{name})"
    if function == "neg":
        return f"-{args[0]}"
    if function in ("maximum", "minimum"):
        if statement.dtype.is_floating_point:
            args.append("propagate_nan=ntl.PropagateNan.ALL")
        return f"ntl.{function}({', '.join(args)})"
    if function == "where":
        return f"ntl.where({', '.join(args)})"
    if function == "tanh":
        return _tanh(args[0], statement.dtype)
    if function in REDUCTIONS:
        identity = {"max": 'float("-inf")', "min": 'float("inf")'}.get(function, "0.0")
        inner = f"ntl.where(inside, {args[0]}, {identity})" if padded else args[0]
        reduced = f"ntl.{'sum' if function == 'mean' else function}({inner}, axis=1, keep_dims=True)"
        return f"{reduced} / {spec.columns}" if function == "mean" else reduced
    if not function[0].isalpha():
        return f"{args[0]} {function} {args[1]}"
    return f"ntl.{function}({args[0]})"


def _tanh(x: str, dtype: torch.dtype) -> str:
    """From exp, which cancels near 0; there by its series, as far as the next term is below the dtype's rounding."""
    near = 0.02 if dtype is torch.float64 else 0.25
    square, series = f"({x} * {x})", f"{62 / 2835}"
    for coefficient in (17 / 315, 2 / 15, 1 / 3, 1.0):
        series = f"({coefficient} - {square} * {series})"
    series = f"{x} * {series}"
    return f"ntl.where(ntl.abs({x}) < {near}, {series}, 1.0 - 2.0 / (ntl.exp(2.0 * {x}) + 1.0))"


def _number(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


# --- building


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
class Built:
    """A kernel: how to launch it (operands in order), and the file of Triton source behind it."""

    launch: Callable[..., Any]
    triton_file: str
    kernel_name: str


def build(spec: KernelSpec, blocks: Blocks, kernel_name: str) -> Built:
    """Generate and load the kernel.

    Raises:
        FusionError: ninetoothed cannot be used here.
    """
    with _lock, triton_mode(interpreted()):
        ninetoothed = import_ninetoothed()
        module = _load(f"{kernel_name}_{blocks.rows}x{blocks.columns}", print_source(spec, blocks))
        tensors = tuple(ninetoothed.Tensor(rank_of(operand, spec)) for operand in (*spec.inputs, *spec.outputs))
        generation = sys.modules["ninetoothed.generation"]
        before, generation.CACHE_DIR = generation.CACHE_DIR, workspace()  # type: ignore[attr-defined]
        try:
            handle = ninetoothed.make(
                module.arrangement,
                module.application,
                tensors,
                kernel_name=kernel_name,
                num_warps=blocks.warps,
                num_stages=1,
            )
        finally:
            generation.CACHE_DIR = before  # type: ignore[attr-defined]
        return Built(_serialised(handle) if interpreted() else handle, handle._source, kernel_name)


def _serialised(handle: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter patches Triton's language module while it runs: one kernel at a time."""

    def launch(*tensors: torch.Tensor) -> None:
        with _lock, _interpreted_reductions(), numpy.errstate(all="ignore"):  # masked lanes divide by zero
            handle(*tensors)

    return launch


def _load(name: str, source: str) -> Any:
    """Import `source` from a file of its own, which ninetoothed reads back."""
    path = workspace() / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"graph_capture_generated.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rank_of(operand: Operand, spec: KernelSpec) -> int:
    """The dimensions of `operand` as the kernel takes it."""
    return 1 if spec.columns is None or operand.layout in (Layout.ROW, Layout.SCALAR) else 2


def bind(operand: Operand, tensor: torch.Tensor, spec: KernelSpec, rows: int) -> torch.Tensor:
    """`tensor` in the form that the kernel takes: a view where its strides allow one, else a copy."""
    if operand.layout is Layout.SCALAR:
        return tensor.reshape(1)
    if spec.columns is None:
        return tensor.reshape(-1)
    shapes = {Layout.FULL: (rows, spec.columns), Layout.ROW: (spec.columns,), Layout.COLUMN: (rows, 1)}
    return tensor.reshape(shapes[operand.layout])
