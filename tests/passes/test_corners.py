"""Rewrites in corners: rows that are masked as a whole, few dimensions, numbers that no rule can take, strides."""

import math

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, capture
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.values import TensorMeta
from graph_capture.passes.strides import noticed
from tests.beside_eager import beside_eager, on_the_cpu, rand, same

pytestmark = on_the_cpu
INF = math.inf


def heads(queries, keys, size=8, dtype=torch.float32):
    return [rand(2, 4, n, size, seed=seed, dtype=dtype) for seed, n in enumerate((queries, keys, keys))]


def holes(queries, keys):
    """A mask that leaves the first query of the first sequence nothing."""
    mask = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[0, :, 0] = True
    return mask


def added(mask, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -INF)


def repeated(x):
    return x[:, :, None].expand(2, 2, 2, x.shape[2], x.shape[3]).reshape(2, 4, x.shape[2], x.shape[3])


MASKED = {
    "filled": lambda q, k, v, m: torch.softmax((q @ k.mT * 0.5).masked_fill(m, -INF), -1) @ v,
    "chosen": lambda q, k, v, m: torch.softmax(torch.where(m, -INF, (q @ k.mT) / 2), -1) @ v,
    "kept": lambda q, k, v, m: torch.softmax(torch.where(m.logical_not(), q @ k.mT, -INF), -1) @ v,
    "added": lambda q, k, v, m: torch.softmax(q @ k.mT * 0.5 + added(m, q.dtype), -1) @ v,
    "in float32": lambda q, k, v, m: F.softmax(q @ k.mT + added(m, q.dtype), -1, dtype=torch.float32).to(q.dtype) @ v,
    "capped": lambda q, k, v, m: F.softmax(torch.tanh((q @ k.mT) / 30) * 30 + added(m, q.dtype), -1) @ v,
    "the lowest number": lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(m, torch.finfo(q.dtype).min), -1) @ v,
    "torch's own": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
}


@pytest.mark.parametrize("lengths", [(2, 3), (1, 5), (12, 12), (3, 2100)])
@pytest.mark.parametrize("way", MASKED)
def test_rows_that_are_masked_as_a_whole(way, lengths):
    beside_eager(MASKED[way], *heads(*lengths), holes(*lengths))


@pytest.mark.parametrize("way", ["filled", "added", "capped"])
def test_rows_that_are_masked_as_a_whole_for_grouped_heads(way):
    query, key, value = rand(2, 4, 2, 8), rand(2, 2, 6, 8, seed=1), rand(2, 2, 6, 8, seed=2)
    beside_eager(lambda q, k, v, m: MASKED[way](q, repeated(k), repeated(v), m), query, key, value, holes(2, 6))


def test_a_mask_that_comes_to_a_plan():
    def attend(q, m):
        return ((q @ q.mT) / 8).masked_fill(~m, -INF).softmax(-1) @ q

    q, mask = rand(1, 2, 4, 8), torch.ones(4, 4, dtype=torch.bool).tril()
    fast, hole = capture(attend, FusionConfig(profile="static")), mask.clone()
    hole[2] = False
    with torch.no_grad():
        for given in (mask, mask, mask, hole, mask):
            same(fast(q, given), attend(q, given))


# --- few dimensions


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)


def rms_norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def softmax(x):
    raised = torch.exp(x - x.amax(-1, keepdim=True))
    return raised / raised.sum(-1, keepdim=True)


@pytest.mark.parametrize("x", [torch.tensor(1.5), rand(1), rand(5), rand(3, 1)], ids=lambda x: str(list(x.shape)))
@pytest.mark.parametrize("spelled", [layer_norm, rms_norm, softmax])
def test_norms_of_few_dimensions(spelled, x):
    beside_eager(spelled, x)
    beside_eager(spelled, x, config=FusionConfig(), targets=("auto",))


FEW = {
    "a dot product": (lambda a: torch.einsum("i,i->", a, a) * 2, rand(3)),
    "an outer product": (lambda a: torch.einsum("i,j->ij", a, a) * 2, rand(3)),
    "a sum": (lambda a: torch.einsum("i->", a) * 2, rand(3)),
    "a diagonal": (lambda a: torch.einsum("ii->i", a) * 2, rand(3, 3)),
    "no dimension": (lambda a: a.permute(()) * 2 + a.t(), torch.tensor(2.0)),
    "one dimension": (lambda a: a.permute((0,)) * 2 + a.permute(-1), rand(3)),
    "vectors": (lambda a: (a @ a).relu() * 2, rand(3)),
    "a matrix and a vector": (lambda a: (a @ a[0]).relu() * 2, rand(3, 3)),
    "a linear of a vector": (lambda a: F.linear(a[0], a, a[1]).relu() * 2, rand(3, 3)),
    "half of a vector": (lambda x: x * x + torch.cat((-x[..., 2:], x[..., :2]), -1) * x, rand(4)),
}


@pytest.mark.parametrize("case", FEW)
def test_few_dimensions(case):
    function, x = FEW[case]
    beside_eager(function, x)


# --- numbers


@pytest.mark.parametrize("number", [0.0, -0.0, INF, -INF, math.nan, 1e-45, 1e300, -2.0, True])
def test_scales_that_no_rule_can_take(number):
    query, key, value = heads(2, 2)
    beside_eager(lambda q, k, v: torch.softmax(q @ k.mT / number, -1) @ v, query, key, value)
    beside_eager(lambda q, k, v: torch.softmax(q @ k.mT * number, -1) @ v, query, key, value)


@pytest.mark.parametrize("number", [0.0, INF, math.nan, 1e-45, -1.0])
def test_constants_that_no_rule_can_take(number):
    beside_eager(lambda x: torch.tanh(x / number) * number, rand(5))
    beside_eager(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + number), rand(3, 5))
    beside_eager(lambda x: rms_norm(x) * (x[0] + number), rand(3, 5))
    beside_eager(lambda x: (x * 2).pow(number), rand(5))
    beside_eager(lambda x: F.softplus(x * 2, beta=2, threshold=number), rand(5))


# --- strides

STRIDES = {
    "attention over transposed heads": (
        lambda x: F.scaled_dot_product_attention(x, x, x),
        rand(2, 5, 4, 8).transpose(1, 2),
    ),
    "attention that is written out": (
        lambda x: torch.softmax(x @ x.mT, -1) @ x,
        rand(2, 5, 4, 8).transpose(1, 2),
    ),
    "a norm of transposed rows": (lambda x: rms_norm(x) * torch.ones(8), rand(8, 12).t()),
    "a norm and what follows": (lambda x: torch.relu(layer_norm(x)) * 2, rand(2, 8, 12).transpose(1, 2)),
    "a reduction of transposed rows": (lambda x: (x * 2).sum(-1, keepdim=True), rand(8, 12, 3).permute(2, 1, 0)),
    "columns that lie apart": (lambda x: F.silu(x) * x, rand(6, 16)[:, ::2]),
    "a number in one dimension": (lambda x: F.gelu(x) * x, rand(1, 12, 1).transpose(0, 1)),
    "memory beneath a norm": (lambda x: rms_norm(x).as_strided((4,), (1,)) * 1, rand(8, 12).t()),
    "memory beneath attention": (
        lambda x: F.scaled_dot_product_attention(x, x, x).as_strided((6,), (1,)) * 1,
        rand(2, 5, 4, 8).transpose(1, 2),
    ),
}


@pytest.mark.parametrize("case", STRIDES)
def test_strides_of_results(case):
    function, x = STRIDES[case]
    beside_eager(function, x)
    beside_eager(function, x, config=FusionConfig(), targets=("auto",))


def test_who_notices_other_strides():
    def graph(*nodes, outputs):
        known = {"x": (2, 3), "y": (2, 3), "z": (2, 3), "v": (6,)}
        values = {
            n: TensorMeta(s, torch.empty(s).stride(), torch.float32, torch.device("cpu")) for n, s in known.items()
        }
        return SubGraph(nodes, ("x",), outputs, values)

    relu = OpNode("relu", ("x",), ("y",))
    copy = OpNode("aten.clone.default", ("y",), ("z",), {"memory_format": torch.contiguous_format})
    view, strided = (OpNode(f"aten.{n}.default", ("x",), ("v",), a) for n, a in _VIEWS)
    assert noticed(graph(relu, outputs=("y",)), "x", (3, 1)) is None
    assert noticed(graph(relu, outputs=("y",)), "x", (1, 2)) == "the caller"
    assert noticed(graph(relu, copy, outputs=("z",)), "x", (1, 2)) is None
    assert "view" in noticed(graph(view, outputs=()), "x", (1, 2))
    assert "as_strided" in noticed(graph(strided, outputs=()), "x", (1, 2))


_VIEWS = (("view", {"size": (6,)}), ("as_strided", {"size": (6,), "stride": (1,)}))
