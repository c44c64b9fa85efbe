"""Ops that are not deterministic: whatever compares results tells their noise from a fault."""

import logging

import pytest
import torch
import torch.nn.functional as F

from graph_capture import Bucket, CaptureError, FusionConfig, capture, fuse
from graph_capture.codegen import CompiledKernel
from graph_capture.ir import interpreter
from tests.noisy import SIZE, noisy
from tests.replaying import graph_of, noise

ALWAYS = FusionConfig(profile="always")
X = noise(64, 8)


def ties(x):
    """Two columns that are nearly equal, and the largest."""
    return torch.cat([x, x.amax(-1, keepdim=True), x.amax(-1, keepdim=True) * (1 + SIZE / 10)], -1)


def routed(x):
    scores, experts = noisy(ties(F.silu(x) * (x + 1))).softmax(-1).topk(2)
    weights = torch.arange(1.0, 11.0)[:, None] * torch.ones(10, 4)
    return (scores[..., None] * weights[experts]).sum(1), torch.argmax(noisy(ties(torch.sin(x) * 2)), -1)


MODELS = {
    "floats": lambda x: torch.exp(F.silu(noisy(x)) * (x + 1)),
    "a scalar": lambda x: (F.silu(noisy(x)) * (x + 1)).sum(),
    "argmax": lambda x: torch.argmax(noisy(ties(torch.sin(x) * 2)), -1),
    "routed": routed,
    "fused argmax": lambda x: (torch.sin(ties(noisy(x))) * 2 + 1).argmax(-1),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_bisect_blames_nobody_for_noise(model):
    fused = fuse(graph_of(model, X), ALWAYS)
    assert any(region.decision for region in fused.regions)
    for _ in range(6):
        found = fused.bisect(X)
        assert found.culprit is None, str(found)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_bisect_finds_a_wrong_kernel_among_noise(model, monkeypatch):
    fused = fuse(graph_of(model, X), ALWAYS)
    right = CompiledKernel.__call__

    def wrong(self, *inputs):
        return tuple(t.roll(1, 0) * (1 + t.is_floating_point()) for t in right(self, *inputs))

    monkeypatch.setattr(CompiledKernel, "__call__", wrong)
    assert fused.bisect(X).culprit == next(region.name for region in fused.regions if region.decision)


def noise_in(monkeypatch, size):
    """Kernels that are not deterministic."""
    right = CompiledKernel.__call__
    monkeypatch.setattr(
        CompiledKernel,
        "__call__",
        lambda self, *inputs: tuple(t + size * torch.randn(t.shape, dtype=t.dtype) * t for t in right(self, *inputs)),
    )


@pytest.fixture
def noisy_silu(monkeypatch):
    """What the recorded op makes of its input is not deterministic, in float32."""
    right = interpreter.prepare

    def prepare(node):
        call = right(node)
        if node.op_type != "silu" and not node.op_type.startswith("aten.silu"):
            return call
        return lambda tensors: noisy(call(tensors)) if tensors[0].dtype is torch.float32 else call(tensors)

    monkeypatch.setattr(interpreter, "prepare", prepare)


@pytest.mark.usefixtures("noisy_silu")
def test_verify_knows_noise(monkeypatch):
    fused = fuse(graph_of(lambda x: F.silu(x) * (x + 1), X), ALWAYS)
    with monkeypatch.context() as patch:
        noise_in(patch, SIZE)
        for _ in range(6):
            found = fused.verify(X)
            assert found.rows
            assert found.ok, str(found)
    noise_in(monkeypatch, 0.1)
    assert not fused.verify(X).ok


def test_a_fault_is_no_noise(monkeypatch):
    fused = fuse(graph_of(lambda x: F.silu(x) * (x + 1), X), ALWAYS)
    noise_in(monkeypatch, SIZE)
    assert not fused.verify(X).ok


@pytest.mark.usefixtures("noisy_silu")
def test_samples_know_noise(monkeypatch, caplog):
    fused = fuse(graph_of(lambda x: F.silu(x) * (x + 1), X), FusionConfig(profile="always", verify_every=1))
    noise_in(monkeypatch, SIZE)
    with caplog.at_level(logging.WARNING, "graph_capture"):
        for _ in range(6):
            fused(X)
    assert not caplog.records
    assert len(fused.samples) == 6


@pytest.mark.usefixtures("noisy_silu")
def test_debug_mode_knows_noise(caplog):
    fused = fuse(graph_of(lambda x: F.silu(x) * (x + 1), X), FusionConfig(profile="always", debug_mode=True))
    with caplog.at_level(logging.WARNING, "graph_capture"):
        for _ in range(6):
            fused(X)
    assert not caplog.records


def test_verify_looks_at_the_candidates_of_a_choice(monkeypatch):
    """One token is as good as another that scores the same, up to rounding."""
    fused = fuse(graph_of(lambda x: (torch.sin(x) * 2 + 1).argmax(-1), X), ALWAYS)
    assert [region.decision.use for region in fused.regions] == [True]
    x = X.clone()
    x[:, 5] = torch.nextafter(x[:, 3], torch.tensor(9.0))
    x[:, 3:6:2] += 100 * torch.pi
    x[:, 4] = 0
    right = CompiledKernel.__call__
    assert fused.verify(x).ok
    monkeypatch.setattr(
        CompiledKernel, "__call__", lambda self, *inputs: tuple(t * 0 + 4 for t in right(self, *inputs))
    )
    assert not fused.verify(x).ok


def padded_model(x, mask):
    return noisy(x * mask).sum(1), (noisy(x) * mask).cumsum(1)


def test_padding_knows_noise():
    bucket = Bucket((8, 16), {"x": 1, "mask": 1}, outputs={"1": 1})
    for _ in range(6):
        fast = capture(padded_model, buckets={"length": bucket})
        fast(noise(4, 6), torch.ones(4, 6))
        assert len(fast.graphs) == 1


def test_padding_that_changes_results_is_found_among_noise():
    fast = capture(lambda x: noisy(torch.exp(x)).mean(1), buckets={"length": Bucket((8,), {"x": 1})})
    with pytest.raises(CaptureError, match="padding changes"):
        fast(noise(4, 6))
