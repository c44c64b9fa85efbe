"""InfiniLM's Llama, in shape: an MLP and a decoder layer record, fuse and replay; and the twins that must not."""

import gc
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, SignatureMismatchError, capture, fuse
from graph_capture.frontends.infinicore.frontend import to_torch
from graph_capture.ir.numerics import distance
from tests.infinicore_models import ic_model, ops, options, randomised, recorded, regions, tensors, torch_layer, zeros
from tests.replaying import noise

ALWAYS = FusionConfig(profile="always")
X, Y = noise(3, 8, seed=1), noise(3, 8, seed=2)


# --- models


def layer_of(ic, batch, length, heads=4, kv_heads=2):
    hidden, width = 8 * heads, 8
    models = ic_model(ic)
    layer = models.Layer(hidden, 48, heads, kv_heads, **options(ic))
    weights = randomised(ic, layer)
    rope = ic.nn.RoPE(16, 10000.0, width, **options(ic))
    tables = to_torch(rope._sin_table), to_torch(rope._cos_table)
    x = noise(batch, length, hidden, seed=7)

    def cache():
        return models.Cache(batch, 16, kv_heads, width, **options(ic))

    def exact(positions, caches=None, used=0):
        caches = caches or tuple(torch.zeros(batch, 16, kv_heads, width, dtype=torch.float64) for _ in range(2))
        return torch_layer(weights, x.double(), positions, tables, (*caches, used), heads, kv_heads), caches

    def run(x, positions, cache):
        return layer(x, positions, rope, cache)

    return SimpleNamespace(layer=layer, run=run, x=x, cache=cache, exact=exact)


def test_an_mlp_fuses_its_gate(ic):
    mlp = ic_model(ic).Mlp(8, 24, **options(ic))
    weights = randomised(ic, mlp)
    x = noise(16, 8)
    graph, result = recorded(mlp, *tensors(ic, x))
    assert ops(graph) == ["linear", "silu", "linear", "mul", "linear"]
    assert list(graph.captured) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    gate, up = (x.double() @ weights[f"{name}_proj.weight"].T for name in ("gate", "up"))
    exact = (F.silu(gate) * up) @ weights["down_proj.weight"].T
    fused = fuse(graph, ALWAYS)
    assert "swiglu" in regions(fused)
    for found in (result, graph.run(*tensors(ic, x)), fused(*tensors(ic, x))):
        assert distance(to_torch(found), exact) < 1e-6
    mlp.down_proj.weight.copy_(tensors(ic, torch.zeros(8, 24))[0])  # weights are read by reference
    assert not to_torch(fused(*tensors(ic, x))).any()


@pytest.mark.parametrize(("batch", "length", "kv_heads"), [(1, 16, 2), (2, 5, 2), (1, 5, 4), (1, 1, 2)])
def test_a_decoder_layer_records_fuses_and_replays(ic, batch, length, kv_heads):
    made = layer_of(ic, batch, length, kv_heads=kv_heads)
    positions = torch.arange(length)
    exact, caches = made.exact(positions)
    made.run(*tensors(ic, made.x, positions), made.cache())  # makes the buffer that the layer keeps
    graph, result = recorded(made.run, *tensors(ic, made.x, positions), made.cache())
    fused = fuse(graph, ALWAYS)
    assert {"rope", "scaled_dot_product_attention", "add_rms_norm"} <= set(regions(fused))
    assert regions(fused).count("scaled_dot_product_attention") == batch
    left = [node.op_type for node in fused.subgraph.nodes]
    assert not {"softmax", "matmul", "repeat_kv", "rope", "silu"} & set(left)
    assert left.count("aten.copy_.default") == 2 + batch  # the caches, and the buffer that the layer keeps
    assert distance(to_torch(result), exact) < 1e-6
    for replay in (graph.run, fused):
        cache = made.cache()
        assert distance(to_torch(replay(*tensors(ic, made.x, positions), cache)), exact) < 1e-6
        assert cache.used == length
        assert distance(to_torch(cache.keys), caches[0]) < 1e-6


def test_a_decode_step_reads_the_cache_that_a_prefill_filled(ic):
    made = layer_of(ic, 1, 1)
    cache, positions = made.cache(), torch.tensor([3])
    filled = noise(1, 16, 2, 8, seed=9), noise(1, 16, 2, 8, seed=10)
    for part, values in zip((cache.keys, cache.values), filled, strict=True):
        part.copy_(tensors(ic, values)[0])
    cache.used = 3
    made.run(*tensors(ic, made.x, positions), made.cache())
    exact, _ = made.exact(positions, tuple(part.double() for part in filled), 3)
    graph, result = recorded(made.run, *tensors(ic, made.x, positions), cache)
    assert distance(to_torch(result), exact) < 1e-6
    cache.used = 3
    assert distance(to_torch(fuse(graph, ALWAYS)(*tensors(ic, made.x, positions), cache)), exact) < 1e-6
    assert "self_attn.q_proj.weight" in graph.captured
    assert {node.source.module for node in graph.subgraph.nodes} >= {"self_attn.q_proj", "mlp.gate_proj"}


def test_capture_serves_a_module_and_records_again_after_a_change(ic):
    mlp = ic_model(ic).Mlp(8, 24, **options(ic))
    randomised(ic, mlp)
    fast = capture(mlp, ALWAYS)
    first = to_torch(fast(*tensors(ic, X))).clone()
    assert torch.equal(to_torch(fast.graphs[0].recorded.run(*tensors(ic, X))), first)
    fast(*tensors(ic, X))
    assert len(fast.misses) == 1
    mlp.down_proj.weight = ic.nn.Parameter(zeros(ic, (8, 24), **options(ic)))
    assert not to_torch(fast(*tensors(ic, X))).any()
    assert "down_proj.weight" in fast.misses[-1]
    fast(*tensors(ic, noise(5, 8)))
    assert len(fast.misses) == 3


def test_devices_and_dtypes_count_by_value(ic):
    def program(a, dtype, device):
        return a + zeros(ic, (3, 8), dtype=dtype, device=device)

    graph, _ = recorded(program, *tensors(ic, X), ic.float32, ic.device("cpu"))
    assert torch.equal(to_torch(graph.run(*tensors(ic, X), tensors(ic, X)[0].dtype, ic.device("cpu"))), X)
    with pytest.raises(SignatureMismatchError):
        graph.run(*tensors(ic, X), ic.float64, ic.device("cpu"))


@pytest.mark.gpu
def test_memory_of_a_cuda_device_is_shared(ic):
    if ic.lib._infinicore.__file__.endswith(".so"):
        pytest.skip("the library was built for the CPU")
    on = {"dtype": ic.bfloat16, "device": ic.device("cuda", 0)}
    mlp = ic_model(ic).Mlp(64, 192, **on)
    weights = {name: to_torch(parameter) for name, parameter in mlp.state_dict().items()}
    for name, weight in weights.items():
        assert weight.is_cuda
        weight.copy_(noise(*weight.shape, seed=len(name)) * 0.3)
    x, residual = (noise(256, 64, seed=seed).bfloat16().cuda() for seed in (1, 2))

    def block(x, residual):
        hidden = mlp(x)
        hidden += residual
        residual.copy_(hidden)
        return hidden

    def exact():
        gate, up, down = (weights[f"{name}_proj.weight"].double() for name in ("gate", "up", "down"))
        return (F.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T + residual.double()

    graph, _ = recorded(block, ic.from_torch(x), ic.from_torch(residual.clone()))
    fused = fuse(graph, ALWAYS)
    assert "swiglu" in regions(fused)
    for replay in (graph.run, fused, fused, fused):  # the last ones in a CUDA graph
        written = residual.clone()
        found = to_torch(replay(ic.from_torch(x), ic.from_torch(written)))
        assert found.is_cuda
        assert distance(found, exact()) < 1e-2
        assert torch.equal(written, found)
    kept = fused(ic.from_torch(x), ic.from_torch(residual.clone())).view((64, 256))
    gc.collect()
    [torch.full((256, 64), 7.0, device="cuda", dtype=torch.bfloat16) for _ in range(16)]
    assert distance(to_torch(kept).view(256, 64), exact()) < 1e-2


# --- negative twins


def test_an_intermediate_that_escapes_keeps_its_copy(ic):
    def program(a):
        hidden = a * a
        before = hidden.view((24,))
        hidden += a
        return before, hidden + hidden

    graph, _ = recorded(program, *tensors(ic, X))
    fused = fuse(graph, ALWAYS)
    assert "aten.copy_.default" in [node.op_type for node in fused.subgraph.nodes]
    before, after = fused(*tensors(ic, X))
    assert torch.equal(to_torch(before).view(3, 8), X * X + X)
    assert torch.allclose(to_torch(after), 2 * (X * X + X))


def test_a_source_that_is_written_later_keeps_its_copy(ic):
    def program(a, b):
        kept = a + b
        made = ic.empty([3, 8], **options(ic))
        made.copy_(kept)
        kept += b
        return made + made, kept

    graph, _ = recorded(program, *tensors(ic, X, Y))
    made, kept = fuse(graph, ALWAYS)(*tensors(ic, X, Y))
    assert torch.allclose(to_torch(made), 2 * (X + Y))
    assert torch.allclose(to_torch(kept), X + 2 * Y)


def test_attention_whose_weights_are_returned_is_not_one_op(ic):
    def attend(q, k, v):
        scores = ic.matmul(q, k.permute((0, 2, 1)), alpha=0.5)
        ic.nn.functional.causal_softmax(scores, out=scores)
        return scores @ v, scores

    values = [noise(2, 4, 8, seed=seed) for seed in range(3)]
    graph, _ = recorded(attend, *tensors(ic, *values))
    assert "scaled_dot_product_attention" not in regions(fuse(graph, ALWAYS))
    graph, _ = recorded(lambda *args: attend(*args)[0], *tensors(ic, *values))
    assert "scaled_dot_product_attention" in regions(fuse(graph, ALWAYS))
