"""`FusedGraph.view`: a program as one page, read as JSON and, where there is a Chromium, in a browser."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image
from torch import nn

from graph_capture import CaptureError, FusionConfig, fuse, record
from graph_capture.runtime.account.verify import Verification
from tests.models import tiny_llama
from tests.replaying import graph_of, noise
from tests.runtime.test_dump import Gate

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def data_of(page):
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.S)
    return json.loads(text, parse_constant=pytest.fail)  # a browser takes no NaN


@pytest.fixture(scope="module")
def gate():
    return fuse(graph_of(Gate(), noise(32, 16)), FusionConfig(profile="always"))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of 32 layers and its page."""
    ids = torch.arange(5)[None]
    model = tiny_llama(layers=32)
    with torch.no_grad(), record(ids) as recording:
        recording.output(model(ids).logits)
    fused = fuse(recording.graph, FusionConfig(profile="always"))
    return fused, fused.view(tmp_path_factory.mktemp("large") / "page.html", ids)


def test_the_page_has_each_stage_and_what_is_known_of_each_region(tmp_path, gate):
    gate(noise(32, 16))
    data = data_of(gate.view(tmp_path / "page.html", noise(32, 16), title="a gate"))
    assert data["title"] == "a gate"
    stages = {stage["name"]: [data["nodes"][index] for index in stage["nodes"]] for stage in data["stages"]}
    assert list(stages) == ["recorded", *(name for name, _ in gate.stages), "replay"]
    assert [node["op"] for node in stages["recorded"]] == [node.op_type for node in gate.recorded.subgraph.nodes]
    for name, graph in gate.stages:
        assert [node["out"] for node in stages[name]] == [list(node.outputs) for node in graph.nodes]
    swiglu = data["regions"]["swiglu_0"]
    (region,) = [region for region in gate.regions if region.name == "swiglu_0"]
    assert swiglu["bytes"] == [region.bytes_before, region.bytes_after]
    assert swiglu["decision"]["use"]
    assert data["texts"][swiglu["files"]["kernel source"]] == region.source
    assert swiglu["error"]["ok"]
    assert 0 <= swiglu["error"]["error_fused"] < 1e-6
    assert {"swiglu_0"} <= {node.get("region") for node in stages["replay"]}
    assert data["values"][region.node.outputs[0]][:2] == ["f32[32, 32]", 32 * 32 * 4]
    assert any("test_dump.py" in node["line"] for node in stages["recorded"])


def test_a_replay_is_shown_as_it_runs(tmp_path):
    """A region without a kernel is its recorded ops there; a node appears once however many stages have it."""
    unfused = fuse(graph_of(Gate(), noise(32, 16)), FusionConfig(enable_fusion=False))
    data = data_of(unfused.view(tmp_path / "page.html"))
    last = [data["nodes"][index]["op"] for index in data["stages"][-1]["nodes"]]
    assert not any(op.startswith("fused.") for op in last)
    keys = [(node["op"], *node.get("in", ()), *node["out"], node.get("attrs", "")) for node in data["nodes"]]
    assert len(keys) == len(set(keys))


def test_near_misses_come_with_reasons(large):
    fused, page = large
    data = data_of(page)
    refusals = [refusal for receipt in fused.receipts for refusal in receipt.refused]
    assert refusals
    assert [row[1:] for row in data["refusals"]] == [[r.reason, r.where, list(r.values)] for r in refusals]
    for row in fused.why("model.layers.3").rows:
        assert data["ops"][row["value"]] == [row["region"], row["used"], row["reasons"]]


def test_one_file_that_nothing_in_it_can_break(tmp_path, gate):
    page = gate.view(tmp_path / "page.html", title="</script><script>alert(1)</script>")
    text = page.read_text()
    assert not re.search(r"{{\w", text.partition('<script id="data"')[0])
    assert "alert(1)</script>" not in text
    assert data_of(page)["title"] == "</script><script>alert(1)</script>"
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", text)
    with pytest.raises(CaptureError, match="cannot be written"):
        gate.view(tmp_path / "missing" / "page.html")


def test_an_error_without_bounds_is_shown_as_it_is(tmp_path, monkeypatch):
    gate = fuse(graph_of(Gate(), noise(32, 16)), FusionConfig(profile="always"))
    found = gate.verify(noise(32, 16))
    rows = [
        {**row, "error_fused": float(bad), "ok": False} for row, bad in zip(found.rows, ("inf", "nan"), strict=False)
    ]
    monkeypatch.setattr(gate, "verify", lambda x: Verification(rows))
    page = gate.view(tmp_path / "page.html", noise(32, 16))
    errors = [region["error"]["error_fused"] for region in data_of(page)["regions"].values() if region["error"]]
    assert sorted(errors) == ["inf", "nan"]


def test_a_notebook_shows_a_table(gate):
    shown = gate._repr_html_()
    assert "swiglu" in shown
    assert len(shown) < 5000
    assert shown.count("<tr>") == 1 + len(gate.explain().rows)


def test_the_command_writes_a_page(tmp_path):
    from typer.testing import CliRunner

    from graph_capture.cli.main import app

    page = tmp_path / "page.html"
    found = CliRunner().invoke(app, ["view", "llama-tiny", "--layers", "1", "--no-measure", "-o", str(page)])
    assert found.exit_code == 0, found.output
    data = data_of(page)
    assert data["title"] == "llama-tiny: decode"
    assert any(region["error"] for region in data["regions"].values())
    assert data["plan"]


# --- in a browser


def browse(page, *options):
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1600,1000"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=3000", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@needs_chromium
def test_32_layers_open_quickly(large):
    page = large[1]
    taken = []
    while len(taken) < 3 and min(taken, default=2000) >= 2000:  # the machine may be busy
        dom = browse(page, "--dump-dom")
        taken += map(int, re.findall(r'data-ready="(\d+)"', dom))
    assert min(taken) < 2000
    assert len(re.findall(r'role="tab" aria-selected="(?:true|false)"', dom)) == len(data_of(page)["stages"])
    assert "layers.31" in dom


@needs_chromium
def test_a_click_shows_what_is_known(large):
    page = large[1].with_name("clicked.html")
    text = large[1].read_text()
    code = """
        const region = Object.keys(data.regions).find((name) => name.startsWith("add_rms_norm"));
        document.querySelector("#right").innerHTML = "";
        turn(...find(region));
        const shown = cy.nodes(".on");
        const boxes = cy.nodes("[width][kind != 'title']");
        const overlap = boxes.filter((a) => boxes.some((b) => a.id() < b.id()
            && Math.abs(a.position("x") - b.position("x")) < (a.width() + b.width()) / 2 - 1
            && Math.abs(a.position("y") - b.position("y")) < (a.height() + b.height()) / 2 - 1));
        const result = cy.nodes("[kind = 'io']").filter((node) => node.id().startsWith("out "));
        document.body.dataset.test = JSON.stringify([shown.length, overlap.length, result.indegree()]);
    """
    page.write_text(f"{text}<script>{code}</script>")
    dom = browse(page, "--dump-dom")
    (found,) = re.findall(r'data-test="(.*?)"', dom)
    assert json.loads(html.unescape(found)) == [1, 0, 1]
    shown = dom.partition('<aside id="right">')[2].partition("</aside>")[0]
    for part in ("kernel used", "kernel source", "error", "Inputs", "modeling_llama.py"):
        assert part in shown


@needs_chromium
def test_a_screenshot_is_not_empty(large):
    picture = large[1].with_name("page.png")
    browse(large[1], f"--screenshot={picture}")
    with Image.open(picture) as image:
        assert image.size == (1600, 1000)
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 50


def test_modules_of_lists_are_in_the_page(tmp_path):
    stack = nn.Sequential(Gate(), nn.Linear(32, 16), Gate())
    data = data_of(fuse(graph_of(stack, noise(4, 16))).view(tmp_path / "page.html"))
    assert {"0.norm", "1", "2.up"} <= {node.get("at") for node in data["nodes"]}
