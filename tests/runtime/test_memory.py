"""What replays take of memory: never more than eager does, graphs or not, one signature or many."""

import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graph_capture import FusionConfig, capture, fuse, record
from graph_capture.ir.graph import OpNode
from graph_capture.ir.interpreter import Executor
from graph_capture.runtime.replay import cuda_graph, forms
from graph_capture.runtime.replay.arena import Arena, Lifetime, live_peak, place
from graph_capture.runtime.replay.cuda_graph import GraphReplay
from graph_capture.runtime.replay.first_run import FirstRun
from graph_capture.runtime.replay.memory import Memory
from tests.replaying import UNFUSED, graph_of, noise
from tests.runtime.test_cudagraph import StandIn


class LiveBytes(TorchDispatchMode):
    """The most bytes that are alive at once, of memory that ops have made meanwhile."""

    def __init__(self):
        super().__init__()
        self.peak, self.living = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                self.living[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage()), tensor.nbytes
        self.living = {key: (ref, size) for key, (ref, size) in self.living.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.living.values()))
        return result


class Layer(torch.nn.Module):
    """A prefill step's shapes: wide in the middle, attention whose op has no way to write where it is told."""

    def __init__(self, width=128, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = torch.nn.Linear(width, 3 * width, bias=False), torch.nn.Linear(width, width, bias=False)
        self.gate_up, self.down = (
            torch.nn.Linear(width, 7 * width, bias=False),
            torch.nn.Linear(7 * width // 2, width, bias=False),
        )

    def forward(self, x, keys):
        rows, length, width = x.shape
        normed = F.rms_norm(x, (width,))
        q, k, v = (t.view(rows, length, self.heads, -1).transpose(1, 2) for t in self.qkv(normed).chunk(3, -1))
        keys[:, :, :length].copy_(k)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, length, width)
        x = x + self.out(attended)
        gate, up = self.gate_up(F.rms_norm(x, (width,))).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Prefill(torch.nn.Module):
    def __init__(self, layers=4, width=128):
        super().__init__()
        self.embed = torch.nn.Embedding(100, width)
        self.layers = torch.nn.ModuleList([Layer(width) for _ in range(layers)])
        self.head = torch.nn.Linear(width, 100)

    def forward(self, tokens, keys):
        x = self.embed(tokens)
        for layer, cache in zip(self.layers, keys, strict=True):
            x = layer(x, cache)
        return self.head(x[:, -1])


def arguments(length, rows=2, layers=4):
    keys = [torch.zeros(rows, 4, 512, 32) for _ in range(layers)]
    return torch.arange(length).remainder(100).repeat(rows, 1), keys


class Measured(StandIn):
    """Also measures what a capture allocates."""

    def body(self, function):
        with LiveBytes() as live:
            result = function()
        self.peak = live.peak
        return result


def replaying(graph, backend, memory=None):
    subgraph = graph.subgraph
    executor = Executor([(node, None) for node in subgraph.nodes], subgraph.input_names, subgraph.output_names)
    return GraphReplay(executor, len(graph.signature.names), memory, backend=lambda: backend)


def eager_peak(model, *args):
    with LiveBytes() as live, torch.no_grad():
        model(*args)
    return live.peak


def test_a_captured_prefill_takes_no_more_than_eager():
    model, args = Prefill(), arguments(384)
    eager = eager_peak(model, *args)
    backend, graph = Measured(), graph_of(model, *args)
    replay = replaying(graph, backend)
    with torch.no_grad():
        for _ in range(5):
            got = graph.replay(graph.bind(args, {}), replay.run)
        torch.testing.assert_close(got, model(*args))
    assert backend.captures == 1
    arena = replay._memory.arenas[torch.device("cpu")].nbytes
    assert backend.peak + arena + replay.graphs.lent_bytes <= 1.1 * eager


def test_a_replay_by_plan_takes_no_more_than_eager():
    model, args = Prefill(), arguments(384)
    eager = eager_peak(model, *args)
    fast = capture(model, UNFUSED)
    for _ in range(2):
        fast(*args)
    (fused,) = fast.graphs
    assert fused.plan is not None
    bound = fused.recorded.bind(args, {})
    inputs = [*bound.tensors, *fused.recorded.captured.values()]
    brought = [
        t for name, t in zip(fused.subgraph.input_names, inputs, strict=True) if name in fused.recorded.signature.names
    ]
    with LiveBytes() as live, torch.no_grad():
        fused.plan.function(*brought)
    assert live.peak + sum(arena.nbytes for arena in fused.plan.arenas.values()) <= 1.1 * eager


def test_recording_and_watching_take_little_more_than_eager(monkeypatch):
    """The check copies what is written; forms of large results are tried where these are."""
    monkeypatch.setattr(forms, "HUGE", 2**18)
    monkeypatch.setattr(forms, "LARGE", 2**10)
    model, args = Prefill(), arguments(384)
    eager = eager_peak(model, *args)
    with LiveBytes() as live, record(*args) as recording:
        recording.output(model(*args))
    assert live.peak <= 1.1 * eager
    graph = recording.graph
    tensors = [*graph.bind(args, {}).tensors, *graph.captured.values()]
    executor = Executor.of(graph.subgraph)
    first_run = FirstRun(executor)
    with LiveBytes() as live, torch.no_grad():
        results = executor.run(tensors, first_run.watching(tensors))
        assert torch.equal(results[0], model(*args))
    assert first_run.failure is None
    assert live.peak <= 1.1 * eager


def test_a_form_that_fails_leaves_the_result_as_it_was(monkeypatch):
    monkeypatch.setattr(forms, "HUGE", 2**10)
    node = OpNode("aten.cumsum.default", ("x",), ("y",), {"dim": 0})
    x, result = noise(64, 64), noise(64, 64).cumsum(0)

    def wrong(emit, inputs, out):
        emit.call(out.copy_, inputs[0])

    def failing(emit, inputs, out):
        emit.call(out.zero_)
        raise RuntimeError("no such form")

    for form in (wrong, failing):
        assert not forms._fills(form, node, [x], result)
        assert torch.equal(result, x.cumsum(0))
    assert forms._fills(lambda emit, inputs, out: emit.call(torch.cumsum, inputs[0], 0, out=out), node, [x], result)
    assert torch.equal(result, x.cumsum(0))


@pytest.mark.parametrize("lengths", [(64, 256, 96, 384, 128, 512), (512, 64, 128), (100, 101, 102, 103, 104, 105)])
def test_prompt_lengths_share_one_arena(lengths):
    model, memory, backend = Prefill(), Memory(), Measured()
    replays = []
    with torch.no_grad():
        for length in lengths:
            args = arguments(length)
            graph = graph_of(model, *args)
            replay = replaying(graph, backend, memory)
            for _ in range(4):
                got = graph.replay(graph.bind(args, {}), replay.run)
            torch.testing.assert_close(got, model(*args))
            replays.append((graph, replay, args, got))
        for graph, replay, args, got in replays:  # what came later has moved nothing
            assert torch.equal(graph.replay(graph.bind(args, {}), replay.run), got)
        for _ in range(2):  # some were moved, and are captured again
            for graph, replay, args, got in replays:
                assert torch.equal(graph.replay(graph.bind(args, {}), replay.run), got)
    needed = max(sum(replay.plan.eager_bytes.values()) for _, replay, _, _ in replays)
    assert memory.arenas[torch.device("cpu")].nbytes <= 1.15 * needed
    assert all(replay.graphs is not None for _, replay, _, _ in replays)


walls = st.lists(st.integers(1, 40), max_size=4).map(
    lambda sizes: [sum(sizes[: i + 1]) * 64 for i in range(len(sizes))]
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1500), st.integers(0, 9), st.integers(0, 6)).map(
            lambda life: Lifetime(life[0], life[1], life[1] + life[2])
        ),
        max_size=20,
    ),
    walls,
)
def test_no_buffer_crosses_a_wall(lives, walls):
    placed = place(lives, 64, walls)
    for offset, life in zip(placed.offsets, lives, strict=True):
        assert not any(offset < wall < offset + life.size for wall in walls)
    assert placed.peak >= live_peak(lives)
    pairs = [(i, j) for i in range(len(lives)) for j in range(i)]
    for i, j in pairs:
        if lives[i].first <= lives[j].last and lives[j].first <= lives[i].last and lives[i].size and lives[j].size:
            assert placed.offsets[i] >= placed.offsets[j] + lives[j].size or (
                placed.offsets[j] >= placed.offsets[i] + lives[i].size
            )


def test_an_arena_grows_where_it_is():
    arena = Arena(torch.device("cpu"))
    assert arena.nbytes == 0
    arena.grow(128)
    first, _ = arena.at(0)
    arena.grow(64)
    arena.grow(512)
    assert arena.walls == [128, 512]
    assert arena.nbytes == 512
    assert arena.at(64)[0] is first
    assert arena.at(128)[0].numel() == 384
    assert arena.at(192)[1] == 64


def test_graphs_that_do_not_fit_the_budget_go(caplog):
    class Sized(StandIn):
        reserved = 0

        def capture(self, body):
            self.reserved += 100
            return super().capture(body)

        def allocated(self):
            return self.reserved

    memory, backend = Memory(budget=250), Sized()
    graphs = [graph_of(lambda x: torch.tanh(x) * 2, noise(size)) for size in (8, 9, 10)]
    replays = [replaying(graph, backend, memory) for graph in graphs]
    for size, graph, replay in zip((8, 9, 10), graphs, replays, strict=True):
        for _ in range(4):
            got = graph.replay(graph.bind((noise(size),), {}), replay.run)
        assert torch.equal(got, torch.tanh(noise(size)) * 2)
    assert [replay.graphs is not None for replay in replays] == [False, True, True]
    small = Memory(budget=50)
    replay = replaying(graphs[0], backend, small)
    with caplog.at_level(logging.WARNING, "graph_capture"):
        for _ in range(5):
            assert torch.equal(graphs[0].replay(graphs[0].bind((noise(8),), {}), replay.run), torch.tanh(noise(8)) * 2)
    assert replay.graphs is None
    assert len(caplog.records) == 1
    assert "graph_memory=50" in caplog.text


@torch.library.custom_op("graph_capture_tests::scarce", mutates_args=())
def scarce(x: torch.Tensor) -> torch.Tensor:
    """Finds no memory where `left` says so."""
    if left and not left.pop():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return x + 1


left = []


@pytest.fixture
def _plenty():
    left.clear()
    yield
    left.clear()


@pytest.mark.usefixtures("_plenty")
@pytest.mark.parametrize("when", [0, 1, 2, 3])
def test_out_of_memory_falls_back(when, caplog):
    graph = graph_of(lambda x: torch.tanh(scarce(x)) * 2, noise(8))
    memory = Memory()
    other = graph_of(lambda x: torch.tanh(x) * 3, noise(8))
    beside = replaying(other, StandIn(), memory)
    replay = replaying(graph, StandIn(), memory)
    for _ in range(4):
        other.replay(other.bind((noise(8),), {}), beside.run)
    want = torch.tanh(noise(8) + 1) * 2
    with caplog.at_level(logging.WARNING, "graph_capture"):
        for number in range(8):
            left[:] = [number != when]
            assert torch.equal(graph.replay(graph.bind((noise(8),), {}), replay.run), want)
            left.clear()
            if number == when:
                assert beside.graphs is None
                assert not memory.arenas
    assert "out of memory" in caplog.text
    assert replay.graphs is not None
    assert torch.equal(other.replay(other.bind((noise(8),), {}), beside.run), torch.tanh(noise(8)) * 3)


@pytest.mark.usefixtures("_plenty")
def test_out_of_memory_is_raised_where_something_was_written():
    def count(x, total):
        total.add_(x)
        return scarce(total) * 2

    graph = graph_of(count, noise(8), noise(8))
    fused = fuse(graph, FusionConfig(enable_fusion=False))
    total = noise(8)
    fused(noise(8), total)
    left[:] = [False]
    with pytest.raises(torch.OutOfMemoryError):
        fused(noise(8), total)


def test_explain_states_what_each_signature_takes():
    fast = capture(lambda x: torch.tanh(x * 2).sum(0) + 1, FusionConfig(enable_fusion=False, clone_outputs=False))
    for length in (9, 50):
        for _ in range(3):
            fast(noise(length, 8))
    small, large = (fused.explain().memory for fused in fast.graphs)
    assert small["planned"]["cpu"] < large["planned"]["cpu"] <= large["arena"]["cpu"] == small["arena"]["cpu"]
    assert small["results"] == 8 * 4
    assert small["graphs"] is None
    assert "for all signatures" in str(fast.graphs[0].explain())


def test_graph_memory_is_checked():
    with pytest.raises(ValueError, match="graph_memory"):
        FusionConfig(graph_memory=-1)


def test_a_graph_keeps_what_it_uses_and_not_what_the_caller_brought(monkeypatch):
    monkeypatch.setattr(cuda_graph, "COPIED", 16)
    graph = graph_of(lambda x, total: torch.tanh(total.add_(x)) * 2, noise(8), noise(8))
    backend = StandIn()
    replay = replaying(graph, backend)
    x, total = noise(8), noise(8)
    for _ in range(4):
        graph.replay(graph.bind((x, total), {}), replay.run)
    (segment,) = replay.graphs._segments
    held = {v.untyped_storage()._cdata for v in segment.held if isinstance(v, torch.Tensor)}
    assert held.isdisjoint(t.untyped_storage()._cdata for t in (x, total))
    results = {t.untyped_storage()._cdata for t in segment.kept.values()}
    assert results <= held
    assert any(callable(value) for value in segment.held)  # and with it whatever it has for itself
