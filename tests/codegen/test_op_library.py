"""Op definitions out of a library: inlined into our kernels, checked before they are used, refused with a reason."""

import re
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, FusionError, KernelCompiler, fuse, record
from graph_capture.codegen.ninetoothed.op_library import OpLibrary
from graph_capture.ir.binding import expression
from tests.codegen.test_kernels import DEVICE, EXPRESSIBLE, call_of, noise
from tests.codegen.test_kernels import check as check_with

HEAD = """
import functools
import math
import ninetoothed.language as ntl
from ninetoothed import Tensor

def arrangement(*tensors, block_size=None):
    raise AssertionError("the arrangement is ours")

def _tensors(count):
    return tuple(Tensor(2) for _ in range(count))
"""
# In the form of such a library: what is assigned to the parameter `output` is what the application computes.
MODULES = {
    "silu": """
        def application(input, output):
            output = input * ntl.sigmoid(ntl.cast(input, ntl.float32))
        def premake(ndim, dtype=None, block_size=None):
            return functools.partial(arrangement, block_size=block_size), application, _tensors(2)
    """,
    "mul": """
        def application(input, other, output):
            output = other * input
        def premake(ndim, dtype=None, block_size=None):
            return arrangement, application, _tensors(3)
    """,
    "gelu": """
        def _scaled(x):
            return x / ntl.sqrt(2.0)
        def plain(input, output):
            output = 0.5 * input * (1 + ntl.erf(_scaled(input)))
        def curved(input, output):
            loaded = input
            output = 0.5 * loaded * (1 + ntl.tanh(ntl.sqrt(2 / math.pi) * (loaded + 0.044715 * loaded**3)))
        def premake(ndim, approximate, dtype=None, block_size=None):
            return arrangement, curved if approximate == "tanh" else plain, _tensors(2)
    """,
    "rms_norm": """
        def application(input, weight, eps, output, num_normalized_elements):
            squares = ntl.zeros(input.dtype.shape, dtype=ntl.float32)
            for i in range(input.shape[0]):
                loaded = ntl.cast(input[i], ntl.float32)
                squares += loaded * loaded
            scale = ntl.rsqrt(ntl.sum(squares) / num_normalized_elements + eps)
            for i in range(input.shape[0]):
                output[i] = input[i] * scale * weight[i]
        def premake(ndim, num_normalized_dims, dtype=None, block_size=None):
            return arrangement, application, _tensors(5)
    """,
    "tanh": """
        def application(input, output):
            up, down = ntl.exp(input), ntl.exp(-input)
            output = (up - down) / (up + down)
        def premake(ndim):
            return arrangement, application, _tensors(2)
    """,
    "abs": """
        def application(input, output):
            output = input if input > 0 else -input
        def premake(ndim):
            return arrangement, application, _tensors(2)
    """,
    "exp": "raise RuntimeError('broken')",
    "clamp": """
        def application(input, low, output):
            output = ntl.maximum(input, low)
        def premake(ndim):
            return arrangement, application, _tensors(3)
    """,
}
REFUSED = {
    "tanh": "it computes .* where torch's function gives",
    "abs": "it branches on a value",
    "exp": "RuntimeError: broken",
    "clamp": "the op has no argument 'low'",
    "log": "No module named",
    "bitwise_and": "not taken for torch.int32",
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package of the form of ntops, in its place."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "ntops"]:
        monkeypatch.delitem(sys.modules, name)
    kernels = tmp_path / "ntops" / "kernels"
    kernels.mkdir(parents=True)
    for folder in (kernels.parent, kernels):
        (folder / "__init__.py").touch()
    for name, text in MODULES.items():
        (kernels / f"{name}.py").write_text(HEAD + textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield OpLibrary("ntops")
    for name in [name for name in sys.modules if name.partition(".")[0] == "ntops"]:
        del sys.modules[name]


def definition(library, name, dtype=torch.float32):
    graph, inputs = call_of(name, dtype)
    (node,) = graph.nodes
    return library.define(node, inputs[0].dtype), expression(node, inputs[0].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["silu", "mul", "gelu", "rms_norm"])
def test_definitions_are_inlined(stand_in, name, dtype, monkeypatch):
    theirs, ours = definition(stand_in, name, dtype)
    assert theirs != ours
    assert name not in stand_in.refused
    compiler = KernelCompiler("ninetoothed", op_library="ntops")
    graph, inputs = call_of(name, dtype)
    monkeypatch.setitem(check_with.__globals__, "COMPILER", compiler)
    check_with(graph, *inputs, slack=2.0)  # another order of roundings
    plain = KernelCompiler("ninetoothed").compile(graph, [t.dtype for t in inputs], [t.shape for t in inputs])
    assert {kernel.key for kernel in compiler.kernels}.isdisjoint({plain.key})


def test_what_a_call_gives_chooses_the_application(stand_in):
    x = noise(3, 5)
    with record(x) as recording:
        recording.output(F.gelu(x, approximate="tanh"))
    (node,) = recording.graph.subgraph.nodes
    assert "tanh" in stand_in.define(node, x.dtype)
    assert "erf" in definition(stand_in, "gelu")[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_right_or_not_readable_keeps_ours(stand_in, name):
    theirs, ours = definition(stand_in, name)
    assert theirs == ours
    assert stand_in.refused.keys() == {name}
    assert re.search(REFUSED[name], stand_in.refused[name])


@pytest.mark.parametrize("target", ["ninetoothed"] if DEVICE == "cuda" else ["ninetoothed", "c"])
def test_a_graph_fused_with_a_library(stand_in, target):
    gate, up, weight = noise(6, 24), noise(6, 24, seed=1), noise(24, seed=2)

    def model(gate, up, weight):
        return F.rms_norm(F.silu(gate) * up, (24,), weight, 1e-5)

    with record(gate, up, weight) as recording:
        recording.output(model(gate, up, weight))
    config = FusionConfig(profile="always", target=target, op_library="ntops")
    fused, plain = fuse(recording.graph, config), fuse(recording.graph, FusionConfig(profile="always", target=target))
    kernels = [[region.kernel for region in graph.regions if region.kernel] for graph in (fused, plain)]
    assert len(kernels[0]) == len(kernels[1]) > 0
    assert {kernel.key for kernel in kernels[0]}.isdisjoint({kernel.key for kernel in kernels[1]})
    torch.testing.assert_close(fused(gate, up, weight), model(gate, up, weight))
    assert fused.verify(gate, up, weight).ok


def test_a_library_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "ntops", None)
    with pytest.raises(FusionError, match=r"op_library='ntops': ntops cannot be imported.*builtin"):
        KernelCompiler("ninetoothed", op_library="ntops")
    x = noise(4)
    with record(x) as recording:
        recording.output(F.silu(x) * 2)
    with pytest.raises(FusionError, match="README"):
        fuse(recording.graph, FusionConfig(op_library="ntops"))
    with pytest.raises(ValueError, match="op_library must be one of 'builtin', 'ntops'"):
        FusionConfig(op_library="other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_ntops_where_it_is_installed(name, dtype, monkeypatch):
    """Its definition or ours: the kernel is as close to float64 as eager is."""
    pytest.importorskip("ntops")
    library = OpLibrary("ntops")
    theirs, ours = definition(library, name, dtype)
    if theirs == ours:
        pytest.skip(library.refused.get(name, "the same as ours"))
    monkeypatch.setitem(check_with.__globals__, "COMPILER", KernelCompiler("ninetoothed", op_library="ntops"))
    graph, inputs = call_of(name, dtype)
    check_with(graph, *inputs, slack=2.0)
