"""`KernelCompiler`: regions to kernels, each distinct one compiled once."""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from graph_capture.codegen import ninetoothed_target as target
from graph_capture.codegen.aot import Binary, compile_ahead
from graph_capture.codegen.lower import KernelSpec, Layout, lower

from graph_capture.errors import FusionError
from graph_capture.graph import SubGraph, TensorMeta

By = Mapping[str, Any] | Sequence[Any]


class CompiledKernel:
    """One kernel, for every number of rows.

    Attributes:
        name: the kernel's name, as profilers show it.
        key: equal for equal kernels, in every process.
        spec: what it computes.
        source: the ninetoothed arrangement and application that were generated for it.
    """

    def __init__(self, spec: KernelSpec, name: str, key: str) -> None:
        self.spec, self.name, self.key = spec, name, key
        self.source = target.print_source(spec, target.choose_blocks(spec, interpreted=False))
        blocks = target.choose_blocks(spec, self.interpreted)
        self._built = target.build(spec, blocks, name)

    @property
    def interpreted(self) -> bool:
        """Whether it runs in Triton's interpreter: right numbers, no speed."""
        return target.interpreted()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run on `inputs` (in the graph's order) into new outputs.

        Raises:
            FusionError: the inputs do not fit the kernel in dtype, device, or shape beyond the number of rows.
        """
        space = self._space(inputs)
        outputs = []
        for operand in self.spec.outputs:
            shape = space if operand.layout is Layout.FULL else (*space[:-1], 1) if operand.keepdim else space[:-1]
            outputs.append(torch.empty(shape, dtype=operand.dtype, device=inputs[0].device))
        self._launch(inputs, outputs, space)
        return tuple(outputs)

    def bind(self, tensors: Sequence[torch.Tensor], share: bool) -> Callable[[Sequence[torch.Tensor]], Any]:
        """A call for replays; a kernel prepares nothing."""
        return lambda inputs: self(*inputs)

    def run(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Run into the given contiguous outputs.

        Raises:
            FusionError: as `__call__`; or an output is not contiguous.
        """
        if not all(output.is_contiguous() for output in outputs):
            raise FusionError("a kernel writes contiguous outputs only")
        self._launch(inputs, outputs, self._space(inputs))

    def _space(self, inputs: Sequence[torch.Tensor]) -> tuple[int, ...]:
        spec = self.spec
        if len(inputs) != len(spec.inputs):
            raise FusionError(f"{self.name} takes {len(spec.inputs)} inputs, got {len(inputs)}")
        for operand, tensor in zip(spec.inputs, inputs, strict=True):
            if tensor.dtype is not operand.dtype:
                raise FusionError(f"{self.name}: {operand.name} is {tensor.dtype}, expected {operand.dtype}")
            if tensor.device.type == "cpu" and not self.interpreted:
                raise FusionError(f"{self.name}: {operand.name} is on the CPU, the kernel runs on CUDA")
        try:
            space = tuple(torch.broadcast_shapes(*(tensor.shape for tensor in inputs)))
        except RuntimeError as error:
            raise FusionError(f"{self.name}: {error}") from error
        if spec.columns is not None and (not space or space[-1] != spec.columns):
            raise FusionError(f"{self.name}: rows have {list(space)[-1:]} elements, expected {spec.columns}")
        if math.prod(space) >= 2**31:
            raise FusionError(f"{self.name}: {math.prod(space)} elements need 64-bit offsets")
        rows = math.prod(space[:-1])
        sizes = {Layout.SCALAR: 1, Layout.ROW: spec.columns, Layout.COLUMN: rows, Layout.FULL: math.prod(space)}
        for operand, tensor in zip(spec.inputs, inputs, strict=True):
            if tensor.numel() != sizes[operand.layout]:
                raise FusionError(
                    f"{self.name}: {operand.name} of shape {list(tensor.shape)} is not a {operand.layout.value} operand"
                )
        return space

    def _launch(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], space: tuple[int, ...]) -> None:
        if math.prod(space) == 0:
            return
        rows = math.prod(space[:-1])
        operands = (*self.spec.inputs, *self.spec.outputs)
        tensors = [
            target.bind(operand, tensor, self.spec, rows)
            for operand, tensor in zip(operands, (*inputs, *outputs), strict=True)
        ]
        self._built.launch(*tensors)

    def compile_for(self, architecture: str) -> Binary:
        """Machine code for ``sm_80``, ``sm_90``, ...; needs no GPU.

        Raises:
            FusionError: the compiler fails.
        """
        return compile_for([self], architecture)[0]

    def __repr__(self) -> str:
        return f"<CompiledKernel {self.name}>"


def compile_for(kernels: Sequence[CompiledKernel], architecture: str) -> list[Binary]:
    """Machine code of several kernels in one go; see `CompiledKernel.compile_for`."""
    jobs = []
    for kernel in kernels:
        blocks = target.choose_blocks(kernel.spec, interpreted=False)
        jobs.append((kernel.spec, target.build(kernel.spec, blocks, kernel.name), blocks.warps))
    return compile_ahead(jobs, architecture)


class KernelCompiler:
    """Makes one kernel for each distinct region: its ops, dtypes and row size; the number of rows stays open.

    Args:
        target: "auto" or "ninetoothed".
    """

    def __init__(self, target: str = "auto") -> None:
        if target not in ("auto", "ninetoothed"):
            raise FusionError(f"there is no target {target!r}; use 'auto' or 'ninetoothed'")
        self._kernels: dict[str, CompiledKernel] = {}
        self._specs: dict[tuple[Any, ...], KernelSpec] = {}
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
        rows in place that lie apart, as halves of a merged projection do.

        Raises:
            FusionError: the region cannot be one kernel, or its kernel cannot be built.
        """
        dtypes, shapes = _listed(graph, input_dtypes), [tuple(shape) for shape in _listed(graph, input_shapes)]
        strides = list(map(_contiguous, shapes)) if input_strides is None else _listed(graph, input_strides)
        with self._lock:
            known = (graph, *dtypes, *shapes, *strides)
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


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
