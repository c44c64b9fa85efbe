"""How a region runs in a replay: a call of its kernel, or library calls of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from graph_capture.codegen import CompiledKernel
from graph_capture.codegen.launches import Launch, Tensors
from graph_capture.errors import FusionError
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.interpreter import Executor, interpret
from graph_capture.ir.numerics import apart, close_enough
from graph_capture.ir.ops import ATTENTION_OPS, LINEARS, TABLE
from graph_capture.ir.values import TensorMeta
from graph_capture.log import log
from graph_capture.passes.strides import noticed
from graph_capture.record.recorded import RecordedGraph
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.library import Constants, LibraryKernel
from graph_capture.runtime.region import Region


@dataclass(frozen=True)
class Inlined:
    """A region as library calls that are steps of the replay themselves.

    Attributes:
        nodes: the ops, and what computes them where that is not torch.
        names: value names of what the weights make computed, which is an input of the replay.
        constants: what computes it.
    """

    nodes: tuple[tuple[OpNode, RegionStep | None], ...]
    names: tuple[str, ...] = ()
    constants: tuple[Constants, ...] = ()

    @classmethod
    def of(cls, region: Region, kernel: LibraryKernel, graph: RecordedGraph, config: FusionConfig) -> Inlined:
        """Raises FusionError where the weights cannot be merged."""
        outer = dict(zip(kernel.body.input_names, region.node.inputs, strict=True))
        outer |= dict(zip(kernel.rest.output_names, region.node.outputs, strict=True))
        inner = [*kernel.rest.input_names, *(name for node in kernel.rest.nodes for name in node.outputs)]
        renamed = {name: f"{region.name}.{name}" for name in inner} | outer
        inlined = [node.rename(renamed) for node in kernel.rest.nodes]
        nodes = tuple(_inlined(node, region, kernel, graph, config) for node in inlined)
        if kernel.once is None:
            return cls(nodes)
        given = {name: graph.captured[renamed[name]] for name in kernel.once.input_names}
        constants = Constants(kernel.once, list(given.values()), config.merge_linears == "views")
        return cls(nodes, tuple(renamed[name] for name in kernel.once.output_names), (constants,))


class RegionStep:
    """Runs a region's kernel; if that ever fails, the recorded ops, from then on."""

    def __init__(
        self, region: Region, graph: RecordedGraph, config: FusionConfig, relaid: Sequence[tuple[int, TensorMeta]]
    ) -> None:
        assert region.kernel is not None
        self.failure: str | None = None  # what the kernel raised, if it did
        self.relaid = relaid
        self.region = region
        self.config = config
        node = region.node
        self.recorded = Executor([(inner, None) for inner in node.recorded], node.inputs, node.outputs)
        weights = [graph.captured.get(name, _NOTHING) for name in node.inputs]
        self.kernel: Callable[[list[torch.Tensor]], Any] | None = region.kernel.bind(
            weights, share=config.merge_linears == "views"
        )

    def __call__(self, tensors: list[torch.Tensor]) -> Any:
        if self.kernel is None:
            return self.recorded.run(tensors)
        before = apart(self.region.body, tensors) if self.config.debug_mode else tensors
        try:
            outputs = self.kernel(tensors)
        except Exception as error:
            if not self.config.fallback_on_error or _is_capturing(tensors):
                raise  # a capture that has failed says nothing about the kernel
            self._fell_back(error)
            return self.recorded.run(tensors)
        if self.relaid:
            outputs = list(outputs)
            for index, meta in self.relaid:
                if outputs[index].stride() != meta.stride:
                    empty = outputs[index].new_empty_strided(meta.shape, meta.stride)
                    outputs[index] = empty.copy_(outputs[index])
        if self.config.debug_mode:
            self._compare(before, outputs)
        return outputs

    def _fell_back(self, error: Exception) -> None:
        log.warning("%s failed and replays as recorded from now on: %s", self.region.name, error)
        self.kernel, self.failure = None, f"{type(error).__name__}: {error}"

    def _compare(self, inputs: Tensors, outputs: Tensors) -> None:
        """Warn of results that differ from those of the recorded ops beyond rounding, and beyond what these differ by
        themselves."""
        runs = [self.recorded.run(apart(self.region.body, inputs))]
        if all(close_enough(fused, [eager])[0] for fused, eager in zip(outputs, *runs, strict=True)):
            return
        runs += [self.recorded.run(apart(self.region.body, inputs)) for _ in range(2)]
        for name, fused, *found in zip(self.region.node.outputs, outputs, *runs, strict=True):
            if not close_enough(fused, found)[0]:
                log.warning("%s: %s differs from the recorded ops beyond rounding", self.region.name, name)


class KernelStep(RegionStep):
    """A step that can be bound to addresses: its kernel is a compiled one."""

    @property
    def movable(self) -> bool:
        """See `graph_capture.codegen.launches.Prepares`."""
        return isinstance(self.region.kernel, CompiledKernel) and self.region.kernel.target.movable

    def prepare(self, inputs: Tensors, outputs: Tensors) -> Launch:
        """See `graph_capture.codegen.launches.Prepares`."""
        if self.kernel is None or not isinstance(self.region.kernel, CompiledKernel):
            raise FusionError("its kernel has failed before")
        return self.region.kernel.prepare(inputs, outputs)

    def failed(self, error: Exception, inputs: Tensors, outputs: Tensors) -> Launch:
        """The recorded ops, whose results are copied to where the kernel's were to be."""
        if not self.config.fallback_on_error:
            raise error
        if self.kernel is not None:
            self._fell_back(error)

        def launch() -> None:
            for output, result in zip(outputs, self.recorded.run(inputs), strict=True):
                if output.data_ptr() != result.data_ptr():
                    output.copy_(result)

        return launch


def _is_capturing(tensors: Tensors) -> bool:
    return any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing()


def _inlined(
    node: OpNode, region: Region, kernel: LibraryKernel, graph: RecordedGraph, config: FusionConfig
) -> tuple[OpNode, KernelStep | None]:
    """An op of a library region, and what computes it: of a linear it may be a kernel of our own."""
    if kernel.product is None or node.op_type not in LINEARS:
        return node, None
    node = OpNode(region.node.op_type, node.inputs, node.outputs, region.node.attrs, node.source, (node,))
    return node, KernelStep(replace(region, node=node, kernel=kernel.product), graph, config, ())


def relaid_outputs(graph: SubGraph, region: Region) -> list[tuple[int, TensorMeta]]:
    """The outputs, by position, that must be brought to the strides that were recorded, for somebody could tell."""
    found = []
    ways = _strides(graph, region)
    for index, name in enumerate(region.node.outputs):
        meta = graph.values[name]
        if any(noticed(graph, name, way[index]) is not None for way in ways if len(way[index]) == len(meta.shape)):
            found.append((index, meta))
    return found


def _strides(graph: SubGraph, region: Region) -> list[list[tuple[int, ...]]]:
    """The strides that the results of a region's kernel may have; torch's attention has one of two."""
    metas = [graph.values[name] for name in region.node.inputs]
    inputs = [torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta") for meta in metas]
    contiguous = [torch.empty(graph.values[name].shape, device="meta") for name in region.node.outputs]
    try:
        if isinstance(region.kernel, CompiledKernel):
            return [[tensor.stride() for tensor in region.kernel.spec.allocate(inputs)]]
        known = all(node.op_type in TABLE or node.op_type in _MERGING for node in region.body.nodes)
        results = interpret(region.body, inputs) if known else contiguous
    except Exception:  # the kernel does not fit, or meta tensors do not know an op: a call will tell
        results = contiguous
    ways = [[tensor.stride() for tensor in results]]
    if any(node.op_type in ATTENTION_OPS for node in region.body.nodes):
        moved = (t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 4 else t for t in results)
        ways += [[tensor.stride() for tensor in contiguous], [tensor.stride() for tensor in moved]]
    return ways


_MERGING = ("aten.cat.default", "aten.split_with_sizes.default")
_NOTHING = torch.empty(0)  # stands for what is not a weight
