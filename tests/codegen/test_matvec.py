"""Linears with their epilogues: numbers against float64, machine code against hand-written Triton."""

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionError, KernelCompiler, OpNode, SubGraph, record
from graph_capture.codegen import compile_for
from graph_capture.codegen.ninetoothed import aot, host
from graph_capture.ir.numerics import distance, in_float64
from graph_capture.runtime.decide.heuristics import fallback_of
from tests.targets import COMPILERS, DEVICE, each_target  # noqa: F401

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
COMPILER = COMPILERS["ninetoothed"]


def graph_of(function, *inputs):
    with torch.no_grad(), record(*inputs) as recording:
        recording.output(function(*inputs))
    return recording.graph.subgraph


def compiled(graph, *inputs):
    return COMPILER.compile(graph, [t.dtype for t in inputs], [t.shape for t in inputs], [t.stride() for t in inputs])


def check(function, *inputs):
    """At least as close to float64 as eager is, which adds in another order, or exact up to one rounding."""
    graph = graph_of(function, *inputs)
    kernel = compiled(graph, *inputs)
    for ours, theirs, want in zip(kernel(*inputs), fallback_of(graph)(inputs), in_float64(graph, inputs), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype is theirs.dtype
        assert distance(ours, want) <= max(2 * distance(theirs, want), torch.finfo(ours.dtype).eps)
    return kernel


def noise(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


EPILOGUES = {
    "plain": lambda x, w, v, b, r: F.linear(x, w),
    "bias": lambda x, w, v, b, r: F.linear(x, w, b),
    "residual": lambda x, w, v, b, r: r + F.linear(x, w),
    "gated": lambda x, w, v, b, r: F.silu(F.linear(x, w)) * F.linear(x, v, b),
    "softcap": lambda x, w, v, b, r: torch.tanh(F.linear(x, w, b) / 1.5) * 1.5,
    "two results": lambda x, w, v, b, r: (F.linear(x, w), F.gelu(F.linear(x, w)) + r),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name, dtype):
    make = EPILOGUES[name]
    for rows, inner, columns in ((1, 77, 33), (3, 130, 40)):
        x, residual = noise(rows, inner, dtype=dtype), noise(rows, columns, dtype=dtype, seed=1)
        weights = [noise(columns, inner, dtype=dtype, seed=seed) for seed in (2, 3)]
        bias = noise(columns, dtype=dtype, seed=4)
        used = {
            "plain": (0, 1),
            "bias": (0, 1, 3),
            "residual": (0, 1, 4),
            "softcap": (0, 1, 3),
            "two results": (0, 1, 4),
        }
        inputs = (x, *weights, bias, residual)
        chosen = used.get(name, (0, 1, 2, 3))
        check(lambda *given, chosen=chosen: make(*_filled(given, chosen)), *[inputs[i] for i in chosen])


def _filled(given, chosen):
    filled = [None] * 5
    for place, tensor in zip(chosen, given, strict=True):
        filled[place] = tensor
    return filled


@pytest.mark.parametrize("rows", range(1, 9))
def test_rows_up_to_eight_on_both_sides_of_the_tensor_cores(rows):
    for columns in (50, 2120):
        check(F.linear, noise(1, rows, 100, dtype=torch.bfloat16), noise(columns, 100, dtype=torch.bfloat16, seed=1))


def gated(x, w, v, r):
    return F.silu(F.linear(x, w)) * F.linear(x, v) + r


def capped(x, w, v, r):
    return F.linear(x, w), torch.tanh(F.linear(x, v) / 1.5) * r


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [gated, capped])
def test_many_rows(function, dtype, target):
    """One kernel for every number of rows; sizes that no tile divides."""
    if target == "c":
        pytest.skip("more than 8 rows are the library's on the CPU")
    weights = [noise(40, 130, dtype=dtype, seed=seed) for seed in (2, 3)]
    keys = set()
    for rows in ((9,), (16,), (3, 25)):
        x, residual = noise(*rows, 130, dtype=dtype), noise(*(rows if function is gated else ()), 40, dtype=dtype)
        keys.add(check(function, x, *weights, residual).key)
        check(lambda x, w, b: F.gelu(F.linear(x, w, b)), x, weights[0], noise(40, dtype=dtype, seed=4))
    assert len(keys) == 1


def test_many_rows_of_weights_of_any_strides(target):
    if target == "c":
        pytest.skip("more than 8 rows are the library's on the CPU")
    x, weight = noise(15, 200, dtype=torch.float16), noise(64, 90, dtype=torch.float16, seed=1)
    check(F.linear, x[:, 7:97], weight)
    check(F.linear, x[:, :90], weight.t().contiguous().t())


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 4097, 3), (8, 5, 1), (1, 16, 8193)], ids=str)
def test_odd_sizes(sizes):
    rows, inner, columns = sizes
    check(F.linear, noise(rows, inner), noise(columns, inner, seed=1))


def test_inputs_and_weights_of_any_strides():
    x, weight = noise(2, 90), noise(64, 90, seed=1)
    apart, column_first = noise(2, 200)[:, 7:97], weight.t().contiguous().t()
    check(F.linear, apart, weight)
    check(F.linear, x, column_first)
    check(F.linear, x, noise(64, 120, seed=1)[:, 9:99])
    transposed = SubGraph((OpNode("linear", ("x", "w"), ("y",), (("transposed", True),)),), ("x", "w"), ("y",))
    (ours,) = compiled(transposed, x, weight.t().contiguous())(x, weight.t().contiguous())
    torch.testing.assert_close(ours, F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_halves_of_one_projection_are_two_products():
    def merged(x, weight, bias):
        gate, up = F.linear(x, weight, bias).chunk(2, -1)
        return F.silu(gate) * up

    kernel = check(merged, noise(1, 1, 70), noise(66, 70, seed=1), noise(66, seed=2))
    assert [product.start for product in kernel.spec.products] == [0, 33]
    assert len({product.weight for product in kernel.spec.products}) == 1


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (11, torch.float16)], ids=str)
def test_infinities_and_nans_pass(rows, dtype, target):
    if target == "c" and rows > 8:
        pytest.skip("more than 8 rows are the library's on the CPU")
    x, weight = noise(rows, 64, dtype=dtype), noise(8, 64, dtype=dtype, seed=1)
    weight[0, 3], weight[1, 5], weight[2, 63] = float("inf"), float("nan"), -float("inf")
    (ours,) = compiled(graph_of(F.linear, x, weight), x, weight)(x, weight)
    assert torch.equal(ours.isnan(), F.linear(x, weight).isnan())
    assert torch.equal(ours.isinf(), F.linear(x, weight).isinf())


def two_inputs(x, y, w):
    return F.linear(x, w) + F.linear(y, w)


REFUSED = {
    "9 rows are more than 8": (F.linear, (9, 16), (8, 16)),  # in float32
    "different inputs": (two_inputs, (2, 16), (2, 16), (8, 16)),
    "reads what the region computes": (lambda x, w: F.linear(x, F.linear(x, w)), (2, 16), (16, 16)),
    "not a pointwise op": (lambda x, w: F.softmax(F.linear(x, w), -1), (2, 16), (8, 16)),
    "differ in shape": (lambda x, w, v: (F.linear(x, w), F.linear(x, v)), (2, 16), (8, 16), (9, 16)),
    "part of the rows": (lambda x, w, r: F.linear(x, w) + r, (2, 3, 16), (8, 16), (2, 1, 8)),
    "nothing to multiply": (F.linear, (0, 16), (8, 16)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason):
    function, *shapes = REFUSED[reason]
    inputs = [noise(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    with pytest.raises(FusionError, match=reason):
        compiled(graph_of(function, *inputs), *inputs)


def test_more_rows_than_pay_are_refused(target):
    linear, gelu = F.linear, lambda x, w: F.gelu(F.linear(x, w))
    weight = noise(8, 16, dtype=torch.bfloat16)
    for function, rows, most in ((linear, 17, 16), (gelu, 257, 256), (linear, 16, None), (gelu, 256, None)):
        x = noise(rows, 16, dtype=torch.bfloat16)
        reason = f"{rows} rows are more than {most}" if most else "library's on the CPU" if target == "c" else None
        if reason is None:
            compiled(graph_of(function, x, weight), x, weight)
            continue
        with pytest.raises(FusionError, match=reason):
            compiled(graph_of(function, x, weight), x, weight)


def test_float64_is_left_to_the_library():
    x, weight = noise(2, 16, dtype=torch.float64), noise(8, 16, dtype=torch.float64)
    with pytest.raises(FusionError, match="float64"):
        compiled(graph_of(F.linear, x, weight), x, weight)


# --- machine code

REFERENCE = """
import triton
import triton.language as tl


@triton.jit
def reference(
    tensor_0_pointer, tensor_1_pointer, tensor_1_stride_0, tensor_1_stride_1, tensor_2_pointer
):
    # x [4096], weight [N, 4096], out [N]: two columns of the result for each program of eight warps.
    column = tl.program_id(0) * 2 + tl.arange(0, 2)
    k = tl.arange(0, 2048)
    total = tl.zeros((2, 256), tl.float32)
    for start in range(0, 4096, 2048):
        tile = tl.load(tensor_1_pointer + column[:, None] * tensor_1_stride_0 + (start + k)[None, :])
        row = tl.load(tensor_0_pointer + start + k)
        product = tile.to(tl.float32) * row.to(tl.float32)[None, :]
        total += tl.sum(tl.reshape(product, (2, 256, 8)), 2)
    tl.store(tensor_2_pointer + column, tl.sum(total, 1).to(tl.bfloat16))
"""


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_machine_code_at_llama_sizes(architecture, tmp_path):
    """Hand-written Triton for the same blocks beside it; each weight is loaded once, 16 bytes at a time."""
    bf16 = torch.bfloat16
    linear = SubGraph((OpNode("linear", ("x", "w"), ("y",)),), ("x", "w"), ("y",))
    gated = (
        OpNode("linear", ("x", "w"), ("gate",)),
        OpNode("linear", ("x", "v"), ("up",)),
        OpNode("silu", ("gate",), ("act",)),
        OpNode("mul", ("act", "up"), ("y",)),
    )
    compiler = KernelCompiler("ninetoothed")
    kernels = [
        compiler.compile(linear, [bf16] * 2, [(1, 4096), (4096, 4096)]),
        compiler.compile(SubGraph(gated, ("x", "w", "v"), ("y",)), [bf16] * 3, [(1, 4096)] + [(14336, 4096)] * 2),
        compiler.compile(linear, [bf16] * 2, [(8, 4096), (4096, 4096)]),
    ]
    binaries = [binary for (binary,) in compile_for(kernels, architecture)]
    for binary in binaries:
        assert binary.stack == 0
        assert set(binary.loads) == {128}
    file = tmp_path / "reference.py"
    file.write_text(REFERENCE.replace("tensor_", "ninetoothed_tensor_"), encoding="utf-8")
    program = host.GeneratedProgram("", (1, 2, 1), (bf16,) * 3, (True,) * 3, warps=8)
    built = host.Built(program, print, str(file), "reference")
    (by_hand,) = aot.compile_ahead([built], architecture)
    assert by_hand.loads == binaries[0].loads == {128: 6}  # two steps along K, unrolled: two of each weight, one of x
    assert binaries[0].instructions <= 1.15 * by_hand.instructions
