"""CUDA graphs: how steps are split, what is copied and what is followed; with a stand-in for CUDA, and on a device."""

import contextlib
import gc
import logging

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, capture, fuse, record
from graph_capture.ir.interpreter import Executor
from graph_capture.ir.memory import storage_bytes
from graph_capture.runtime.replay import cuda_graph as cudagraph
from graph_capture.runtime.replay.cuda_graph import GraphReplay
from graph_capture.runtime.replay.memory import Memory
from graph_capture.runtime.replay.plan import Plan
from tests.replaying import graph_of, noise


class StandIn:
    """Captures on the CPU: a replay computes everything again, into the memory of the capture."""

    device_type = "cpu"

    def __init__(self, fails=False):
        self.captures, self.replays, self.fails = 0, 0, fails

    def beside(self):
        return contextlib.nullcontext()

    def capture(self, body):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures += 1
        self.collected = gc.isenabled()
        tensors = [value for value in body.__globals__.values() if isinstance(value, torch.Tensor)]
        memories = {tensor.untyped_storage()._cdata: storage_bytes(tensor) for tensor in tensors}
        before, random = [(memory, memory.clone()) for memory in memories.values()], torch.get_rng_state()
        results = self.body(body)
        for tensor in results:  # nothing is computed while CUDA captures
            if tensor.untyped_storage()._cdata not in memories:
                tensor.fill_(77)
        for memory, copy in before:
            memory.copy_(copy)
        torch.set_rng_state(random)

        def replay():
            self.replays += 1
            for static, tensor in zip(results, body(), strict=True):
                if static.data_ptr() != tensor.data_ptr():
                    static.copy_(tensor)

        return results, replay

    def body(self, function):
        return function()

    def allocated(self):
        return 0


def captured(graph, backend, **options):
    subgraph = graph.subgraph
    executor = Executor([(node, None) for node in subgraph.nodes], subgraph.input_names, subgraph.output_names)
    dynamic = len(graph.signature.names)
    return GraphReplay(executor, dynamic, backend=lambda: backend, **options)


def run(graph, replay, *args):
    stamp = graph.guards.moves
    return graph.replay(graph.bind(args, {}), lambda dynamic, static: replay.run(dynamic, static, stamp))


def test_the_third_replay_is_a_graph():
    backend = StandIn()
    graph = graph_of(lambda x: torch.tanh(x) * 2, noise(8))
    replay = captured(graph, backend)
    kept = []
    for seed in range(6):
        x = noise(8, seed=seed)
        kept.append((run(graph, replay, x), torch.tanh(x) * 2))
    assert all(torch.equal(got, want) for got, want in kept)
    assert backend.captures == 1
    assert not backend.collected  # what ends meanwhile may be another graph
    assert gc.isenabled()
    assert replay.graphs.segments == (1, 0)


def test_nothing_is_copied_into_the_arena_for_a_capture(monkeypatch):
    plans = []
    make = Plan.__init__

    def noted(plan, *args, **options):
        plans.append(plan)
        make(plan, *args, **options)

    monkeypatch.setattr(Plan, "__init__", noted)

    def program(x):
        y = F.conv1d(x.view(1, 1, 8), torch.ones(1, 1, 2))  # returns memory of its own
        return y[..., 1:] + y[..., :-1]

    graph = graph_of(program, noise(8))
    for backend, copies in ((StandIn(), 0), (None, 1)):
        replay = captured(graph, backend) if backend else fuse(graph, FusionConfig(enable_fusion=False))
        for seed in range(4):
            x = noise(8, seed=seed)
            assert torch.equal(run(graph, replay, x) if backend else replay(x), program(x))
        assert plans.pop().source.count("copy_(") == copies


def test_graphs_that_share_arenas_share_what_captures():
    memory, backends = Memory(), [StandIn(), StandIn()]
    graphs = [graph_of(lambda x: torch.tanh(x) * 2, noise(size)) for size in (8, 9)]
    replays = [captured(*pair, memory=memory) for pair in zip(graphs, backends, strict=True)]
    for seed in range(6):
        for size, graph, replay in zip((8, 9), graphs, replays, strict=True):
            assert torch.equal(run(graph, replay, noise(size, seed=seed)), torch.tanh(noise(size, seed=seed)) * 2)
    assert [backend.captures for backend in backends] == [2, 0]


def test_capturing_leaves_the_callers_state_alone():
    def count(x, total):
        total.add_(x)
        return total * 2

    backend = StandIn()
    graph = graph_of(count, noise(8), noise(8, seed=1))
    replay = captured(graph, backend)
    ours, theirs = noise(8, seed=2), noise(8, seed=2)
    for seed in range(6):
        assert torch.equal(run(graph, replay, noise(8, seed=seed), ours), count(noise(8, seed=seed), theirs))
        assert torch.equal(ours, theirs)
    assert backend.captures == 1


def test_arguments_that_are_written_are_followed(monkeypatch):
    def count(x, total):
        total.add_(x)
        return total, total[2:] * 1

    monkeypatch.setattr(cudagraph, "COPIED", 16)
    graph = graph_of(count, noise(8), noise(8, seed=1))
    backend = StandIn()
    replay = captured(graph, backend)
    totals = [noise(8, seed=seed) for seed in range(3)]
    for total in (*totals, totals[0], totals[0], totals[0], totals[1]):
        want = count(noise(8), total.clone())
        got = run(graph, replay, noise(8), total)
        assert got[0] is total
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_steps_that_cannot_be_captured_run_between(monkeypatch):
    whole = cudagraph._capturable
    monkeypatch.setattr(cudagraph, "_capturable", lambda step, *rest: step.node.op_type != "exp" and whole(step, *rest))
    backend = StandIn()
    graph = graph_of(lambda x: (torch.tanh(x).exp() + x, torch.tanh(x).exp()[1:]), noise(8))
    replay = captured(graph, backend)
    for seed in range(6):
        x = noise(8, seed=seed)
        got = run(graph, replay, x)
        assert torch.equal(got[0], torch.tanh(x).exp() + x)
        assert torch.equal(got[1], torch.tanh(x).exp()[1:])
    captures, between = replay.graphs.segments
    assert captures >= 2
    assert between >= 1


def test_results_that_share_memory_go_on_sharing_it():
    def run_both(x):
        y = torch.tanh(x)
        return y, y[2:]

    graph = graph_of(run_both, noise(8))
    replay = captured(graph, StandIn())
    for _ in range(5):
        whole, part = run(graph, replay, noise(8))
    whole.zero_()
    assert not part.any()
    assert torch.equal(run(graph, replay, noise(8))[0], torch.tanh(noise(8)))


def test_lent_results_are_those_of_the_graph():
    graph = graph_of(lambda x: torch.tanh(x) * 2, noise(8))
    replay = captured(graph, StandIn(), keep_outputs=False)
    results = [run(graph, replay, noise(8, seed=seed)) for seed in range(5)]
    assert results[-1].data_ptr() == results[-2].data_ptr()


def test_a_capture_that_fails_is_logged_once_and_not_tried_again(caplog):
    graph = graph_of(lambda x: torch.tanh(x) * 2, noise(8))
    replay = captured(graph, StandIn(fails=True))
    with caplog.at_level(logging.WARNING, "graph_capture"):
        for seed in range(6):
            assert torch.equal(run(graph, replay, noise(8, seed=seed)), torch.tanh(noise(8, seed=seed)) * 2)
    assert len(caplog.records) == 1
    assert "launch kernel by kernel" in caplog.text
    assert replay.graphs is None


@pytest.mark.gpu
@pytest.mark.parametrize("clone_outputs", [True, False])
def test_on_a_device(clone_outputs):
    def step(x, total, position):
        total.index_add_(0, position, torch.tanh(x) * 2)
        position.add_(1)
        return total.sum(0) + torch.nn.functional.dropout(x, 0.5)

    def arguments():
        return torch.zeros(16, 8, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")

    graph = graph_of(step, noise(1, 8).cuda(), *arguments())
    fused = fuse(graph, FusionConfig(clone_outputs=clone_outputs))
    ours, theirs = arguments(), arguments()
    torch.manual_seed(0)
    got = [fused(noise(1, 8, seed=seed).cuda(), *ours).clone() for seed in range(8)]
    torch.manual_seed(0)
    want = [step(noise(1, 8, seed=seed).cuda(), *theirs) for seed in range(8)]
    assert fused.cuda_graphs is not None
    for left, right in zip((*got, *ours), (*want, *theirs), strict=True):
        torch.testing.assert_close(left, right)
    assert fused.cuda_graphs.bytes_after >= fused.cuda_graphs.bytes_before


@pytest.mark.gpu
def test_signatures_share_the_private_pool():
    """In turns, in any order, with results that live on."""
    fast = capture(lambda x: torch.tanh(x @ x.T).cumsum(0) @ x)
    kept = []
    for turn in range(12):
        x = noise((64, 96, 32)[turn * 5 % 3], 48, seed=turn).cuda()
        kept.append((fast(x), torch.tanh(x @ x.T).cumsum(0) @ x))
    for got, want in kept:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    graphs = [fused.cuda_graphs for fused in fast.graphs]
    assert all(graphs)
    assert len({id(graph._backend) for graph in graphs}) == 1


@pytest.mark.gpu
def test_an_op_that_synchronises_splits_the_graph():
    def step(x):
        found = torch.nonzero(x > 0)
        return torch.tanh(x) * 2, found

    x = torch.tensor([1.0, -1.0, 2.0], device="cuda")
    with record(x, data_dependent="guard") as recording:
        recording.output(step(x))
    fused = fuse(recording.graph, FusionConfig())
    for _ in range(5):
        got = fused(x)
    assert torch.equal(got[1].cpu(), torch.tensor([[0], [2]]))
