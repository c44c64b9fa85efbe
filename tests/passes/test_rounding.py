"""Half precision that is widened afterwards: spellings and kernels round where the code does; filled masks."""

import math

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig
from graph_capture.passes.pipeline import Passes, rewrite
from tests.beside_eager import beside_eager, fused_of, on_the_cpu, rand

pytestmark = on_the_cpu
HALVES = [torch.bfloat16, torch.float16]


def rms_norm(x, w):
    return w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layer_norm(x, w):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * w + w


def softmax(x, w):
    raised = torch.exp(x - x.amax(-1, keepdim=True))
    return raised / raised.sum(-1, keepdim=True)


def rope(x, w):
    half = x.shape[-1] // 2
    return x * w + torch.cat((-x[..., half:], x[..., :half]), -1) * w


SPELLED = {
    "rms_norm": rms_norm,
    "rms_norm in its dtype": lambda x, w: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
    "layer_norm": layer_norm,
    "softmax": softmax,
    "gelu": lambda x, w: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x, w: x * torch.sigmoid(x),
    "softcap": lambda x, w: torch.tanh(x / 30) * 30,
    "rope": rope,
    "attention": lambda x, w: torch.softmax(x @ x.mT * 0.3, -1) @ x,
    "attention in float32": lambda x, w: F.softmax(x @ x.mT * 0.3, -1, dtype=torch.float32).to(x.dtype) @ x,
    "no spelling": lambda x, w: (x * w + x) * w,
}
WIDENED = {
    "cast": lambda y, z: y.float(),
    "added": lambda y, z: y + z,
    "compared": lambda y, z: y > 0.5,
    "whole": lambda y, z: (y * 100).to(torch.int32),
    "after arithmetic": lambda y, z: (y + y * 2).double(),
    "after a view": lambda y, z: y.transpose(-1, -2).float(),
    "after cat": lambda y, z: torch.cat((y, y), -1).float().sum(-1),
    "written": lambda y, z: torch.zeros_like(z).copy_(y) * 2,
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("way", WIDENED)
@pytest.mark.parametrize("spelled", SPELLED)
def test_what_is_widened_is_rounded_as_it_was_written(spelled, way, dtype):
    x, weight, wide = rand(2, 6, 8, dtype=dtype), rand(8, seed=3, dtype=dtype), rand(2, 6, 8, seed=4)
    beside_eager(lambda x, w, z: WIDENED[way](SPELLED[spelled](x, w), z), x, weight, wide, times=2)


@pytest.mark.parametrize("spelled", ["rms_norm in its dtype", "layer_norm", "softmax", "silu"])
def test_what_float16_cannot_hold_on_the_way(spelled):
    x, weight = rand(2, 6, 8, dtype=torch.float16) * 300, rand(8, seed=3, dtype=torch.float16)
    beside_eager(SPELLED[spelled], x, weight)


def test_scores_that_float16_cannot_hold():
    """Attention as one op holds them in float32: it is right where the code as it is gives NaN."""
    x = rand(2, 6, 8, dtype=torch.float16) * 300
    got, exact = fused_of(SPELLED["attention"], x, None)(x, None), SPELLED["attention"](x.double(), None)
    assert SPELLED["attention"](x, None).isnan().any()
    torch.testing.assert_close(got.double(), exact, rtol=2e-3, atol=2e-3)


def norms(function, *arguments, off=()):
    graph = fused_of(function, *arguments).recorded.subgraph
    rewritten = rewrite(graph, Passes(lambda body: None, off=frozenset(off))).graph
    return [node.op_type for node in rewritten if "norm" in node.op_type]


def test_only_what_shows_is_taken_apart():
    x, weight = rand(2, 6, 8, dtype=torch.bfloat16), rand(8, dtype=torch.bfloat16)
    assert norms(lambda x, w: rms_norm(x, w).float(), x, weight) == []
    assert norms(lambda x, w: rms_norm(x, w).float(), x, weight, off=["roundings"]) == ["fused.rms_norm"]
    for hidden in (
        rms_norm,
        lambda x, w: F.linear(rms_norm(x, w), w.expand(8, 8)).float(),
        lambda x, w: rms_norm(rms_norm(x, w) + x, w),
    ):
        assert norms(hidden, x, weight)
    assert norms(lambda x, w: rms_norm(x, w).double(), x.float(), weight.float()) == ["fused.rms_norm"]


def test_the_receipt_says_why():
    receipts = fused_of(
        lambda x, w: rms_norm(x, w).float(), rand(3, 8, dtype=torch.bfloat16), rand(8).bfloat16()
    ).receipts
    (receipt,) = (receipt for receipt in receipts if receipt.rule == "roundings")
    assert receipt.refusals == (("rms_norm rounds less often than what it stands for", 1),)


def test_saved_with_its_roundings(tmp_path):
    from graph_capture import load

    x, weight = rand(3, 8, dtype=torch.bfloat16), rand(8, seed=1).bfloat16()
    for number, function in enumerate(
        (lambda x, w: rms_norm(x, w).float(), lambda x, w: ((x * w + x) * w).t().float())
    ):
        fused_of(function, x, weight).save(tmp_path / f"{number}.safetensors")
        config = FusionConfig(profile="always", target="c")
        torch.testing.assert_close(
            load(tmp_path / f"{number}.safetensors", config=config)(x, weight), function(x, weight)
        )


# --- scores that are not finite


def scores(q, k):
    return q @ k.mT * 0.5


FILLED = {
    "filled": lambda q, k, v, m: torch.softmax(scores(q, k).masked_fill(m, -math.inf), -1) @ v,
    "chosen": lambda q, k, v, m: torch.softmax(torch.where(m, -math.inf, scores(q, k)), -1) @ v,
    "kept": lambda q, k, v, m: torch.softmax(torch.where(~m, scores(q, k), -math.inf), -1) @ v,
    "lowest": lambda q, k, v, m: torch.softmax(scores(q, k).masked_fill(m, torch.finfo(q.dtype).min), -1) @ v,
    "in float32": lambda q, k, v, m: (
        F.softmax(scores(q, k).masked_fill(m, -math.inf), -1, dtype=torch.float32).to(q.dtype) @ v
    ),
    "added": lambda q, k, v, m: torch.softmax(scores(q, k) + m.to(q.dtype).masked_fill(m, -math.inf), -1) @ v,
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("lengths", [(1, 5), (2, 3), (12, 12), (1, 300)])
@pytest.mark.parametrize("way", FILLED)
def test_scores_that_are_not_finite_under_a_mask(way, lengths, value):
    queries, keys = lengths
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (rand(2, 4, n, 8, seed=seed, dtype=dtype) for seed, n in enumerate((queries, keys, keys)))
        mask = rand(2, 1, queries, keys, seed=5) > 0.3
        mask[..., 1] = True
        mask[..., 0], mask[1, :, 0] = False, True  # one row of the second sequence is masked as a whole
        k[:, :, 1] = value
        beside_eager(FILLED[way], q, k, v, mask, times=2)
        k[:, :, 0] = value  # and where nothing is masked
        beside_eager(FILLED[way], q, k, v, mask, times=2)
