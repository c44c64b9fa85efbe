"""What only a CUDA device can show; skipped elsewhere."""

import copy
import gc

import pytest
import torch
from torch import nn
from transformers import StaticCache

from graph_capture import (
    CompiledKernel,
    FusionConfig,
    InferEngine,
    UnrecordedWriteError,
    accelerate,
    capture,
    fuse,
    record,
)
from graph_capture.ir.numerics import distance
from graph_capture.runtime.replay.capturing import Cuda
from tests import llm
from tests.models import forward, recorded, tiny_llama, token_ids

pytestmark = pytest.mark.gpu
ALWAYS = FusionConfig(profile="always")


def assert_gated(fused, regions):
    """Norms are kernels, and so is every gate: by itself, or behind the products where these are ours."""
    kinds = {region.kind for region in regions}
    assert "add_rms_norm" in kinds
    assert kinds & {"swiglu", "linear_epilogue"}
    assert not [node for node in fused.subgraph.nodes if node.op_type in ("silu", "aten.silu.default")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_fused_llama_is_as_close_to_float64_as_eager(dtype):
    model = tiny_llama(dtype=dtype).cuda()
    graph = recorded(model, token_ids().cuda())
    fused = fuse(graph, ALWAYS)
    kernels = [region for region in fused.regions if region.kernel is not None]
    assert_gated(fused, kernels)
    assert all(region.decision and not region.kernel.interpreted for region in kernels)
    ids = token_ids(seed=2).cuda()
    assert torch.equal(graph.run(input_ids=ids), forward(model, ids))
    exact = forward(copy.deepcopy(model).double(), ids)
    # Per region the bar is exact (verify); over a whole model two roundings that differ drift apart, either way.
    assert distance(fused(input_ids=ids), exact) <= 1.2 * distance(forward(model, ids), exact)
    assert fused.verify(input_ids=ids).ok, str(fused.verify(input_ids=ids))


def test_regions_are_measured():
    fused = fuse(recorded(tiny_llama().cuda(), token_ids().cuda()))
    measured = [region for region in fused.regions if region.kernel is not None]
    assert_gated(fused, measured)
    for region in measured:
        assert region.decision.t_fallback > 0
        assert region.decision.t_fused > 0


def test_decoding_through_a_static_cache():
    model = tiny_llama(layers=2).cuda()

    def step(ids, cache):
        with torch.no_grad():
            return model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    fast = capture(step, FusionConfig(enable_fusion=False))
    ours, theirs = (StaticCache(config=model.config, max_cache_len=16) for _ in range(2))
    for number, length in enumerate((5, 1, 1, 1)):
        ids = token_ids(length, seed=number).cuda()
        assert torch.equal(fast(ids, ours), step(ids, theirs))
    assert len(fast.misses) == 2


def test_random_ops_draw_eagers_stream():
    x = torch.ones(8, device="cuda")
    model = nn.Dropout(0.5).train()
    with record(x) as recording:
        recording.output(model(x) + torch.rand(8, device="cuda"))
    torch.manual_seed(3)
    want = model(x) + torch.rand(8, device="cuda")
    torch.manual_seed(3)
    assert torch.equal(recording.graph.run(x), want)


def test_cpu_graphs_have_kernels_for_the_cpu():
    model, ids = tiny_llama(layers=1), token_ids()
    fused = fuse(recorded(model, ids), ALWAYS)
    kernels = [region.kernel for region in fused.regions if isinstance(region.kernel, CompiledKernel)]
    assert all(kernel.target.name == "c" for kernel in kernels)
    torch.testing.assert_close(fused(input_ids=ids), forward(model, ids))


@pytest.mark.parametrize("rows", [[[5, 9, 4]], [[5, 9, 4], [7, 3, 8, 6, 4, 4, 5]]], ids=["one", "padded"])
def test_the_engine_says_what_the_model_says(rows):
    model = llm.endless("llama").cuda()
    engine = InferEngine(model, max_length=64, config=ALWAYS)
    ids, mask = llm.padded(rows)
    want = model.generate(ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=20, do_sample=False)
    for _ in range(3):
        assert [c.tokens for c in engine.generate(rows, max_new_tokens=20)] == want[:, ids.shape[1] :].tolist()
    assert engine.stats()["eager"] == {}
    assert all(phase.fused.cuda_graphs for phase in engine.session(len(rows)).phases.values() if phase.replays > 2)
    sampled = [engine.generate(rows, max_new_tokens=20, temperature=1.0, top_p=0.9, seed=1) for _ in range(2)]
    assert [c.tokens for c in sampled[0]] == [c.tokens for c in sampled[1]]


def test_generate_over_captured_steps():
    model = llm.endless("llama").cuda()
    ids, mask = (tensor.cuda() for tensor in llm.padded([[5, 9, 4], [7, 3, 8, 6, 4, 4, 5]]))
    options = {"inputs": ids, "attention_mask": mask, "max_new_tokens": 20}
    for more in ({}, {"num_beams": 2}, {"repetition_penalty": 1.3}):
        want = model.generate(**options, **more)
        accelerate(model, ALWAYS, max_length=64)
        for _ in range(3):
            assert torch.equal(model.generate(**options, **more), want)
        assert model.accelerated.declined is None
        model.accelerated.undo()


@pytest.mark.parametrize("cuda_graph", ["auto", "off"])
@pytest.mark.parametrize("size", [64, 2048])
def test_kernels_that_start_early_see_what_others_wrote(size, cuda_graph):
    """Each row needs a whole column of the result before: of our kernel, of torch's, or of a copy."""
    x = torch.randn(size, size, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    kept = torch.zeros_like(x)

    def mixed(x):
        for step in range(24):
            x = torch.softmax((x.t() / 2 + x) / 8, -1) * size  # far from one-hot: rounding must not decide
            x = torch.nn.functional.layer_norm(x.t(), (size,)) + step % 2
            if step % 3 == 1:
                x = x.flip(0)
            if step % 3 == 2:
                kept.copy_(x.t())
                x = kept + 1
        return x

    with record(x) as recording:
        recording.output(mixed(x))
    fused = fuse(recording.graph, FusionConfig(profile="always", cuda_graph=cuda_graph))
    assert sum(region.kernel is not None for region in fused.regions) >= 24
    first = [fused(x) for _ in range(4)][-1]
    torch.testing.assert_close(first, mixed(x.double()).float(), rtol=1e-3, atol=1e-3)
    for _ in range(200):
        assert torch.equal(fused(x), first)


def test_garbage_does_not_end_a_capture(monkeypatch, caplog):
    capture = Cuda.capture

    def littering(self, body):
        def beside():
            if littered and torch.cuda.is_current_stream_capturing():
                cycle = [littered.pop()]
                cycle.append(cycle)
                del cycle
                assert len([[] for _ in range(10**5)]) == 10**5  # enough to have garbage collected
            return body()

        return capture(self, beside)

    littered = []
    monkeypatch.setattr(Cuda, "capture", littering)
    x = torch.randn(64, 64, device="cuda")
    with record(x) as recording:
        recording.output(torch.softmax(x, -1) * 2)
    fused = fuse(recording.graph, ALWAYS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
    littered.append([graph])
    del graph
    for _ in range(4):
        torch.testing.assert_close(fused(x), torch.softmax(x, -1) * 2)
    assert not littered
    assert fused.cuda_graphs is not None, caplog.text


def test_graphs_outlive_the_workspaces_that_torch_compile_frees():
    model = llm.endless("llama").to("cuda", torch.bfloat16)
    engine = InferEngine(model, max_length=64)
    want = [engine.generate([5, 9, 4], max_new_tokens=20).tokens for _ in range(3)][-1]
    weight = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    step = torch.compile(lambda x: torch.relu(x @ weight) @ weight, mode="reduce-overhead", dynamic=False)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        step(weight)
    torch.cuda.empty_cache()
    assert engine.generate([5, 9, 4], max_new_tokens=20).tokens == want


def test_a_raw_triton_launch_is_found_out():
    import triton
    import triton.language as tl

    @triton.jit
    def double(source, destination, size: tl.constexpr):
        offsets = tl.arange(0, size)
        tl.store(destination + offsets, tl.load(source + offsets) * 2)

    x, buffer = torch.randn(16, device="cuda"), torch.zeros(16, device="cuda")
    with pytest.raises(UnrecordedWriteError, match="uninitialised memory"), record(x) as recording:
        out = torch.empty_like(x)
        double[(1,)](x, out, 16)
        recording.output(out + 1)
    with pytest.raises(UnrecordedWriteError, match="'const' changed"), record(x) as recording:
        y = buffer + x
        double[(1,)](x, buffer, 16)
        recording.output(buffer + y)


@pytest.mark.parametrize("verify", [False, True])
def test_recording_needs_no_more_memory_than_the_forward(verify):
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)]).cuda().eval()
    x = torch.randn(4096, 1024, device="cuda")

    def peak(run):
        gc.collect()  # what other tests left would be freed meanwhile
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    def recorded():
        with record(x, verify=verify) as recording:
            recording.output(model(x))

    with torch.no_grad():
        eager = peak(lambda: model(x))
    assert peak(recorded) <= eager + x.nbytes * verify + 2**20  # the check holds the result while it replays
