"""`KernelCompiler`: regions to kernels, each distinct one compiled once."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from graph_capture.codegen import ninetoothed_target
from graph_capture.codegen.aot import Binary
from graph_capture.codegen.geometry import dense_strides
from graph_capture.codegen.lower import lower
from graph_capture.codegen.spec import Operand, Spec

from graph_capture.errors import FusionError
from graph_capture.graph import SubGraph, TensorMeta

By = Mapping[str, Any] | Sequence[Any]
Launch = Callable[[], Any]


class Target(Protocol):
    """What makes specs run somewhere: a module with these names."""

    name: str

    def interpreted(self) -> bool:
        """Whether kernels give right numbers but no speed."""
        ...

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise FusionError if kernels cannot run on these tensors."""
        ...

    def source(self, spec: Spec) -> str:
        """The code of a spec."""
        ...

    def build(self, spec: Spec, kernel_name: str) -> Callable[[Sequence[torch.Tensor]], Launch]:
        """Compile a spec; the result binds it to the tensors of a call, inputs before outputs."""
        ...


class CompiledKernel:
    """One kernel, for every number of rows.

    Attributes:
        name: the kernel's name, as profilers show it.
        key: equal for equal kernels, in every process.
        spec: what it computes.
        source: the code that was generated for it.
    """

    def __init__(self, spec: Spec, name: str, key: str, target: Target = ninetoothed_target) -> None:
        self.spec, self.name, self.key, self.target = spec, name, key, target
        self.source = target.source(spec)
        self._bind = target.build(spec, name)

    @property
    def interpreted(self) -> bool:
        """Whether it runs in Triton's interpreter: right numbers, no speed."""
        return self.target.interpreted()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run on `inputs` (in the graph's order); the outputs are new, but for those that are written in place.

        Raises:
            FusionError: the inputs do not fit the kernel in dtype, device, or shape beyond the number of rows.
        """
        self._check(self.spec.inputs, inputs)
        outputs = self.spec.allocate(inputs)
        try:
            self.prepare(inputs, outputs)()
        except FusionError:
            if all(tensor.is_contiguous() for tensor in inputs):
                raise
            # Made for other strides: written places keep their memory, the rest is copied.
            held = {output.data_ptr() for output in outputs}
            copies = [t if t.data_ptr() in held else t.contiguous() for t in inputs]
            self.prepare(copies, outputs)()
        return tuple(outputs)

    def prepare(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Launch:
        """A launch that reads and writes these tensors, and no others, each time it is called.

        Raises:
            FusionError: they do not fit the kernel, in dtype, device, shape or strides.
        """
        self._check(self.spec.inputs, inputs)
        self._check(self.spec.outputs, outputs)
        self.target.check((*inputs, *outputs))
        if all(tensor.numel() == 0 for tensor in outputs):
            return _nothing
        try:
            return self._bind((*inputs, *outputs))
        except FusionError as error:
            raise FusionError(f"{self.name}: {error}") from error

    def bind(self, tensors: Sequence[torch.Tensor], share: bool) -> Callable[[Sequence[torch.Tensor]], Any]:
        """A call for replays; a kernel prepares nothing."""
        return lambda inputs: self(*inputs)

    def _check(self, operands: Sequence[Operand], tensors: Sequence[torch.Tensor]) -> None:
        if len(tensors) != len(operands):
            raise FusionError(f"{self.name} takes {len(operands)} tensors here, got {len(tensors)}")
        for operand, tensor in zip(operands, tensors, strict=True):
            if tensor.dtype is not operand.dtype:
                raise FusionError(f"{self.name}: {operand.name} is {tensor.dtype}, expected {operand.dtype}")

    def compile_for(self, architecture: str) -> Binary:
        """Machine code for ``sm_80``, ``sm_90``, ...; needs no GPU.

        Raises:
            FusionError: the compiler fails.
        """
        return compile_for([self], architecture)[0]

    def __repr__(self) -> str:
        return f"<CompiledKernel {self.name}>"


def _nothing() -> None:
    """The launch of a kernel that has no elements to compute."""


def compile_for(kernels: Sequence[CompiledKernel], architecture: str) -> list[Binary]:
    """Machine code of several kernels in one go; see `CompiledKernel.compile_for`."""
    return ninetoothed_target.compile_for([(kernel.spec, kernel.name) for kernel in kernels], architecture)


class KernelCompiler:
    """Makes one kernel for each distinct region: its ops, dtypes and row size; the number of rows stays open.

    Args:
        target: "auto" or "ninetoothed".
    """

    def __init__(self, target: str = "auto") -> None:
        if target not in ("auto", "ninetoothed"):
            raise FusionError(f"there is no target {target!r}; use 'auto' or 'ninetoothed'")
        self._kernels: dict[str, CompiledKernel] = {}
        self._specs: dict[tuple[Any, ...], Spec] = {}
        self._lock = threading.RLock()

    @property
    def kernels(self) -> tuple[CompiledKernel, ...]:
        """The kernels made so far."""
        return tuple(self._kernels.values())

    def compile(
        self, graph: SubGraph, input_dtypes: By, input_shapes: By, input_strides: By | None = None
    ) -> CompiledKernel:
        """The kernel of `graph` for inputs of these dtypes and shapes (by name, or in the order of its inputs).

        The kernel takes inputs of any strides; knowing them (in elements; contiguous unless given) lets it read
        in place what is not contiguous: halves of a merged projection, transposed heads.

        Raises:
            FusionError: the region cannot be one kernel, or its kernel cannot be built.
        """
        dtypes, shapes = _listed(graph, input_dtypes), [tuple(shape) for shape in _listed(graph, input_shapes)]
        strides = list(map(dense_strides, shapes)) if input_strides is None else _listed(graph, input_strides)
        with self._lock:
            known = (graph, *dtypes, *shapes, *map(tuple, strides))
            spec = self._specs.get(known)
            if spec is None:
                metas = {
                    name: TensorMeta(shape, tuple(stride), dtype, torch.device("cpu"))
                    for name, dtype, shape, stride in zip(graph.input_names, dtypes, shapes, strides, strict=True)
                }
                spec = self._specs[known] = lower(graph, metas)
            key = hashlib.sha256(repr(spec).encode()).hexdigest()
            if key not in self._kernels:
                ops = "_".join(re.sub(r"\W.*", "", node.op_type) for node in graph.nodes)
                self._kernels[key] = CompiledKernel(spec, f"fused_{ops[:40]}_{key[:8]}", key)
            return self._kernels[key]


def _listed(graph: SubGraph, table: By) -> list[Any]:
    values = [table[name] for name in graph.input_names] if isinstance(table, Mapping) else list(table)
    if len(values) != len(graph.input_names):
        raise FusionError(f"the graph takes ({', '.join(graph.input_names)}), got {len(values)} values")
    return values
