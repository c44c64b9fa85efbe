"""InfiniCore's own graphs, recorded inside a recording of ours."""

import gc
import warnings

import pytest
import torch

from graph_capture import CaptureError, FusionConfig, convert_recorded_graph_to_subgraph, fuse, record
from graph_capture.frontends.infinicore.frontend import to_torch
from graph_capture.ir.numerics import distance
from tests.infinicore_models import tensors, zeros
from tests.replaying import noise

X, W = noise(3, 8, seed=1), noise(3, 8, seed=2)


def natively(ic, function, *args):
    """Record `function` natively inside a recording: both graphs, and the result."""
    with record(*args) as recording:
        ic.start_graph_recording()
        result = function(*args)
        native = ic.stop_graph_recording()
        recording.output(result)
    return recording.graph, native, result


def program(ic):
    def run(x, w):
        hidden = x * w
        view = hidden.view((24,))
        hidden += x
        return ic.nn.functional.swiglu(hidden, view.view((3, 8)))

    return run


def exact(x, w):
    hidden = x.double() * w.double() + x.double()
    return hidden * torch.nn.functional.silu(hidden)


def test_nothing_runs_until_the_native_graph_does(ic):
    x, w = tensors(ic, X, W)
    graph, native, result = natively(ic, program(ic), x, w)
    assert graph.verification is None
    names = [node.op_type for node in graph.subgraph.nodes]
    assert names[:3] == ["mul", "aten.view.default", "add"]
    assert names[-2:] == ["silu", "mul"]
    native.run()
    assert distance(to_torch(result), exact(X, W)) < 1e-6
    y = X.flip(0)
    assert distance(to_torch(graph.run(*tensors(ic, y, W))), exact(y, W)) < 1e-6
    fused = fuse(graph, FusionConfig(profile="always"))
    assert distance(to_torch(fused(*tensors(ic, y, W))), exact(y, W)) < 1e-6


def test_a_native_graph_becomes_a_subgraph(ic):
    graph, native, _ = natively(ic, program(ic), *tensors(ic, X, W))
    subgraph = convert_recorded_graph_to_subgraph(native)
    assert subgraph.nodes == graph.subgraph.nodes
    assert subgraph.input_names == ("arg0", "arg1")
    assert set(graph.subgraph.output_names) <= set(subgraph.output_names)
    assert convert_recorded_graph_to_subgraph(graph) == graph.subgraph


def test_only_what_was_recorded_natively_is_its_subgraph(ic):
    a = tensors(ic, X)[0]
    with record(a) as recording:
        before = a + a
        ic.start_graph_recording()
        first = before * a
        one = ic.stop_graph_recording()
        ic.start_graph_recording()
        second = first + a
        two = ic.stop_graph_recording()
        recording.output(second)
    assert [node.op_type for node in convert_recorded_graph_to_subgraph(one).nodes] == ["mul"]
    assert convert_recorded_graph_to_subgraph(one).input_names == ("add", "arg0")
    assert convert_recorded_graph_to_subgraph(one).output_names == ("mul",)
    assert [node.op_type for node in convert_recorded_graph_to_subgraph(two).nodes] == ["add"]
    one.run()
    two.run()
    assert torch.equal(to_torch(second), (X + X) * X + X)


def test_the_native_graph_keeps_what_it_needs(ic):
    x, w = tensors(ic, X, W)
    own = zeros(ic, (3, 8), ic.float32, ic.device("cpu"))
    _, native, result = natively(ic, lambda x, w, own: program(ic)(x + own, w), x, w, own)
    view = result.view((24,))
    del own, result, x, w
    gc.collect()
    [torch.full((3, 8), 7.0) for _ in range(64)]
    native.run()
    assert distance(to_torch(view).view(3, 8), exact(X, W)) < 1e-6


def test_silu_is_not_put_off(ic):
    def gated(x, w):
        return ic.nn.functional.silu(x * w) * x

    with pytest.warns(UserWarning, match=r"infinicore\.silu is not deferred.*test_infinicore_native"):
        graph, native, result = natively(ic, gated, *tensors(ic, X, W))
    want = torch.nn.functional.silu(X.double() * W.double()) * X.double()
    assert distance(to_torch(graph.run(*tensors(ic, X, W))), want) < 1e-6
    native.run()
    assert not torch.allclose(to_torch(result).double(), want, atol=1e-4)  # the trap
    assert "silu" in [node.op_type for node in convert_recorded_graph_to_subgraph(native).nodes]


def test_what_is_put_off_warns_of_nothing(ic):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        natively(ic, program(ic), *tensors(ic, X, W))


def test_arguments_are_checked_before_infinicore_sees_them(ic):
    with pytest.raises(CaptureError, match="cannot be multiplied"), record(*tensors(ic, X)) as recording:
        ic.start_graph_recording()
        try:
            recording.output(ic.matmul(*tensors(ic, X, X)))
        finally:
            ic.stop_graph_recording()


def test_a_copy_into_a_cache_is_put_off(ic):
    cache, new = zeros(ic, (2, 6, 4), ic.float32, ic.device("cpu")), noise(2, 3, 4)

    def step(cache, new):
        cache.narrow(1, 2, 3).copy_(new + new)
        return cache.narrow(1, 0, 5).contiguous()

    graph, native, result = natively(ic, step, cache, *tensors(ic, new))
    assert not to_torch(cache).any()
    native.run()
    assert torch.equal(to_torch(cache)[:, 2:5], 2 * new)
    assert torch.equal(to_torch(result)[:, 2:], 2 * new)
    again = zeros(ic, (2, 6, 4), ic.float32, ic.device("cpu"))
    graph.run(again, *tensors(ic, new))
    assert torch.equal(to_torch(again), to_torch(cache))


def test_a_graph_that_was_not_recorded_by_us_shows_no_ops(ic):
    ic.start_graph_recording()
    a = tensors(ic, X)[0]
    made = a + a
    native = ic.stop_graph_recording()
    with pytest.raises(CaptureError, match=r"exposes no ops.*native recording inside"):
        convert_recorded_graph_to_subgraph(native)
    native.run()
    assert torch.equal(to_torch(made), X + X)
    with pytest.raises(CaptureError, match="cannot convert a int"):
        convert_recorded_graph_to_subgraph(3)


def test_a_graph_is_not_there_before_the_recording_ends(ic):
    x = tensors(ic, X)[0]
    with record(x) as recording:
        ic.start_graph_recording()
        made = x + x
        native = ic.stop_graph_recording()
        with pytest.raises(CaptureError, match="has not ended"):
            convert_recorded_graph_to_subgraph(native)
        recording.output(made)
    assert len(convert_recorded_graph_to_subgraph(native)) == 1


def test_native_recording_must_begin_inside(ic):
    ic.start_graph_recording()
    try:
        with pytest.raises(CaptureError, match="on already"), record(X):
            pass
    finally:
        ic.stop_graph_recording()
    with record(X) as recording:  # nothing is left of the one that did not begin
        recording.output(X + X)
