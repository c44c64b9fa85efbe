"""The CPU target: specs as C functions, compiled by the system's compiler.

A kernel is a function over a range of units of work; ``c/runtime.c`` runs it on the calling thread, or on torch's own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from graph_capture.cache import DiskCache
from graph_capture.codegen.c import attention as c_attention
from graph_capture.codegen.c import host
from graph_capture.codegen.c import matvec as c_matvec
from graph_capture.codegen.c import rotary as c_rotary
from graph_capture.codegen.c import rows as c_rows
from graph_capture.codegen.c.host import CLaunch, Layout
from graph_capture.codegen.spec.attention import AttentionSpec
from graph_capture.codegen.spec.kernel import BuildRequest, KernelSpec, Spec
from graph_capture.codegen.spec.linear import MAX_ROWS, LinearSpec
from graph_capture.codegen.spec.rotary import RotarySpec
from graph_capture.codegen.target import Target
from graph_capture.errors import FusionError

THREAD_WORK = 200_000  # additions (`c_print.weight`) worth a thread: measured, 3 us, where waking one costs 1.5 us


class CPrinter(Protocol):
    """How specs of one kind become C: a module with these two functions."""

    def source(self, spec: Any, name: str) -> str:
        """The text of the function."""
        ...

    def layout(self, spec: Any, tensors: Sequence[torch.Tensor], thread_work: int) -> tuple[Layout, ...]:
        """What each launch on these tensors passes; a thread takes at least so much work."""
        ...


PRINTERS: dict[type, Any] = {
    KernelSpec: c_rows,
    RotarySpec: c_rotary,
    LinearSpec: c_matvec,
    AttentionSpec: c_attention,
}


class CTarget(Target):
    """Kernels for the CPU."""

    name = "c"
    movable = True

    def available(self, device: torch.device, cache: DiskCache | None = None) -> str | None:
        """Why nothing can be compiled here for `device`, or None."""
        if device.type != "cpu":
            return f"its tensors are on {device}, and C kernels run on the CPU"
        try:
            host.toolchain(cache)
        except FusionError as error:
            return str(error)
        return None

    def serves(self, device: torch.device) -> bool:
        """The CPU."""
        return device.type == "cpu"

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Whether kernels can run on these tensors.

        Raises:
            FusionError: they cannot.
        """
        for tensor in tensors:
            if not tensor.is_cpu or tensor.layout is not torch.strided:
                raise FusionError(f"a tensor is {tensor.layout} on {tensor.device}, the kernel runs on the CPU")
            if tensor.is_neg():
                raise FusionError("a tensor is a view that negates")

    def accept(self, spec: Spec) -> None:
        """Whether there is a way to compute this; FusionError if there is none."""
        _accept(spec)

    def source(self, spec: Spec) -> str:
        """The kernel's function, without the prelude that all share."""
        return _printed(spec, "kernel")

    def artifacts(self, spec: Spec, kernel_name: str) -> Mapping[str, str]:
        """The C file as it is compiled, and the compiler's assembly."""
        text = host.prelude() + _printed(spec, _symbol(kernel_name))
        return {"kernel.c": text, "kernel.s": host.assembly(text)}

    def build(
        self, spec: Spec, kernel_name: str, cache: DiskCache | None = None
    ) -> Callable[[Sequence[torch.Tensor], int], CLaunch]:
        """Compile a kernel; the result binds it to tensors.

        Raises:
            FusionError: there is no compiler, or it fails.
        """
        symbol = _symbol(kernel_name)
        library = host.library(_printed(spec, symbol), cache)
        printer: CPrinter = PRINTERS[type(spec)]
        layouts: dict[Any, tuple[Layout, ...]] = {}

        def bind(tensors: Sequence[torch.Tensor], choice: int) -> CLaunch:
            key = tuple((tensor.shape, tensor.stride()) for tensor in tensors)
            found = layouts.get(key)
            if found is None:
                found = printer.layout(spec, tensors, THREAD_WORK)
                host.check_reach(found, tensors)
                layouts[key] = found
            return host.launch([getattr(library, symbol + layout.part) for layout in found], tensors, found)

        return bind

    def prepare(self, requests: Sequence[BuildRequest], cache: DiskCache | None = None) -> None:
        """Compile kernels side by side, for `build` to find them."""
        texts = []
        for spec, kernel_name in dict.fromkeys((request.spec, request.name) for request in requests):
            with contextlib.suppress(FusionError):  # `build` raises it again
                texts.append(_printed(spec, _symbol(kernel_name)))
        host.compile_ahead(texts, cache)


def _symbol(kernel_name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", kernel_name)


def _printed(spec: Spec, symbol: str) -> str:
    _accept(spec)
    printer: CPrinter = PRINTERS[type(spec)]
    return printer.source(spec, symbol)


def _accept(spec: Spec) -> None:
    if type(spec) not in PRINTERS:
        raise FusionError(f"the C target has no kernels of the kind {type(spec).__name__}")
    if isinstance(spec, LinearSpec) and spec.rows is None:
        raise FusionError(f"more than {MAX_ROWS} rows are the library's on the CPU")
