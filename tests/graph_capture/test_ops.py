"""Calls to nodes and back: every way of passing arguments survives."""

import pytest
import torch

from graph_capture.errors import CaptureError
from graph_capture.ir.binding import arguments, pack, prepare
from graph_capture.ir.effects import is_random, written_inputs
from graph_capture.ir.graph import OpNode
from graph_capture.ir.ops import TABLE, Kind, op, op_of
from graph_capture.ir.values import Arg, same_value

aten = torch.ops.aten
a, b, c = torch.randn(2, 3), torch.randn(2, 3), torch.randn(3)


@pytest.mark.parametrize(
    ("overload", "args", "kwargs"),
    [
        (aten.add.Tensor, (a, b), {"alpha": 2}),
        (aten.add.Tensor, (a, 2.5), {}),
        (aten.clamp.Tensor, (a, None, b), {}),
        (aten.clamp.Tensor, (a,), {"max": b}),
        (aten.cat.default, ([a, b, a], 1), {}),
        (aten.native_layer_norm.default, (a, [3], None, c, 1e-5), {}),
        (aten.index.Tensor, (a, [None, torch.tensor([0, 2])]), {}),
        (aten.arange.start, (1, 5), {"dtype": torch.float32}),
        (aten.split.Tensor, (a, 2, 1), {}),
        (aten.addmm.default, (c[:2], a, b.T), {"beta": 0.5}),
    ],
)
def test_pack_then_prepare_is_the_same_call(overload, args, kwargs):
    names, tensors = {}, []

    def name_of(tensor):
        if id(tensor) not in names:
            names[id(tensor)] = f"v{len(names)}"
            tensors.append(tensor)
        return names[id(tensor)]

    target = op_of(overload)
    inputs, attrs = pack(target, args, kwargs, name_of)
    node = OpNode(target.name, inputs, ("out",), attrs)
    by_name = {f"v{i}": tensor for i, tensor in enumerate(tensors)}
    got, want = prepare(node)([by_name[name] for name in inputs]), overload(*args, **kwargs)
    for left, right in zip(*(x if isinstance(x, (list, tuple)) else [x] for x in (got, want)), strict=True):
        assert torch.equal(left, right)


def test_hand_written_nodes_bind_tensors_past_attributes():
    node = OpNode("rms_norm", ("x", "w"), ("y",), {"eps": 1e-6})
    assert arguments(node) == {"input": Arg(0), "weight": Arg(1), "eps": 1e-6}
    with pytest.raises(CaptureError, match="silu takes"):
        arguments(OpNode("silu", ("x", "y"), ("z",)))
    with pytest.raises(CaptureError, match="got also: nope"):
        arguments(OpNode("silu", ("x",), ("z",), {"nope": 1}))


def test_unknown_ops_are_named():
    with pytest.raises(CaptureError, match="no op named 'bogus'"):
        op("bogus")
    assert op("aten.view.default").kind is Kind.VIEW
    assert op("aten.index_copy_.default").kind is Kind.OPAQUE


def test_effects_come_from_the_schema():
    assert written_inputs(OpNode("aten.add_.Tensor", ("x", "y"), ("z",))) == [0]
    assert written_inputs(OpNode("aten.add.out", ("x", "y", "o"), ("z",), {"alpha": 1})) == [2]
    assert written_inputs(OpNode("add", ("x", "y"), ("z",))) == []
    assert is_random(OpNode("aten.rand.default", (), ("z",), {"size": (2,)}))
    assert is_random(OpNode("scaled_dot_product_attention", ("q", "k", "v"), ("z",), {"dropout_p": 0.1}))
    assert not is_random(OpNode("mul", ("x", "y"), ("z",)))


def test_each_overload_has_one_row():
    overloads = [row.overload for row in TABLE.values() if row.overload is not None]
    assert len(set(overloads)) == len(overloads)


def test_same_value_keeps_types_apart():
    assert same_value(float("nan"), float("nan"))
    assert not same_value(0.0, -0.0)
    assert not same_value(complex(0.0, 1.0), complex(-0.0, 1.0))
    assert not same_value(1, True)
    assert not same_value((1, 2.0), (1, 2))
