"""Checking replays in production: what is off is logged worst first, and nothing else happens."""

import logging

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, capture, fuse, record
from graph_capture.codegen import CompiledKernel


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, x, cache):
        self.count += 1
        cache.mul_(2)
        y = F.silu(x) * (x + self.count)
        return F.rms_norm(y + cache, (8,), self.weight) + torch.rand(8)


def run(config, calls=6):
    model, x, cache = Model(), torch.linspace(-1, 1, 32).view(4, 8), torch.full((8,), 0.01)
    torch.manual_seed(0)
    fast = capture(model, config)
    with torch.no_grad():
        results = [fast(x, cache) for _ in range(calls)]
    return fast, results, model.count, cache, torch.get_rng_state()


def test_samples_change_neither_results_nor_state():
    plain = run(FusionConfig(profile="always"))
    sampled = run(FusionConfig(profile="always", verify_every=2))
    for one, other in zip(plain[1], sampled[1], strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(one, other) for one, other in zip(plain[2:], sampled[2:], strict=True))
    samples = sampled[0].graphs[0].samples
    assert len(samples) == 2
    assert all(len(sample.rows) == 2 for sample in samples)
    assert all(row["error_fused"] < 1e-6 for sample in samples for row in sample.rows)
    assert len(plain[0].graphs[0].samples) == 0


def swiglu_and_more(x):
    return F.silu(x) * x, torch.sin(x.t() + 1) * 3


def test_what_is_off_is_logged_worst_first(monkeypatch, caplog):
    x = torch.randn(4, 8)
    with record(x) as recording:
        recording.output(swiglu_and_more(x))
    fused = fuse(recording.graph, FusionConfig(profile="always", verify_every=1))
    used = [region for region in fused.regions if region.decision]
    assert len(used) == 2
    right = CompiledKernel.__call__
    factor = {id(used[0].kernel): 1.01, id(used[1].kernel): 1.1}
    monkeypatch.setattr(
        CompiledKernel, "__call__", lambda self, *given: tuple(t * factor[id(self)] for t in right(self, *given))
    )
    with caplog.at_level(logging.WARNING, "graph_capture"):
        fused(x)
    (sample,) = fused.samples
    errors = [row["error_fused"] for row in sample.rows]
    assert errors == sorted(errors, reverse=True)
    assert sample.rows[0]["region"] == used[1].name
    assert not sample.ok
    assert "2 of 2 kernels are off, worst first" in caplog.text
    assert caplog.text.index(used[1].name) < caplog.text.index(used[0].name)


def test_a_check_that_fails_is_no_failure_of_the_replay(monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise MemoryError("no memory for copies")

    monkeypatch.setattr("graph_capture.runtime.account.sample.verify", fail)
    x = torch.randn(4, 8)
    fast = capture(swiglu_and_more, FusionConfig(profile="always"), verify_every=1)
    first, second = fast(x), fast(x)
    torch.testing.assert_close(first, second)
    assert "could not be checked: MemoryError: no memory for copies" in caplog.text


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="verify_every must not be negative"):
        FusionConfig(verify_every=-1)
