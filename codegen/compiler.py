"""`KernelCompiler`: regions to kernels, each distinct one compiled once."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import re
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graph_capture.cache import DiskCache
from graph_capture.codegen.c.target import CTarget
from graph_capture.codegen.ninetoothed.aot import Binary
from graph_capture.codegen.ninetoothed.op_library import OpLibrary
from graph_capture.codegen.ninetoothed.target import NinetoothedTarget
from graph_capture.codegen.spec.geometry import dense_strides
from graph_capture.codegen.spec.kernel import BuildRequest, Operand, Spec
from graph_capture.codegen.spec.lower import infer_values
from graph_capture.codegen.target import TARGETS, Target, chosen_target, naming, register_target, supports
from graph_capture.errors import FusionError
from graph_capture.ir.binding import expression
from graph_capture.ir.graph import SubGraph
from graph_capture.ir.values import TensorMeta
from graph_capture.log import log

for _target in (NinetoothedTarget(), CTarget()):
    register_target(_target)

SPECS = 4096  # descriptions that a compiler remembers,
LATEST = 64  # and kernels that nobody holds
By = Mapping[str, Any] | Sequence[Any]
Launch = Callable[[], Any]


class CompiledKernel:
    """One kernel, for every number of rows.

    Attributes:
        name: the kernel's name, as profilers show it.
        key: equal for equal kernels, in every process.
        spec: what it computes.
        source: the code that was generated for it.
        choice: which of the target's ways to cut the work it takes; see `candidates`.
    """

    choice = 0

    def __init__(
        self,
        spec: Spec,
        name: str,
        key: str,
        target: Target,
        cache: DiskCache | None = None,
    ) -> None:
        self.spec, self.name, self.key, self.target = spec, name, key, target
        with naming(target):
            self.source = target.source(spec)
            self._bind = target.build(spec, name, cache)

    @property
    def interpreted(self) -> bool:
        """Whether it runs in an interpreter: right numbers, no speed."""
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

        It is bound to their addresses: the caller keeps them alive for as long as it is used.

        Raises:
            FusionError: they do not fit the kernel, in dtype, device, shape or strides.
        """
        self._check(self.spec.inputs, inputs)
        self._check(self.spec.outputs, outputs)
        self.target.check((*inputs, *outputs))
        if all(tensor.numel() == 0 for tensor in outputs):
            return _nothing
        _check_memory((*inputs, *outputs))
        try:
            return self._bind((*inputs, *outputs), self.choice)
        except FusionError as error:
            raise FusionError(f"{self.name}: {error}") from error

    def candidates(self, tensors: Sequence[torch.Tensor]) -> list[CompiledKernel]:
        """Equal kernels that cut the work on `tensors` (inputs, then outputs) in different ways, the expected fastest
        first; at most four."""
        return [self.with_choice(choice) for choice in range(self.target.candidates(self.spec, tensors))]

    def with_choice(self, choice: int) -> CompiledKernel:
        """This kernel, with another of its `candidates`."""
        if choice == self.choice:
            return self
        other = copy.copy(self)
        other.choice = choice
        return other

    def bind(self, tensors: Sequence[torch.Tensor], share: bool) -> Callable[[Sequence[torch.Tensor]], Any]:
        """A call for replays; a kernel prepares nothing."""
        return lambda inputs: self(*inputs)

    def _check(self, operands: Sequence[Operand], tensors: Sequence[torch.Tensor]) -> None:
        if len(tensors) != len(operands):
            raise FusionError(f"{self.name} takes {len(operands)} tensors here, got {len(tensors)}")
        for operand, tensor in zip(operands, tensors, strict=True):
            if tensor.dtype is not operand.dtype:
                raise FusionError(f"{self.name}: {operand.name} is {tensor.dtype}, expected {operand.dtype}")

    def compile_for(self, architecture: str) -> tuple[Binary, ...]:
        """Machine code for ``sm_80``, ``sm_90``, ..., of each program that a call launches; needs no GPU.

        Raises:
            FusionError: the compiler fails.
        """
        return compile_for([self], architecture)[0]

    def __repr__(self) -> str:
        return f"<CompiledKernel {self.name}>"


def _check_memory(tensors: Sequence[torch.Tensor]) -> None:
    """Whether each tensor's elements are all there: a storage may have been resized beneath it.

    Raises:
        FusionError: they are not.
    """
    for tensor in tensors:
        if not tensor.numel():
            continue
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        needed, there = (tensor.storage_offset() + last + 1) * tensor.itemsize, tensor.untyped_storage().nbytes()
        if needed > there:
            raise FusionError(f"a tensor {list(tensor.shape)} needs {needed} bytes, and its memory has {there}")


def _nothing() -> None:
    """The launch of a kernel that has no elements to compute."""


def compile_for(kernels: Sequence[CompiledKernel], architecture: str) -> list[tuple[Binary, ...]]:
    """Machine code of several kernels in one go; see `CompiledKernel.compile_for`."""
    target = next((target for target in TARGETS.values() if target.compiles(architecture)), None)
    if target is None:
        raise FusionError(f"{architecture!r} is not an architecture that a target compiles for, such as 'sm_90'")
    with naming(target):
        return target.compile_for([(kernel.spec, kernel.name) for kernel in kernels], architecture)


def target_for(chosen: str, device: torch.device, cache: DiskCache | None = None) -> Target:
    """The target of kernels on a device; see `chosen_target`. What it has to compile itself is kept in `cache`.

    Raises:
        FusionError: there is none, or it does not run there; the message names it and says why.
    """
    target = chosen_target(chosen, device)
    with naming(target):
        reason = target.available(device, cache)
    if reason is not None:
        _log_once(f"nothing is fused on {device}: the target {target.name!r} is not available: {reason}")
        raise FusionError(f"the target {target.name!r} is not available: {reason}")
    return target


def is_native(chosen: str, device: torch.device, cache: DiskCache | None = None) -> bool:
    """Whether kernels for a device are machine code, and not interpreted or impossible; `cache` as in `target_for`."""
    try:
        return not target_for(chosen, device, cache).interpreted()
    except FusionError:
        return False


@functools.cache
def _log_once(message: str) -> None:
    log.warning("%s", message)


class KernelCompiler:
    """Makes one kernel for each distinct region: its ops, dtypes and row size; the number of rows stays open.

    Args:
        target: "auto", "ninetoothed" or "c".
        cache: where machine code is kept for later processes; nowhere if None.
        op_library: what defines the ops: "builtin", or a package such as "ntops" where that has a usable definition.

    Raises:
        FusionError: there is no such target, or the package cannot be imported.
    """

    def __init__(self, target: str = "auto", cache: DiskCache | None = None, op_library: str = "builtin") -> None:
        cuda, cpu = torch.device("cuda"), torch.device("cpu")
        on_cuda = torch.cuda.is_available() and chosen_target(target, cuda).serves(cuda)
        self._home = cuda if on_cuda else cpu
        expected = chosen_target(target, self._home)
        self.target, self.cache = target, cache
        self.define = expression if op_library == "builtin" else OpLibrary(op_library).define
        self._kernels: weakref.WeakValueDictionary[str, CompiledKernel] = weakref.WeakValueDictionary()  # in use
        self._latest: deque[CompiledKernel] = deque(maxlen=LATEST)  # which may be asked for again
        self._specs: OrderedDict[tuple[Any, ...], Spec] = OrderedDict()
        self._lock = threading.RLock()
        if cache is not None:
            expected.start()

    def fresh(self) -> KernelCompiler:
        """A compiler like this one that knows no kernel and keeps none on disk."""
        other = KernelCompiler(self.target)
        other.define = self.define
        return other

    @property
    def kernels(self) -> tuple[CompiledKernel, ...]:
        """The kernels that are in use."""
        return tuple(self._kernels.values())

    def supports(self, graph: SubGraph) -> str | None:
        """Why `graph` cannot be one kernel of the target, or None if it can."""
        device = next((graph.values[name].device for name in graph.input_names if name in graph.values), None)
        return supports(chosen_target(self.target, device or torch.device("cpu")), graph)

    def compile(
        self,
        graph: SubGraph,
        input_dtypes: By,
        input_shapes: By,
        input_strides: By | None = None,
        device: torch.device | str | None = None,
    ) -> CompiledKernel:
        """The kernel of `graph` for inputs of these dtypes and shapes (by name, or in the order of its inputs).

        The kernel takes inputs of any strides; knowing them (in elements; contiguous unless given) lets it read
        in place what is not contiguous: halves of a merged projection, transposed heads. Without a `device` it is made
        for CUDA where there is CUDA and the target is not C, for the CPU elsewhere.

        Raises:
            FusionError: the region cannot be one kernel, or its kernel cannot be built.
        """
        dtypes, shapes = _listed(graph, input_dtypes), [tuple(shape) for shape in _listed(graph, input_shapes)]
        strides = list(map(dense_strides, shapes)) if input_strides is None else _listed(graph, input_strides)
        place = torch.device(device) if device is not None else self._home
        layouts = zip(shapes, strides, dtypes, strict=True)
        metas = tuple(TensorMeta(shape, tuple(stride), dtype, place) for shape, stride, dtype in layouts)
        with self._lock:
            return self._kernel(*self._described(graph, metas))

    def prepare(self, wanted: Sequence[tuple[SubGraph, Sequence[TensorMeta], int | None]]) -> None:
        """Build the kernels of several regions on inputs of these layouts side by side, for `compile` to find.

        With each comes which of its `candidates` is going to run; None if they will be timed. What cannot be built is
        passed over; `compile` says why.
        """
        with self._lock:
            by_target: dict[str, dict[tuple[Any, ...], BuildRequest]] = {}
            for graph, metas, choice in wanted:
                try:
                    target, spec, key, name = self._described(graph, tuple(metas))
                except Exception:  # whatever it is, `compile` raises it again
                    continue
                request = BuildRequest(spec, name, tuple(metas), choice)
                by_target.setdefault(target.name, {})[key, *metas, choice] = request
            for chosen, requests in by_target.items():
                with contextlib.suppress(FusionError):  # `compile` raises it again
                    TARGETS[chosen].prepare(list(requests.values()), self.cache)

    def _described(self, graph: SubGraph, metas: tuple[TensorMeta, ...]) -> tuple[Target, Spec, str, str]:
        """A kernel before it is built: its target, its spec, its key and its name."""
        devices = {meta.device for meta in metas}
        target = target_for(self.target, next(iter(devices)) if len(devices) == 1 else torch.device("cpu"), self.cache)
        known = (graph, *metas)
        spec = self._specs.get(known)
        if spec is None:
            while len(self._specs) >= SPECS:
                self._specs.popitem(last=False)
            spec = self._specs[known] = self._lowered(target, graph, metas)
        key = hashlib.sha256(f"{target.name} {spec!r}".encode()).hexdigest()
        ops = "_".join(re.sub(r"\W.*", "", node.op_type) for node in graph.nodes)
        return target, spec, key, f"fused_{ops[:40]}_{key[:8]}"

    def _lowered(self, target: Target, graph: SubGraph, metas: tuple[TensorMeta, ...]) -> Spec:
        values = infer_values(graph, dict(zip(graph.input_names, metas, strict=True)))
        with naming(target):
            return target.lower(graph, values, self.define)

    def _kernel(self, target: Target, spec: Spec, key: str, name: str) -> CompiledKernel:
        kernel = self._kernels.get(key)
        if kernel is None:
            kernel = self._kernels[key] = CompiledKernel(spec, name, key, target, self.cache)
            self._latest.append(kernel)
        return kernel

    def forget(self) -> None:
        """Keep no kernel alive that nobody else holds."""
        self._latest.clear()


def _listed(graph: SubGraph, table: By) -> list[Any]:
    values = [table[name] for name in graph.input_names] if isinstance(table, Mapping) else list(table)
    if len(values) != len(graph.input_names):
        raise FusionError(f"the graph takes ({', '.join(graph.input_names)}), got {len(values)} values")
    return values
