"""Sweeps by whole vectors, beside those that compilers vectorise: the same numbers, whatever is left over."""

import os
import platform

import pytest
import torch

from graph_capture import KernelCompiler, OpNode, SubGraph
from graph_capture.codegen.c import host as c_host
from graph_capture.codegen.c import lanes as c_lanes
from graph_capture.codegen.c import rows as c_rows
from graph_capture.ir.numerics import distance
from tests.replaying import noise

SWIGLU = SubGraph((OpNode("silu", ("gate",), ("s",)), OpNode("mul", ("s", "up"), ("y",))), ("gate", "up"), ("y",))
ADD_RMS_NORM = SubGraph(
    (
        OpNode("add", ("x", "residual"), ("sum",)),
        OpNode("rms_norm", ("sum", "weight"), ("y",), {"eps": 1e-6}),
    ),
    ("x", "residual", "weight"),
    ("sum", "y"),
)
COLUMNS = [2, 30, 32, 34, 64, 94, 256, 290, 514, 4096]


@pytest.fixture(params=["", "-mno-avx512bf16"], ids=["vectors", "no vectors"])
def compiler(request, monkeypatch):
    if request.param and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("there are no such vectors here")
    monkeypatch.setenv(c_host.CFLAGS, f"{os.environ.get(c_host.CFLAGS, '')} {request.param}")
    return KernelCompiler("c")


def values(*shape, seed=0):
    """Noise with numbers so small that an instruction takes them for zero, and large ones."""
    made = noise(*shape, seed=seed)
    odd = torch.tensor([0.0, -0.0, 1e-39, -3e-39, 1e18, -80.0, 80.0, 200.0, -70.0])
    made.view(-1)[: len(odd) : 1] = odd[: made.numel()]
    return made.bfloat16()


def kernel_of(compiler, graph, inputs):
    return compiler.compile(graph, [t.dtype for t in inputs], [t.shape for t in inputs], [t.stride() for t in inputs])


def swiglu(gate, up):
    gate, up = gate.double(), up.double()
    return [gate / (1 + torch.exp(-gate)) * up]


def add_rms_norm(x, residual, weight):
    total = x.double() + residual.double()
    return [total, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [1, 3])
def test_swiglu(compiler, rows, columns):
    inputs = [values(rows, columns), values(rows, columns, seed=1)]
    (out,) = kernel_of(compiler, SWIGLU, inputs)(*inputs)
    (want,) = swiglu(*inputs)
    assert (out.double() - want).abs().le(want.abs() * 2**-7.98 + 2**-134).all()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [1, 3])
def test_add_rms_norm(compiler, rows, columns):
    inputs = [noise(rows, columns).bfloat16(), noise(rows, columns, seed=1).bfloat16(), noise(columns).bfloat16()]
    inputs[0][:, 0], inputs[1][:, 0] = 1e-39, 0.0
    found = kernel_of(compiler, ADD_RMS_NORM, inputs)(*inputs)
    for out, want in zip(found, add_rms_norm(*inputs), strict=True):
        assert (out.double() - want).abs().le(want.abs() * 2**-7.98 + 2**-134).all()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_infinities_and_nan(compiler, odd):
    gate, up = noise(2, 64).bfloat16(), noise(2, 64, seed=1).bfloat16()
    gate[0, 5] = up[1, 40] = odd
    (out,) = kernel_of(compiler, SWIGLU, [gate, up])(gate, up)
    want = swiglu(gate, up)[0].bfloat16()
    finite = want.isfinite()
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out[~finite & ~want.isnan()], want[~finite & ~want.isnan()])
    assert torch.allclose(out[finite].float(), want[finite].float(), rtol=2**-7)


@pytest.mark.parametrize("columns", [34, 256, 290])
def test_a_sum_over_one_of_its_inputs(compiler, columns):
    """What a sweep stores early must not be read again."""
    x, residual, weight = (noise(3, columns, seed=seed).bfloat16() for seed in range(3))
    weight = weight[0].contiguous()
    want = add_rms_norm(x, residual, weight)
    kernel = kernel_of(compiler, ADD_RMS_NORM, [x, residual, weight])
    out = torch.empty_like(x)
    kernel.prepare([x, residual, weight], [residual, out])()
    assert distance(residual, want[0]) < 2**-8
    assert distance(out, want[1]) < 2**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64), (3, 290)])
def test_a_sum_over_an_input_that_a_later_sweep_reads(compiler, dtype, shape):
    """It is not stored before."""
    x, residual, weight = (noise(*shape, seed=seed).to(dtype) for seed in range(3))
    inputs = [x, residual, weight.view(-1, shape[-1])[0].clone()]
    scaled = OpNode("mul", ("y", "x"), ("z",))
    graph = SubGraph((*ADD_RMS_NORM.nodes, scaled), ADD_RMS_NORM.input_names, ("sum", "z"))
    kernel = kernel_of(compiler, graph, inputs)
    want = [tensor.clone() for tensor in kernel(*inputs)]
    out = torch.empty_like(x)
    kernel.prepare(inputs, [x, out])()
    assert torch.equal(x, want[0])
    assert torch.equal(out, want[1])


def test_large_results_and_odd_addresses(compiler):
    """Results of 16 MiB and more are written past the caches, where they are aligned."""
    rows, columns = 2050, 4096
    for shift in (0, 2, 32):
        inputs = [noise(rows * columns + shift, seed=seed).bfloat16()[shift:].view(rows, columns) for seed in (0, 1)]
        out = torch.empty(rows * columns + shift, dtype=torch.bfloat16)[shift:].view(rows, columns)
        kernel_of(compiler, SWIGLU, inputs).prepare(inputs, [out])()
        some = [tensor[::512] for tensor in inputs]
        want = swiglu(*some)[0]
        assert (out[::512].double() - want).abs().le(want.abs() * 2**-7.98 + 2**-134).all()


def test_what_has_a_form_by_vectors():
    compiler = KernelCompiler("c")
    x = noise(3, 64).bfloat16()
    assert c_rows._RowPrinter(kernel_of(compiler, SWIGLU, [x, x]).spec).vectorised
    assert c_rows._RowPrinter(kernel_of(compiler, ADD_RMS_NORM, [x, x, x[0].contiguous()]).spec).vectorised
    for name, attrs in (("exp", {}), ("softmax", {"dim": -1}), ("relu", {}), ("argmax", {"dim": -1})):
        graph = SubGraph((OpNode(name, ("x",), ("y",), attrs),), ("x",), ("y",))
        spec = kernel_of(compiler, graph, [x]).spec
        assert not c_lanes.fits(spec, [])
