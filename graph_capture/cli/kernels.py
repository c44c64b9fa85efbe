"""``graph-capture kernels``: the machine code of every kernel that a model needs, without a GPU and without weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from graph_capture import load
from graph_capture.cli.inspect import record_steps
from graph_capture.codegen import Binary, CompiledKernel, KernelCompiler, compile_for, supports
from graph_capture.codegen.ninetoothed.rows import choose_blocks
from graph_capture.codegen.spec.kernel import KernelSpec
from graph_capture.errors import FusionError
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import FUSED
from graph_capture.ir.values import TensorMeta
from graph_capture.passes import Passes, rewrite
from graph_capture.passes.decode import SMALL
from graph_capture.passes.linears import RULE as PARALLEL_LINEAR
from graph_capture.passes.linears import product_of
from graph_capture.passes.region_bodies import moved_bytes


@dataclass
class KernelRow:
    """One launch: a kernel, or one of the programs that it consists of.

    Attributes:
        kernel: its name, with a number from the second program on.
        regions: the kinds of region that it serves, with how often each occurs in one step of the model.
        steps: where: ``decode``, ``prefill 128``.
        source: bytes of generated source.
        moved, minimum: bytes that it reads and writes, against what its inputs and outputs hold.
    """

    kernel: str
    regions: dict[str, int] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    source: int = 0
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instructions: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    moved: int = 0
    minimum: int = 0


@dataclass
class KernelReport:
    """What a model's kernels are like on one architecture; `refused` says of regions without a kernel why."""

    model: str
    target: str
    rows: list[KernelRow]
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def table(self) -> Table:
        """For a terminal."""
        table = Table(box=SIMPLE_HEAD, title=f"{self.model}, {self.target}", title_justify="left")
        for name in ("kernel", "for", "step"):
            table.add_column(name, overflow="fold")
        for name in ("source", "SASS", "registers", "spilled", "shared", "loads", "stores", "bytes", "of minimum"):
            table.add_column(name, justify="right")
        for row in self.rows:
            uses = ", ".join(f"{kind} x{count}" for kind, count in row.regions.items())
            numbers = (row.source, row.instructions, row.registers, row.spilled, row.shared)
            widths = [_widths(row.loads), _widths(row.stores)]
            ratio = f"{row.moved / row.minimum:.2f}" if row.minimum else ""
            table.add_row(row.kernel, uses, ", ".join(row.steps), *map(str, numbers), *widths, str(row.moved), ratio)
        return table


def _widths(accesses: dict[int, int]) -> str:
    return ", ".join(f"{count} x {bits}" for bits, count in sorted(accesses.items(), reverse=True))


def report(
    name: str, target: str, *, dtype: torch.dtype, prompt: int = 128, slots: int = 2048, layers: int | None = None
) -> KernelReport:
    """Compile every kernel of a model's prefill and decode step for `target` (``sm_90``).

    Args:
        name: a saved graph (`FusedGraph.save`), or a model as `load_config` takes it.
        dtype: of the weights.
        prompt: tokens of the prefill.
        slots: of the static cache.
        layers: only so many.

    Raises:
        CaptureError: there is no such model.
        FusionError: the compiler fails.
    """
    compiler = KernelCompiler("ninetoothed")
    rows: dict[str, KernelRow] = {}
    kernels: dict[str, CompiledKernel] = {}
    refused: dict[str, str] = {}
    for step, graph in _steps(name, dtype, prompt, slots, layers):
        for node in graph.nodes:
            if not node.op_type.startswith(FUSED):
                continue
            kind = node.op_type.removeprefix(FUSED)
            try:
                kernel = _compiled(compiler, graph, node)
            except FusionError as error:
                refused[kind] = str(error)
                continue
            row = rows.setdefault(kernel.key, KernelRow(kernel.name, source=len(kernel.source)))
            kernels[kernel.key] = kernel
            row.regions[kind] = row.regions.get(kind, 0) + 1
            row.steps = list(dict.fromkeys([*row.steps, step]))
            alone = SubGraph(node.recorded, node.inputs, node.outputs, graph.values)
            row.minimum = max(row.minimum, moved_bytes(alone, range(len(alone))))
    filled = []
    for key, binaries in zip(kernels, compile_for(list(kernels.values()), target), strict=True):
        row = rows[key]
        _fill(row, kernels[key], binaries[0])
        filled.append(row)
        for number, binary in enumerate(binaries[1:], 1):
            filled.append(replace(row, kernel=f"{row.kernel}_{number}", source=0, moved=0, minimum=0))
            _measure(filled[-1], binary)
    return KernelReport(name, target, filled, refused)


def kernel_for(graph: SubGraph, node: OpNode) -> tuple[SubGraph, tuple[TensorMeta, ...]]:
    """What the kernel of a region computes, and the layouts of its inputs; of merged linears it is their product.

    Raises:
        FusionError: there is none.
    """
    if node.op_type == FUSED + PARALLEL_LINEAR:
        product, metas = product_of(node, graph.values)
        return product, tuple(metas.values())
    return node.attr("body"), tuple(graph.values[name]._replace(offset=0, storage=-1) for name in node.inputs)


def _compiled(compiler: KernelCompiler, graph: SubGraph, node: OpNode) -> CompiledKernel:
    body, metas = kernel_for(graph, node)
    dtypes, shapes, strides = ([getattr(meta, what) for meta in metas] for what in ("dtype", "shape", "stride"))
    return compiler.compile(body, dtypes, shapes, strides)


def _measure(row: KernelRow, binary: Binary) -> None:
    row.registers, row.spilled, row.shared = binary.registers, binary.stack, binary.shared
    row.instructions, row.loads, row.stores = binary.instructions, dict(binary.loads), dict(binary.stores)


def _fill(row: KernelRow, kernel: CompiledKernel, binary: Binary) -> None:
    _measure(row, binary)
    spec = kernel.spec
    row.moved = row.minimum
    if isinstance(spec, KernelSpec) and choose_blocks(spec, interpreted=False).sweeps:
        row.moved *= len(spec.passes)


def _steps(
    name: str, dtype: torch.dtype, prompt: int, slots: int, layers: int | None
) -> Iterator[tuple[str, SubGraph]]:
    """The rewritten graphs of a model's prefill and decode step, or the one that is saved in a file."""
    if Path(name).is_file():
        yield "saved", load(name).subgraph
        return
    off = frozenset({SMALL})  # as on a GPU
    for step, graph in record_steps(name, dtype, prompt, slots, layers, "meta"):
        yield step, rewrite(graph.subgraph, Passes(supports, weights=frozenset(graph.captured), off=off)).graph
