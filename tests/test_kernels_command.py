"""``graph-capture kernels``: every kernel of a model compiled without a GPU and without weights."""

import json

import pytest
import torch
from typer.testing import CliRunner

from graph_capture import CaptureError, FusionConfig, fuse
from graph_capture.cli.main import app
from graph_capture.runtime.llm.models import CONFIGURATIONS, build_model, load_config
from tests.models import recorded, tiny_llama, token_ids


def invoke(*args):
    return CliRunner().invoke(app, ["kernels", *args], env={"COLUMNS": "240"})


def test_a_built_in_model():
    result = invoke("llama-tiny", "--json", "--prompt", "8", "--slots", "32", "--target", "sm_80")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["target"] == "sm_80"
    by_kind = {kind: row for row in found["rows"] for kind in row["regions"]}
    assert {"add_rms_norm", "rope_cache", "linear_epilogue", "decode_attention", "parallel_linear"} <= by_kind.keys()
    layers = CONFIGURATIONS["llama-tiny"][1]["num_hidden_layers"]
    assert by_kind["linear_epilogue"]["regions"]["linear_epilogue"] == layers  # gate, up and SwiGLU of a decode step
    for row in found["rows"]:
        assert row["instructions"] > 0
        assert row["moved"] == row["minimum"] > 0
        assert row["stores"]
    table = invoke("llama-tiny", "--prompt", "8", "--slots", "32", "--target", "sm_80")
    assert "llama-tiny, sm_80" in table.output
    assert by_kind["rope_cache"]["kernel"] in table.output


def test_a_saved_graph(tmp_path):
    fused = fuse(recorded(tiny_llama(1), token_ids()), FusionConfig(profile="static"))
    fused.save(tmp_path / "llama.graph")
    found = json.loads(invoke(str(tmp_path / "llama.graph"), "--json", "--target", "sm_80").output)
    assert {"swiglu", "add_rms_norm"} <= {kind for row in found["rows"] for kind in row["regions"]}
    assert {step for row in found["rows"] for step in row["steps"]} == {"saved"}


def test_errors_are_said_in_one_line():
    for arguments, message in (
        (("no/such/model",), "is no model folder"),
        (("llama-tiny", "--target", "hopper"), "not an architecture"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        assert message in result.stderr


def test_models_are_made_for_the_contexts_of_their_authors():
    lengths = {name: load_config(name).max_position_embeddings for name in CONFIGURATIONS}
    assert lengths["llama-3-8b"] == 8192
    assert lengths["llama-3.2-1b"] == 131072
    assert lengths["qwen3-0.6b"] == 40960
    assert lengths["gemma-3-1b"] == 32768


def test_models_by_name(tmp_path):
    for name in CONFIGURATIONS:
        model = build_model(load_config(name, layers=1), dtype=torch.bfloat16, device="meta")
        assert len(model.model.layers) == 1
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    load_config("llama-tiny").save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).hidden_size == 64
    assert build_model(load_config(str(tmp_path)), dtype=torch.float32, device="cpu").dtype is torch.float32
    with pytest.raises(CaptureError, match="no model folder"):
        load_config(str(tmp_path / "missing"))
