"""Torch's own ops called from C: the same bits as torch's, the same errors, nothing left behind."""

import gc
import threading

import pytest
import torch

from graph_capture import OpNode, fuse
from graph_capture.codegen.c import host as c_host
from graph_capture.codegen.c import library as c_library
from graph_capture.codegen.c.library import BINARY, SMALL, UNARY, LibraryProduct, SmallOp
from graph_capture.codegen.launches import Chain, HalfwayError
from graph_capture.ir.numerics import same_bits
from graph_capture.ir.ops import op
from graph_capture.runtime.replay.forms import writer
from tests.replaying import UNFUSED, graph_of, noise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD = [0.0, -0.0, float("inf"), -float("inf"), 1e-40, -1e-40, 3.4e38, 65504.0, 65520.0, 1e-7]


def values(*shape, dtype=torch.float32, seed=0):
    """Noise of all magnitudes, and what is odd about floats."""
    made = noise(*shape, seed=seed) * torch.exp2(noise(*shape, seed=seed + 1) * 8)
    flat = made.view(-1)
    flat[: len(ODD)] = torch.tensor(ODD)[: flat.numel()]
    return made.to(dtype)


LAYOUTS = {
    "contiguous": lambda dtype: (values(3, 200, dtype=dtype), values(3, 200, dtype=dtype, seed=5)),
    "one element": lambda dtype: (values(1, dtype=dtype), values(1, 1, dtype=dtype, seed=5)),
    "scalar": lambda dtype: (values(7, 3, dtype=dtype), torch.tensor(0.3, dtype=dtype)),
    "rows": lambda dtype: (values(5, 129, dtype=dtype), values(129, dtype=dtype, seed=5)),
    "columns": lambda dtype: (values(5, 129, dtype=dtype), values(5, 1, dtype=dtype, seed=5)),
    "outer": lambda dtype: (values(5, 1, dtype=dtype), values(1, 7, dtype=dtype, seed=5)),
    "transposed": lambda dtype: (values(65, 6, dtype=dtype).t(), values(6, 65, dtype=dtype, seed=5)),
    "halves": lambda dtype: (values(4, 3, 64, dtype=dtype)[..., 32:], values(3, 64, dtype=dtype, seed=5)[:, ::2]),
    "heads": lambda dtype: (values(1, 7, 4, 16, dtype=dtype).transpose(1, 2), values(1, 1, 7, 16, dtype=dtype, seed=5)),
}


def node_of(kind, count, **attrs):
    return OpNode(kind, tuple(f"x{i}" for i in range(count)), ("y",), attrs)


def launched(kernel, inputs, out):
    kernel.prepare(inputs, [out])()
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*BINARY, *UNARY, "pow"])
def test_small_ops_have_the_bits_of_torch(kind, dtype, layout):
    left, right = LAYOUTS[layout](dtype)
    inputs = [left, right] if kind in BINARY else [left]
    attrs = {"pow": {"exponent": 2}, "cast": {"dtype": torch.float32}}.get(kind, {})
    node = node_of(kind, len(inputs), **attrs)
    want = op(kind).function(*inputs, **attrs)
    form = c_library.writer(node, inputs, want)
    if form is None:  # it was tried
        assert kind in ("sqrt", "rsqrt", "reciprocal")
        return
    kernels = []

    class Emitted:
        def launch(self, kernel, operands, outs):
            kernels.append(kernel.prepare(operands, outs))

    out = torch.full_like(want, 7)
    form(Emitted(), inputs, out)
    kernels[0]()
    assert torch.equal(out.isnan(), want.isnan())
    assert same_bits(out.nan_to_num(nan=1.0), want.nan_to_num(nan=1.0))


@pytest.mark.parametrize("number", [3, 1e-6, -0.1, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BINARY)
def test_numbers_are_taken_as_torch_takes_them(kind, dtype, number):
    x = values(3, 50, dtype=dtype)
    want = op(kind).function(x, number)
    node = node_of(kind, 1, other=number)
    kernel, reads = c_library._elementwise(node, [x], dtype)
    out = launched(kernel, [x], torch.empty_like(want))
    assert c_library.writer(node, [x], want) is not None
    assert reads == (0,)
    assert torch.equal(out.isnan(), want.isnan())
    assert same_bits(out.nan_to_num(nan=1.0), want.nan_to_num(nan=1.0))


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casts_and_what_only_moves(dtype, target):
    x = values(5, 130, dtype=dtype)
    assert same_bits(launched(SmallOp(c_library.COPY), [x.t()], torch.empty(130, 5, dtype=target)), x.t().to(target))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_keeps_the_payload_of_nan(dtype):
    kind = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    bits = torch.arange(-300, 300, dtype=kind) + {4: 0x7F800000, 2: 0x7F80}[dtype.itemsize]
    x = bits.view(dtype)
    assert torch.equal(launched(SmallOp(c_library.COPY), [x], torch.empty_like(x)).view(kind), bits)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat(dim):
    pieces = [noise(2, 3, 8), noise(2, 3, 16)[..., 4:12], noise(2, 8, 3, seed=2).transpose(1, 2)]
    node = OpNode("aten.cat.default", ("a", "b", "c"), ("y",), graph_attrs(dim))
    form = writer(node, pieces, torch.cat(pieces, dim))
    assert type(form).__name__ == "_NativeForm"  # it was compared with torch's


def graph_attrs(dim):
    graph = graph_of(lambda a, b, c: torch.cat([a, b, c], dim), *[noise(2, 3, 8)] * 3)
    return dict(next(node for node in graph.subgraph.nodes if node.op_type == "aten.cat.default").attrs)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (128, 256), (704, 256), (1000, 333), (4096, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_products_are_torchs(rows, sizes, dtype, threads):
    columns, inner = sizes
    x, weight = noise(1, rows, inner).to(dtype), noise(columns, inner, seed=1).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        want = torch.nn.functional.linear(x, weight)
        out = torch.full_like(want, 7)
        launched(LibraryProduct(), [x.view(rows, inner), weight.t()], out.view(rows, columns))
        form = writer(node_of("linear", 2), [x, weight], want)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(out.double(), x.double() @ weight.double().t(), rtol=0.05, atol=0.5)
    if type(form).__name__ == "_NativeForm":  # where the library's bits depend on how columns are cut, it is not taken
        assert same_bits(out, want)


def test_products_of_a_model_are_taken():
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = noise(1, 1, 256).to(dtype), noise(704, 256, seed=1).to(dtype)
        form = writer(node_of("linear", 2), [x, weight], torch.nn.functional.linear(x, weight))
        assert type(form).__name__ == "_NativeForm"


def test_what_is_not_taken():
    x = noise(4, 4)
    assert c_library.writer(node_of("mul", 2), [x.double(), x.double()], x.double()) is None
    assert c_library.writer(node_of("add", 2, alpha=2), [x, x], x) is None
    assert c_library.writer(node_of("mul", 1, other=True), [x], x) is None
    assert c_library.writer(node_of("exp", 1), [x], x) is None
    assert c_library.writer(node_of("div", 2, rounding_mode="floor"), [x, x], x) is None
    assert c_library.writer(node_of("mul", 2), [x[:0], x[:0]], x[:0]) is None
    large = torch.zeros(SMALL + 1)
    assert c_library.writer(node_of("neg", 1), [large], large) is None
    assert c_library.writer(node_of("linear", 2), [noise(2, 16), noise(16, 4).t()], noise(2, 4)) is None
    rows = noise(1, 9, 16)
    assert c_library.writer(node_of("linear", 2), [rows, noise(4, 16)], noise(1, 9, 4)) is None


def step(x, weight):
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return torch.sin(torch.nn.functional.linear(torch.cat([-scaled, scaled], -1) + 1, weight))


def test_a_replay_calls_them_in_one_go():
    x, weight = noise(1, 1, 16), torch.nn.Parameter(noise(64, 32))
    fused = fuse(graph_of(step, x, weight), UNFUSED)
    with torch.no_grad():
        for seed in range(4):
            x = noise(1, 1, 16, seed=seed)
            assert torch.equal(fused(x, weight), step(x, weight))
    text = str(fused.plan)
    assert "op_neg" not in text
    assert "op_cat" not in text
    assert "kernels" in text


def test_a_profile_names_them():
    x, weight = noise(1, 1, 16), noise(64, 32)
    fused = fuse(graph_of(lambda x: step(x, weight), x), UNFUSED)
    for _ in range(3):
        fused(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        fused(x)
    names = {event.name for event in trace.events()}
    assert {"neg", "aten.cat.default", "linear"} <= names
    assert "aten::mm" not in names  # it is called, below the dispatcher


def test_without_a_compiler_ops_are_called(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    x, weight = noise(1, 1, 16), noise(64, 32)
    fused = fuse(graph_of(step, x, weight), UNFUSED)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(fused(x, weight), step(x, weight))
    assert "kernels" not in str(fused.plan)


def test_without_the_shim_products_are_called(monkeypatch):
    monkeypatch.setattr(c_library, "_shim", lambda: None)
    x, weight = noise(1, 1, 16), noise(4, 16)
    assert c_library.writer(node_of("linear", 2), [x, weight], noise(1, 1, 4)) is None
    with pytest.raises(c_library.FusionError, match="shim"):
        LibraryProduct().prepare([x[0], weight.t()], [noise(1, 4)])


def test_a_product_that_fails_raises():
    x, weight, out = noise(1, 16), noise(4, 16), noise(1, 4)
    launch = LibraryProduct().prepare([x, weight.t()[:8]], [out])  # inner sizes differ
    with pytest.raises(HalfwayError, match="standard error"):
        launch()
    fine = LibraryProduct().prepare([x, weight.t()], [out])
    with pytest.raises(HalfwayError):
        fine.join([launch])()
    fine()
    assert torch.equal(out, x @ weight.t())


def test_a_chain_does_not_go_on_after_one_that_failed_halfway():
    runs = []

    class Kernel:
        movable = False

        def prepare(self, inputs, outputs):
            return launch

        def failed(self, error, inputs, outputs):
            raise AssertionError("it must not run again")

    def launch():
        runs.append(1)
        raise HalfwayError("no memory")

    from graph_capture.codegen.launches import BoundKernel

    chain = Chain([BoundKernel(Kernel(), [], [])])
    for _ in range(2):
        with pytest.raises(HalfwayError):
            chain()
    assert len(runs) == 2


def test_launches_keep_tensors_for_as_long_as_they_live(monkeypatch):
    x, weight, out = noise(1, 16), noise(4, 16), noise(1, 4)
    freed = []
    shim = c_library._shim()
    monkeypatch.setattr(
        c_library, "_shim", lambda: c_library.Shim(shim.mm, lambda handle: freed.append(shim.delete(handle)))
    )
    launch = LibraryProduct().prepare([x, weight.t()], [out])
    del x, weight, out
    gc.collect()
    launch()
    assert not freed
    del launch
    gc.collect()
    assert len(freed) == 3


def test_weights_that_require_gradients_leave_none():
    x, weight, out = noise(1, 256), noise(704, 256).requires_grad_(), torch.empty(1, 704)
    LibraryProduct().prepare([x, weight.t()], [out])()
    assert not out.requires_grad


def test_two_threads_at_once():
    x, weight = noise(1, 256), noise(704, 256)
    outs = [torch.empty(1, 704) for _ in range(2)]
    launches = [LibraryProduct().prepare([x, weight.t()], [out]) for out in outs]
    threads = [threading.Thread(target=lambda one=one: [one() for _ in range(200)]) for one in launches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, x @ weight.t()) for out in outs)


def test_the_numbers_of_c_and_python_agree():
    text = (c_host.FOLDER / "library.c").read_text()
    order = [name.strip() for name in text.split("enum { COPY")[1].split("}")[0].strip(", ").split(",")]
    assert [getattr(c_library, name) for name in order] == list(range(1, 1 + len(order)))


@pytest.mark.parametrize("number", [0.0, -0.0])
@pytest.mark.parametrize("code", [lambda x, n: x + n, lambda x, n: x - n, lambda x, n: x * n])
def test_a_zero_keeps_its_sign(code, number):
    x = torch.tensor([-0.0, 0.0, 1.0, -1.0])
    fused = fuse(graph_of(lambda x: torch.neg(code(x, number)), x), UNFUSED)
    for _ in range(3):
        assert same_bits(fused(x), torch.neg(code(x, number)))
