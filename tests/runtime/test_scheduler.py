"""Decisions, dispatch, fallback."""

import logging

import pytest
import torch
import torch.nn.functional as F

import graph_capture as gc
from graph_capture import FusionConfig, FusionError, FusionHeuristics, FusionScheduler, OpNode, SubGraph
from graph_capture.codegen import CompiledKernel
from graph_capture.runtime.decide import heuristics as heuristics_module

ALWAYS = FusionConfig(profile="always")
SHAPES = {"gate": (4, 64), "up": (4, 64)}


def inputs(dtype=torch.float32):
    return {"gate": torch.randn(4, 64, dtype=dtype), "up": torch.randn(4, 64, dtype=dtype)}


def recorded_swiglu(x):
    with gc.record(x) as recording:
        recording.output(F.silu(x) * (x + 1))
    return recording.graph


def test_dispatch_runs_a_pattern():
    tensors = inputs()
    for config in (ALWAYS, FusionConfig(), FusionConfig(enable_fusion=False)):
        result = FusionScheduler(config).dispatch(gc.create_swiglu_pattern(), tensors)
        assert result.keys() == {"output"}
        torch.testing.assert_close(result["output"], F.silu(tensors["gate"]) * tensors["up"])


def test_dispatch_add_rms_norm_has_two_outputs():
    x, residual, weight = torch.randn(3, 32), torch.randn(3, 32), torch.randn(32)
    result = FusionScheduler(ALWAYS).dispatch(
        gc.create_add_rms_norm_pattern(), {"x": x, "residual": residual, "weight": weight}
    )
    torch.testing.assert_close(result["sum"], x + residual)
    torch.testing.assert_close(result["output"], F.rms_norm(x + residual, (32,), weight, 1e-6))


def test_dispatch_names_missing_inputs():
    with pytest.raises(FusionError, match="inputs are missing: up"):
        FusionScheduler().dispatch(gc.create_swiglu_pattern(), {"gate": torch.randn(2)})


@pytest.mark.parametrize(
    ("config", "shapes", "reason"),
    [
        (FusionConfig(enable_fusion=False), SHAPES, "fusion is off"),
        (FusionConfig(min_nodes_for_fusion=3), SHAPES, "2 ops are fewer"),
        (FusionConfig(max_graph_size=1), SHAPES, "2 ops are more"),
        (FusionConfig(min_tensor_elements=257), SHAPES, "256 elements are fewer"),
    ],
)
def test_should_fuse_says_why_not(config, shapes, reason):
    decision = FusionHeuristics(config).should_fuse(gc.create_swiglu_pattern(), shapes)
    assert not decision
    assert reason in decision.reason


def test_should_fuse():
    heuristics = FusionHeuristics()
    assert heuristics.should_fuse(gc.create_swiglu_pattern(), SHAPES)
    assert heuristics.should_fuse(gc.create_swiglu_pattern(), list(SHAPES.values()))
    unknown = SubGraph((OpNode("matmul", ("x", "w"), ("y",)), OpNode("silu", ("y",), ("z",))), ("x", "w"), ("z",))
    decision = heuristics.should_fuse(unknown, [(2, 2), (2, 2)])
    assert not decision
    assert "matmul" in decision.reason


def test_the_ratio_decides(monkeypatch):
    tensors, pattern = inputs(), gc.create_swiglu_pattern()
    for t_fused, use in ((0.79, True), (0.81, False), (2.0, False)):
        monkeypatch.setattr(heuristics_module, "compare", lambda *_, t=t_fused: (1.0, t))
        decision = FusionHeuristics(FusionConfig(enable_cache=False)).profile_and_decide(pattern, tensors)
        assert bool(decision) is use
        assert (decision.t_fallback, decision.t_fused) == (1.0, t_fused)
    assert "2.00x slower" in decision.reason


def test_measurements_are_cached(monkeypatch):
    calls = []
    monkeypatch.setattr(heuristics_module, "compare", lambda *_: calls.append(1) or (1.0, 0.5))
    heuristics = FusionHeuristics()
    for _ in range(3):
        heuristics.profile_and_decide(gc.create_swiglu_pattern(), inputs())
    assert len(calls) == 1
    heuristics.profile_and_decide(gc.create_swiglu_pattern(), inputs(torch.float16))
    assert len(calls) == 2
    uncached = FusionHeuristics(FusionConfig(enable_cache=False))
    for _ in range(2):
        uncached.profile_and_decide(gc.create_swiglu_pattern(), inputs())
    assert len(calls) == 4


def test_static_profile_does_not_use_interpreted_kernels():
    for target in ("auto", "ninetoothed"):
        heuristics = FusionHeuristics(FusionConfig(profile="static", target=target))
        decision = heuristics.profile_and_decide(gc.create_swiglu_pattern(), inputs())
        assert bool(decision) is (target == "auto" or torch.cuda.is_available())


def test_a_kernel_that_cannot_be_made_falls_back_with_the_reason(monkeypatch):
    def refuse(*_):
        raise RuntimeError("out of registers")

    scheduler = FusionScheduler(ALWAYS)
    monkeypatch.setattr(scheduler.heuristics.compiler, "compile", refuse)
    x = torch.randn(4, 8)
    fused = scheduler.analyze(recorded_swiglu(x))
    assert [region.decision.reason for region in fused.regions] == ["no kernel: RuntimeError: out of registers"]
    assert fused.regions[0].source == ""
    assert torch.equal(fused(x), F.silu(x) * (x + 1))
    strict = FusionScheduler(FusionConfig(profile="always", fallback_on_error=False))
    monkeypatch.setattr(strict.heuristics.compiler, "compile", refuse)
    with pytest.raises(FusionError, match="out of registers"):
        strict.analyze(recorded_swiglu(x))


def test_a_kernel_that_fails_at_run_time_is_replaced_once(monkeypatch, caplog):
    x = torch.randn(4, 8)
    fused = gc.fuse(recorded_swiglu(x), ALWAYS)
    assert fused.regions[0].decision

    def fail(*_):
        raise RuntimeError("launch failed")

    monkeypatch.setattr(CompiledKernel, "__call__", fail)
    with caplog.at_level(logging.WARNING, "graph_capture"):
        for _ in range(3):
            assert torch.equal(fused(x), F.silu(x) * (x + 1))
    assert len(caplog.records) == 1
    assert "launch failed" in caplog.text


def test_unknown_ops_replay_as_recorded():
    x = torch.randn(4, 8)
    with gc.record(x) as recording:
        recording.output(torch.cumsum(F.silu(x) * x, -1).sort(-1))
    fused = gc.fuse(recording.graph, ALWAYS)
    got, want = fused(x), torch.cumsum(F.silu(x) * x, -1).sort(-1)
    torch.testing.assert_close(got[0], want[0])
    assert len(fused.regions) == 1


def test_debug_mode_reports_decisions_and_checks_results(caplog):
    x = torch.randn(4, 8)
    with caplog.at_level(logging.INFO, "graph_capture"):
        fused = gc.fuse(recorded_swiglu(x), FusionConfig(profile="always", debug_mode=True))
        fused(x)
    assert "silu" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "bad",
    [
        {"profile": "guess"},
        {"target": "fortran"},
        {"fusion_ratio": 0},
        {"max_graph_size": 0},
        {"min_tensor_elements": -1},
    ],
)
def test_config_refuses_nonsense(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        FusionConfig(**bad)
