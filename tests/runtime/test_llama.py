"""A whole Llama forward: recorded, rewritten, replayed."""

import copy

import pytest
import torch

from graph_capture import FusionConfig, fuse
from graph_capture.ir.numerics import distance
from tests.models import forward, recorded, tiny_llama, token_ids

ALWAYS = FusionConfig(profile="always")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unfused_replay_is_bit_equal(dtype):
    model = tiny_llama(dtype=dtype)
    graph = recorded(model, token_ids())
    other = token_ids(seed=2)
    assert torch.equal(graph.run(input_ids=other), forward(model, other))
    off = fuse(graph, FusionConfig(enable_fusion=False))
    assert torch.equal(off(input_ids=other), forward(model, other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_replay_is_as_close_to_float64_as_eager(dtype):
    model = tiny_llama(dtype=dtype)
    fused = fuse(recorded(model, token_ids()), ALWAYS)
    assert all(region.decision for region in fused.regions)
    other = token_ids(seed=2)
    exact = forward(copy.deepcopy(model).double(), other)
    eager = distance(forward(model, other), exact)
    # Per region the bar is exact (verify); over a whole model two roundings that differ drift apart, either way.
    slack = 1.5 if dtype is torch.bfloat16 else 1.2  # the interpreter truncates bfloat16 stores
    assert distance(fused(input_ids=other), exact) <= slack * eager
    assert fused.verify(input_ids=other).ok, str(fused.verify(input_ids=other))


def test_the_regions_are_those_of_the_architecture(llama):
    fused = fuse(recorded(llama, token_ids()), ALWAYS)
    kinds = [region.kind for region in fused.regions]
    # Each layer: one SwiGLU; the residual sum before the MLP's norm, and that before the next layer's or the last.
    assert kinds.count("swiglu") == 4
    assert kinds.count("add_rms_norm") == 8
    assert kinds.count("rms_norm") == 1
    assert all(region.where.startswith("model.layers") for region in fused.regions if region.kind == "swiglu")


def test_all_layers_share_one_kernel_per_kind(llama):
    fused = fuse(recorded(llama, token_ids()), ALWAYS)
    *inner, last = [region for region in fused.regions if region.kind == "add_rms_norm"]
    assert len({id(region.kernel) for region in inner}) == 1
    assert len({id(region.kernel) for region in fused.regions if region.kind == "swiglu"}) == 1
    assert [len(region.node.outputs) for region in (*inner, last)] == [2] * 7 + [1]  # nobody reads the last sum


def test_receipts_group_what_is_alike(llama):
    fused = fuse(recorded(llama, token_ids()), ALWAYS)
    explanation = fused.explain()
    row = next(row for row in explanation.rows if row["region"] == "swiglu")
    assert row["alike"] == 4
    assert row["where"] == "model.layers.*.mlp"
    hidden = 9 * 176 * 4  # bytes of one [1, 9, 176] float32
    assert (row["bytes_before"], row["bytes_after"], row["bytes_saved"]) == (5 * hidden, 3 * hidden, 2 * hidden)
    assert "swiglu" in str(explanation)
    assert '"regions"' in explanation.to_json()


def test_measured_decisions_have_both_times(llama):
    fused = fuse(recorded(llama, token_ids()))
    other = token_ids(seed=3)
    for region in fused.regions:
        assert region.decision.t_fallback > 0
        assert region.decision.t_fused > 0
        faster = region.decision.t_fused < 0.8 * region.decision.t_fallback
        assert region.decision.use == (faster and (fused.whole is None or bool(fused.whole)))
    if not any(region.decision for region in fused.regions):
        assert torch.equal(fused(input_ids=other), forward(llama, other))


def test_a_second_length_costs_no_new_kernel(llama):
    from graph_capture import FusionScheduler

    scheduler = FusionScheduler(ALWAYS)
    first = scheduler.analyze(recorded(llama, token_ids(9)))
    second = scheduler.analyze(recorded(llama, token_ids(11)))
    norm = {region.kernel.key for region in first.regions if region.kind == "add_rms_norm"}
    assert {region.kernel.key for region in second.regions if region.kind == "add_rms_norm"} == norm
