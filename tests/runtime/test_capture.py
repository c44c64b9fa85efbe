"""`capture`: a recording for each signature, replays afterwards."""

import threading

import pytest
import torch
import torch.nn.functional as F

from graph_capture import CaptureError, FusionConfig, capture


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x, scale=1):
        return {"y": F.silu(self.linear(x)) * x * scale}


def test_each_signature_is_recorded_once():
    model = Scaled()
    fast = capture(model)
    for rows in (2, 3):
        for _ in range(3):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(fast(x)["y"], F.silu(model.linear(x)) * x)
    assert len(fast.misses) == 2
    fast(torch.randn(2, 8), scale=2)
    fast(torch.randn(2, 8), scale=2.0)
    with torch.no_grad():
        fast(torch.randn(2, 8).requires_grad_(), scale=2)
    assert len(fast.misses) == 5  # without gradients the code is told another thing
    fast(torch.randn(2, 8).requires_grad_(), scale=2)
    assert "requires a gradient" in fast.misses[-1]
    assert len(fast.graphs) == 5
    assert "arg0: f32[3, 8]" in fast.explain()


def test_results_are_the_users_to_keep():
    fast = capture(Scaled(), FusionConfig(profile="always"))
    x = torch.randn(2, 8)
    first = fast(x)["y"]
    kept = first.clone()
    fast(torch.randn(2, 8))
    fast(torch.randn(2, 8))
    assert torch.equal(first, kept)


def test_signatures_are_bounded():
    model = Scaled()
    fast = capture(model, max_signatures=2)
    for rows in (1, 2, 1, 3, 1, 2):
        fast(torch.randn(rows, 8))
    assert len(fast.graphs) == 2
    assert len(fast.misses) == 4  # 1, 2, 3, and 2 again, which 3 had pushed out
    with pytest.raises(ValueError, match="max_signatures"):
        capture(model, max_signatures=0)


def test_a_failed_recording_leaves_no_signature():
    fast = capture(lambda x: x.sum().item(), data_dependent="error")
    for _ in range(2):
        with pytest.raises(CaptureError, match="_local_scalar_dense"):
            fast(torch.randn(2))
    assert fast.graphs == ()


def test_two_threads_share_a_captured_model():
    model = Scaled()
    fast, results = capture(model), []

    def work():
        for _ in range(20):
            x = torch.randn(2, 8)
            results.append(torch.allclose(fast(x)["y"], F.silu(model.linear(x)) * x, atol=1e-6))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80
