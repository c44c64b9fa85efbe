"""Decisions on a busy machine: what was disturbed is known to be, said, and measured again later."""

import math

import pytest
import torch

from graph_capture import FusionConfig, fuse, record
from graph_capture.runtime.decide import heuristics, measure, whole
from graph_capture.runtime.decide.decision_store import ATTEMPTS, DecisionStore, Times
from graph_capture.runtime.decide.measure import Timing, compare, is_doubtful

CPU = torch.device("cpu")


def test_a_side_that_was_never_left_alone_is_disturbed(monkeypatch):
    count = iter(range(10**6))
    monkeypatch.setattr(measure, "_switches", lambda: next(count))
    calls = []
    timings = compare([lambda: calls.append(None), lambda: None], CPU)
    assert [timing.disturbed for timing in timings] == [True, True]
    assert is_doubtful(timings)


def test_one_quiet_sample_is_enough(monkeypatch):
    looks = iter([0, 1, 1, 1] + [2, 2] * 100)  # the first sample of the first side only
    monkeypatch.setattr(measure, "_switches", lambda: next(looks))
    monkeypatch.setattr(measure, "PLAIN", math.inf)
    timings = compare([lambda: None, lambda: None], CPU)
    assert [timing.disturbed for timing in timings] == [False, False]


def test_a_disturbed_side_gets_more_samples(monkeypatch):
    monkeypatch.setattr(measure, "_switches", iter(range(10**6)).__next__)
    side = []
    monkeypatch.setattr(measure._Side, "add", lambda self, add=measure._Side.add: (side.append(self), add(self)))
    compare([lambda: None, lambda: None], CPU)
    assert len(side) == 2 * measure.RESTLESS


def test_a_call_that_was_long_at_first_gets_more_calls_later(monkeypatch):
    clock = iter([0, 0.008, 0.01, 0.018] + [1 + 2e-6 * step for step in range(1000)])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    side = measure._Side(lambda: None, CPU)
    assert side.calls == 1
    side.add()
    assert side.calls > 100
    assert min(side.samples) < 1e-5


@pytest.mark.parametrize(
    ("timings", "doubtful"),
    [
        ([Timing.of(1.0, 1.01, False), Timing.of(1.02, 1.01, False)], False),  # close, but both are sure of it
        ([Timing.of(1.0, 1.5, False), Timing.of(1.6, 1.0, False)], True),  # one differs by more than they do
        ([Timing.of(1.0, 1.5, False), Timing.of(9.0, 1.0, False)], False),
        ([Timing.of(1.0, 1.0, True), Timing.of(9.0, 1.0, False)], True),  # whatever the times say
        ([1.0, 2.0], False),
    ],
)
def test_doubt(timings, doubtful):
    assert is_doubtful(timings) is doubtful


def test_measurements_in_doubt_add_up_and_a_sure_one_ends_it():
    busy = Times(2.0, 9.0, choice=3, spread=4.0, doubts=1)
    again = Times(3.0, 5.0, choice=1, spread=2.0, doubts=1).after(busy)
    assert again == Times(2.0, 5.0, choice=1, spread=2.0, doubts=2)
    assert not again.stands
    quiet = Times(1.0, 0.5).after(again)
    assert quiet == Times(1.0, 0.5)
    assert quiet.stands
    assert Times(1.0, 2.0, doubts=ATTEMPTS).stands  # a machine that is always busy


def test_the_store_keeps_how_sure_a_time_is(tmp_path):
    store = DecisionStore(tmp_path)
    store.put("a", Times(1.0, 2.0, False, 2, 3.5, 1))
    assert DecisionStore(tmp_path).get("a") == Times(1.0, 2.0, False, 2, 3.5, 1)
    store.put("a", Times(1.0, 2.0))
    assert store.get("a").stands


def recorded():
    x = torch.randn(64, 256)
    with record(x) as recording:
        recording.output(torch.nn.functional.silu(x) * x + 1)
    return recording.graph


def test_a_doubtful_decision_is_named_and_measured_again(tmp_path, monkeypatch):
    config = FusionConfig(cache_dir=tmp_path, target="c")
    asked = []

    def busy(functions, device):
        asked.append("busy")
        return [Timing.of(1.0, 3.0, True), *(Timing.of(2.0, 3.0, True) for _ in functions[1:])]

    def quiet(functions, device):
        asked.append("quiet")
        return [Timing(1.0), *(Timing(0.5) for _ in functions[1:])]

    monkeypatch.setattr(heuristics, "compare", busy)
    monkeypatch.setattr(whole, "compare", busy)
    first = fuse(recorded(), config)
    row = next(row for row in first.explain().rows if row["t_fused"])
    assert (row["used"], row["doubtful"], row["spread"]) == (False, True, 3.0)
    assert "doubtful: samples differ by 3x" in str(first.explain())
    monkeypatch.setattr(heuristics, "compare", quiet)
    monkeypatch.setattr(whole, "compare", quiet)
    second = fuse(recorded(), config)  # as another process would: it knows the doubt from the disk
    row = next(row for row in second.explain().rows if row["t_fused"])
    assert (row["used"], row["doubtful"]) == (True, False)
    assert "doubtful" not in str(second.explain())
    before = len(asked)
    third = fuse(recorded(), config)
    assert len(asked) == before
    assert any(row["cached"] for row in third.explain().rows)


def test_within_a_process_doubt_is_looked_into_after_a_while(tmp_path, monkeypatch):
    from graph_capture import FusionScheduler

    answers = []
    monkeypatch.setattr(whole, "compare", lambda functions, device: [Timing(1.0), Timing(0.5)])
    monkeypatch.setattr(
        heuristics,
        "compare",
        lambda functions, device: answers.append(1) or [Timing.of(1.0, 3.0, True)] * len(functions),
    )
    scheduler = FusionScheduler(FusionConfig(cache_dir=tmp_path, target="c"))
    scheduler.analyze(recorded())
    count = len(answers)
    assert count
    scheduler.analyze(recorded())
    assert len(answers) == count  # not at once
    monkeypatch.setattr(heuristics, "LATER", -1.0)
    scheduler.analyze(recorded())
    assert len(answers) > count
