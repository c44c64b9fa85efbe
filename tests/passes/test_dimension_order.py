"""Pointwise ops over values that lie in memory in another order than their dimensions are counted."""

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, fuse, record
from graph_capture.ir.interpreter import interpret
from graph_capture.passes.dimension_order import contiguous_rows, follow_memory
from graph_capture.passes.regions import find_regions

SHAPES = [(2, 12, 5, 7), (1, 12, 5, 7), (2, 1, 5, 7), (2, 12, 1, 1), (1, 1, 1, 1), (0, 3, 2, 2), (2, 8, 4)]


def laid(shape, order, seed=0):
    """A random tensor whose dimensions lie in memory in `order`."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn([shape[dim] for dim in order], generator=generator)
    return dense.permute([order.index(dim) for dim in range(len(order))])


def orders(shape):
    return [(0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 2, 3)] if len(shape) == 4 else [(0, 2, 1), (2, 1, 0)]


def recorded(function, *args):
    with record(*args) as recording:
        recording.output(function(*args))
    return recording.graph, recording.graph.subgraph


def chain(x, y):
    channels = torch.arange(x.shape[1], dtype=x.dtype).view(-1, *[1] * (x.dim() - 2))
    total = F.relu(x * channels + y) * 0.5
    return total, total.movedim(1, -1) + channels.flatten()


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_strides_stay(shape):
    for order in orders(shape):
        x, y = laid(shape, order), laid(shape, order, 1)
        graph, before = recorded(chain, x, y)
        after = follow_memory(before)
        for got, want in zip(interpret(after, [x, y, *graph.captured.values()]), chain(x, y), strict=True):
            assert torch.equal(got, want)
            assert got.stride() == want.stride()
        for replay in (fuse(graph, FusionConfig(profile="always")), fuse(graph, FusionConfig(enable_fusion=False))):
            for got, want in zip(replay(x, y), chain(x, y), strict=True):
                torch.testing.assert_close(got, want)
                assert got.stride() == want.stride()


def test_a_chain_and_what_reads_its_view_are_one_region():
    shape = (2, 12, 5, 7)
    graph, _ = recorded(chain, laid(shape, (0, 2, 3, 1)), laid(shape, (0, 2, 3, 1), 1))
    (region,) = fuse(graph, FusionConfig(profile="always")).regions
    assert region.kind == "pointwise"
    assert len(region.node.recorded) == 5  # *, +, relu, *, +
    apart = fuse(graph, FusionConfig(profile="always", passes_off={"dimension_order"})).regions
    assert [len(each.node.recorded) for each in apart] == [4]


def test_operands_in_another_order_are_read_through_their_strides():
    x, y = laid((2, 12, 5, 7), (0, 2, 3, 1)), laid((2, 12, 5, 7), (0, 1, 2, 3), 1)
    _, before = recorded(lambda x, y: (x * y).exp() - y, x, y)
    (got,) = interpret(follow_memory(before), [x, y])
    want = (x * y).exp() - y
    assert torch.equal(got, want)
    assert got.stride() == want.stride()


@pytest.mark.parametrize(
    "program",
    [
        lambda x: x.contiguous() * 2 + 1,  # in order
        lambda x: x.softmax(1).sum(1),  # not pointwise
        lambda x: x.clone().mul_(2).add_(1),  # written in place
    ],
    ids=["contiguous", "rows", "in place"],
)
def test_other_ops_stay_as_they_are(program):
    _, before = recorded(program, laid((2, 4, 5, 6), (0, 2, 3, 1)))
    after = follow_memory(before)
    assert [node.op_type for node in after.nodes].count("aten.permute.default") == 0


def over_time(x):
    """What follows a convolution over time: [B, C, T] is read by rows [B, T, C], with a residual that goes on."""
    weight = torch.linspace(0.5, 1.5, x.shape[1])
    rows = torch.exp(x).permute(0, 2, 1) + weight
    for _ in range(2):
        rows = rows + torch.tanh(F.linear(F.layer_norm(rows, weight.shape, weight, weight), torch.eye(len(weight))))
    return (rows * 2).contiguous(), F.layer_norm(rows, weight.shape, weight, weight)


@pytest.mark.parametrize("shape", [(2, 8, 5), (1, 8, 5), (2, 1, 5), (2, 8, 1)])
def test_what_is_read_by_rows_lies_in_rows(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    graph, before = recorded(over_time, x)
    after = contiguous_rows(before)
    metas = [after.values[node.outputs[0]] for node in after.nodes if node.op_type == "add"]
    for meta in metas if min(shape) > 1 else ():
        assert meta.stride == (shape[1] * shape[2], shape[1], 1)
    want = over_time(x)
    for replay in (
        lambda x: interpret(after, [x, *graph.captured.values()]),
        fuse(graph, FusionConfig(profile="always")),
        fuse(graph, FusionConfig(enable_fusion=False)),
    ):
        for got, expected in zip(replay(x), want, strict=True):
            torch.testing.assert_close(got, expected)
            assert got.stride() == expected.stride()


def test_a_residual_over_time_grows_into_its_norms():
    def program(x):
        return over_time(x)[1]

    graph, _ = recorded(program, torch.randn(2, 8, 5))
    kinds = [region.kind for region in fuse(graph, FusionConfig(profile="always")).regions]
    assert kinds.count("add_layer_norm") == 3


@pytest.mark.parametrize("seen", ["as_strided", "another dtype"])
def test_who_looks_at_memory_is_left_alone(seen):
    def program(x):
        rows = x.permute(0, 2, 1) + 1
        tail = rows.as_strided((4,), (1,)) if seen == "as_strided" else rows.transpose(1, 2).view(torch.int32)
        return F.layer_norm(rows, rows.shape[-1:]), tail

    x = torch.randn(2, 8, 5)
    graph, before = recorded(program, x)
    assert contiguous_rows(before) is before
    for got, want in zip(fuse(graph, FusionConfig(profile="always"))(x), program(x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 4)])
def test_a_batch_norm_with_channels_anywhere(shape, dtype):
    norm = torch.nn.BatchNorm1d(shape[1]) if len(shape) < 4 else torch.nn.BatchNorm2d(shape[1])
    norm = norm.eval().requires_grad_(False).to(dtype)
    for index, statistic in enumerate(norm.state_dict().values()):
        if statistic.is_floating_point():
            statistic.copy_(laid((shape[1],), (0,), index).abs() + 0.5)

    def program(x, y):
        return F.relu(norm(x) + y)

    for order in orders(shape) if len(shape) > 2 else [(1, 0), (0, 1)]:
        x, y = laid(shape, order).to(dtype), laid(shape, order, 1).to(dtype)
        graph, _ = recorded(program, x, y)
        want = program(x, y)
        fused, unfused = fuse(graph, FusionConfig(profile="always")), fuse(graph, FusionConfig(enable_fusion=False))
        assert torch.equal(unfused(x, y), want)
        if min(shape) > 1:  # the strides of single elements differ from op to op
            assert [region.kind for region in fused.regions] == ["pointwise"]
        got, exact = fused(x, y), F.relu(F.batch_norm(x.double(), *_doubles(norm), eps=norm.eps) + y.double())
        assert got.stride() == want.stride()
        eps = torch.finfo(dtype).eps
        assert (
            ((got - exact).abs() <= (want - exact).abs().amax() + eps * (1 + exact.abs())).all() if x.numel() else True
        )


def _doubles(norm):
    return [getattr(norm, name).double() for name in ("running_mean", "running_var", "weight", "bias")]


@pytest.mark.parametrize(
    ("off", "regions"),
    [
        ((), [("row", 3)]),
        ({"row"}, [("bias_relu", 2)]),
        ({"row", "pointwise"}, [("bias_relu", 2)]),
        ({"pointwise"}, [("bias_relu", 2)]),
    ],
)
def test_what_a_pattern_names_may_grow(off, regions):
    x, bias = torch.randn(4, 8), torch.randn(8)
    graph, _ = recorded(lambda x, bias: F.softmax(F.relu(x + bias), -1), x, bias)
    fused = fuse(graph, FusionConfig(profile="always", passes_off=frozenset(off)))
    assert [(region.kind, len(region.node.recorded)) for region in fused.regions] == regions
    torch.testing.assert_close(fused(x, bias), F.softmax(F.relu(x + bias), -1))


def test_a_norm_alone_is_a_region_on_a_gpu():
    weight = torch.ones(8)
    _, graph = recorded(lambda x: F.layer_norm(x, (8,), weight, weight) @ x.mT, torch.randn(4, 8))
    assert find_regions(graph, supports=lambda body: None).graph.nodes[0].op_type == "layer_norm"
    there = {name: meta._replace(device=torch.device("cuda")) for name, meta in graph.values.items()}
    moved = type(graph)(graph.nodes, graph.input_names, graph.output_names, there)
    assert find_regions(moved, supports=lambda body: None).graph.nodes[0].op_type == "fused.layer_norm"
