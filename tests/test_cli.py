"""The command line: the demo runs, and says so when a number is off."""

import json

import pytest
import torch
from typer.testing import CliRunner

import graph_capture
from graph_capture.cli import demo
from graph_capture.cli.main import app

SMALL = [
    "--layers",
    "2",
    "--hidden",
    "32",
    "--intermediate",
    "48",
    "--heads",
    "4",
    "--vocab",
    "64",
    "--length",
    "12",
    "--no-talk",
]


def invoke(*args):
    return CliRunner().invoke(app, list(args), env={"COLUMNS": "160"})


def test_demo_shows_every_part():
    result = invoke("demo", *SMALL)
    assert result.exit_code == 0, result.output
    for part in ("fused.swiglu", "receipts, float32", "receipts, bfloat16", "target ", "bit-equal to eager"):
        assert part in result.output
    assert "OFF" not in result.output


def test_demo_as_json():
    result = invoke("demo", *SMALL, "--json")
    report = json.loads(result.output)
    assert result.exit_code == 0
    assert report["ok"]
    assert report["shape"]["layers"] == 2
    kinds = {row["region"]: row["alike"] for row in report["receipts"]["float32"]}
    assert kinds["swiglu"] == 2
    assert len(report["checks"]) == 10
    assert all(ways.keys() == {"eager", "graph_capture"} for ways in report["seconds"].values())
    assert all(seconds > 0 for ways in report["seconds"].values() for seconds in ways.values())


def test_demo_plots(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "times.png"
    assert invoke("demo", *SMALL, "--json", "--plot", str(file)).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_demo_fails_when_a_number_is_off(monkeypatch):
    right = demo.FusedGraph.__call__
    monkeypatch.setattr(demo.FusedGraph, "__call__", lambda self, **kwargs: right(self, **kwargs) * 1.01)
    result = invoke("demo", *SMALL)
    assert result.exit_code == 1
    assert "OFF" in result.output


def test_demo_fails_when_a_kernel_is_off(monkeypatch):
    right = graph_capture.CompiledKernel.__call__
    monkeypatch.setattr(
        graph_capture.CompiledKernel, "__call__", lambda self, *inputs: tuple(o * 1.01 for o in right(self, *inputs))
    )
    assert invoke("demo", *SMALL, "--json").exit_code == 1


def test_help_lists_the_knobs():
    text = invoke("demo", "--help").output
    for knob in (
        "--layers",
        "--hidden",
        "--kv-heads",
        "--length",
        "--seed",
        "--kernel",
        "--compare",
        "--plot",
        "--json",
    ):
        assert knob in text


def test_heads_must_divide():
    result = invoke("demo", "--hidden", "32", "--heads", "5")
    assert result.exit_code == 2
    assert "must divide" in result.output


def test_version():
    assert graph_capture.__version__ in invoke("--version").output


@pytest.mark.gpu
def test_demo_uses_kernels_on_a_gpu():
    assert torch.cuda.is_available()
    assert invoke("demo").exit_code == 0
