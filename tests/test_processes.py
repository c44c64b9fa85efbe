"""Many recordings in one process: threads, memory, what is printed and logged."""

import gc
import logging
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graph_capture import (
    CaptureError,
    FusionConfig,
    capture,
    fuse,
    record,
)
from tests.replaying import UNFUSED, Gated, graph_of, noise


def test_two_models_in_two_threads():
    models = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))]
    graphs, errors, barrier = {}, [], threading.Barrier(2)

    def work(index):
        try:
            barrier.wait()
            for number in range(20):
                graphs[index, number] = graph_of(models[index], noise(2, 4, seed=number))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for (index, _), graph in graphs.items():
        x = noise(2, 4, seed=99)
        with torch.no_grad():
            assert torch.equal(graph.run(x), models[index](x))


def test_replays_from_several_threads():
    model = Gated().eval()
    fast, results = capture(model, FusionConfig(profile="always")), []

    def work(seed):
        for number in range(20):
            x = noise(2, 4, seed=seed * 100 + number)
            with torch.no_grad():
                results.append(torch.allclose(fast(x), model(x), atol=1e-5))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80


def test_a_recording_keeps_neither_inputs_nor_intermediates():
    x = noise(64)
    held = []

    def run(x):
        y = x * 2
        held.append(weakref.ref(y))
        return (y + 1).sum()

    graph = graph_of(run, x)
    held.append(weakref.ref(x))
    del x
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert len(graph.subgraph) == 3


def test_intermediates_die_while_recording_as_they_do_without():
    x = noise(64)
    with record(x) as recording:
        y = x * 2
        seen = weakref.ref(y)
        z = y + 1
        del y
        assert seen() is None
        recording.output(z)


def test_guards_are_printed_and_misses_explained(caplog):
    model = Gated()
    fast = capture(model, UNFUSED)
    with caplog.at_level(logging.INFO, "graph_capture"):
        fast(noise(2, 4))
        fast(noise(3, 4))
    assert "(arg0: f32[2, 4])" in fast.guards
    assert "up.weight is at 0x" in fast.guards
    assert "scale is 1.0" in fast.guards
    assert "argument arg0: expected f32[2, 4]" in fast.misses[-1]
    assert "got f32[3, 4]" in caplog.text


def test_a_captured_function_inside_another_is_recorded_with_it():
    inner = capture(lambda x: x * 2, UNFUSED)
    outer = capture(lambda x: inner(x) + 1, UNFUSED)
    for seed in range(3):
        assert torch.equal(outer(noise(2, seed=seed)), noise(2, seed=seed) * 2 + 1)
    assert inner.graphs == ()
    assert len(outer.misses) == 1


def test_a_function_that_never_settles_is_warned_about(caplog):
    class Engine:
        count = 0

        def step(self, x):
            self.count += 1
            return x * self.count

    engine = Engine()
    engine.count = 0
    fast = capture(engine.step, UNFUSED)
    for number in range(9):
        assert torch.equal(fast(torch.ones(2)), torch.full((2,), number + 1.0))
    assert "has recorded 8 calls in a row" in caplog.text


def test_a_tensor_subclass_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    x = TwoTensor(noise(2), noise(2))
    with pytest.raises(CaptureError, match="is a TwoTensor"):
        graph_of(lambda x: x + 1, x)


def test_silu_of_a_tensor_that_is_written_later():
    """A read is never moved across a write to the same memory, fused or not."""

    def run(x, y):
        gate = F.silu(x)
        x.mul_(0)
        return gate * y + x

    graph = graph_of(run, noise(4, 8), noise(4, 8, seed=1))
    fused = fuse(graph, FusionConfig(profile="always"))
    x, y = noise(4, 8, seed=2), noise(4, 8, seed=3)
    torch.testing.assert_close(fused(x.clone(), y), run(x.clone(), y))
