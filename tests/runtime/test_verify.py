"""What verify and bisect say agrees with what a replay gives, whatever a kernel does."""

import logging

import pytest
import torch

from graph_capture.ir.numerics import in_float64
from graph_capture.runtime.account.verify import compared
from tests.beside_eager import fused_of, on_the_cpu, rand, same

pytestmark = on_the_cpu


def spoilt(fused, spoil):
    """`fused`, whose first kernel does what `spoil` makes of its launch."""
    kernel = fused.regions[0].kernel
    bind = kernel._bind
    kernel._bind = lambda tensors, choice: spoil(bind(tensors, choice), tensors)
    return fused


def fails(launch, tensors):
    raise RuntimeError("the device is on fire")


def forges(value):
    def spoil(launch, tensors):
        def run():
            launch()
            tensors[-1].view(-1)[2] = value

        return run

    return spoil


def chain(x):
    return torch.relu(x * 3) + 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 0.5])
def test_one_wrong_number_is_seen(value):
    x = rand(1000)
    fused = spoilt(fused_of(chain, x), forges(value))
    assert not fused.verify(x).ok
    assert fused.bisect(x).culprit == "pointwise_0"


def test_a_wrong_number_beside_large_ones_is_seen():
    x = torch.cat([rand(50), rand(50) * 1e30])
    assert fused_of(chain, x).verify(x).ok
    assert not spoilt(fused_of(chain, x), forges(5.0)).verify(x).ok


@pytest.mark.parametrize("power", [-3, 5, -1])
def test_infinities_that_eager_has_are_right(power):
    x = torch.tensor([-0.0, 1e-30, 1e20, 2.0])
    fused = fused_of(lambda x: x.pow(power) * 2, x)
    same(fused(x), x.pow(power) * 2)
    assert fused.verify(x).ok


def test_infinities_that_eager_has_and_a_kernel_has_not_are_wrong():
    eager, exact = torch.tensor([float("inf"), 1.0]), torch.tensor([1e60, 1.0], dtype=torch.float64)
    assert compared(torch.tensor([1e38, 1.0]), eager, exact)[2] is False
    assert compared(torch.tensor([float("inf"), 1.0]), eager, exact)[2] is True
    assert compared(torch.tensor([float("nan"), 1.0]), eager, exact)[2] is False


def test_the_reference_is_what_was_recorded():
    x = rand(64)
    fused = fused_of(lambda x: (x.bfloat16().float() - x) * 1000, x)
    (region,) = fused.regions
    (row,) = fused.verify(x).rows
    assert row["ok"]
    assert row["error_fused"] < 1e-5
    widened, *_ = in_float64(region.body, [x])
    assert float(widened.abs().max()) == 0  # in which alone it would not


def test_a_kernel_that_fails_is_told_and_the_replay_is_right(caplog):
    x = rand(64)
    fused = spoilt(fused_of(chain, x), fails)
    assert fused.verify(x).rows[0]["failed"] == "RuntimeError: the device is on fire"
    assert fused.verify(x).ok
    assert "failed, as recorded" in str(fused.verify(x))
    assert fused.bisect(x).culprit is None
    with caplog.at_level(logging.WARNING, "graph_capture"):
        for _ in range(3):
            same(fused(x), chain(x))
    assert "its kernel failed: RuntimeError: the device is on fire" in str(fused.explain())
    assert "its kernel failed" in str(fused.why("pointwise_0"))
    assert fused.verify(x).ok
    assert fused.bisect(x).culprit is None


def test_a_kernel_that_fails_without_fallback_is_wrong():
    x = rand(64)
    fused = spoilt(fused_of(chain, x, fallback_on_error=False), fails)
    assert not fused.verify(x).ok
    with pytest.raises(RuntimeError, match="on fire"):
        fused(x)


def test_samples_go_on_where_a_kernel_fails():
    x = rand(64)
    fused = spoilt(fused_of(chain, x, verify_every=1), fails)
    for _ in range(3):
        same(fused(x), chain(x))
    assert all(sample.ok for sample in fused.samples)
