"""Parallel linears become one, and the weights stay what they were to everybody else."""

import copy
import gc

import pytest
import torch

from graph_capture import FusionConfig, SignatureMismatchError, capture, fuse, load, record
from graph_capture.runtime import fuse as scheduler
from graph_capture.runtime.library import LibraryKernel

ALWAYS = FusionConfig(profile="always")
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Attention(torch.nn.Module):
    """Three linears on one input."""

    def __init__(self, sizes=(16, 8, 8), bias=(False, False, False), dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v = (torch.nn.Linear(16, n, b, dtype=dtype) for n, b in zip(sizes, bias, strict=True))

    def forward(self, x):
        return torch.cat([torch.sin(self.q(x)), torch.cos(self.k(x)), torch.exp(self.v(x))], -1)


def recorded(model, x=X):
    with torch.no_grad(), record(x) as recording:
        recording.output(model(x))
    return recording.graph


def merged(fused):
    return [region for region in fused.regions if region.kind == "parallel_linear"]


def receipt(fused):
    return next(rule for rule in fused.explain().rules if rule["rule"] == "parallel_linear")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_linear_with_the_same_numbers(dtype, bias):
    model = Attention(bias=(bias,) * 3, dtype=dtype)
    x = X.to(dtype)
    expected = copy.deepcopy(model).double()(x.double())
    fused = fuse(recorded(model, x), ALWAYS)
    assert len(merged(fused)) == 1
    assert [node.op_type for node in fused.subgraph].count("linear") == 0
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(fused(x).double(), expected, rtol=tolerance, atol=tolerance)
    assert fused.verify(x).ok


def test_what_reads_parts_of_the_result_is_made_for_where_they_lie():
    """A gate behind a merged linear of many rows is one kernel in the plan, and copies nothing."""
    model = torch.nn.Module()
    model.gate, model.up, model.down = (torch.nn.Linear(*sizes, bias=False) for sizes in ((16, 24), (16, 24), (24, 16)))

    def mlp(x):
        return model.down(torch.nn.functional.silu(model.gate(x)) * model.up(x))

    x = torch.randn(2, 9, 16)
    fused = fuse(recorded(mlp, x), ALWAYS)
    (gated,) = [region for region in fused.regions if region.kind == "swiglu"]
    assert [gated.values[name].stride for name in gated.node.inputs] == [(432, 48, 1)] * 2
    for _ in range(3):
        torch.testing.assert_close(fused(x), mlp(x))
    assert fused.plan.counts["kernels"] == 1
    assert fused.plan.counts["calls"] == 1  # the last linear, whose result is the caller's
    heads = Heads()
    for _ in range(3):
        torch.testing.assert_close(fuse(recorded(heads), ALWAYS)(X), heads(X))


class Heads(torch.nn.Module):
    """Halves of a merged linear, as transposed heads."""

    def __init__(self):
        super().__init__()
        self.query, self.key = torch.nn.Linear(16, 12), torch.nn.Linear(16, 8)

    def forward(self, x):
        query, key = self.query(x).view(2, 5, 3, 4).transpose(1, 2), self.key(x).view(2, 5, 2, 4).transpose(1, 2)
        return torch.sin(query) * 2.0, torch.cos(key[:, :, 1:]) + 1.0


def test_the_weights_live_on_as_views_of_the_merged_one():
    model = Attention()
    parameters, before = list(model.parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    fused = fuse(recorded(model), ALWAYS)
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == 1
    assert model.q.weight.untyped_storage().nbytes() == sum(p.nbytes for p in model.parameters())
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(X), recorded(model).run(X))
    # Written in place, the merged weight follows.
    with torch.no_grad():
        model.k.weight.mul_(2).add_(0.5)
    torch.testing.assert_close(fused(X), model(X))
    other = Attention()
    with torch.no_grad():
        other.v.weight.fill_(0.125)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused(X), other(X))


def test_merging_does_not_double_memory():
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Linear(16, 2048, bias=False), torch.nn.Linear(16, 2048, bias=False)
    graph = recorded(lambda x: model.a(x) * model.b(x))
    old = model.a.weight.untyped_storage().data_ptr()
    fused = fuse(graph, ALWAYS)
    gc.collect()
    assert len(merged(fused)) == 1
    assert model.a.weight.untyped_storage().data_ptr() != old
    assert model.a.weight.untyped_storage().data_ptr() == model.b.weight.untyped_storage().data_ptr()


def test_a_copy_when_asked_leaves_the_weights_alone_and_follows_them():
    model = Attention()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    fused = fuse(recorded(model), FusionConfig(profile="always", merge_linears="copy"))
    assert len(merged(fused)) == 1
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    torch.testing.assert_close(fused(X), model(X))
    with torch.no_grad():
        model.k.weight.mul_(2)
    torch.testing.assert_close(fused(X), model(X))


def test_off():
    fused = fuse(recorded(Attention()), FusionConfig(profile="always", merge_linears="off"))
    assert not merged(fused)
    with pytest.raises(ValueError, match="merge_linears"):
        FusionConfig(merge_linears="maybe")


def test_other_recordings_of_the_model_stay_valid():
    model = Attention()
    first, second, other = recorded(model), recorded(model), recorded(model, X[:, :1])
    one = fuse(first, ALWAYS)
    expected = model(X)
    assert torch.equal(second.run(X), expected)
    assert torch.equal(first.run(X), expected)
    again = fuse(other, ALWAYS)  # finds them side by side already
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == 1
    torch.testing.assert_close(one(X), expected)
    torch.testing.assert_close(again(X[:, :1]), model(X[:, :1]))
    model.q.weight.data = torch.zeros_like(model.q.weight)
    with pytest.raises(SignatureMismatchError, match="memory of"):
        one(X)


@pytest.mark.parametrize("bias", [(True,) * 3, (False,) * 3], ids=["bias", "plain"])
def test_a_kernel_of_our_own_for_the_product(monkeypatch, tmp_path, bias):
    """As on a GPU, where one may be faster than the library's."""

    def libraries(self, node):
        body = node.attr("body")
        return [LibraryKernel(body, body.input_names[1:], scheduler.merged_kernel(self.heuristics, node, self.values))]

    monkeypatch.setattr(scheduler._RegionDecider, "_libraries", libraries)
    model, x = Attention(bias=bias), X[:1, :1]
    fused = fuse(recorded(model, x), FusionConfig(profile="always", target="c"))
    (region,) = merged(fused)
    assert region.kernel.product.spec.columns == sum(layer.out_features for layer in (model.q, model.k, model.v))
    for scale in (1, 1, 2):
        with torch.no_grad():
            model.k.weight.mul_(scale)
            torch.testing.assert_close(fused(x), model(x))
    assert "kernels(" in fused.plan.source
    assert "mm(" not in fused.plan.source
    assert fused.verify(x).ok
    fused.save(tmp_path / "graph")
    again = load(tmp_path / "graph")
    assert merged(again)[0].kernel.product is not None
    assert torch.equal(again(x), fused(x))


def test_capture_merges_once_for_all_signatures():
    model = Attention()
    fast = capture(model, ALWAYS)
    with torch.no_grad():
        for length in (3, 2, 1, 3, 2):
            torch.testing.assert_close(fast(X[:, :length]), model(X[:, :length]))
        assert len(fast.graphs) == 3
        assert len(fast.misses) == 3
        model.v = torch.nn.Linear(16, 8, bias=False)  # replaced: recorded again
        torch.testing.assert_close(fast(X), model(X))
    assert len(fast.misses) == 4


# --- what stays apart, and why


def refused(model, x=X):
    fused = fuse(recorded(model, x), ALWAYS)
    assert not merged(fused)
    torch.testing.assert_close(fused(x), model(x))
    found = receipt(fused)
    assert (found["candidates"], found["matches"]) == (1, 0)
    return next(iter(found["refusals"]))


def test_mixed_bias_and_dtype():
    assert refused(Attention(bias=(True, False, True))) == "some have a bias and some have none"
    model = Attention()
    weight = model.k.weight

    def mixed(x):
        return torch.cat([model.q(x), torch.nn.functional.linear(x, weight.sin()), model.v(x)], -1)

    assert "is computed in the graph" in refused(mixed)


def test_a_weight_that_is_used_twice():
    model = Attention()

    def program(x):
        return model.q(x + 1).sum() + torch.cat([model.q(x).sin(), model.k(x).sin()], -1)

    assert "is used by several linears" in refused(program)


def test_results_that_leave_the_graph():
    model = Attention()
    fused = fuse(recorded(lambda x: (model.q(x), model.k(x).sin())), ALWAYS)
    assert not merged(fused)
    assert "is returned" in next(iter(receipt(fused)["refusals"]))


def test_a_view_that_a_slice_does_not_allow():
    model = Attention()
    assert "needs other strides" in refused(lambda x: model.q(x).view(-1)[:80].sin() + model.k(x).reshape(-1))


def test_tied_weights_are_not_parted():
    model = Attention(sizes=(8, 8, 8))
    whole = torch.nn.Parameter(torch.randn(24, 16))
    for index, layer in enumerate((model.k, model.q, model.v)):  # views of one tensor, in another order
        layer.weight.data = whole.data[8 * index : 8 * index + 8]
    fused = fuse(recorded(model), ALWAYS)
    assert not merged(fused)[0].decision
    assert merged(fused)[0].decision.reason == "other tensors, or another library, share the weights' memory"
    with torch.no_grad():
        whole.mul_(2)
    assert torch.equal(model.k.weight, whole[:8])
    torch.testing.assert_close(fused(X), model(X))


def test_a_copy_is_refreshed_after_a_write_that_torch_does_not_count():
    model = Attention()
    fused = fuse(recorded(model), FusionConfig(profile="always", merge_linears="copy"))
    model.k.weight.data.mul_(2)
    fused.refresh()
    torch.testing.assert_close(fused(X), model(X))


def test_a_result_that_is_written_in_place():
    model = Attention()

    def program(x):
        query = model.q(x)
        query.cumsum_(-1)  # nothing that could make memory of its own
        return query + 0 * model.k(x).sum() + model.v(x).sum()

    assert "written in place" in refused(program)
