"""Linears and attention of few rows as regions, with what follows them, and what keeps that apart."""

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, fuse, record
from graph_capture.runtime.decide import heuristics
from tests.targets import DEVICE

ALWAYS = FusionConfig(profile="always")
torch.manual_seed(0)
X, RESIDUAL = torch.randn(1, 2, 64), torch.randn(1, 2, 24)
W, V, BIAS, NORM = torch.randn(24, 64), torch.randn(24, 64), torch.randn(24), torch.randn(24)


def fused_of(function, *inputs, config=ALWAYS):
    with torch.no_grad(), record(*inputs) as recording:
        recording.output(function(*inputs))
    return fuse(recording.graph, config)


def ops_of(fused, kind):
    return [[node.op_type for node in region.nodes] for region in fused.regions if region.kind == kind]


def refusals(fused, rule):
    return {reason for receipt in fused.receipts if receipt.rule == rule for reason, _ in receipt.refusals}


def check(fused, function, *inputs):
    results, wanted = fused(*inputs), function(*inputs)
    for got, want in zip(*((r if isinstance(r, tuple) else (r,)) for r in (results, wanted)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    verification = fused.verify(*inputs)
    assert verification.ok, str(verification)


FOUND = {
    "linear_epilogue": {
        "bias, gelu": (lambda x: F.gelu(F.linear(x, W, BIAS)), ["linear", "gelu"]),
        "residual": (lambda x: RESIDUAL + F.linear(x, W), ["linear", "add"]),
        "softcap": (lambda x: torch.tanh(F.linear(x, W) / 3.0) * 3.0, ["linear", "div", "tanh", "mul"]),
        "gated, two weights": (
            lambda x: F.silu(F.linear(x, W)) * F.linear(x, V),
            ["linear", "linear", "silu", "mul"],
        ),
        "gated, one weight": (
            lambda x: (lambda g, u: F.silu(g) * u)(*F.linear(x, W).chunk(2, -1)),
            ["linear", "aten.split.Tensor", "silu", "mul"],
        ),
        "the linear's result too": (lambda x: (lambda y: (y, torch.sigmoid(y)))(F.linear(x, W)), ["linear", "sigmoid"]),
    },
    "skinny_linear": {"nothing behind it": (lambda x: F.linear(x, W), ["linear"])},
}


@pytest.mark.parametrize(("rule", "name"), [(rule, name) for rule, cases in FOUND.items() for name in cases])
def test_found(rule, name):
    function, ops = FOUND[rule][name]
    fused = fused_of(function, X)
    assert [sorted(found) for found in ops_of(fused, rule)] == [sorted(ops)], str(fused.explain())
    assert len(fused.subgraph) == 1
    check(fused, function, X)


def test_a_norm_keeps_the_sum_apart():
    def function(x):
        total = RESIDUAL + F.linear(x, W)
        return total, F.rms_norm(total, (24,), NORM, 1e-6)

    fused = fused_of(function, X)
    assert ops_of(fused, "skinny_linear") == [["linear"]]
    assert ops_of(fused, "add_rms_norm") == [["add", "rms_norm"]]
    assert refusals(fused, "linear_epilogue") == {"add is read by rms_norm, which takes it"}
    check(fused, function, X)


def test_many_rows_are_the_librarys():
    x = torch.randn(9, 64)
    fused = fused_of(lambda x: F.gelu(F.linear(x, W)), x)
    assert not fused.regions
    assert refusals(fused, "linear_epilogue") == refusals(fused, "skinny_linear") == {"9 rows are more than 8"}


def test_many_rows_are_a_kernel_of_tensor_cores():
    """The sum goes to the norm, and the product alone is not worth a kernel."""
    half = {"dtype": torch.bfloat16, "device": DEVICE}
    weights = torch.nn.ParameterList([torch.randn(24, 64, **half) / 8 for _ in range(2)])
    down, norm, x = torch.randn(64, 24, **half) / 5, torch.ones(64, **half), torch.randn(1, 40, 64, **half)

    def mlp(x):
        total = x + F.linear(F.silu(F.linear(x, weights[0])) * F.linear(x, weights[1]), down)
        return total, F.rms_norm(total, (64,), norm, 1e-6)

    fused = fused_of(mlp, x, config=FusionConfig(profile="always", target="ninetoothed"))
    assert [region.kind for region in fused.regions] == ["linear_epilogue", "add_rms_norm"]
    assert "40 rows are more than 16" in refusals(fused, "skinny_linear")
    verification = fused.verify(x)
    assert verification.ok, str(verification)
    if DEVICE == "cpu":
        by_cpu = fused_of(mlp, x)
        assert [region.kind for region in by_cpu.regions] == ["parallel_linear", "swiglu", "add_rms_norm"]


@pytest.mark.parametrize(("whole", "apart"), [(0.5, True), (0.3, False)])
def test_a_product_and_what_follows_are_apart_where_that_is_faster(whole, apart, monkeypatch):
    """The parts: the library's product, and a kernel of the rest, used or not."""
    monkeypatch.setattr("graph_capture.runtime.fuse.is_native", lambda *_: True)

    def decide(self, graph, metas, tensors, fallback=None, ops=None, libraries=()):
        t_fused = 0.3 if libraries else whole if graph.by_op.get("linear") else 0.1
        return heuristics.Decision(True, "measured", 1.0, t_fused), [*libraries, None][0] or self.kernel(graph, metas)

    monkeypatch.setattr(heuristics.FusionHeuristics, "decide", decide)
    monkeypatch.setattr("graph_capture.runtime.fuse.decide_whole", lambda *_: None)
    half = {"dtype": torch.bfloat16, "device": DEVICE}
    weights = torch.nn.ParameterList([torch.randn(24, 64, **half) for _ in range(2)])

    def gated(x):
        return F.silu(F.linear(x, weights[0])) * F.linear(x, weights[1])

    fused = fused_of(gated, torch.randn(40, 64, **half), config=FusionConfig(target="ninetoothed"))
    found = [(region.kind, bool(region.decision)) for region in fused.regions]
    if apart:
        assert found == [("linear_epilogue", False), ("parallel_linear", True), ("swiglu", True)]
        assert fused.regions[0].decision.reason == "its parts are 1.25x faster"
    else:
        assert found == [("linear_epilogue", True)]


def test_what_follows_is_taken_as_far_as_it_goes():
    """A value that is needed elsewhere is a result; what cannot be expressed, and what depends on it, stays out."""

    def escapes(x):
        y = F.silu(F.linear(x, W))
        return y * 2.0, y.cumsum(-1)

    fused = fused_of(escapes, X)
    assert ops_of(fused, "linear_epilogue") == [["linear", "silu", "mul"]]
    check(fused, escapes, X)

    def comes_back(x):
        y = F.linear(x, W)
        return torch.exp(y) + y.cumsum(-1)  # the sum cannot join: a path leaves and comes back

    fused = fused_of(comes_back, X)
    assert ops_of(fused, "linear_epilogue") == [["linear", "exp"]]
    check(fused, comes_back, X)


def test_a_result_that_is_written_in_place():
    def function(x):
        y = F.linear(x, W)
        z = torch.exp(y)
        y.add_(1.0)
        return y, z

    fused = fused_of(function, X)
    check(fused, function, X)


def test_what_is_not_used_falls_apart_into_what_may_be(monkeypatch):
    """Linears that were merged are merged still, and the gate is a region of its own."""
    monkeypatch.setattr("graph_capture.runtime.fuse.is_native", lambda *_: True)
    weights = torch.nn.ParameterList([torch.randn(24, 64), torch.randn(24, 64)])

    def gated(x):
        return F.silu(F.linear(x, weights[0])) * F.linear(x, weights[1])

    fused = fused_of(gated, X, config=FusionConfig(profile="static", target="ninetoothed"))  # no interpreted kernel
    found = [(region.kind, region.parent, bool(region.decision)) for region in fused.regions]
    whole, parent = ("linear_epilogue", "", False), "linear_epilogue_0"
    assert found == [whole, ("parallel_linear", parent, True), ("swiglu", parent, False)]
    check(fused, gated, X)


@pytest.mark.parametrize(("each", "apart"), [(0.1, True), (0.4, False)])
def test_merged_linears_are_apart_where_that_is_faster(each, apart, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("on a CPU")

    def compare(functions, device):
        return [1.0, *(each if call.func is heuristics._launch else 0.5 for call in functions[1:])]

    monkeypatch.setattr(heuristics, "compare", compare)
    monkeypatch.setattr("graph_capture.runtime.decide.whole.compare", lambda *_: (1.0, 0.1))
    weights = torch.nn.ParameterList([torch.randn(24, 64), torch.randn(16, 64)])

    def both(x):
        return [F.linear(x, weight).cumsum(-1) for weight in weights]

    fused = fused_of(both, X, config=FusionConfig(target="c"))
    found = [(region.kind, region.parent, region.decision.use, region.decision.reason) for region in fused.regions]
    if apart:
        part = ("skinny_linear", "parallel_linear_0", True, "10.00x faster")
        assert found == [("parallel_linear", "", False, "its parts are 2.50x faster"), part, part]
    else:
        assert found == [("parallel_linear", "", True, "2.00x faster")]
    for got, want in zip(fused(X), both(X), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_linears_that_were_not_merged_meet_in_what_follows():
    def gated(x):
        return torch.exp(F.linear(x, V)), F.silu(F.linear(x, W)) * F.linear(x, W + 1.0)

    fused = fused_of(gated, X, config=FusionConfig(profile="always", merge_linears="off"))
    found = sorted(map(sorted, ops_of(fused, "linear_epilogue")))
    assert found == [["exp", "linear"], ["linear", "linear", "mul", "silu"]]
    check(fused, gated, X)


def test_rules_can_be_left_out():
    config = FusionConfig(profile="always", passes_off={"linear_epilogue", "skinny_linear", "decode_attention"})
    assert not fused_of(lambda x: F.gelu(F.linear(x, W)), X, config=config).regions


def test_small_ops_of_a_decode_step_are_kernels():
    """Where nothing else takes them; their call costs more than what they compute."""

    def step(x, position):
        return F.linear(x, W), position + 1, torch.arange(40) <= position

    position = torch.tensor([7])
    fused = fused_of(step, X, position)
    assert ops_of(fused, "small_op") == [["add"], ["le"]], str(fused.explain())
    for _ in range(3):
        got = fused(X, position)
        assert torch.equal(got[1], torch.tensor([8]))
        assert torch.equal(got[2], step(X, position)[2])
    assert fused.plan.counts["kernels"] == 3
    assert fused.plan.counts["calls"] == 0

    def without(x, position):
        return x.cumsum(-1), position + 1

    assert not fused_of(without, X, position).regions

    def large(x, y):
        return F.linear(x, W), y + 1

    assert not ops_of(fused_of(large, X, torch.zeros(5000)), "small_op")


@pytest.mark.parametrize("length", [1, 9])
def test_attention_of_few_queries(length):
    query, key, value = torch.randn(1, 2, length, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    mask = torch.arange(40)[None, None, None] < 7

    def attend(query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, mask)

    fused = fused_of(attend, query, key, value, mask)
    assert [region.kind for region in fused.regions] == (["decode_attention"] if length == 1 else [])
    if length == 9:
        assert "9 queries" in next(iter(refusals(fused, "decode_attention")))
    check(fused, attend, query, key, value, mask)
