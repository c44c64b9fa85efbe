"""Attention of few rows: numbers against float64, and what is not read."""

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, FusionError, fuse, record
from graph_capture.codegen.c import attention as c_attention
from graph_capture.codegen.launches import BoundKernel, Chain
from graph_capture.ir.numerics import distance, in_float64
from graph_capture.runtime.replay.steps import KernelStep
from tests.targets import COMPILERS, DEVICE, each_target  # noqa: F401

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
COMPILER = COMPILERS["ninetoothed"]


def graph_of(inputs, **options):
    with torch.no_grad(), record(*inputs) as recording:
        recording.output(F.scaled_dot_product_attention(*inputs, **options))
    return recording.graph.subgraph


def compiled(graph, inputs):
    return COMPILER.compile(graph, [t.dtype for t in inputs], [t.shape for t in inputs], [t.stride() for t in inputs])


def check(*inputs, **options):
    """At least as close to float64 as eager is, which adds in another order, or exact up to one rounding."""
    graph = graph_of(inputs, **options)
    kernel = compiled(graph, inputs)
    (ours,), (want,) = kernel(*inputs), in_float64(graph, inputs)
    theirs = F.scaled_dot_product_attention(*inputs, **options)
    assert ours.shape == theirs.shape
    assert ours.dtype is theirs.dtype
    luck = 2 if DEVICE == "cpu" else 3  # Triton's exp and its sums in another order
    assert distance(ours, want) <= max(luck * distance(theirs, want), torch.finfo(ours.dtype).eps)
    return kernel, ours


def noise(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def heads(length, dtype=torch.float32, batch=2, query=4, kept=2, width=24, rows=1, value=None):
    shapes = ((batch, query, rows, width), (batch, kept, length, width), (batch, kept, length, value or width))
    return [noise(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [1, 77, 300])
def test_grouped_heads(length, dtype):
    check(*heads(length, dtype), enable_gqa=True)


@pytest.mark.parametrize("valid", [0, 1, 100, 255, 300])
def test_only_what_is_filled_of_a_static_cache(valid):
    query, key, value = heads(300, batch=1)
    mask = (torch.arange(300, device=DEVICE) < valid)[None, None, None]
    _, ours = check(query, key, value, mask, enable_gqa=True, scale=0.3)
    if valid == 0:
        assert torch.equal(ours, torch.zeros_like(ours))
    # Blocks that are masked as a whole are not read: here they hold NaN.
    first = -(-valid // 128) * 128
    key[:, :, first:], value[:, :, first:] = float("nan"), float("nan")
    graph = graph_of((query, key, value, mask), enable_gqa=True, scale=0.3)
    assert torch.equal(compiled(graph, (query, key, value, mask))(query, key, value, mask)[0], ours)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_mask_that_is_added(dtype):
    inputs = heads(300, dtype, batch=1)
    left_out = torch.arange(300, device=DEVICE)[None, None, None] >= 130
    for low in (float("-inf"), torch.finfo(dtype).min, -3.0):
        check(*inputs, torch.zeros(left_out.shape, dtype=dtype).to(DEVICE).masked_fill(left_out, low), enable_gqa=True)
    whole = torch.full((1, 1, 1, 300), torch.finfo(dtype).min, dtype=dtype, device=DEVICE)
    check(*inputs, whole, enable_gqa=True)  # the same for all: not masked at all


def test_masks_by_batch_head_and_query():
    inputs = heads(150, query=3, kept=3, rows=3)
    for shape in ((2, 1, 3, 150), (2, 3, 3, 150), (3, 150), (1, 1, 1, 150), (2, 1, 1, 150)):
        check(*inputs, noise(*shape, seed=5) > 0.5)
    grouped = heads(150)
    check(*grouped, noise(2, 4, 1, 150, seed=5) > 0.5, enable_gqa=True)


def test_a_sliding_window_and_rows_that_see_nothing():
    place = torch.arange(400, device=DEVICE)
    query, key, value = heads(400, query=2, kept=2, rows=2, value=40)
    mask = torch.stack((place < 0, (place > 200) & (place <= 210)))[None, None]
    _, ours = check(query, key, value, mask)
    assert torch.equal(ours[:, :, 0], torch.zeros_like(ours[:, :, 0]))


def capped(query, key, value, mask=None):
    """As Gemma 2 spells it."""
    key, value = (
        t[:, :, None].expand(*t.shape[:2], 2, *t.shape[2:]).reshape(t.shape[0], -1, *t.shape[2:]) for t in (key, value)
    )
    scores = torch.matmul(query, key.transpose(2, 3)) * 0.4
    scores = torch.tanh(scores / 1.5) * 1.5
    scores = scores if mask is None else scores + mask
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    return torch.matmul(F.softmax(scores, dim=-1, dtype=wide).to(query.dtype), value)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [1, 77, 2100])
def test_capped_scores(length, dtype, target):
    inputs = heads(length, dtype)
    mask = torch.zeros(2, 1, 1, length, dtype=dtype, device=DEVICE)
    mask[0, ..., length // 2 + 1 :] = torch.finfo(dtype).min
    want = capped(*(tensor.double() for tensor in (*inputs, mask)))
    with torch.no_grad(), record(*inputs, mask) as recording:
        recording.output(capped(*inputs, mask))
    fused = fuse(recording.graph, FusionConfig(profile="always", target=target))
    assert [region.kind for region in fused.regions] == ["decode_attention"]
    ours, theirs = fused(*inputs, mask), capped(*inputs, mask)
    assert distance(ours, want) <= max(1.5 * distance(theirs, want), torch.finfo(dtype).eps)


def test_transposed_heads_and_no_heads():
    query, key, value = heads(90)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    check(*apart, enable_gqa=True)
    check(*(noise(2, n, 16, seed=n) for n in (3, 70)), noise(2, 70, 16, seed=9), noise(2, 3, 70, seed=3) > 0)


@pytest.mark.parametrize("valid", [0, 70, 2100])
def test_a_long_cache_in_splits(valid, target):
    inputs = heads(2100, torch.bfloat16, batch=1)
    kernel, _ = check(*inputs, (torch.arange(2100, device=DEVICE) < valid)[None, None, None], enable_gqa=True)
    if target == "c":
        assert c_attention.splits(kernel.spec) == 2


def test_infinities_and_nans_pass_in_their_rows(target):
    query, key, value = heads(70, batch=1, query=2, width=16)
    query[0, 0, 0, 3], key[0, 1, 5, 2], value[0, 1, 8, 4] = float("nan"), float("inf"), -float("inf")
    want = F.scaled_dot_product_attention(query, key, value)
    (ours,) = compiled(graph_of((query, key, value)), (query, key, value))(query, key, value)
    assert want.isnan().any()
    torch.testing.assert_close(ours, want, equal_nan=True)


REFUSED = {
    "is_causal": (heads(16, query=2, rows=2), {"is_causal": True}),
    "9 queries": (heads(16, query=2, rows=9), {}),
    "float64": ([t.double() for t in heads(16, query=2)], {}),
    "cannot be seen as one dimension": (
        [t.transpose(1, 2).contiguous().transpose(1, 2) for t in heads(16, rows=2)],
        {"enable_gqa": True},
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason):
    inputs, options = REFUSED[reason]
    with pytest.raises(FusionError, match=reason):
        compiled(graph_of(inputs, **options), inputs)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_machine_code(architecture):
    inputs = heads(2048, torch.bfloat16, batch=1, query=32, kept=8, width=128)
    mask = torch.ones(1, 1, 1, 2048, dtype=torch.bool, device=DEVICE)
    attend, combine = compiled(graph_of((*inputs, mask), enable_gqa=True), (*inputs, mask)).compile_for(architecture)
    assert attend.stack == combine.stack == 0
    assert attend.loads[128] == 17  # a block of keys and one of values by 128 threads, and the query
    assert combine.loads[128] > 0


def test_what_two_launches_share_is_kept_for_as_long_as_they_may_run():
    """The parts of a split attention lie in memory of the launch: who captures it, and drops it, must keep that."""
    inputs = heads(300, batch=1, query=2, kept=1)
    with torch.no_grad(), record(*inputs) as recording:
        recording.output(F.scaled_dot_product_attention(*inputs, enable_gqa=True))
    fused = fuse(recording.graph, FusionConfig(profile="always", target="ninetoothed", enable_cache=False))
    (region,) = fused.regions
    out = torch.empty_like(inputs[0])
    chain = Chain([BoundKernel(KernelStep(region, fused.recorded, fused.config, ()), inputs, [out])])
    shared = {tensor.untyped_storage()._cdata for tensor in chain.scratch}
    assert len(shared) == 3
    assert not shared & {tensor.untyped_storage()._cdata for tensor in (*inputs, out)}
