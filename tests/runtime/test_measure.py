"""Timing: the least of both sides in turns, few calls of what is slow, made-up inputs that ops can take."""

import math
import time

import pytest
import torch

from graph_capture.ir.values import TensorMeta
from graph_capture.runtime.decide import measure
from graph_capture.runtime.decide.measure import compare, example_inputs

CPU = torch.device("cpu")


def test_the_slower_side_takes_longer():
    x = torch.randn(64, 64)
    fallback, fused = compare([lambda: [x @ x for _ in range(20)], lambda: x @ x], CPU)
    assert 0 < fused < fallback


def test_a_slow_function_is_called_a_few_times_only(monkeypatch):
    monkeypatch.setattr(measure, "PATIENCE", 0.001)
    calls = []

    def slow():
        calls.append(None)
        time.sleep(0.002)

    fallback, fused = compare([slow, slow], CPU)
    assert len(calls) == 2
    assert min(fallback, fused) >= 0.002


def test_both_sides_are_sampled_in_turns(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE", 0.0)
    monkeypatch.setattr(measure, "PLAIN", math.inf)
    order = []
    compare([lambda: order.append("a"), lambda: order.append("b")], CPU)
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * measure.REPEATS


def test_sampling_ends_where_the_difference_is_more_than_noise():
    def side(*samples):
        made = measure._Side(lambda: None, CPU)
        made.samples = list(samples)
        return made

    assert measure._is_plain([side(3.0, 2.0, 2.1), side(1.0, 1.1)])
    assert not measure._is_plain([side(2.0, 3.0), side(1.0, 1.1)])  # twice as long, but one side is restless
    assert not measure._is_plain([side(1.0, 1.0), side(1.03, 1.03)])
    assert not measure._is_plain([side(9.0), side(1.0)])


def test_made_up_inputs_have_the_layouts_and_are_valid_indices():
    metas = {
        "x": TensorMeta((2, 3), (1, 2), torch.bfloat16, CPU),
        "i": TensorMeta((4,), (1,), torch.int64, CPU),
        "m": TensorMeta((2, 2), (0, 1), torch.bool, CPU),
        "e": TensorMeta((0, 3), (3, 1), torch.float32, CPU),
    }
    state = torch.get_rng_state()
    tensors = example_inputs(list(metas), metas)
    assert torch.equal(torch.get_rng_state(), state)
    for tensor, meta in zip(tensors, metas.values(), strict=True):
        assert (tensor.shape, tensor.dtype) == (meta.shape, meta.dtype)
        assert tensor.numel() == 0 or tensor.stride() == meta.stride
    assert tensors[1].tolist() == [0, 0, 0, 0]
    assert tensors[2].all()


@pytest.mark.gpu
def test_on_cuda_both_sides_run_in_graphs():
    device = torch.device("cuda")
    x = torch.randn(1 << 20, device=device)
    sides = [measure._Side(lambda: x * 2, device), measure._Side(lambda: x.sum().item(), device)]
    assert measure._captured(sides[0], device) is not None
    assert measure._captured(sides[1], device) is None  # reading a value cannot be captured
    fallback, fused = compare([lambda: (x * 2) * 3, lambda: x * 2], device)
    assert 0 < fused < fallback
    fallback, fused = compare([lambda: x.sum().item(), lambda: x * 2], device)
    assert 0 < fused < fallback
