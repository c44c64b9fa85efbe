"""`FusedGraph.trace`: one replay as events that Perfetto and chrome://tracing read."""

import json

import pytest
import torch
from torch import nn

from graph_capture import CaptureError, FusionConfig, SignatureMismatchError, fuse
from tests.replaying import graph_of, noise
from tests.runtime.test_dump import Gate

ALWAYS = FusionConfig(profile="always")


def events_of(path):
    trace = json.loads(path.read_text())
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    return trace["traceEvents"]


def complete(events):
    return [event for event in events if event["ph"] == "X"]


@pytest.fixture
def gate():
    return fuse(graph_of(Gate(), noise(32, 16)), ALWAYS)


@pytest.mark.parametrize("before", [0, 2])
def test_events_are_of_the_format_and_nest(tmp_path, gate, before):
    for _ in range(before):
        gate(noise(32, 16))
    x = noise(32, 16, seed=3)
    result = gate.trace(tmp_path / "trace.json", x)
    assert torch.equal(result, gate(x))
    events = events_of(tmp_path / "trace.json")
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    assert all("pid" in event and "name" in event for event in events)
    spans = complete(events)
    assert all(event["dur"] > 0 and event["ts"] >= 0 and "tid" in event for event in spans)
    open_until = []  # the ends of what is open; an event ends before what it began in
    for event in sorted(spans, key=lambda event: (event["ts"], -event["dur"])):
        end = event["ts"] + event["dur"]
        while open_until and event["ts"] >= open_until[-1] - 1e-3:
            open_until.pop()
        assert not open_until or end <= open_until[-1] + 2e-3
        open_until.append(end)
    assert next(event for event in spans if event["name"] == "replay")["ts"] == 0


def test_regions_and_other_steps_go_by_name(tmp_path, gate):
    gate.trace(tmp_path / "trace.json", noise(32, 16))
    named = {e["name"]: e["args"] for e in complete(events_of(tmp_path / "trace.json")) if "module" in e["args"]}
    assert set(named) == {region.name for region in gate.regions if region.decision}
    (swiglu,) = [region for region in gate.regions if region.name == "swiglu_0"]
    about = named["swiglu_0"]
    assert about["bytes"] == swiglu.bytes_after
    assert about["decision"]["use"]
    assert about["ops"] == [node.op_type for node in swiglu.nodes]
    assert about["outputs"] == [f"{swiglu.node.outputs[0]}: f32[32, 32]"]
    stack = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    unfused = fuse(graph_of(stack, noise(4, 16)), FusionConfig(enable_fusion=False))
    unfused.trace(tmp_path / "trace.json", noise(4, 16))
    spans = complete(events_of(tmp_path / "trace.json"))
    assert [(e["name"], e["args"]["module"]) for e in spans if "module" in e["args"]] == [
        ("linear", "0"),
        ("tanh", "1"),
        ("linear", "2"),
    ]


def test_the_arena_is_a_counter(tmp_path, gate):
    gate.trace(tmp_path / "trace.json", noise(32, 16))
    counters = [event for event in events_of(tmp_path / "trace.json") if event["ph"] == "C"]
    assert {event["name"] for event in counters} == {"arena cpu"}
    sizes = [event["args"]["bytes"] for event in counters]
    assert max(sizes) == gate.plan.live_bytes[torch.device("cpu")][1]
    assert max(sizes) <= gate.plan.peak_bytes[torch.device("cpu")]
    assert sizes[-1] == 0
    assert [event["ts"] for event in counters] == sorted(event["ts"] for event in counters)


def test_what_a_replay_writes_is_written_once(tmp_path):
    def step(cache, x):
        cache.add_(x)
        return cache * 2 + torch.rand(3)

    fused = fuse(graph_of(step, noise(3), noise(3)), ALWAYS)
    for _ in range(2):  # the first has no plan yet
        cache, x = noise(3, seed=1), noise(3, seed=2)
        want = cache + x
        torch.manual_seed(5)
        result = fused.trace(tmp_path / "trace.json", cache, x)
        assert torch.equal(cache, want)
        torch.manual_seed(5)
        torch.testing.assert_close(result, want * 2 + torch.rand(3))


def test_a_scope_of_the_users_own_stays(tmp_path, gate):
    with torch.profiler.record_function("mine"):
        gate.trace(tmp_path / "trace.json", noise(32, 16))
    assert any(event["name"] == "swiglu_0" for event in events_of(tmp_path / "trace.json"))


def test_without_a_plan_torchs_ops_are_there(tmp_path, caplog):
    fused = fuse(graph_of(Gate(), noise(4, 16)), FusionConfig(profile="always", debug_mode=True))
    fused.trace(tmp_path / "trace.json", noise(4, 16))
    assert "no plan" in caplog.text
    names = {event["name"] for event in complete(events_of(tmp_path / "trace.json"))}
    assert "replay" in names
    assert any(name.startswith("aten::") for name in names)


def test_errors(tmp_path, gate):
    with pytest.raises(SignatureMismatchError):
        gate.trace(tmp_path / "trace.json", noise(33, 16))
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with profiler, pytest.raises(CaptureError, match="a profiler is on already"):
        gate.trace(tmp_path / "trace.json", noise(32, 16))
    with pytest.raises(CaptureError, match="cannot be written"):
        gate.trace(tmp_path / "missing" / "trace.json", noise(32, 16))


@pytest.mark.gpu
def test_kernels_of_a_gpu_are_there(tmp_path):
    gate = Gate().cuda()
    fused = fuse(graph_of(gate, noise(32, 16).cuda()), ALWAYS)
    x = noise(32, 16, seed=3).cuda()
    result = fused.trace(tmp_path / "trace.json", x)
    torch.testing.assert_close(result, gate(x))
    events = events_of(tmp_path / "trace.json")
    assert any(event.get("cat") == "kernel" for event in events)
    assert any(event.get("cat") == "gpu_user_annotation" and event["name"] == "swiglu_0" for event in events)
    assert any(event["ph"] == "C" and event["name"].startswith("arena cuda") for event in events)
