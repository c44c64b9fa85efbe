"""The GPU target: specs as ninetoothed programs, on Triton; in Triton's interpreter where there is no CUDA."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from graph_capture.cache import DiskCache
from graph_capture.codegen.ninetoothed import attention as ninetoothed_attention
from graph_capture.codegen.ninetoothed import host
from graph_capture.codegen.ninetoothed import linear as ninetoothed_linear
from graph_capture.codegen.ninetoothed import rotary as ninetoothed_rotary
from graph_capture.codegen.ninetoothed import rows as ninetoothed_rows
from graph_capture.codegen.ninetoothed.aot import Binary, capability_of, compile_ahead
from graph_capture.codegen.ninetoothed.workers import POOL
from graph_capture.codegen.spec.attention import AttentionSpec
from graph_capture.codegen.spec.kernel import BuildRequest, KernelSpec, Spec
from graph_capture.codegen.spec.linear import LinearSpec
from graph_capture.codegen.spec.rotary import RotarySpec
from graph_capture.codegen.target import Target
from graph_capture.errors import FusionError


class SpecPrinter(Protocol):
    """How specs of one kind become a program: a module with these functions.

    It may also have ``after(spec, tensors)``: a call that follows the launch, or None; ``candidates(spec, tensors)``:
    programs for tensors of this size, to be timed, the expected fastest first; and, instead of `program`,
    ``programs(spec, interpreted)``: one for each launch.
    """

    def program(self, spec: Any, interpreted: bool) -> host.GeneratedProgram:
        """The program of a spec."""
        ...

    def views(self, spec: Any, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """The operands of each launch, given inputs and outputs."""
        ...


PRINTERS: dict[type, Any] = {
    KernelSpec: ninetoothed_rows,
    RotarySpec: ninetoothed_rotary,
    LinearSpec: ninetoothed_linear,
    AttentionSpec: ninetoothed_attention,
}
OVERLAPS = 90  # the compute capability from where on kernels can start before others have ended


def _programs(spec: Spec, interpreted: bool) -> Sequence[host.GeneratedProgram]:
    printer = PRINTERS[type(spec)]
    return printer.programs(spec, interpreted) if hasattr(printer, "programs") else [printer.program(spec, interpreted)]


def _ways(spec: Spec, tensors: Sequence[torch.Tensor]) -> list[Sequence[host.GeneratedProgram]]:
    """The ways to cut the work, the expected fastest first: of each its programs, one for all launches or for each."""
    printer = PRINTERS[type(spec)]
    if host.interpreted() or not hasattr(printer, "candidates"):
        return [_programs(spec, host.interpreted())]
    return [[program] for program in printer.candidates(spec, tensors)]


def _named(
    programs: Sequence[host.GeneratedProgram], kernel_name: str, capability: int | None = None
) -> list[tuple[host.GeneratedProgram, str]]:
    """The programs of a kernel for a device (default: this machine's), and what they are called."""
    capability = host.capability() if capability is None else capability
    programs = [replace(program, overlapped=capability >= OVERLAPS) for program in programs]
    return [(program, f"{kernel_name}_{number}" if number else kernel_name) for number, program in enumerate(programs)]


def _launches(
    spec: Spec, kernel_name: str, tensors: Sequence[torch.Tensor], choice: int
) -> Iterator[tuple[host.GeneratedProgram, str, Sequence[torch.Tensor]]]:
    """The launches on these tensors: program, kernel's name, operands."""
    launches = PRINTERS[type(spec)].views(spec, tensors)
    ways = _ways(spec, tensors)
    kernels = _named(ways[min(choice, len(ways) - 1)], kernel_name)
    kernels = kernels if len(kernels) > 1 else kernels * len(launches)
    for (program, name), operands in zip(kernels, launches, strict=True):
        yield program, name, operands


class _Launches:
    """Launches in a row. What they share and nobody else has is `scratch`: it must live as long as they may run."""

    def __init__(self, steps: Sequence[Callable[[], None]], tensors: Sequence[torch.Tensor]) -> None:
        self._steps = steps
        given = {tensor.untyped_storage()._cdata for tensor in tensors}
        operands = [operand for step in steps for operand in getattr(step, "args", ())]
        self.scratch = tuple(
            operand
            for operand in operands
            if isinstance(operand, torch.Tensor) and operand.untyped_storage()._cdata not in given
        )

    def __call__(self) -> None:
        for step in self._steps:
            step()


class NinetoothedTarget(Target):
    """Kernels for CUDA; in Triton's interpreter where there is none."""

    name = "ninetoothed"

    def available(self, device: torch.device, cache: DiskCache | None = None) -> str | None:
        """Why kernels cannot run on tensors of `device`: with a GPU here they are compiled for it."""
        if device.type == "cpu" and not host.interpreted():
            return "its tensors are on the CPU, and ninetoothed kernels run on CUDA here"
        return None

    def serves(self, device: torch.device) -> bool:
        """Every accelerator."""
        return device.type != "cpu"

    def start(self) -> None:
        """Start the process that compilers are forked from."""
        if not host.interpreted():
            POOL.start()

    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter: on a machine without CUDA."""
        return host.interpreted()

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Whether kernels can run on these tensors.

        Raises:
            FusionError: they cannot.
        """
        if not host.interpreted() and any(tensor.device.type == "cpu" for tensor in tensors):
            raise FusionError("its tensors are on the CPU, the kernel runs on CUDA")

    def accept(self, spec: Spec) -> None:
        """Every spec has a printer, but for products with packed weights."""
        if isinstance(spec, LinearSpec) and any(product.scheme for product in spec.products):
            raise FusionError("packed weights have no kernels on a GPU")

    def source(self, spec: Spec) -> str:
        """The generated module, as it is compiled for a GPU."""
        return "\n\n".join(program.source for program in _programs(spec, False))

    def artifacts(self, spec: Spec, kernel_name: str) -> Mapping[str, str]:
        """The Triton source after rewriting, and with a GPU here its machine code."""
        named = _named(_programs(spec, host.interpreted()), kernel_name)
        built = [host.build(program, name) for program, name in named]
        found = {f"{item.kernel_name}.triton.py": Path(item.triton_file).read_text(encoding="utf-8") for item in built}
        if host.capability():
            binaries = compile_ahead(built, f"sm_{host.capability()}")
            found |= {f"{item.kernel_name}.sass": code.sass for item, code in zip(built, binaries, strict=True)}
        return found

    def candidates(self, spec: Spec, tensors: Sequence[torch.Tensor]) -> int:
        """How many ways there are to cut the work on these tensors (inputs, then outputs); at most four."""
        return len(_ways(spec, tensors))

    def build(
        self, spec: Spec, kernel_name: str, cache: DiskCache | None = None
    ) -> Callable[[Sequence[torch.Tensor], int], Callable[[], None]]:
        """A kernel, from `cache` where it is there; the result binds it to tensors, and one of `candidates`.

        Raises:
            FusionError: ninetoothed cannot be used here.
        """
        printer = PRINTERS[type(spec)]
        host.import_triton()
        if host.interpreted():  # on a GPU the program follows the size of the tensors
            for program, name in _named(_programs(spec, True), kernel_name):
                host.build(program, name)

        def bind(tensors: Sequence[torch.Tensor], choice: int) -> Callable[[], None]:
            steps: list[Callable[[], None]] = []
            for program, name, operands in _launches(spec, kernel_name, tensors, choice):
                steps.append(functools.partial(host.build(program, name, cache).launch, *operands))
            last = printer.after(spec, tensors) if hasattr(printer, "after") else None
            steps += [last] if last is not None else []
            return _Launches(steps, tensors)

        return bind

    def prepare(self, requests: Sequence[BuildRequest], cache: DiskCache | None = None) -> None:
        """Make and compile kernels side by side in other processes, as far as they are not in `cache`, for launches to
        find them there. What fails is left to the launch, which says why."""
        if host.interpreted() or cache is None:
            return
        jobs = []
        for request in requests:
            spec = request.spec
            inputs = [torch.empty_strided(m.shape, m.stride, dtype=m.dtype, device="meta") for m in request.inputs]
            try:
                tensors = [*inputs, *spec.allocate(inputs)]
                if all(tensor.numel() == 0 for tensor in tensors[len(inputs) :]):
                    continue
                ways = range(self.candidates(spec, tensors)) if request.choice is None else [request.choice]
                for way in ways:
                    jobs += [host.Job.of(*launch) for launch in _launches(spec, request.name, tensors, way)]
            except FusionError:
                continue
        host.compile_side_by_side(jobs, cache)

    def compiles(self, architecture: str) -> bool:
        """NVIDIA's: ``sm_80``, ``sm_90``, ..."""
        return architecture.startswith("sm_")

    def compile_for(self, specs: Sequence[tuple[Spec, str]], architecture: str) -> list[tuple[Binary, ...]]:
        """Machine code of kernels (their specs and names) for ``sm_80``, ``sm_90``, ...; needs no GPU.

        Of each kernel that of all its programs, in the order of their launches.

        Raises:
            FusionError: the architecture's name is of another form, or the compiler fails.
        """
        cache = DiskCache("sass")
        capability = capability_of(architecture)
        kernels = [_named(_programs(spec, False), kernel_name, capability) for spec, kernel_name in specs]
        keys = {item: cache.key(repr(item[0]), item[1], architecture) for kernel in kernels for item in kernel}
        stored = {item: cache.read(key, ".binary") for item, key in keys.items()}
        found = {item: Binary.from_json(data) for item, data in stored.items() if data is not None}
        missing = [item for item in keys if item not in found]
        made = compile_ahead([host.build(*item) for item in missing], architecture) if missing else []
        for item, binary in zip(missing, made, strict=True):
            cache.put(keys[item], {".binary": binary.to_json().encode()})
            found[item] = binary
        return [tuple(found[item] for item in kernel) for kernel in kernels]
