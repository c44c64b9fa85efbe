"""Kernels whose numbers must be eager's: broadcasts, expanded operands, casts, numbers and signs of zeros."""

import math

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionError
from graph_capture.codegen.c.host import Layout, Place, check_reach
from graph_capture.codegen.spec import rounding
from tests.beside_eager import beside_eager, fused_of, on_the_cpu, rand

pytestmark = on_the_cpu
INF, NAN = math.inf, math.nan

# --- broadcasts: no operand moves along every dimension

PAIRWISE = {
    "distances": (lambda a, b: (a[:, None] - b[None]).square().sum(-1).sqrt(), (13, 37), (11, 37)),
    "cosines": (lambda a, b: F.cosine_similarity(a[:, None], b[None], -1), (13, 37), (11, 37)),
    "k-means": (lambda a, b: (a[:, None] - b[None]).abs().amin(-1), (6, 5), (4, 5)),
    "long rows": (lambda a, b: ((a[:, None] - b[None]) * 2).amax(-1), (3, 40000), (2, 40000)),
    "softmax": (lambda a, b: F.softmax(a[:, None] + b[None], -1), (5, 6), (4, 6)),
    "a column and rows": (lambda a, b: (a[:, None] * b[None]).sum(-1), (5, 1), (4, 6)),
    "log-sum-exp": (lambda a, b: torch.logsumexp(a[:, None] + b[None], -1, keepdim=True), (5, 6), (4, 6)),
}


@pytest.mark.parametrize("case", PAIRWISE)
def test_rows_of_operands_that_are_broadcast_against_each_other(case):
    function, first, second = PAIRWISE[case]
    beside_eager(function, rand(*first), rand(*second, seed=1))


def test_three_operands_of_which_each_moves_along_another_dimension():
    operands = rand(3, 1, 1, 6), rand(1, 4, 1, 6, seed=1), rand(1, 1, 5, 6, seed=2)
    beside_eager(lambda a, b, c: (a + b + c).mean(-1), *operands)


# --- linears and extents


@pytest.mark.parametrize("shape", [(1,), (2, 5), (2, 1), (1, 5)])
def test_a_bias_of_another_shape_than_the_columns(shape):
    beside_eager(lambda x, w, b: F.silu(F.linear(x, w, b)) * F.linear(x, w), rand(2, 7), rand(5, 7), rand(*shape))
    beside_eager(lambda x, w, b: torch.relu(F.linear(x, w, b)), rand(2, 7), rand(5, 7), rand(10)[::2])


def test_biases_of_linears_that_could_be_merged():
    class Sides(torch.nn.Module):
        def __init__(self, *biases):
            super().__init__()
            self.weights = torch.nn.ParameterList([rand(5, 7, seed=i) for i in range(len(biases))])
            self.biases = torch.nn.ParameterList(biases)

        def forward(self, x):
            pairs = zip(self.weights, self.biases, strict=True)
            return sum(torch.relu(F.linear(x, weight, bias)) for weight, bias in pairs)

    for biases in ((rand(1), rand(5)), (rand(1), rand(1, seed=1)), (rand(2, 5), rand(2, 5, seed=1))):
        beside_eager(Sides(*biases), rand(2, 7))


def test_heads_whose_elements_are_one_in_memory():
    query, key = rand(1, 2, 1, 1).expand(1, 2, 1, 8), rand(1, 2, 6, 8, seed=1)
    beside_eager(F.scaled_dot_product_attention, query, key, key * 2)


def test_a_launch_that_would_reach_beyond_a_tensor_is_refused():
    tensor = torch.zeros(4, 6)[:, :3]
    check_reach([Layout((), 1, 1, (Place(0, 0, 84),))], [tensor])
    with pytest.raises(FusionError, match="reaches beyond"):
        check_reach([Layout((), 1, 1, (Place(0, 0, 88),))], [tensor])
    with pytest.raises(FusionError, match="reaches beyond"):
        check_reach([Layout((), 1, 1, (Place(0, -4, 8),))], [tensor])


def test_memory_that_was_taken_away_is_refused():
    x = rand(64)
    kernel = fused_of(lambda x: F.silu(x) * x, x).regions[0].kernel
    gone = x.clone()
    gone.untyped_storage().resize_(0)
    with pytest.raises(FusionError, match="its memory has 0"):
        kernel(gone)


# --- arguments whose elements share memory

EXPANDED = {
    "columns": (lambda x: (x * 2).amax(-1), lambda: rand(3, 1).expand(3, 4)),
    "rows": (lambda x: F.softmax(x * 2, -1), lambda: rand(1, 6).expand(4, 6)),
    "two dimensions": (lambda x: F.rms_norm(x + 1, (6,)), lambda: rand(1, 1, 6).expand(4, 3, 6)),
    "a number": (lambda x: F.silu(x) * x, lambda: rand(()).expand(4, 6)),
    "windows": (lambda x: F.silu(x) * x, lambda: rand(10).unfold(0, 4, 1)),
    "one row of one element": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)), lambda: rand(1).expand(16)),
    "booleans": (lambda x: (x.to(torch.int32) * 3) > 2, lambda: rand(3, 1).expand(3, 4)),
}


@pytest.mark.parametrize("case", EXPANDED)
def test_expanded_arguments(case):
    function, make = EXPANDED[case]
    beside_eager(function, make())


def test_captured_tensors_that_are_expanded():
    rows, windows = rand(1, 6).expand(4, 6), rand(9).unfold(0, 6, 1)
    beside_eager(lambda x: F.silu(x + rows) * rows, rand(4, 6))
    beside_eager(lambda x: F.silu(x + windows).sum(-1), rand(4, 6))


# --- casts that the code wrote, and what shows a rounding

X, HALF, BRAIN = rand(64), rand(64).half(), rand(64).bfloat16()
CASTS = {
    "there and back": (lambda x: x.bfloat16().float() * 1, X),
    "the error of a cast": (lambda x: ((x.half().float() - x) * 1000, x.half()), X),
    "what a cast leaves": (lambda x: (x.bfloat16(), x - x.bfloat16().float()), X),
    "compared with what it was": (lambda x: (x.bfloat16() == x, x.half() > x), X),
    "integers of a cast": (lambda x: ((x * 100.0).bfloat16().to(torch.int32) + 0, (x.half() * 7).int() + 1), X),
    "products that are compared": (lambda x: (x * x.flip(0) == x * x.flip(0) + 0.001, (x * 1.1) > 1), BRAIN),
    "widened products": (lambda x: (x * 1.3).float() * 2, BRAIN),
    "floors": (lambda x: (x * 7).floor() + (x * 7).trunc(), BRAIN),
    "an overflow": (lambda x: (torch.isinf(x * 60000), (x * 60000) / 60000, torch.isfinite(x * 1e5)), HALF),
    "an underflow": (lambda x: (x * 1e-5) * 1e-4 == 0, HALF),
    "within doubles": (lambda x: (x.float().double() - x, x.half().double() * 3), X.double()),
    "Veltkamp's halves": (lambda x: (x * 4097.0 - (x * 4097.0 - x), x - (x * 4097.0 - (x * 4097.0 - x))), X),
}


@pytest.mark.parametrize("case", CASTS)
def test_a_rounding_that_the_code_can_see(case):
    function, x = CASTS[case]
    beside_eager(function, x, exact=True)


def test_casts_at_the_end_and_between_equal_dtypes_cost_nothing():
    spec = fused_of(lambda x: (F.silu(x.float()) * 2).to(torch.bfloat16), BRAIN).regions[0].kernel.spec
    assert not any(statement.function in rounding.ROUNDED for statement in spec.statements)


def test_a_norm_that_rounds_on_the_way_is_no_norm():
    def narrow(x, w):
        hidden = x.bfloat16().float()
        return w * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6))

    beside_eager(narrow, rand(3, 64), rand(64))


# --- numbers beside integers, doubles and halves

UNSIGNED = torch.tensor([3, 44, 200], dtype=torch.uint8)
SIGNED = torch.tensor([-128, 5, 127], dtype=torch.int8)
SHORT = torch.tensor([-5, 7, 300], dtype=torch.int16)
LONG = torch.tensor([1, 2**41, -(2**63)])
NUMBERS = {
    "arithmetic of bytes": (lambda u: (u + 300, u * 257, u - 400), UNSIGNED),
    "bytes compared": (lambda u: (u == -253, u >= 256, u <= 511, u > 300, u < -5), UNSIGNED),
    "arithmetic of signed bytes": (lambda i: (i + 300, i * 257, i - 400, i.clamp(-3, 100)), SIGNED),
    "signed bytes compared": (lambda i: (i == 130, i != 128, i >= 256), SIGNED),
    "shorts": (lambda i: (i > 70000, i + 70000, i * 65537), SHORT),
    "longs": (lambda i: (i > 2**40, i + 2**40, i < -(2**63), i * 3), LONG),
    "floats beside integers": (lambda i: (i > 2.5, i == 7.0, i * 0.5, i > 1e10), SHORT),
    "bools": (lambda i: ((i > 0) + (i < 9), (i > 0) * (i < 9), (i > 0) + True, (i > 0) * 3), SHORT),
    "a half beside a third": (lambda x: (x > 0.1, x >= 0.1, x == 0.1, x < 0.1), torch.tensor([0.1, 0.2]).bfloat16()),
    "doubles": (lambda x: (x.pow(1 / 3), torch.where(x > 0.1, 0.3, x), x.clamp(min=0.1)), rand(33).double().abs()),
    "small doubles": (lambda x: (x * 0.1 + 1e-60, x.masked_fill(x > 0, 0.1), x * 1e40), rand(33).double()),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_beside_tensors(case):
    function, x = NUMBERS[case]
    beside_eager(function, x)


# --- signs of zeros

ZEROS = torch.tensor([-0.0, 0.0, 2.0, -1.0, INF, -INF, NAN])
SIGNS = {
    "relu": lambda x: 1 / torch.relu(x),
    "clamp": lambda x: (1 / x.clamp(min=0), 1 / x.clamp(max=0), 1 / x.clamp(-0.0, 0.0)),
    "larger and smaller": lambda x: (1 / torch.maximum(x, -x), 1 / torch.minimum(x, -x)),
    "powers": lambda x: tuple(1 / x.pow(exponent) for exponent in (1, 2, 3, -1, -3, 5, -5, 0.5, -0.5, 4, 1 / 3)),
    "steps": lambda x: (1 / x.ceil(), 1 / x.trunc(), 1 / x.floor()),
    "negation": lambda x: (1 / -x, 1 / (x * -0.0), 1 / (x + 0.0), 1 / (x - 0.0)),
    "functions": lambda x: (1 / torch.tanh(x), 1 / F.silu(x), 1 / x.sin(), 1 / x.erf(), 1 / x.log1p(), 1 / x.sqrt()),
    "bounds that are none": lambda x: (x.clamp(min=NAN), x.clamp(min=2, max=1), x.clamp(max=INF)),
}


@pytest.mark.parametrize("case", SIGNS)
def test_signs_of_zeros(case):
    beside_eager(SIGNS[case], ZEROS)
