"""Recording: data flow, names, sources, and what bad input gets."""

import gc
import importlib
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graph_capture.errors import CaptureError, DataDependentError, SignatureMismatchError
from graph_capture.ir.effects import order_edges
from graph_capture.record.recorder import record, start_graph_recording, stop_graph_recording
from graph_capture.record.source import is_user_file


def ops(graph):
    return [node.op_type for node in graph.subgraph.nodes]


class MLP(nn.Module):
    def __init__(self, width=8, hidden=16):
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x)) * self.scale


def test_values_are_connected_by_data_flow():
    x = torch.randn(3, 4)
    with record(x) as recording:
        a = x + 1
        recording.output(a * a)
    first, second = recording.graph.subgraph.nodes
    assert second.inputs == (first.outputs[0], first.outputs[0])
    assert first.inputs == recording.graph.subgraph.input_names == ("arg0",)


def test_modules_name_parameters_buffers_and_ops():
    model, x = MLP(), torch.randn(2, 8)
    with record(x) as recording:
        recording.output(model(x))
    graph = recording.graph
    assert set(graph.captured) == {"gate.weight", "gate.bias", "up.weight", "down.weight", "down.bias", "scale"}
    assert ops(graph) == ["linear", "silu", "linear", "mul", "linear", "mul"]
    assert [node.source.module for node in graph.subgraph.nodes] == ["gate", "", "up", "", "down", ""]
    assert all(node.source.file == __file__ for node in graph.subgraph.nodes)
    assert torch.equal(graph.run(x), model(x))
    text = str(graph)
    assert "# gate" in text
    assert "f32[2, 16]" in text
    assert "test_recorder.py:" in text


def test_replay_uses_new_inputs_and_current_weights():
    model, x = MLP(), torch.randn(2, 8)
    with record(x) as recording:
        recording.output(model(x))
    with torch.no_grad():
        model.gate.weight.mul_(0.5)
    y = torch.randn(2, 8)
    assert torch.equal(recording.graph.run(y), model(y))


def test_semantic_ops_stay_whole():
    x, w, b = torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)
    with record(x) as recording:
        y = F.rms_norm(x, (8,), w, 1e-5)
        y = F.layer_norm(y, (8,), w, b)
        y = F.softmax(y, -1)
        y = F.gelu(y, approximate="tanh")
        y = F.scaled_dot_product_attention(y, y, y, is_causal=True)
        recording.output(y @ y.mT)
    names = ops(recording.graph)
    assert names == [
        "rms_norm",
        "layer_norm",
        "softmax",
        "gelu",
        "scaled_dot_product_attention",
        "aten.transpose.int",
        "matmul",
    ]


def test_semantic_calls_outside_the_table_are_recorded_by_their_parts():
    x = torch.randn(2, 3, 8)
    with record(x) as recording:
        y = F.layer_norm(x, (3, 8))
        recording.output(torch.softmax(y, 0, dtype=torch.float64))
    assert torch.equal(recording.graph.run(x), torch.softmax(F.layer_norm(x, (3, 8)), 0, dtype=torch.float64))


def test_a_write_makes_a_new_value_and_order_edges():
    x = torch.randn(4)

    def program(x):
        view = x[1:]
        before = x * 2
        view.add_(1)
        return before, x * 3

    expected = program(x.clone())
    with record(x) as recording:
        recording.output(program(x))
    graph = recording.graph.subgraph
    types = [node.op_type for node in graph.nodes]
    read, write, after = types.index("mul"), types.index("aten.add_.Tensor"), len(types) - 1
    assert (read, write) in order_edges(graph)
    assert (write, after) in order_edges(graph)
    assert not any(name == "arg0" and graph.nodes[write].outputs == (name,) for name in graph.input_names)
    fresh = torch.randn(4)
    expected = program(fresh.clone())
    for got, want in zip(recording.graph.run(fresh), expected, strict=True):
        assert torch.equal(got, want)
    assert recording.graph.writes


def test_writes_into_an_input_are_seen_by_the_caller_at_each_replay():
    counter = torch.zeros(1)
    with record(counter) as recording:
        counter.add_(1)
        recording.output(counter * 1)
    again = torch.tensor([5.0])
    assert recording.graph.run(again).item() == 6
    assert again.item() == 6


def test_constants_start_fresh_at_each_replay():
    x = torch.ones(2)
    with record(x) as recording:
        acc = torch.tensor([0.0, 0.0])
        acc += x
        recording.output(acc * 1)
    for _ in range(3):
        assert recording.graph.run(x).tolist() == [1, 1]


def test_data_is_a_view_of_recorded_memory():
    x = torch.randn(3)
    with record(x) as recording:
        y = x * 2
        recording.output(y.data + 1)
    z = torch.randn(3)
    assert torch.equal(recording.graph.run(z), z * 2 + 1)


def test_random_ops_are_fresh_and_follow_the_seed():
    x = torch.zeros(8)
    with record(x) as recording:
        recording.output(x + torch.rand(8))
    torch.manual_seed(3)
    want = torch.rand(8)
    torch.manual_seed(3)
    assert torch.equal(recording.graph.run(x), want)
    assert not torch.equal(recording.graph.run(x), want)


def test_output_structures_and_keywords():
    x, mask = torch.randn(2), torch.ones(2, dtype=torch.bool)
    with record(x, mask=mask, scale=3) as recording:
        recording.output({"y": x * 3, "mask": mask, "n": 7, "none": None})
    result = recording.graph.run(x, mask=mask, scale=3)
    assert torch.equal(result["y"], x * 3)
    assert result["mask"] is mask
    assert (result["n"], result["none"]) == (7, None)


def test_keywords_may_come_in_any_order():
    x, mask = torch.randn(2), torch.randn(2)
    with record(mask=mask, bias=x) as recording:
        recording.output(x - mask)
    assert recording.graph.subgraph.input_names == ("mask", "bias")
    assert torch.equal(recording.graph.run(bias=x * 2, mask=mask), x * 2 - mask)


def test_without_output_the_live_results_are_returned():
    x = torch.randn(2)
    with record(x):
        pass_through = x + 1
    with record(x) as recording:
        temporary = x * 2
        kept = temporary + 1
        del temporary
    assert torch.equal(recording.graph.run(x), kept)
    del pass_through


def test_start_and_stop():
    x = torch.randn(3)
    start_graph_recording()
    y = x * 2  # noqa: F841
    graph = stop_graph_recording()
    assert torch.equal(graph.run(), x * 2)
    x.add_(1)
    assert torch.equal(graph.run(), x * 2)
    with pytest.raises(CaptureError, match="no recording is active"):
        stop_graph_recording()


def test_a_recording_keeps_no_intermediate_alive():
    x = torch.randn(4)
    with record(x) as recording:
        a = x + 1
        seen = weakref.ref(a)
        b = a * 2
        del a
        recording.output(b)
    del b
    gc.collect()
    assert seen() is None


# --- bad input


def test_record_inside_record():
    x = torch.randn(2)
    with record(x) as recording:
        with pytest.raises(CaptureError, match="already active"), record(x):
            pass
        recording.output(x + 1)
    assert ops(recording.graph) == ["add"]


def test_an_exception_propagates_and_the_next_recording_works():
    x = torch.randn(2)
    with pytest.raises(ZeroDivisionError), record(x) as broken:
        x + 1
        1 / 0
    with pytest.raises(CaptureError, match="ended with an exception"):
        _ = broken.graph
    with record(x) as recording:
        recording.output(x + 1)
    assert len(recording.graph.subgraph) == 1


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((torch.ones(3),), {"mask": torch.ones(2)}, r"arg0: expected f32\[2\].*got f32\[3\]"),
        ((torch.ones(2).double(),), {"mask": torch.ones(2)}, r"arg0: expected f32.*got f64"),
        ((torch.ones(2),), {"mask": torch.ones(2, device="meta")}, r"mask: expected .*on cpu, got .*on meta"),
        ((torch.ones(2),), {"mask": 3}, r"mask: expected f32\[2\].*got 3 \(int\)"),
        ((torch.ones(2),), {}, "missing: mask"),
        ((torch.ones(2), torch.ones(2)), {"mask": torch.ones(2)}, "unexpected: arg1"),
        ((torch.ones(4)[::2],), {"mask": torch.ones(2)}, r"strides \[1\].*strides \[2\]"),
    ],
)
def test_a_call_that_does_not_fit(args, kwargs, match):
    x, mask = torch.randn(2), torch.randn(2)
    with record(x, mask=mask) as recording:
        recording.output(x + mask)
    with pytest.raises(SignatureMismatchError, match=match):
        recording.graph.run(*args, **kwargs)


def test_arguments_must_share_memory_as_recorded():
    x, y = torch.randn(2), torch.randn(2)
    with record(x, y) as recording:
        recording.output(x.add_(1) + y)
    with pytest.raises(SignatureMismatchError, match="share memory"):
        recording.graph.run(x, x.view(2))
    with record(x, x) as recording:
        recording.output(x * 2)
    with pytest.raises(SignatureMismatchError, match="gives two"):
        recording.graph.run(x, y)


def test_python_arguments_count_by_value_and_type():
    x = torch.randn(2)
    with record(x, n=1) as recording:
        recording.output(x + 1)
    for other in (2, 1.0, True):
        with pytest.raises(SignatureMismatchError, match="n: expected 1"):
            recording.graph.run(x, n=other)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.numpy(),
        lambda x: x.unique(),
    ],
)
def test_reading_values_is_refused_with_the_line(read):
    x = torch.randn(3)
    with pytest.raises(DataDependentError, match=r"test_recorder\.py:\d+"), record(x):
        read(x)


def test_values_that_follow_from_shapes_may_be_read():
    x = torch.randn(5)
    with record(x) as recording:
        last = torch.arange(x.shape[0])[-1].item()
        recording.output(x * last)
    assert torch.equal(recording.graph.run(x), x * 4)


def test_no_output():
    x = torch.randn(2)
    with pytest.raises(CaptureError, match="no output"), record(x):
        x + 1


def test_an_object_in_the_result_is_made_anew():
    class Cache:
        pass

    x = torch.randn(2)
    with record(x) as recording:
        cache = Cache()
        cache.keys, cache.length = [x + 1], 1
        recording.output((x * 2, cache))
    other = torch.randn(2)
    _, made = recording.graph.run(other)
    assert type(made) is Cache
    assert made is not cache
    assert torch.equal(made.keys[0], other + 1)
    assert made.length == 1


def test_an_iterator_in_the_result_is_refused():
    x = torch.randn(2)
    with pytest.raises(CaptureError, match="generator"), record(x) as recording:
        recording.output(value for value in (x + 1,))


def test_two_threads_record_at_once():
    graphs, barrier = {}, threading.Barrier(2)

    def work(name, factor):
        model, x = MLP(), torch.randn(2, 8)
        barrier.wait()
        for _ in range(20):
            with record(x) as recording:
                recording.output(model(x * factor))
        graphs[name] = (recording.graph, x, model(x * factor))

    threads = [threading.Thread(target=work, args=(f"t{i}", i + 2)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for graph, x, expected in graphs.values():
        assert len(graph.subgraph) == 7
        assert torch.equal(graph.run(x), expected)


@pytest.mark.parametrize(
    "package", ["graph_capture", "graph_capture.passes", "graph_capture.codegen", "graph_capture.runtime"]
)
def test_frames_of_this_package_are_not_the_users(package):
    """In a checkout three of the packages lie beside the first."""
    assert not is_user_file(importlib.import_module(package).__file__)
    assert is_user_file(__file__)
