"""``graph-capture bench`` at a size that takes seconds; what it measures is not asserted, but that it did."""

import json

import pytest
from typer.testing import CliRunner

from graph_capture.cli import bench
from graph_capture.cli.main import app
from graph_capture.cli.ways import FUSED, Setting
from graph_capture.runtime.llm.models import build_model, load_config
from tests.benchmarks import bench_sweep

SMALL = ["bench", "--config", "llama-tiny", "--prompt", "9", "--tokens", "4", "--rounds", "2", "--device", "cpu"]


def invoke(*arguments):
    return CliRunner().invoke(app, [*SMALL, "--no-compare", *arguments])


def test_json_has_every_way(tmp_path):
    done = invoke("--no-starts", "--json", "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["way"] for row in found["rows"]] == ["eager", "unfused", "fused"]
    for row in found["rows"]:
        assert not row["note"]
        assert 0 < row["decode_p50"] <= row["decode_p99"]
        assert row["tokens_per_second"] == pytest.approx(1 / row["decode_p50"])
        assert row["cold"] is None
    assert "greedy tokens" in found["agreement"]
    assert found["roofline"] == pytest.approx(found["bandwidth"] / found["step_bytes"])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_not_measured_says_so():
    done = invoke("--no-starts", "--markdown")
    assert done.exit_code == 0, done.output
    lines = dict(line.strip("| ").split(" | ", 1) for line in done.stdout.splitlines() if line.startswith("| "))
    assert "cold start" not in lines
    assert lines["x eager"].startswith("1.00")
    report = bench.BenchReport(Setting("m"), "", [bench.BenchRow("eager", cold=1.0), bench.BenchRow("fused")], 1.0, 1)
    assert "| cold start | 1.00 s | not measured |  |" in report.markdown()


def test_starts_are_measured_in_processes_of_their_own():
    found = bench.start(FUSED, Setting("llama-tiny", prompt=9, tokens=4))
    assert found["seconds"] > 0
    assert found["memory"] > 2**20
    row = bench.BenchRow("eager")
    bench._starts(row, Setting("llama-tiny", prompt=9, tokens=4))
    assert row.cold > 0
    assert row.warm > 0
    broken = bench.BenchRow("eager")
    bench._starts(broken, Setting("/no/such/model"))
    assert broken.cold is None
    assert "/no/such/model" in broken.note


def test_the_bytes_of_a_step():
    setting = Setting("llama-tiny", prompt=10, tokens=4)
    model = build_model(load_config("llama-tiny"), dtype=bench.torch.float32, device="cpu")
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    assert bench.step_bytes(model, setting) == weights + 2 * 2 * 2 * 16 * 12 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "either --model or --config"),
        (["bench", "--config", "llama-tiny", "--model", "x"], "either --model or --config"),
        (["bench", "--model", "/no/such/model"], "no model folder"),
        (["bench", "--config", "llama-tiny", "--prompt", "3000", "--device", "cpu"], "made for"),
    ],
)
def test_errors(arguments, message):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != 0
    assert message in " ".join(done.output.split())


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SWEEP_DEVICE", "cpu")
    monkeypatch.setattr(bench_sweep, "DEVICE", "cpu")
    monkeypatch.setattr(bench_sweep, "_in_a_process", bench_sweep.run_cells)
    file = tmp_path / "sweep.jsonl"
    command = ["sweep", "--file", str(file), "--models", "llama-tiny", "--ways", "eager", "--contexts", "8"]

    def sweep(batches, prompts):
        monkeypatch.setattr("sys.argv", [*command, "--batches", batches, "--prompts", prompts])
        assert bench_sweep.main() == 0
        return capsys.readouterr().out

    sweep("1", "")
    before = file.read_text()
    table = sweep("1", "4")
    assert file.read_text().startswith(before)
    cells = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert [(cell["kind"], cell["batch"], cell["length"]) for cell in cells] == [("decode", 1, 8), ("prefill", 1, 4)]
    assert not any("failed" in cell for cell in cells)
    assert table.count("| llama-tiny |") == 2
