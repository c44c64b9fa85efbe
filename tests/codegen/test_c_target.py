"""What only the C target has: threads, chains of launches, the compiler, the cache of its output, unusual addresses."""

import logging
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, FusionError, KernelCompiler, OpNode, SubGraph, fuse, record
from graph_capture import cache as cachedir
from graph_capture.cache import DiskCache
from graph_capture.codegen import compiler
from graph_capture.codegen.c import host as c_host
from graph_capture.codegen.c import rows as c_rows
from graph_capture.codegen.c.printing import identifier, literal
from graph_capture.ir.numerics import distance

COMPILER = KernelCompiler("c")


def swiglu():
    nodes = (OpNode("silu", ("gate",), ("s",)), OpNode("mul", ("s", "up"), ("output",)))
    return SubGraph(nodes, ("gate", "up"), ("output",))


def softmax():
    return SubGraph((OpNode("softmax", ("x",), ("y",), {"dim": -1}),), ("x",), ("y",))


def one(name, **attrs):
    return SubGraph((OpNode(name, ("x",), ("y",), attrs),), ("x",), ("y",))


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kernel_of(graph, *inputs):
    return COMPILER.compile(graph, [t.dtype for t in inputs], [t.shape for t in inputs], [t.stride() for t in inputs])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- threads


@pytest.mark.parametrize("graph", [swiglu(), softmax()], ids=["flat", "rows"])
def test_the_number_of_threads_changes_no_bit(graph, threads):
    inputs = [noise(517, 1031, seed=seed) for seed, _ in enumerate(graph.input_names)]
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(kernel_of(graph, *inputs)(*inputs)[0])
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_chain_is_worked_on_by_one_team(threads):
    """Whatever comes after another launch finds what that one wrote, on any number of threads."""
    x = noise(300, 1031)
    graphs = [one("exp"), softmax(), one("sqrt"), one("neg"), softmax()]
    values = [x, *(torch.empty_like(x) for _ in graphs)]
    small = [noise(3, 5), *(torch.empty(3, 5) for _ in graphs)]
    launches = []
    for number, graph in enumerate(graphs):
        for tensors in (values, small):
            launches.append(kernel_of(graph, tensors[number]).prepare([tensors[number]], [tensors[number + 1]]))
    chained = launches[0].join(launches[1:])
    want = x
    for graph in graphs:
        want = kernel_of(graph, want)(want)[0]
    for count in (1, 2, 3):
        threads(count)
        for _ in range(20):
            for tensor in (*values[1:], *small[1:]):
                tensor.fill_(float("nan"))
            chained()
            assert torch.equal(values[-1], want)
            assert not small[-1].isnan().any()


def test_threads_are_those_of_torch():
    code = """
import os, torch
from tests.codegen.test_c_target import kernel_of, noise, swiglu
torch.set_num_threads(3)
x = noise(512, 1024)
y = x.exp()
before = len(os.listdir("/proc/self/task"))
kernel = kernel_of(swiglu(), x, y)
for _ in range(3):
    kernel(x, y)
    y = x.exp()
assert len(os.listdir("/proc/self/task")) == before > 2, (before, os.listdir("/proc/self/task"))
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads are counted in /proc")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_forked_child_computes_alone(threads):
    threads(2)
    x = noise(512, 1024)
    kernel = kernel_of(swiglu(), x, x)
    want = kernel(x, x)[0].numpy().tobytes()
    child = os.fork()
    if not child:
        signal.alarm(30)
        os._exit(0 if kernel(x, x)[0].numpy().tobytes() == want else 1)  # torch's own parallel ops would hang here
    assert os.waitpid(child, 0)[1] == 0


# --- launches


def test_a_chain_is_one_launch_of_all():
    x, y, z = noise(5, 64), torch.empty(5, 64), torch.empty(5, 64)
    first, second = kernel_of(one("exp"), x).prepare([x], [y]), kernel_of(softmax(), y).prepare([y], [z])
    chained = c_host.chain([c_host.chain([first]), second])
    assert isinstance(chained, c_host.CLaunch)
    del first, second
    for _ in range(2):
        chained()
        torch.testing.assert_close(z, x.exp().softmax(-1))
        x.mul_(0.5)


def test_addresses_that_are_not_aligned():
    for dtype in (torch.float32, torch.bfloat16):
        base = torch.empty(4 * 33 * 4 + 1, dtype=torch.uint8)
        step = dtype.itemsize
        x = base[step : step + 3 * 33 * step].view(dtype).view(3, 33).copy_(noise(3, 33)) if step == 1 else None
        flat = torch.empty(200, dtype=dtype)
        x, out = flat[1 : 1 + 99].view(3, 33).copy_(noise(3, 33)), torch.empty(200, dtype=dtype)[3 : 3 + 99].view(3, 33)
        kernel_of(softmax(), x).prepare([x], [out])()
        assert distance(out, x.double().softmax(-1)) <= torch.finfo(dtype).eps


# --- numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_converted_as_torch_does(dtype):
    half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    (wide,) = kernel_of(one("cast", dtype=torch.float32), half)(half)
    torch.testing.assert_close(wide, half.float(), rtol=0, atol=0, equal_nan=True)
    bits = torch.arange(-(2**31), 2**31 - 1, 4099, dtype=torch.int64).to(torch.int32)
    (narrow,) = kernel_of(one("cast", dtype=dtype), bits.view(torch.float32))(bits.view(torch.float32))
    torch.testing.assert_close(narrow, bits.view(torch.float32).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2**16, 2**16 - 1, 33, 2, 1], ids=str)
def test_all_halves_pass_through_pieces(dtype, size):
    """Subnormal numbers, infinities and NaN among them; odd sizes leave an element without a neighbour."""
    half = torch.arange(-(2**15), size - 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    (ours,) = kernel_of(one("neg"), half)(half)
    torch.testing.assert_close(ours, -half, rtol=0, atol=0, equal_nan=True)
    kernel_of(one("neg"), half).prepare([half], [half])()
    torch.testing.assert_close(half, ours, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "columns"), [(torch.bfloat16, 4096), (torch.bfloat16, 1030), (torch.float16, 2048), (torch.float32, 1027)]
)
def test_streamed_results_are_those_of_few_rows(dtype, columns):
    rows = c_rows.STREAMED // (columns * dtype.itemsize) + 1
    x = noise(rows, columns, dtype=dtype)
    for graph in (softmax(), one("silu")):
        (streamed,) = kernel_of(graph, x)(x)
        for part in (slice(0, 3), slice(rows - 3, rows)):
            assert torch.equal(streamed[part], kernel_of(graph, x[part])(x[part])[0])


@pytest.mark.parametrize(
    ("name", "ulps"), [("exp", 1), ("log", 1), ("log1p", 3), ("tanh", 2), ("erf", 2), ("sin", 2), ("cos", 2)]
)
def test_functions_over_all_floats(name, ulps):
    x = torch.arange(-(2**31), 2**31 - 1, 9973, dtype=torch.int64).to(torch.int32).view(torch.float32)
    (ours,) = kernel_of(one(name), x)(x)
    exact = getattr(torch, name)(x.double())
    rounded = exact.float()
    torch.testing.assert_close(ours.isnan(), rounded.isnan())
    infinite = rounded.isinf()
    assert torch.equal(ours[infinite], rounded[infinite])
    known = rounded.isfinite()
    size = rounded.abs()
    unit = (torch.nextafter(size, torch.tensor(math.inf)) - size).double().clamp(min=2.0**-149)
    assert ((ours.double() - exact).abs() / unit)[known].max() <= ulps
    zero = x == 0
    assert torch.equal(ours[zero].signbit(), rounded[zero].signbit())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sigmoid", "silu"])
def test_functions_over_all_halves(name, dtype):
    """The exponential is rougher there: what that adds is little beside half a unit, of rounding."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    (ours,) = kernel_of(one(name), x)(x)
    exact = getattr(F, name)(x.double())
    torch.testing.assert_close(ours, exact.to(dtype), atol=1e-6, rtol=0.01, equal_nan=True)
    known = exact.isfinite() & (exact.abs() <= torch.finfo(dtype).max) & (x > -88)  # below, float32 knows infinity
    size = exact.abs()[known].clamp(min=torch.finfo(dtype).tiny)
    unit = torch.exp2(size.log2().floor()) * torch.finfo(dtype).eps
    assert ((ours.double()[known] - exact[known]).abs() / unit).max() <= 0.53


def test_masks_of_infinity():
    x = torch.tensor([[1.0, -math.inf, 2.0] * 7, [-math.inf] * 21, [math.nan] + [0.0] * 20, [math.inf] + [1.0] * 20])
    torch.testing.assert_close(kernel_of(softmax(), x)(x)[0], x.softmax(-1), equal_nan=True)
    for name, theirs in (("relu", F.relu), ("silu", F.silu), ("sigmoid", torch.sigmoid)):
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(kernel_of(one(name), x)(x)[0], theirs(x), equal_nan=True, msg=message)


# --- the compiler


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    compiler._log_once.cache_clear()
    cachedir.environment.cache_clear()
    yield
    cachedir.environment.cache_clear()


def program(gate, up):
    return F.silu(gate) * up


def test_without_a_compiler_the_ops_replay_as_recorded(no_compiler, caplog):
    gate, up = noise(4, 8), noise(4, 8, seed=1)
    with record(gate, up) as recording:
        recording.output(program(gate, up))
    with caplog.at_level(logging.WARNING):
        fused = fuse(recording.graph, FusionConfig(profile="always"))
    assert "there is no C compiler" in fused.regions[0].decision.reason
    assert sum("there is no C compiler" in message for message in caplog.messages) == 1
    assert torch.equal(fused(gate, up), program(gate, up))


def test_a_failing_compiler_gives_its_message(monkeypatch):
    c_host.toolchain()
    monkeypatch.setattr(c_host, "prelude", lambda: "#error this cannot be\n")
    with pytest.raises(FusionError, match="this cannot be"):
        KernelCompiler("c").compile(one("clamp", min=0.25, max=0.375), [torch.float32], [(3, 5)])  # no other test's


def test_flags_from_outside_are_words_not_a_shell(monkeypatch, tmp_path):
    monkeypatch.setenv(c_host.CFLAGS, f"-DX='$(touch {tmp_path}/ran)' -O1")
    assert c_host.toolchain().flags[-2:] == (f"-DX=$(touch {tmp_path}/ran)", "-O1")
    assert not list(tmp_path.iterdir())


def test_the_cache_keeps_what_was_compiled(tmp_path):
    cache = DiskCache("kernels", tmp_path)
    x = noise(3, 7)
    graph = one("clamp", min=-0.123, max=0.321)  # no other test's
    want = KernelCompiler("c", cache).compile(graph, [x.dtype], [x.shape])(x)[0]
    assert list((tmp_path / "kernels").glob("*.so"))
    code = f"""
import subprocess, torch
from graph_capture.cache import DiskCache
from graph_capture import KernelCompiler
from tests.codegen.test_c_target import noise, one
run, compiled = subprocess.run, []
def watch(command, **keywords):
    if "-x" in command:
        compiled.append(command)
    return run(command, **keywords)
subprocess.run = watch
x = noise(3, 7)
graph = one("clamp", min=-0.123, max=0.321)
kernel = KernelCompiler("c", DiskCache("kernels", {str(tmp_path)!r})).compile(graph, [x.dtype], [x.shape])
assert kernel(x)[0].tolist() == {want.tolist()!r}
assert len(compiled) <= 1, compiled  # the runtime, which another cache may hold
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_are_prepared_side_by_side():
    made = KernelCompiler("c")
    x = noise(3, 7)
    wanted = [(one(name), [record_meta(x)], None) for name in ("exp", "log", "sqrt")]
    made.prepare([*wanted, (one("aten.cumsum.default", dim=-1), [record_meta(x)], None)])
    for graph, *_ in wanted:
        made.compile(graph, [x.dtype], [x.shape])(x)


def record_meta(tensor):
    from graph_capture.ir.values import TensorMeta

    return TensorMeta.of(tensor)


def test_other_devices_are_refused():
    with pytest.raises(FusionError, match="C kernels run on the CPU"):
        COMPILER.compile(one("exp"), [torch.float32], [(3,)], device="cuda")
    with pytest.raises(FusionError, match="the kernel runs on the CPU"):
        kernel_of(one("exp"), noise(3))(torch.empty(3, device="meta"))


# --- text


def test_names_from_outside_are_harmless():
    assert identifier('a"; system("x', (), "p_") == "p_a___system__x"
    assert identifier("ä", ["p__"], "p_") == "p___2"
    names = ("float", "x;y", "NAN", "operands", "p_x_y")
    nodes = [OpNode("add", names[:2], ("t0",))] + [
        OpNode("add", (f"t{i}", names[i + 2]), (f"t{i + 1}",)) for i in range(3)
    ]
    inputs = [noise(3, 4, seed=seed) for seed in range(5)]
    (out,) = kernel_of(SubGraph(tuple(nodes), names, ("t3",)), *inputs)(*inputs)
    torch.testing.assert_close(out, sum(inputs))


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (1, torch.float32, "1.0f"),
        (1e-6, torch.float32, "1e-06f"),
        (1e300, torch.float32, "INFINITY"),
        (1e300, torch.float64, "1e+300"),
        (-math.inf, torch.float32, "-INFINITY"),
        (math.nan, torch.float64, "NAN"),
        (True, torch.bool, "1"),
        (3, torch.int64, "INT64_C(3)"),
        (-(2**63), torch.int64, "(-9223372036854775807 - 1)"),
    ],
)
def test_literals(value, dtype, text):
    assert literal(value, dtype) == text
