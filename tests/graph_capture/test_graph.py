"""The immutable graph: verification, keys, order."""

from dataclasses import FrozenInstanceError

import networkx
import pytest
import torch

from graph_capture.errors import CaptureError
from graph_capture.ir.effects import order_edges
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.values import Arg, TensorMeta
from graph_capture.record.convert import convert_recorded_graph_to_subgraph
from graph_capture.record.recorder import record
from tests.replaying import printed_by_processes


def swiglu(gate="gate", up="up", inner="t0", out="output"):
    nodes = (OpNode("silu", (gate,), (inner,)), OpNode("mul", (inner, up), (out,)))
    return SubGraph(nodes, (gate, up), (out,))


def test_equal_graphs_are_equal_and_hash_alike():
    assert swiglu() == swiglu()
    assert hash(swiglu()) == hash(swiglu())
    assert swiglu() != swiglu(out="y")
    with pytest.raises(FrozenInstanceError):
        swiglu().nodes = ()


@pytest.mark.parametrize(
    ("nodes", "inputs", "outputs", "match"),
    [
        ([OpNode("silu", ("x",), ("y",)), OpNode("exp", ("x",), ("y",))], ["x"], ["y"], "defined twice"),
        ([OpNode("silu", ("y",), ("z",)), OpNode("exp", ("x",), ("y",))], ["x"], ["z"], "before it is defined"),
        ([OpNode("silu", ("y",), ("y",))], [], ["y"], "before it is defined"),
        ([OpNode("silu", ("x",), ("y",))], ["x"], ["z"], "output 'z' is not defined"),
        ([OpNode("silu", ("x",), ("x",))], ["x"], ["x"], "defined twice"),
        ([], ["x", "x"], ["x"], "defined twice"),
    ],
)
def test_malformed_graphs_are_refused(nodes, inputs, outputs, match):
    with pytest.raises(CaptureError, match=match):
        SubGraph(tuple(nodes), tuple(inputs), tuple(outputs))


def test_the_key_is_blind_to_names_and_sees_everything_else():
    dtypes, shapes = [torch.float32] * 2, [(2, 8)] * 2
    key = swiglu().cache_key(dtypes, shapes)
    assert swiglu("a", "b", "c", "d").cache_key(dtypes, shapes) == key
    assert swiglu().cache_key({"up": torch.float32, "gate": torch.float32}, {"gate": (2, 8), "up": (2, 8)}) == key
    swapped = SubGraph(swiglu().nodes, ("up", "gate"), ("output",))
    different = [
        swiglu().cache_key([torch.float16, torch.float32], shapes),
        swiglu().cache_key(dtypes, [(2, 8), (1, 8)]),
        swapped.cache_key(dtypes, shapes),
        SubGraph(swiglu().nodes, ("gate", "up"), ("output", "t0")).cache_key(dtypes, shapes),
    ]
    scaled = [SubGraph((OpNode("mul", ("x",), ("y",), {"other": v}),), ("x",), ("y",)) for v in (1, 1.0, True, 2)]
    keys = [key, *different, *(graph.cache_key([torch.float32], [(2,)]) for graph in scaled)]
    assert len(set(keys)) == len(keys)


def test_the_key_is_the_same_in_every_process():
    program = """
import torch
from graph_capture.ir.graph import OpNode, SubGraph
nodes = (OpNode("cast", ("x",), ("a",), {"dtype": torch.float32}), OpNode("softmax", ("a",), ("b",), {"dim": -1}))
print(SubGraph(nodes, ("x",), ("b",)).cache_key([torch.bfloat16], [(2, 8)]))
"""
    keys = printed_by_processes(program)
    assert len(keys) == 1
    assert len(keys.pop().strip()) == 64


def test_networkx_form_has_data_and_order_edges():
    x = torch.randn(4)
    with record(x) as recording:
        y = x * 2
        x.add_(1)
        recording.output(y)
    graph = recording.graph.to_networkx()
    assert type(graph) is networkx.DiGraph
    product, written = (node.outputs[0] for node in recording.graph.subgraph.nodes)
    assert set(graph.nodes) == {"arg0", 0, product, 1, written}
    assert {(u, v): (data["positions"], data["order"]) for u, v, data in graph.edges(data=True)} == {
        ("arg0", 0): ((0,), False),
        (0, product): ((0,), False),
        ("arg0", 1): ((0,), False),
        (1, written): ((0,), False),
        (0, 1): ((), True),
    }


def test_order_edges_are_transitive_over_aliases():
    def meta(storage):
        return TensorMeta((4,), (1,), torch.float32, torch.device("cpu"), 0, storage)

    nodes = (
        OpNode("exp", ("x",), ("a",)),
        OpNode("aten.add_.Tensor", ("v",), ("v1",), {"other": 1}),
        OpNode("exp", ("x",), ("b",)),
        OpNode("exp", ("w",), ("c",)),
    )
    values = {"x": meta(0), "v": meta(0), "v1": meta(0), "w": meta(1), "a": meta(2), "b": meta(3), "c": meta(4)}
    graph = SubGraph(nodes, ("x", "v", "w"), ("a", "b", "c"), values)
    assert order_edges(graph) == [(0, 1), (1, 2)]


def test_attributes_are_frozen_and_sorted():
    node = OpNode("aten.cat.default", ("a", "b"), ("c",), {"tensors": [Arg(0), Arg(1)], "dim": 1})
    assert node.attrs == (("dim", 1), ("tensors", (Arg(0), Arg(1))))
    assert node.attr("dim") == 1
    assert node.attr("missing", 5) == 5


def test_convert_refuses_what_it_did_not_record():
    x = torch.randn(2)
    with record(x) as recording:
        recording.output(x + 1)
    assert convert_recorded_graph_to_subgraph(recording.graph) is recording.graph.subgraph
    with pytest.raises(CaptureError, match="exposes no ops"):
        convert_recorded_graph_to_subgraph(object())
