"""A `LinearSpec` as a ninetoothed program: by a thread's own arithmetic, or by tensor cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graph_capture.codegen.ninetoothed import matmul, matvec
from graph_capture.codegen.ninetoothed.host import GeneratedProgram
from graph_capture.codegen.spec.linear import LinearSpec


def program(spec: LinearSpec, interpreted: bool) -> GeneratedProgram:
    """The program of a spec."""
    way = matmul if matmul.fits(spec) else matvec
    return _program(spec, way.choose_blocks(spec, interpreted)[0], interpreted)


def candidates(spec: LinearSpec, tensors: Sequence[torch.Tensor]) -> list[GeneratedProgram]:
    """Programs for tensors (inputs, then outputs) of this size, at most four; the expected fastest first."""
    if not matmul.fits(spec):
        return [_program(spec, blocks, False) for blocks in matvec.choose_blocks(spec, False)]
    (x,) = spec.matrices(tensors)["x"]
    return [_program(spec, blocks, False) for blocks in matmul.choose_blocks(spec, False, x.shape[0])]


def _program(
    spec: LinearSpec, blocks: matvec.MatvecBlocks | matmul.MatmulBlocks, interpreted: bool
) -> GeneratedProgram:
    make = matmul.MatmulPrinter if isinstance(blocks, matmul.MatmulBlocks) else matvec.MatvecPrinter
    printer = make(spec, blocks, interpreted)  # type: ignore[arg-type]
    extras, outputs = ([operand.dtype for operand in operands] for operands in (spec.extras, spec.outputs))
    biases = [product for product in spec.products if product.bias]
    products = [spec.dtype] * (1 + len(spec.products) + len(biases))
    rows = [spec.inner % 16 == 0] + [(spec.inner if p.unit else spec.columns) % 16 == 0 for p in spec.products]
    others = [spec.columns % 16 == 0] * (len(biases) + len(extras) + len(outputs))
    return GeneratedProgram(
        printer.source(),
        (2,) * (len(products) + len(extras) + len(outputs)),
        (*products, *extras, *outputs),
        (*rows, *others),
        blocks.warps,
        blocks.stages,
        other=0 if spec.inner % blocks.inner else None,
    )


def views(spec: LinearSpec, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The operands of the launch: matrices whose last dimension is the fast one."""
    seen = spec.matrices(tensors)
    weights = [w if p.unit else w.t() for p, w in zip(spec.products, seen["weights"], strict=True)]
    return [[*seen["x"], *weights, *(bias[None] for bias in seen["biases"]), *seen["extras"], *seen["outputs"]]]
