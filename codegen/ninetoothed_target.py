"""The GPU target: specs as ninetoothed programs, on Triton; in Triton's interpreter where there is no CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from graph_capture.codegen import ninetoothed_host as host
from graph_capture.codegen import ninetoothed_matvec, ninetoothed_rows
from graph_capture.codegen.aot import Binary, compile_ahead
from graph_capture.codegen.matvec import MatvecSpec
from graph_capture.codegen.spec import KernelSpec, Spec

from graph_capture.errors import FusionError


class Printer(Protocol):
    """How specs of one kind become a program: a module with these two functions."""

    def program(self, spec: Any, interpreted: bool) -> host.Program:
        """The program of a spec."""
        ...

    def views(self, spec: Any, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """The operands of each launch, given inputs and outputs."""
        ...


PRINTERS: dict[type, Any] = {KernelSpec: ninetoothed_rows, MatvecSpec: ninetoothed_matvec}
name = "ninetoothed"


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
    return PRINTERS[type(spec)].program(spec, False).source


def build(spec: Spec, kernel_name: str) -> Callable[[Sequence[torch.Tensor]], Callable[[], None]]:
    """Load the kernel; the result binds it to tensors.

    Raises:
        FusionError: ninetoothed cannot be used here.
    """
    printer: Printer = PRINTERS[type(spec)]
    built = host.build(printer.program(spec, interpreted()), kernel_name)

    def bind(tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        launches = printer.views(spec, tensors)
        if len(launches) == 1:
            (operands,) = launches
            return lambda: built.launch(*operands)

        def launch() -> None:
            for operands in launches:
                built.launch(*operands)

        return launch

    return bind


def compile_for(specs: Sequence[tuple[Spec, str]], architecture: str) -> list[Binary]:
    """Machine code of kernels (their specs and names) for ``sm_80``, ``sm_90``, ...; needs no GPU.

    Raises:
        FusionError: the compiler fails.
    """
    jobs = [host.build(PRINTERS[type(spec)].program(spec, False), kernel_name) for spec, kernel_name in specs]
    return compile_ahead(jobs, architecture)
