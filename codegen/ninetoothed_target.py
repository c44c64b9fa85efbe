"""The GPU target: specs as ninetoothed programs, on Triton; in Triton's interpreter where there is no CUDA."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from graph_capture.codegen import ninetoothed_attention, ninetoothed_matvec, ninetoothed_rotary, ninetoothed_rows
from graph_capture.codegen import ninetoothed_host as host
from graph_capture.codegen.aot import Binary, compile_ahead
from graph_capture.codegen.attention import AttentionSpec
from graph_capture.codegen.matvec import MatvecSpec
from graph_capture.codegen.rotary_spec import RotarySpec
from graph_capture.codegen.spec import KernelSpec, Spec

from graph_capture.cachedir import DiskCache
from graph_capture.errors import FusionError


class Printer(Protocol):
    """How specs of one kind become a program: a module with these functions.

    It may also have ``after(spec, tensors)``: a call that follows the launch, or None; ``fitted(spec, tensors)``: the
    program for tensors of this size; and, instead of `program`, ``programs(spec, interpreted)``: one for each launch.
    """

    def program(self, spec: Any, interpreted: bool) -> host.Program:
        """The program of a spec."""
        ...

    def views(self, spec: Any, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """The operands of each launch, given inputs and outputs."""
        ...


PRINTERS: dict[type, Any] = {
    KernelSpec: ninetoothed_rows,
    RotarySpec: ninetoothed_rotary,
    MatvecSpec: ninetoothed_matvec,
    AttentionSpec: ninetoothed_attention,
}
name = "ninetoothed"
movable = False


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: on a machine without CUDA."""
    return host.interpreted()


def check(tensors: Sequence[torch.Tensor]) -> None:
    """Whether kernels can run on these tensors.

    Raises:
        FusionError: they cannot.
    """
    if not interpreted() and any(tensor.device.type == "cpu" for tensor in tensors):
        raise FusionError("its tensors are on the CPU, the kernel runs on CUDA")


def source(spec: Spec) -> str:
    """The generated module, as it is compiled for a GPU."""
    return "\n\n".join(program.source for program in _programs(spec, False))


def _programs(spec: Spec, interpreted: bool) -> Sequence[host.Program]:
    printer = PRINTERS[type(spec)]
    return printer.programs(spec, interpreted) if hasattr(printer, "programs") else [printer.program(spec, interpreted)]


def build(
    spec: Spec, kernel_name: str, cache: DiskCache | None = None
) -> Callable[[Sequence[torch.Tensor]], Callable[[], None]]:
    """Load the kernel; the result binds it to tensors. Triton keeps a cache of its own.

    Raises:
        FusionError: ninetoothed cannot be used here.
    """
    printer = PRINTERS[type(spec)]
    known: dict[host.Program, host.Built] = {}

    def load(programs: Sequence[host.Program]) -> list[host.Built]:
        for program in programs:
            if program not in known:
                number = f"_{len(known)}" if known else ""
                known[program] = host.build(program, kernel_name + number)
        return [known[program] for program in programs]

    load(_programs(spec, interpreted()))

    def bind(tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        launches = printer.views(spec, tensors)
        fits = not interpreted() and hasattr(printer, "fitted")
        built = load([printer.fitted(spec, tensors)] if fits else _programs(spec, interpreted()))
        kernels = built if len(built) > 1 else built * len(launches)
        steps = [functools.partial(k.launch, *operands) for k, operands in zip(kernels, launches, strict=True)]
        last = printer.after(spec, tensors) if hasattr(printer, "after") else None
        steps += [last] if last is not None else []
        if len(steps) == 1:
            return steps[0]

        def launch() -> None:
            for step in steps:
                step()

        return launch

    return bind


def prepare(specs: Sequence[tuple[Spec, str]], cache: DiskCache | None = None) -> None:
    """Nothing to do ahead: Triton compiles at the first launch."""


def compile_for(specs: Sequence[tuple[Spec, str]], architecture: str) -> list[Binary]:
    """Machine code of kernels (their specs and names) for ``sm_80``, ``sm_90``, ...; needs no GPU.

    Of a spec with several programs, that of the first.

    Raises:
        FusionError: the compiler fails.
    """
    programs = [(_programs(spec, False)[0], kernel_name) for spec, kernel_name in specs]
    cache = DiskCache("sass")
    keys = [cache.key(repr(program), kernel_name, architecture) for program, kernel_name in programs]
    found = {key: Binary.from_json(data) for key in keys if (data := cache.read(key, ".binary")) is not None}
    missing = {key: item for key, item in zip(keys, programs, strict=True) if key not in found}
    made = compile_ahead([host.build(*item) for item in missing.values()], architecture) if missing else []
    for key, binary in zip(missing, made, strict=True):
        cache.put(key, {".binary": binary.to_json().encode()})
        found[key] = binary
    return [found[key] for key in keys]
