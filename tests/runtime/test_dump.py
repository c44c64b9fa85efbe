"""`FusedGraph.dump`: everything that was made of a recording, as files."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graph_capture import CaptureError, FusionConfig, fuse
from tests.replaying import UNFUSED, graph_of, noise
from tests.targets import COMPILERS


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.gate = nn.RMSNorm(16), nn.Linear(16, 32), nn.Linear(16, 32)

    def forward(self, x):
        x = self.norm(x + 1)
        return F.silu(self.gate(x)) * self.up(x)


def files(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("target", COMPILERS)
def test_every_stage_and_every_source_is_there(tmp_path, target):
    fused = fuse(graph_of(Gate(), noise(32, 16)), FusionConfig(profile="always", target=target))
    fused(noise(32, 16))
    fused(noise(32, 16))
    found = files(fused.dump(tmp_path / "new" / "folder"))
    listed = [line.split()[0] for line in found.pop("index.txt").splitlines()[2:]]
    assert listed == sorted(listed) == sorted({name.partition("/")[0].partition(".")[0] for name in found})
    assert found["00_recorded.py"] == f"{fused.recorded}\n"
    stages = [name for name in listed if "_after_" in name]
    assert [name.partition("_after_")[2] for name in stages] == [name for name, _ in fused.stages]
    swiglu = {name.rpartition("/")[2]: text for name, text in found.items() if "swiglu_0/" in name}
    assert any(name.endswith("spec.txt") and "KernelSpec" in text for name, text in swiglu.items())
    compiled = {"c": "kernel.c", "ninetoothed": ".triton.py"}[target]
    (source,) = [text for name, text in swiglu.items() if name.endswith(compiled)]
    assert ("__restrict" in source or "static" in source) if target == "c" else "@triton.jit" in source
    if target == "c":
        (assembly,) = [text for name, text in swiglu.items() if name.endswith(".s")]
        assert "ret" in assembly
    (decision,) = [json.loads(text) for name, text in swiglu.items() if name.endswith("decision.json")]
    assert decision["use"]
    (plan,) = [text for name, text in found.items() if name.endswith("_plan.py")]
    assert plan.rstrip() == str(fused.plan).rstrip()
    (explained,) = [text for name, text in found.items() if name.endswith("explain.json")]
    assert {row["region"] for row in json.loads(explained)["regions"]} >= {"swiglu", "parallel_linear"}


def test_a_dump_is_replaced_and_nothing_else_is(tmp_path):
    fused = fuse(graph_of(Gate(), noise(32, 16)), UNFUSED)
    folder = fused.dump(tmp_path / "dump")
    (folder / "leftover").write_text("of an earlier dump")
    before = files(fused.dump(folder))
    assert "leftover" not in before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CaptureError, match="not empty, and not an earlier dump"):
        fused.dump(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(CaptureError, match="cannot be written"):
        fused.dump(tmp_path / "notes.txt")


PROGRAM = """
import torch
from graph_capture import FusionConfig, capture

fast = capture(lambda x: torch.tanh(x * 2) + 1, FusionConfig(profile="always"))
for _ in range(3):
    fast(torch.ones(8))
fast(torch.ones(9))
"""


def test_the_environment_asks_for_it(tmp_path):
    environment = os.environ | {"GRAPH_CAPTURE_DUMP": str(tmp_path)}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True)
    first, second = sorted(tmp_path.iterdir())
    assert any(name.endswith("_plan.py") for name in files(first))  # which there is from the second replay on
    assert not any(name.endswith("_plan.py") for name in files(second))
    assert "f32[9]" in (second / "00_recorded.py").read_text()


def test_a_folder_that_cannot_be_written_stops_nobody(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAPH_CAPTURE_DUMP", str(tmp_path / "file"))
    fused = fuse(graph_of(torch.sin, noise(8)), UNFUSED)
    assert torch.equal(fused(noise(8)), torch.sin(noise(8)))
    assert "GRAPH_CAPTURE_DUMP" in caplog.text
