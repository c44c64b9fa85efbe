"""``graph-capture inspect``: what is found in a model, or in a saved graph."""

import json

import pytest
from typer.testing import CliRunner

from graph_capture import FusionConfig, fuse
from graph_capture.cli.main import app
from tests.models import recorded, tiny_llama, token_ids


def invoke(*args):
    return CliRunner().invoke(app, ["inspect", *args], env={"COLUMNS": "240"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_built_in_model(dtype, caplog):
    shape = ("--prompt", "12", "--slots", "32", "--layers", "1", "--dtype", dtype, "--device", "cpu")
    result = invoke("llama-tiny", *shape, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert list(found) == ["decode", "prefill 12"]
    for explained in found.values():
        timed = {row["region"] for row in explained["regions"] if row["t_fused"] is not None}
        assert {"add_rms_norm", "rope_cache"} <= timed
    assert not [record.message for record in caplog.records if "failed" in record.message]
    result = invoke("llama-tiny", *shape, "--no-measure", "--graph", "--why", "model.layers.0.mlp")
    assert result.exit_code == 0, result.output
    assert "prefill 12: " in result.output
    assert "fused.linear_epilogue(" in result.output


def test_a_saved_graph(tmp_path):
    fuse(recorded(tiny_llama(1), token_ids()), FusionConfig(profile="static")).save(tmp_path / "llama.graph")
    result = invoke(str(tmp_path / "llama.graph"))
    assert result.exit_code == 0, result.output
    assert result.output.startswith("saved: ")
    assert "add_rms_norm" in result.output


def test_errors_are_said_in_one_line(tmp_path):
    (tmp_path / "damaged").write_bytes(b"nothing")
    for arguments, message in (
        (("no/such/model",), "is no model folder"),
        (("llama-tiny", "--prompt", "9", "--slots", "8"), "do not fit into a cache"),
        ((str(tmp_path / "damaged"),), "CacheError"),
        (("llama-tiny", "--layers", "1", "--prompt", "4", "--no-measure", "--why", "nowhere"), "nowhere"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        assert message in result.stderr
