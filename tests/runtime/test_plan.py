"""The plan of a fused graph: kernels bound to addresses, library regions as steps, failures, profiles."""

import builtins
import gc
import keyword
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import StaticCache

from graph_capture import FusionConfig, SignatureMismatchError, capture, fuse
from graph_capture.codegen import CompiledKernel
from graph_capture.runtime.replay.script import Script
from tests.models import forward, recorded, token_ids
from tests.replaying import UNFUSED, graph_of, noise

ALWAYS = FusionConfig(profile="always")


def gated(x, gate, up):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), up)


def weights():
    return noise(8, 8, seed=1), noise(8, 8, seed=2)


def fused_gated(config=ALWAYS):
    fused = fuse(graph_of(gated, noise(9, 8), *weights()), config)
    fused(noise(9, 8), *weights())
    assert fused.plan is not None
    return fused


def test_kernels_are_bound_to_planned_buffers():
    fused = fused_gated()
    assert fused.plan.counts["kernels"] == 1
    assert "kernels()" in fused.plan.source
    for seed in range(3):
        x = noise(9, 8, seed=seed)
        torch.testing.assert_close(fused(x, *weights()), gated(x, *weights()))


def test_a_kernel_reads_small_arguments_at_fixed_addresses():
    fused = fuse(graph_of(lambda a, b: (F.silu(a) * b) @ b.T, noise(3, 8), noise(3, 8, seed=1)), ALWAYS)
    for seed in range(4):
        a, b = noise(3, 8, seed=seed), noise(3, 8, seed=seed + 10)
        torch.testing.assert_close(fused(a, b), (F.silu(a) * b) @ b.T)
    assert fused.plan.source.count("_copy, ") == 2
    assert fused.plan.counts["kernels"] == 1


def test_a_kernel_follows_large_arguments():
    def run(a, b):
        return (F.silu(a) * b).sum(-1)[:2]

    fused = fuse(graph_of(run, noise(600, 200), noise(600, 200, seed=1)), ALWAYS)
    kernels = [region for region in fused.regions if region.decision]
    assert kernels
    pairs = [(noise(600, 200, seed=seed), noise(600, 200, seed=seed + 10)) for seed in range(6)]
    for a, b in [*pairs, *pairs]:
        torch.testing.assert_close(fused(a, b), run(a, b), rtol=1e-5, atol=1e-4)


def test_a_kernel_that_fails_in_a_plan_is_replaced_for_good(monkeypatch, caplog):
    broken = {"now": False}
    right = CompiledKernel.prepare

    def prepare(self, inputs, outputs):
        launch = right(self, inputs, outputs)

        def fragile():
            if broken["now"]:
                raise RuntimeError("out of registers")
            launch()

        return fragile

    monkeypatch.setattr(CompiledKernel, "prepare", prepare)
    fused = fused_gated()
    broken["now"] = True
    with caplog.at_level(logging.WARNING, "graph_capture"):
        for seed in range(3):
            x = noise(9, 8, seed=seed)
            torch.testing.assert_close(fused(x, *weights()), gated(x, *weights()))
    assert [record.message for record in caplog.records] == [
        "swiglu_0 failed and replays as recorded from now on: out of registers"
    ]
    broken["now"] = False
    strict = fused_gated(FusionConfig(profile="always", fallback_on_error=False))
    broken["now"] = True
    with pytest.raises(RuntimeError, match="out of registers"):
        strict(noise(9, 8), *weights())


def test_a_profile_reads_like_the_graph():
    fused = fused_gated()
    x = noise(9, 8, seed=3)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        fused(x, *weights())
    assert "swiglu_0" in {event.name for event in trace.events()}
    plain = fused(x, *weights())
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        assert torch.equal(fused(x, *weights()), plain)
    assert "with region" not in fused.plan.source


def side_by_side(x, y):
    return F.silu(x) * 2.0, F.rms_norm(y + 1.0, (7,))


def pairs(seed):
    return noise(600, 8, seed=seed), noise(700, 7, seed=seed + 50)


def test_kernels_in_a_row_are_one_call_wherever_the_tensors_of_a_call_lie():
    """What a kernel reads and writes of a call is told to it; results are the caller's; nothing of a call is kept."""
    fused = fuse(graph_of(side_by_side, *pairs(0)), ALWAYS)
    given = [pairs(seed) for seed in range(3)]
    kept = [(fused(*given[turn % 3]), side_by_side(*given[turn % 3])) for turn in range(7)]
    for results, want in kept:
        torch.testing.assert_close(results, want)
    assert fused.plan.source.count("kernels") == 1
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        torch.testing.assert_close(fused(*given[0]), kept[0][1])
    assert {region.name for region in fused.regions} <= {event.name for event in trace.events()}
    torch.testing.assert_close(fused(*given[1]), kept[1][1])
    alive = [weakref.ref(tensor) for tensor in (*given[1], *kept[-1][0])]
    del given, kept, results, want
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_a_view_that_negates_is_not_taken_for_its_memory():
    fused, fast = fuse(graph_of(side_by_side, *pairs(0)), ALWAYS), capture(side_by_side, ALWAYS)
    for turn in range(4):
        x, y = pairs(turn % 2)
        for call in (fused, fast):
            torch.testing.assert_close(call(x, y), side_by_side(x, y))
        if turn == 2:
            with pytest.raises(SignatureMismatchError, match="negative bit"):
                fused(torch._neg_view(x), y)
            torch.testing.assert_close(fast(torch._neg_view(x), y), side_by_side(-x, y))


def test_one_of_several_kernels_in_a_row_that_fails(monkeypatch, caplog):
    right = CompiledKernel.prepare
    broken = set()

    def prepare(self, inputs, outputs):
        launch = right(self, inputs, outputs)

        def fragile():
            if self.name in broken:
                raise RuntimeError("no memory")
            launch()

        return fragile

    fused = fuse(graph_of(side_by_side, *pairs(0)), ALWAYS)
    first, second = [region.kernel.name for region in fused.regions]
    monkeypatch.setattr(CompiledKernel, "prepare", prepare)
    fused(*pairs(0))
    for step, name in enumerate((None, second, None, first, None)):
        broken.update({name} - {None})
        with caplog.at_level(logging.WARNING, "graph_capture"):
            torch.testing.assert_close(fused(*pairs(step)), side_by_side(*pairs(step)))
    assert len([record for record in caplog.records if "no memory" in record.message]) == 2


def broken_matmul(*args, **kwargs):
    raise RuntimeError("no such primitive")


def test_an_op_that_raises_is_named():
    fused = fuse(graph_of(lambda x, w: torch.tanh(F.linear(x, w)) @ w, noise(9, 8), noise(8, 8)), UNFUSED)
    fused(noise(9, 8), noise(8, 8))
    name = next(name for name in fused.plan.function.__globals__ if name.startswith("op_mm"))
    fused.plan.function.__globals__[name] = broken_matmul
    with pytest.raises(RuntimeError, match="no such primitive") as caught:
        fused(noise(9, 8), noise(8, 8))
    assert caught.value.__notes__ == ["raised in a replay by linear"]


def test_a_library_region_that_raises_is_replaced_by_what_was_recorded(llama, caplog):
    config = FusionConfig(profile="always", passes_off=frozenset({"swiglu", "add_rms_norm", "rms_norm", "row"}))
    fused = fuse(recorded(llama, token_ids()), config)
    for seed in range(2):
        fused(input_ids=token_ids(seed=seed))
    fused.plan.function.__globals__["op_mm"] = broken_matmul
    with caplog.at_level(logging.WARNING, "graph_capture"):
        for seed in range(3):
            want = forward(llama, token_ids(seed=seed))
            torch.testing.assert_close(fused(input_ids=token_ids(seed=seed)), want)
    (message,) = [record.message for record in caplog.records]
    assert "no such primitive; raised in a replay by linear, as a part of parallel_linear_0" in message
    with pytest.raises(IndexError):  # the caller's own mistake is no reason
        again = fuse(recorded(llama, token_ids()), config)
        for _ in range(2):
            again(input_ids=token_ids())
        again(input_ids=token_ids() + 100_000)
    torch.testing.assert_close(again(input_ids=token_ids()), forward(llama, token_ids()))
    assert again.plan is not None
    assert not again._given_up


def test_library_regions_are_steps_of_the_plan(llama):
    config = FusionConfig(profile="always", passes_off=frozenset({"swiglu", "add_rms_norm", "rms_norm", "row"}))
    fused = fuse(recorded(llama, token_ids()), config)
    for seed in range(3):
        torch.testing.assert_close(fused(input_ids=token_ids(seed=seed)), forward(llama, token_ids(seed=seed)))
    merged = [region for region in fused.regions if region.kind == "parallel_linear" and region.decision]
    assert merged
    assert f"{merged[0].name}_product" in fused.plan.source


def test_a_library_region_whose_result_is_seen_in_other_strides(caplog):
    """It is a call, not bound to addresses; nothing is copied to where a kernel would want it."""

    def attention(query, key, value, mask):
        wide = (tensor[:, :, None].expand(2, 2, 3, 12, 8).reshape(2, 6, 12, 8) for tensor in (key, value))
        mixed = F.scaled_dot_product_attention(query, *wide, mask)
        return mixed.transpose(1, 2).contiguous().view(2, 12, 48).cumsum(-1)

    query, mask = noise(2, 12, 6, 8).transpose(1, 2), noise(2, 1, 12, 12, seed=3)
    inputs = query, noise(2, 2, 12, 8, seed=1), noise(2, 2, 12, 8, seed=2), mask
    fused = fuse(graph_of(attention, *inputs), ALWAYS)
    with caplog.at_level(logging.WARNING, "graph_capture"):
        for _ in range(3):
            torch.testing.assert_close(fused(*inputs), attention(*inputs))
    assert [region.kind for region in fused.regions] == ["scaled_dot_product_attention"]
    assert "op_copy_" not in fused.plan.source
    assert not caplog.records


def test_decoding_through_a_static_cache(llama):
    """One plan serves every step; the cache is written where the caller has it."""
    caches = [StaticCache(config=llama.config, max_cache_len=16) for _ in range(2)]
    fast = capture(lambda ids, cache: llama(input_ids=ids, past_key_values=cache, use_cache=True).logits)
    for step in range(8):
        ids = token_ids(1, seed=step)
        with torch.no_grad():
            want = llama(input_ids=ids, past_key_values=caches[0], use_cache=True).logits
            torch.testing.assert_close(fast(ids, caches[1]), want)
    for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys)
    assert fast.graphs[-1].plan.counts["views"] > 0


def test_graphs_of_one_scheduler_share_their_arena():
    fast = capture(lambda x: torch.tanh(x * 2).sum(0) + 1, UNFUSED)
    for length in (9, 50, 3):
        for seed in range(3):
            x = noise(length, 8, seed=seed)
            assert torch.equal(fast(x), torch.tanh(x * 2).sum(0) + 1)
    first, largest, last = fast.graphs
    (memory,) = {fused._replay._memory for fused in fast.graphs}
    (arena,) = memory.arenas.values()
    sizes = [sum(fused.plan.peak_bytes.values()) for fused in (first, largest, last)]
    assert sizes[2] < sizes[0] < sizes[1] == arena.nbytes


def test_expanded_arguments_are_planned_for():
    def run(a, b):
        return torch.tanh(torch.matmul(a, b)) + a.sum()

    a, b = noise(1, 4).expand(3, 4), noise(4, 5)
    fused = fuse(graph_of(run, a, b), FusionConfig(enable_fusion=False))
    for seed in range(3):
        a = noise(1, 4, seed=seed).expand(3, 4)
        assert torch.equal(fused(a, b), run(a, b))
    assert fused.plan is not None


# --- names

NAMES = (
    "\ufb01",
    "fi",
    "\xaa",
    "a",
    "\u017f",
    "s",
    "\u212a",
    "K",
    "class",
    "None",
    "__debug__",
    "print",
    "1x",
    "a b",
    "del x\n",
)


def test_names_that_python_takes_for_each_other_or_for_none():
    class Scales(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for number, name in enumerate(NAMES):
                self.register_parameter(name, torch.nn.Parameter(torch.full((5,), 0.5 + number / 10)))

        def forward(self, x):
            for name in NAMES:
                x = torch.relu(x * self._parameters[name]).flip(0) + x.sort().values
            return x

    model, x = Scales(), torch.linspace(-1, 1, 5)
    with torch.no_grad():
        for config in (FusionConfig(profile="static"), FusionConfig(enable_fusion=False)):
            fast = capture(model, config)
            for _ in range(3):
                assert torch.allclose(fast(x), model(x))


@pytest.mark.parametrize("wish", ["", "\ufb01", "1", "lambda", "a-b", "__import__", "x" * 500, "\n", "replay"])
def test_a_plans_variables_are_identifiers_of_their_own(wish):
    script = Script()
    first, second = script.name(wish), script.name(wish)
    assert first != second
    assert all(name.isascii() and name.isidentifier() for name in (first, second))
    assert not any(hasattr(builtins, name) or keyword.iskeyword(name) for name in (first, second))
