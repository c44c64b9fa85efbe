"""Receipts: every candidate accounted for, every op answerable, the pass or kernel that is to blame named."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, OpNode, fuse, record
from graph_capture.codegen import CompiledKernel
from graph_capture.log import configure
from graph_capture.passes import DEFAULT, PatternRegistry, pattern
from tests.models import recorded, tiny_llama, token_ids

STATIC = FusionConfig(profile="static")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def graph_of(function, *args):
    with record(*args) as recording:
        recording.output(function(*args))
    return recording.graph


def rule(fused, name, spelling=False):
    rows = {row["spelling"]: row for row in fused.explain().rules if row["rule"] == name}
    return rows.get(spelling) or next(iter(rows.values()))


@pytest.fixture(scope="module")
def fused():
    return fuse(recorded(tiny_llama(2), token_ids()), STATIC)


def test_candidates_are_matches_and_refusals(fused):
    for row in fused.explain().rules:
        assert row["candidates"] == row["matches"] + sum(row["refusals"].values()), row
    norms = rule(fused, "rms_norm")
    assert norms["refusals"] == {"overlaps add_rms_norm, which saves more": 4}
    assert "model.layers.*.post_attention_layernorm" in norms["places"]["overlaps add_rms_norm, which saves more"]


def test_explain_as_text_and_json(fused):
    explanation = fused.explain()
    text = str(explanation)
    assert "add_rms_norm: 4 of 4 candidates matched" in text
    assert "constants: " in text
    data = json.loads(explanation.to_json())
    assert data["constant_bytes"] == fused.constant_bytes > 0
    assert {"region", "bytes_before", "bytes_after", "alike", "ops", "used", "reason"} <= data["regions"][0].keys()
    for row in data["regions"]:
        assert row["bytes_before"] - row["bytes_after"] == row["bytes_saved"] > 0


def test_explain_states_the_memory_once_there_is_a_plan():
    x = torch.randn(40, 32)
    fused = fuse(graph_of(lambda x: torch.tanh(x.sin().cumsum(0)).cumsum(1) * 2.0, x), FusionConfig(profile="static"))
    assert fused.explain().memory == {}
    fused(x)
    memory = fused.explain().memory
    assert memory["planned"] == {"cpu": sum(fused.plan.peak_bytes.values())}
    assert memory["eager"]["cpu"] >= x.nbytes
    assert memory["graphs_before"] is memory["graphs_after"] is None
    assert "intermediate values on cpu: " in str(fused.explain())
    assert json.loads(fused.explain().to_json())["memory"] == memory


def test_why_of_a_module(fused):
    answer = fused.why("layers.1.mlp")
    assert {row["where"].split(".mlp")[0] for row in answer.rows} == {"model.layers.1"}
    assert [row["op"] for row in answer.rows] == ["linear", "silu", "linear", "mul", "linear"]
    by_op = {row["value"]: row for row in answer.rows}
    silu = next(row for row in answer.rows if row["op"] == "silu")
    assert silu["region"] == "swiglu_1"
    assert "swiglu_1 (model.layers.1.mlp): used: " in str(answer)
    down = list(by_op.values())[-1]
    assert down["region"] is None
    assert "skinny_linear: 9 rows are more than 8" in down["reasons"]
    assert json.loads(answer.to_json()) == answer.rows


def test_why_of_every_op(fused):
    for node in fused.recorded.subgraph:
        (row,) = [row for row in fused.why(node.outputs[0]).rows if row["value"] == node.outputs[0]]
        assert row["reasons"], node
    reasons = fused.why("rope_0").rows[0]["reasons"]
    assert reasons[0].startswith("rope_0 (model.layers.0.self_attn): used: ")
    with pytest.raises(KeyError, match="no module, value or region"):
        fused.why("layers.7")


def test_why_of_what_clean_up_removed():
    def program(x):
        return (x + 1).sin() * (x + 1).cos() + torch.arange(8).sum()

    fused = fuse(graph_of(program, X), STATIC)
    assert fused.why("add_1").rows[0]["reasons"] == ["removed by the pass common_subexpressions"]
    assert fused.why("arange").rows[0]["reasons"] == ["computed once: it is the same in every replay"]


def test_refusals_say_which_guard():
    def almost(x, weight):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * (x * scale), scale

    fused = fuse(graph_of(almost, X, torch.ones(8)), STATIC)
    assert "rsqrt inside is used elsewhere" in rule(fused, "rms_norm", spelling=True)["refusals"]

    def spelled_otherwise(x):
        return 0.5 * x * (1 + torch.tanh(0.9 * (x + 0.044715 * x**3)))

    reasons = rule(fuse(graph_of(spelled_otherwise, X), STATIC), "gelu", spelling=True)["refusals"]
    assert "its constant is 0.9, not 0.7978846" in reasons


def test_cycles_name_the_op():
    def program(gate):
        up = gate.view(-1)
        activated = F.silu(gate.view(-1))
        up.mul_(2)
        return activated * up

    fused = fuse(graph_of(program, torch.randn(8)), STATIC)
    assert rule(fused, "swiglu")["refusals"] == {"would have created a cycle through aten.mul_.Tensor": 1}


# --- patterns and passes by configuration


def test_patterns_of_one_configuration_do_not_leak():
    mine = PatternRegistry(DEFAULT)

    @pattern("sine_glu", registry=mine)
    def sine_glu(gate, up):
        return torch.sin(gate) * up

    graph = graph_of(lambda x: torch.sin(x) * (x + 1), X)
    kinds = [region.kind for region in fuse(graph, FusionConfig(profile="static", patterns=tuple(mine))).regions]
    assert kinds == ["sine_glu"]
    assert [region.kind for region in fuse(graph, STATIC).regions] == ["pointwise"]
    assert [region.kind for region in fuse(graph, FusionConfig(profile="static", patterns=())).regions] == ["pointwise"]


def test_passes_can_be_left_out_by_name():
    graph = recorded(tiny_llama(1), token_ids())
    names = ("swiglu", "parallel_linear", "rms_norm", "common_subexpressions", "constants", "pointwise")
    for name in names:
        fused = fuse(graph, FusionConfig(profile="static", passes_off={name}))
        assert name not in [region.kind for region in fused.regions]
        assert name not in [stage for stage, _ in fused.stages]
        torch.testing.assert_close(fused(input_ids=token_ids()), graph.run(input_ids=token_ids()))
    nothing = fuse(graph, FusionConfig(profile="static", passes_off=set(names) | {"add_rms_norm"}))
    assert "add_rms_norm" not in [region.kind for region in nothing.regions]
    with pytest.raises(ValueError, match="there is no pass 'swigloo'"):
        FusionConfig(passes_off={"swigloo"})


# --- bisecting


def test_bisect_finds_nothing_where_all_is_well(fused):
    result = fused.bisect(input_ids=token_ids(seed=3))
    assert result.culprit is None
    assert [name for name, _ in result.steps][-1] in [region.name for region in fused.regions]
    assert "within its tolerance" in str(result)


def test_bisect_names_a_wrong_kernel(monkeypatch):
    graph = graph_of(lambda x: torch.exp(F.silu(x) * (x + 1) @ torch.eye(8)), X)
    fused = fuse(graph, FusionConfig(profile="always"))
    assert fused.bisect(X).culprit is None
    right = CompiledKernel.__call__
    monkeypatch.setattr(CompiledKernel, "__call__", lambda self, *inputs: tuple(2 * t for t in right(self, *inputs)))
    result = fused.bisect(X)
    assert result.culprit == fused.regions[0].name
    assert result.error > 0.1
    assert f"off since {result.culprit}" in str(result)


def test_bisect_names_a_wrong_pass(monkeypatch):
    from graph_capture.passes import cleanup

    def cosine(node):
        return OpNode("cos", node.inputs, node.outputs) if node.op_type == "sin" else node

    def broken(graph):
        return cleanup.with_nodes(graph, [cosine(node) for node in graph.nodes])

    monkeypatch.setitem(cleanup.CLEAN_UP, "broken", broken)
    fused = fuse(graph_of(lambda x: x.sin().mul_(2).mul_(3), X), STATIC)
    assert fused.bisect(X).culprit == "broken"


def test_bisect_undoes_what_is_written():
    cache = torch.zeros(4, 8)

    def step(x):
        cache.add_(x)
        return cache * torch.sigmoid(x) + torch.rand(1) * 0

    fused = fuse(graph_of(step, X), FusionConfig(profile="always"))
    before, state = cache.clone(), torch.get_rng_state()
    assert fused.bisect(X).culprit is None
    assert torch.equal(cache, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_bisect_takes_a_tolerance(monkeypatch):
    fused = fuse(graph_of(lambda x: torch.exp(F.silu(x) * (x + 1)), X), FusionConfig(profile="always"))
    right = CompiledKernel.__call__
    monkeypatch.setattr(
        CompiledKernel, "__call__", lambda self, *inputs: tuple(1.001 * t for t in right(self, *inputs))
    )
    assert fused.bisect(X).culprit is not None
    assert fused.bisect(X, tolerance=0.01).culprit is None


# --- the log


def test_the_log_is_set_by_the_environment():
    program = "import graph_capture, logging; print(logging.getLogger('graph_capture').level)"
    for value, expected in (("debug", "10"), ("INFO", "20"), ("", "0")):
        environment = os.environ | {"GRAPH_CAPTURE_LOG": value}
        out = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert out.stdout.strip() == expected


def test_an_unknown_level_is_reported(caplog):
    with caplog.at_level(logging.WARNING, "graph_capture"):
        configure("loud")
    assert "GRAPH_CAPTURE_LOG=LOUD is not a level" in caplog.text


def test_a_spelling_and_a_fusion_of_one_name_are_counted_apart(fused):
    norms = [rule for rule in fused.explain().rules if rule["rule"] == "rms_norm"]
    assert {rule["spelling"]: rule["matches"] for rule in norms} == {True: 5, False: 1}  # four of five with an add
    assert "rms_norm (spelling): 5 of 5" in str(fused.explain())
