"""Whether a region is fused: first by what is known of it, then by measurement."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graph_capture.codegen import CompiledKernel, KernelCompiler, infer_values, interpreted, supports
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.library import LibraryKernel
from graph_capture.runtime.measure import compare

from graph_capture.errors import FusionError
from graph_capture.executor import Executor
from graph_capture.graph import OpNode, SubGraph, TensorMeta
from graph_capture.log import log
from graph_capture.ops import Kind, op

Kernel = CompiledKernel | LibraryKernel


@dataclass(frozen=True)
class Decision:
    """Whether a fused kernel is used, why, and what was measured (seconds a call; None: not measured)."""

    use: bool
    reason: str
    t_fallback: float | None = None
    t_fused: float | None = None

    def __bool__(self) -> bool:
        return self.use


def input_metas(graph: SubGraph, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorMeta]:
    """The layouts of a region's inputs.

    Raises:
        FusionError: an input is missing.
    """
    missing = [name for name in graph.input_names if name not in tensors]
    if missing:
        raise FusionError(f"inputs are missing: {', '.join(missing)}; the graph takes {', '.join(graph.input_names)}")
    return {name: TensorMeta.of(tensors[name]) for name in graph.input_names}


class FusionHeuristics:
    """The rules of a `FusionConfig`, with a cache of what was measured."""

    def __init__(self, config: FusionConfig | None = None, compiler: KernelCompiler | None = None) -> None:
        self.config = config or FusionConfig()
        self.compiler = compiler or KernelCompiler(self.config.target)
        self._measured: dict[tuple[Any, ...], Decision] = {}

    def should_fuse(
        self,
        graph: SubGraph,
        input_shapes: Mapping[str, Sequence[int]] | Sequence[Sequence[int]] | None = None,
        ops: int | None = None,
    ) -> Decision:
        """Whether fusing `graph` is allowed and can pay, from its ops and sizes alone. The result is truthy or falsy.

        `input_shapes` follows ``graph.input_names`` or maps them; without it the shapes in ``graph.values`` are used.
        `ops` is how many recorded ops the graph stands for, where that differs from its length.
        """
        if input_shapes is None:
            shapes = [graph.values[name].shape for name in graph.input_names if name in graph.values]
        elif isinstance(input_shapes, Mapping):
            shapes = [tuple(input_shapes[name]) for name in graph.input_names]
        else:
            shapes = [tuple(shape) for shape in input_shapes]
        reason = self._forbidden(graph, ops, shapes)
        if reason is None and (unsupported := supports(graph)) is not None:
            reason = f"no kernel: {unsupported}"
        return Decision(reason is None, reason or "every op can be fused")

    def _forbidden(self, graph: SubGraph, ops: int | None, shapes: Sequence[Sequence[int]]) -> str | None:
        """What in the configuration speaks against a region of so many ops (default: the graph's) and such inputs."""
        config = self.config
        ops = len(graph) if ops is None else ops
        if not config.enable_fusion:
            return "fusion is off (enable_fusion=False)"
        alone = ops == 1 and op(graph.nodes[0].op_type).kind is Kind.OPAQUE  # worth a kernel without anything else
        if ops < config.min_nodes_for_fusion and not alone:
            return f"{ops} ops are fewer than min_nodes_for_fusion={config.min_nodes_for_fusion}"
        if ops > config.max_graph_size:
            return f"{ops} ops are more than max_graph_size={config.max_graph_size}"
        elements = max((math.prod(shape) for shape in shapes), default=0)
        if elements < config.min_tensor_elements:
            return f"{elements} elements are fewer than min_tensor_elements={config.min_tensor_elements}"
        return None

    def profile_and_decide(self, graph: SubGraph, inputs: Mapping[str, torch.Tensor]) -> Decision:
        """Whether the fused kernel of `graph` is used for `inputs`, by measurement (see `FusionConfig.profile`).

        Both sides run on `inputs` themselves; a region holds no op that writes, so they are only read.

        Raises:
            FusionError: an input is missing, or, with ``fallback_on_error=False``, no kernel can be made.
        """
        decision, _ = self.decide(graph, [inputs[name] for name in input_metas(graph, inputs)])
        return decision

    def decide(
        self,
        graph: SubGraph,
        tensors: Sequence[torch.Tensor],
        fallback: Callable[[], Any] | None = None,
        ops: int | None = None,
        library: LibraryKernel | None = None,
    ) -> tuple[Decision, Kernel | None]:
        """`profile_and_decide` on a list of inputs; also returns the kernel where one was made.

        Args:
            fallback: runs the recorded ops on the same inputs (default: the graph's own ops).
            ops: how many recorded ops there are.
            library: the region as library calls, where that is another way to run it.
        """
        metas = {name: TensorMeta.of(tensor) for name, tensor in zip(graph.input_names, tensors, strict=True)}
        forbidden = self._forbidden(graph, ops, [meta.shape for meta in metas.values()])
        decision, kernel = Decision(False, forbidden or ""), None
        if forbidden is None:
            fallback = fallback or fallback_of(graph, tensors)
            made: list[tuple[Decision, Kernel]] = []
            try:
                compiled = self.kernel(graph, metas)
                made.append((self._by_profile(graph, compiled, tensors, metas, fallback), compiled))
            except FusionError as error:
                if not self.config.fallback_on_error and library is None:
                    raise
                decision = Decision(False, f"no kernel: {error}")
            if library is not None and not (made and made[0][0] and self.config.profile != "measure"):
                for way in (library, *self._with_kernels(library, metas)):
                    made.append((self._by_profile(graph, way, tensors, metas, fallback), way))
            if made:
                decision, kernel = min(made, key=_merit)
        if self.config.debug_mode:
            log.info("%s -> %s", " ".join(node.op_type for node in graph.nodes), decision)
        return decision, kernel

    def kernel(self, graph: SubGraph, metas: Mapping[str, TensorMeta]) -> CompiledKernel:
        """The kernel of `graph` for inputs of these layouts.

        Raises:
            FusionError: it cannot be made, for whatever reason.
        """
        if not interpreted() and any(meta.device.type == "cpu" for meta in metas.values()):
            raise FusionError("its tensors are on the CPU, where there is no compiled target yet")
        compiler = self.compiler if self.config.enable_cache else KernelCompiler(self.config.target)
        dtypes = {name: meta.dtype for name, meta in metas.items()}
        shapes = {name: meta.shape for name, meta in metas.items()}
        strides = {name: meta.stride for name, meta in metas.items()}
        try:
            return compiler.compile(graph, dtypes, shapes, strides)
        except FusionError:
            raise
        except Exception as error:  # a compiler's own failure must not become the user's
            raise FusionError(f"{type(error).__name__}: {error}") from error

    def _with_kernels(self, library: LibraryKernel, metas: Mapping[str, TensorMeta]) -> list[LibraryKernel]:
        """The same calls with linears of few rows as kernels, if there are any."""
        values = infer_values(library.body, metas)
        kernels: dict[OpNode, CompiledKernel] = {}
        for node in library.body.nodes:
            if node.op_type == "linear":
                with contextlib.suppress(FusionError):
                    alone = SubGraph(
                        (OpNode(node.op_type, node.inputs, ("product",), node.attrs),), node.inputs, ("product",)
                    )
                    kernels[node] = self.kernel(alone, {name: values[name] for name in node.inputs})
        return [LibraryKernel(library.body, library.weights, kernels)] if kernels else []

    def _by_profile(
        self,
        graph: SubGraph,
        kernel: Kernel,
        tensors: Sequence[torch.Tensor],
        metas: Mapping[str, TensorMeta],
        fallback: Callable[[], Any],
    ) -> Decision:
        config = self.config
        if config.profile == "always":
            return Decision(True, 'profile="always"')
        if config.profile == "static":
            reason = "is interpreted on this machine" if kernel.interpreted else "is machine code"
            return Decision(not kernel.interpreted, f'profile="static": the kernel {reason}')
        key = (
            graph.cache_key({n: m.dtype for n, m in metas.items()}, {n: m.shape for n, m in metas.items()}),
            tuple(meta.stride for meta in metas.values()),
            tuple(str(meta.device) for meta in metas.values()),
            kernel.name,
        )
        if config.enable_cache and key in self._measured:
            return self._measured[key]
        try:
            device = next(iter(metas.values())).device
            fused = functools.partial(kernel.bind(tensors, share=False), tensors)
            t_fallback, t_fused = compare(fallback, fused, device)
        except Exception as error:
            if not config.fallback_on_error:
                raise
            decision = Decision(False, f"the kernel failed: {type(error).__name__}: {error}")
        else:
            decision = self._judge(t_fallback, t_fused, kernel)
        self._measured[key] = decision
        return decision

    def _judge(self, t_fallback: float, t_fused: float, kernel: Kernel) -> Decision:
        ratio = t_fused / t_fallback
        if ratio < self.config.fusion_ratio:
            return Decision(True, f"{1 / ratio:.2f}x faster", t_fallback, t_fused)
        if ratio < 1:
            return Decision(False, f"gain too small, {1 / ratio:.2f}x faster", t_fallback, t_fused)
        how = f"{ratio:.2f}x slower" if ratio < 10 else f"{ratio:.0f}x slower"
        return Decision(False, how + (", interpreted" if kernel.interpreted else ""), t_fallback, t_fused)


def fallback_of(graph: SubGraph, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """A call that runs a graph's own ops on `tensors`."""
    executor = Executor([(node, None) for node in graph.nodes], graph.input_names, graph.output_names)
    return lambda: executor.run(tensors)


def _merit(made: tuple[Decision, Kernel]) -> tuple[bool, float]:
    """Sorts the used before the unused, then the faster before the slower."""
    decision = made[0]
    known = decision.t_fallback is not None and decision.t_fused is not None
    return not decision, decision.t_fused / decision.t_fallback if known else 0.0  # type: ignore[operator]
