"""Convolutions whose weights are made ready once: numbers, what is matched and what is not, changes of weights."""

import dataclasses
import logging
from collections import Counter

import pytest
import torch
from torch import nn

from graph_capture import FusionConfig, capture, fuse, load, record
from graph_capture.ir import convolutions
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.interpreter import interpret
from graph_capture.ir.numerics import distance
from graph_capture.ir.ops import TABLE, op
from graph_capture.passes.convolutions import NORMS, RULE, biases_apart, pointwise_norms, ready_convolutions
from tests.beside_eager import beside_eager
from tests.replaying import graph_of, noise

ALWAYS = FusionConfig(profile="always")


class Block(nn.Module):
    """A convolution, its norm, and what a residual network does with them."""

    def __init__(self, bias=False, affine=True, **options):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(4, 6, 3, bias=bias, **options)
        self.norm = nn.BatchNorm2d(6, affine=affine)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)
            if affine:
                self.norm.weight.normal_()
                self.norm.bias.normal_()
        self.eval()

    def forward(self, x):
        y = self.norm(self.convolution(x))
        return torch.relu(y + x[:, :1, : y.shape[2], : y.shape[3]])


X = noise(2, 4, 9, 11)
VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "no affine": {"affine": False},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": (1, 2)},
    "groups": {"groups": 2, "bias": True},
}


def fused_of(model, x, config=ALWAYS):
    return fuse(graph_of(model, x), config)


def ready(fused):
    return [region for region in fused.regions if region.kind == RULE]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_norm_is_folded_into_the_convolution(options):
    model = Block(**options)
    fused = fused_of(model, X)
    (region,) = ready(fused)
    assert len(region.nodes) == 2
    assert region.decision.use
    assert [node.op_type for node in region.body.nodes] == ["folded_norm", "packed_weight", "packed_convolution"]
    assert not [node for node in fused.subgraph.nodes if "batch_norm" in node.op_type]
    exact = Block(**options).double()
    for seed in range(4):
        x = noise(2, 4, 9, 11, seed=seed)
        with torch.no_grad():
            want, eager = exact(x.double()), model(x)
        got = fused(x)
        assert got.stride() == eager.stride()
        assert distance(got, want) <= max(2 * distance(eager, want), 2e-7)
    assert fused.verify(X).ok
    assert fused.bisect(X).culprit is None


def test_float64_is_left_alone():
    assert not ready(fused_of(Block().double(), X.double()))


class Residual(nn.Module):
    """Norms behind convolutions, before them and behind a linear, in place and not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8, affine=number < 2) for number in range(3))
        self.linear, self.last = nn.Linear(8, 5), nn.BatchNorm1d(5)
        for norm in (*self.norms, self.last):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x):
        y = self.norms[0](self.convolutions[0](x)).relu_()
        y = self.norms[1](self.convolutions[1](y))
        y += x
        y = torch.sigmoid(self.norms[2](y.relu_()))
        return torch.relu(self.last(self.linear(y.mean((2, 3))))), y


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", ["c", "ninetoothed"])
def test_norms_in_half_precision_are_as_close_as_eagers(target, dtype, fold):
    x = noise(2, 8, 5, 7).to(dtype)
    model, exact = Residual().to(dtype), Residual().to(dtype).double()
    fused = fused_of(model, x, FusionConfig(profile="always", target=target, fold_weights=fold))
    inside = [node.op_type for region in fused.regions for node in region.body]
    assert inside.count("batch_norm") == 4
    assert "folded_norm" not in inside
    with torch.no_grad():
        wants, eagers = exact(x.double()), model(x)
    for _ in range(3):
        for got, want, eager in zip(fused(x), wants, eagers, strict=True):
            assert (got.dtype, got.stride()) == (eager.dtype, eager.stride())
            assert distance(got, want) <= 1.05 * distance(eager, want)
    assert fused.verify(x).ok


def test_norms_of_other_ranks_and_statistics_of_another_dtype():
    def norm(x, mean, var, weight):
        return torch.relu(nn.functional.batch_norm(x, mean, var, weight, None)) * 2

    for shape in ((3, 8), (2, 8, 5), (2, 8, 3, 5), (2, 8, 2, 3, 4), (0, 8, 3), (2, 1, 3)):
        channels = shape[1]
        statistics = noise(channels), noise(channels).abs() + 0.1, noise(3 * channels)[::3]
        beside_eager(norm, noise(*shape), *statistics)
        beside_eager(norm, noise(*shape).bfloat16(), *statistics)
        beside_eager(norm, noise(*shape).transpose(0, -1).contiguous().transpose(0, -1), *statistics)


def test_weights_that_change_are_made_ready_again():
    model = Block(bias=True)
    fused = fused_of(model, X)
    for change in (
        lambda: model.convolution.weight.mul_(2),
        lambda: model.norm.running_mean.add_(1),
        lambda: model.norm.weight.neg_(),
        lambda: model.convolution.bias.zero_(),
        lambda: model.load_state_dict(Block(bias=True, stride=1).state_dict()),
    ):
        with torch.no_grad():
            fused(X)
            change()
            want = model(X)
        for _ in range(3):
            torch.testing.assert_close(fused(X), want, rtol=1e-4, atol=1e-4)


class Training(Block):
    def forward(self, x):
        norm = self.norm
        return nn.functional.batch_norm(
            self.convolution(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True
        )


class Shared(Block):
    """The convolution is read beside the norm."""

    def forward(self, x):
        y = self.convolution(x)
        return self.norm(y) + y


class Computed(Block):
    """The weight is computed."""

    def forward(self, x):
        return self.norm(nn.functional.conv2d(x, self.convolution.weight * 2))


class Written(Block):
    def forward(self, x):
        self.norm.running_mean.add_(1)
        return self.norm(self.convolution(x))


@pytest.mark.parametrize("kind", [Training, Shared, Computed, Written])
def test_what_is_not_folded(kind):
    model, other = kind(), kind()
    fused = fused_of(model, X)
    assert not [region for region in ready(fused) if len(region.nodes) > 1]
    with torch.no_grad():
        other(X)
        for _ in range(3):
            torch.testing.assert_close(fused(X), other(X))


def test_infinities_and_nans_come_through():
    model, x = Block(), X.clone()
    x[0, 0, 3, 3], x[1, 2, 4, 4] = float("nan"), float("inf")
    with torch.no_grad():
        want = model(x)
    got = fused_of(model, X)(x)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_convolution_without_a_norm_is_packed_for_the_cpu():
    model = nn.Conv2d(4, 6, 3, padding=1)
    fused = fused_of(model, X)
    (region,) = ready(fused)
    assert [node.op_type for node in region.body.nodes] == ["packed_weight", "packed_convolution"]
    for _ in range(4):
        torch.testing.assert_close(fused(X), model(X).detach(), rtol=1e-5, atol=1e-5)


class Deep(nn.Module):
    """Blocks whose results lie as the next one takes them, and a head that flattens."""

    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(4, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)) for _ in range(3)]
        )
        self.head = nn.Linear(width, 5)
        self.eval()

    def forward(self, x):
        x = nn.functional.max_pool2d(self.stem(x), 2)
        for block in self.blocks:
            y = block(x)
            y += x
            x = torch.relu(y)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_measurement_all_are_used_or_none(dtype, caplog):
    model, x = Deep().to(dtype), noise(2, 4, 32, 32).to(dtype)
    fast = capture(model)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "graph_capture"):
        for _ in range(5):
            got, want = fast(x), model(x)
            for ours, theirs in zip(got, want, strict=True):
                assert ours.stride() == theirs.stride()
                torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)
    assert not caplog.records
    assert len({region.decision.use for region in ready(fast.graphs[0])}) <= 1


def test_values_lie_as_the_library_leaves_them(caplog):
    model, x = Deep(), noise(2, 4, 32, 32)
    fused = fused_of(model, x)
    assert len(ready(fused)) == 4
    with torch.no_grad(), caplog.at_level(logging.WARNING, "graph_capture"):
        for _ in range(4):
            got, want = fused(x), model(x)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert ours.stride() == theirs.stride()
    assert not caplog.records, caplog.text  # no kernel met other strides than it was made for


@pytest.mark.parametrize("shape", [(2, 4, 32, 32), (1, 4, 32, 32), (3, 4, 2, 2)], ids=str)
def test_a_layout_without_packing(shape, monkeypatch, caplog):
    """What is done on a GPU, on the CPU: weights whose channels come last, and torch's own convolution."""

    def laid_out(weight, size, stride, padding, dilation, groups):
        return convolutions.channels_last(weight)

    monkeypatch.setitem(TABLE, "packed_weight", dataclasses.replace(TABLE["packed_weight"], function=laid_out))
    op.cache_clear()
    model, x = Deep(), noise(*shape)
    fused = fused_of(model, x)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "graph_capture"):
        for _ in range(4):
            got, want = fused(x), model(x)
    op.cache_clear()
    assert not any(tensor.is_mkldnn for bound in fused._bound for tensor in bound())
    assert len(ready(fused)) == 4
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert ours.stride() == theirs.stride()
    assert not caplog.records, caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_device(dtype, caplog):
    model, x = Deep(64).to("cuda", dtype), noise(2, 4, 64, 64).to("cuda", dtype)
    forced, fast = fused_of(model, x), capture(model)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "graph_capture"):
        for _ in range(5):
            want = model(x)
            for got in (forced(x), fast(x)):
                for ours, theirs in zip(got, want, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)
                    assert ours.stride() == theirs.stride()
    assert ready(forced)
    assert not caplog.records, caplog.text


class Flat(nn.Module):
    """What is behind the convolution does not take channels that come last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(4, 6, 3)
        self.eval()

    def forward(self, x):
        return self.convolution(x).view(len(x), -1).cumsum(1)


def test_views_of_what_is_recorded_stay_right():
    fused = fused_of(Flat(), X)
    assert not ready(fused)
    (receipt,) = [r for r in fused.receipts if r.rule == RULE]
    assert "channels that come last" in receipt.refused[0].reason
    for _ in range(3):
        torch.testing.assert_close(fused(X), Flat()(X).detach())


def test_replays_have_a_plan():
    fused = fused_of(Block(), X)
    for _ in range(3):
        fused(X)
    assert fused.plan is not None


def test_the_rule_can_be_left_out():
    fused = fused_of(Block(), X, FusionConfig(profile="always", passes_off=frozenset({RULE})))
    assert not ready(fused)


def test_a_saved_graph_makes_its_weights_ready_again(tmp_path):
    model = Block()
    fused = fused_of(model, X)
    want = fused(X)
    fused.save(tmp_path / "block.graph")
    loaded = load(tmp_path / "block.graph")
    assert [region.kind for region in loaded.regions if region.decision] == [
        r.kind for r in fused.regions if r.decision
    ]
    for _ in range(3):
        assert torch.equal(loaded(X), want)


def test_a_bias_is_added_on_the_way_on_a_gpu():
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 8, 3).eval().requires_grad_(False).bfloat16()
    x = torch.randn(2, 3, 6, 6).bfloat16()
    with record(x) as recording:
        ones = torch.ones(128, 1).bfloat16()
        recording.output((torch.relu(convolution(x)) + 1, convolution(x).flatten(1) @ ones))
    graph = recording.graph.subgraph
    assert biases_apart(graph) is graph  # on a CPU the library adds it while it multiplies
    values = {name: meta._replace(device=torch.device("cuda")) for name, meta in graph.values.items()}
    apart = biases_apart(SubGraph(graph.nodes, graph.input_names, graph.output_names, values))
    before, after = (Counter(node.op_type for node in each.nodes) for each in (graph, apart))
    assert after - before == Counter({"aten.view.default": 1, "add": 1})
    given = [x, *recording.graph.captured.values()]
    for got, want in zip(interpret(apart, given), interpret(graph, given), strict=True):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


def test_norms_as_cudnn_has_them():
    """On CUDA, float32 and float16 go to another op, which names its arguments in another way and order."""
    block = Block().requires_grad_(False)
    x = noise(2, 4, 8, 8)
    with record(x) as recording:
        recording.output(block(x))
    graph = recording.graph.subgraph

    def cudnn(node):
        if node.op_type != NORMS[0]:
            return node
        attrs = {"training": False, "exponential_average_factor": node.attr("momentum"), "epsilon": node.attr("eps")}
        more = tuple(f"{node.outputs[0]}_{number}" for number in range(3))
        return OpNode(NORMS[1], node.inputs, (node.outputs[0], *more), attrs, node.source)

    other = SubGraph(tuple(map(cudnn, graph.nodes)), graph.input_names, graph.output_names, graph.values)
    weights = [name for name in graph.input_names if name != graph.input_names[0]]
    (folded,) = [node for node in ready_convolutions(other, weights)[0].nodes if node.op_type.endswith(RULE)]
    (known,) = [node for node in ready_convolutions(graph, weights)[0].nodes if node.op_type.endswith(RULE)]
    assert folded.attr("body").nodes[0].op_type == "folded_norm"
    assert folded.attr("body") == known.attr("body")
    pointwise = pointwise_norms(other)
    given = [x, *recording.graph.captured.values()]
    torch.testing.assert_close(interpret(pointwise, given)[0], block(x))
