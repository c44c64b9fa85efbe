"""What only a CUDA device can show; skipped elsewhere."""

import copy

import pytest
import torch
from graph_capture.runtime.verify import distance
from torch import nn
from transformers import StaticCache

from graph_capture import CompiledKernel, FusionConfig, UnrecordedWriteError, capture, fuse, record
from tests.models import forward, recorded, tiny_llama, token_ids

pytestmark = pytest.mark.gpu
ALWAYS = FusionConfig(profile="always")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_fused_llama_is_as_close_to_float64_as_eager(dtype):
    model = tiny_llama(dtype=dtype).cuda()
    graph = recorded(model, token_ids().cuda())
    fused = fuse(graph, ALWAYS)
    kernels = [region for region in fused.regions if region.kernel is not None]
    assert {"swiglu", "add_rms_norm"} <= {region.kind for region in kernels}
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
    assert {"swiglu", "add_rms_norm"} <= {region.kind for region in measured}
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


def test_cpu_graphs_replay_as_recorded_where_kernels_are_for_cuda():
    model, ids = tiny_llama(layers=1), token_ids()
    fused = fuse(recorded(model, ids), ALWAYS)
    assert not any(isinstance(region.kernel, CompiledKernel) for region in fused.regions)
    reasons = [region.decision.reason for region in fused.regions if region.kind == "swiglu"]
    assert len(reasons) == 1
    assert "on the CPU" in reasons[0]
    torch.testing.assert_close(fused(input_ids=ids), forward(model, ids))


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
