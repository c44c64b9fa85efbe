"""Products with packed weights as kernels: against float64, on odd sizes, with what follows them."""

import functools

import pytest
import torch
import torch.nn.functional as F

from graph_capture import record
from graph_capture.ir.quantised import FORMATS, decoded, format_of, quant_linear
from tests.quantised.blocks import packed
from tests.targets import COMPILERS

NAMES = [*FORMATS, "int8:64", "int4:32", "int4:128"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # of the largest result


def kernel_of(function, *inputs):
    with torch.no_grad(), record(*inputs) as recording:
        recording.output(function(*inputs))
    described = [t.dtype for t in inputs], [t.shape for t in inputs], [t.stride() for t in inputs]
    return COMPILERS["c"].compile(recording.graph.subgraph, *described)


def check(got, want, largest=0.0):
    """Within roundings of the result, or of sums of numbers as large as `largest`."""
    error, bound = (got.double() - want).abs().max(), BOUNDS[got.dtype] * want.abs().max()
    assert error <= bound + BOUNDS[torch.float32] * largest, (error, bound)


def _product(name, x, weight, bias):
    return quant_linear(x, weight, bias, format=name)


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 128])
@pytest.mark.parametrize("name", NAMES)
def test_a_product_is_that_of_the_decoded_weights(name, rows):
    for (columns, blocks), dtype in zip(((1, 1), (33, 3), (70, 5)), FLOATS, strict=True):
        inner = blocks * format_of(name).size
        weight, bias = packed(name, columns, inner), torch.randn(columns).to(dtype)
        x = torch.randn(rows, inner).to(dtype)
        want = F.linear(x.double(), decoded(weight, name).double(), bias.double())
        largest = F.linear(x.double().abs(), decoded(weight, name).double().abs(), bias.double().abs()).max()
        if rows <= 16:
            kernel = kernel_of(functools.partial(_product, name), x, weight, bias)
            check(kernel(x, weight, bias)[0], want, largest)
        check(quant_linear(x.float(), weight, bias.float(), format=name), want, largest)


def gated(name):
    """Two products of one input, a bias, a gate, a residual."""

    def function(x, gate, up, bias, residual):
        gated = F.silu(quant_linear(x, gate, format=name)) * quant_linear(x, up, bias, format=name)
        return residual + gated

    return function


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "int4:64"])
def test_gate_up_bias_and_residual_are_one_kernel(name, rows):
    gate, up = packed(name, 70, 768), packed(name, 70, 768, seed=1)
    inputs = (torch.randn(rows, 768), gate, up, torch.randn(70), torch.randn(rows, 70))
    kernel = kernel_of(gated(name), *inputs)
    x, _, _, bias, residual = (tensor.double() for tensor in inputs)
    gate, up = decoded(gate, name).double(), decoded(up, name).double()
    check(kernel(*inputs)[0], residual + F.silu(F.linear(x, gate)) * F.linear(x, up, bias))


def test_formats_may_differ_within_a_kernel():
    inputs = (torch.randn(3, 512), packed("Q4_K", 40, 512), packed("Q8_0", 40, 512))
    kernel = kernel_of(lambda x, a, b: quant_linear(x, a, format="Q4_K") * quant_linear(x, b, format="Q8_0"), *inputs)
    x, one, other = inputs
    left, right = (F.linear(x.double(), decoded(w, n).double()) for w, n in ((one, "Q4_K"), (other, "Q8_0")))
    check(kernel(*inputs)[0], left * right)
