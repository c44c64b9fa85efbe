"""What graph capture is known to get silently wrong: each ends in the right number or in a named error."""

import ctypes

import numpy
import pytest
import torch
from torch import nn

from graph_capture import (
    CaptureError,
    DataDependentError,
    FusionConfig,
    SignatureMismatchError,
    UnrecordedWriteError,
    capture,
    record,
)
from tests.replaying import UNFUSED, Gated, assert_replays, graph_of, noise

# --- weights


def assign(model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)


REBINDINGS = {
    "data": lambda m: setattr(m.up.weight, "data", noise(6, 4, seed=3)),
    "assign": assign,
    "parameter": lambda m: setattr(m.up, "bias", nn.Parameter(noise(6, seed=3))),
    "submodule": lambda m: setattr(m, "down", nn.Linear(6, 4)),
    "activation": lambda m: setattr(m, "act", nn.ReLU()),
    "attribute": lambda m: setattr(m, "scale", 3.0),
    "tensor attribute": lambda m: setattr(m, "table", noise(4, seed=8)),
    "training": lambda m: m.train(not m.training),
    "list": lambda m: m.weights.__setitem__(0, 5.0),
    "config": lambda m: setattr(m.config, "offset", 7.0),
    "appended": lambda m: m.more.append(nn.Linear(4, 4)),
    "hook": lambda m: m.down.register_forward_hook(lambda module, args, output: output * 2),
    "double": lambda m: m.double().half().float(),
}


@pytest.mark.parametrize("change", REBINDINGS.values(), ids=REBINDINGS)
def test_what_a_model_is_made_of_changed(change):
    torch.manual_seed(0)
    model, x = Gated(), noise(2, 4)
    fast, graph = capture(model, UNFUSED), graph_of(model, x)
    fast(x)
    change(model)
    with torch.no_grad():
        want = model(x)
    with pytest.raises(SignatureMismatchError, match="record again"):
        graph.run(x)
    assert torch.equal(fast(x), want)
    assert torch.equal(fast(x), want)
    assert len(fast.misses) == 2


def test_values_changed_in_place_are_honoured():
    model, x = Gated(), noise(2, 4)
    graph = graph_of(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
        model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
        assert torch.equal(graph.run(x), model(x))


def test_the_ledger_names_every_captured_address():
    model, x = Gated(), noise(2, 4)
    graph = graph_of(model, x)
    assert graph.guards.addresses[model.up.weight.data_ptr()] == "up.weight"
    assert set(graph.guards.addresses.values()) == {"up.weight", "up.bias", "down.weight", "down.bias", "table"}
    assert any("scale is 1.0" in line for line in graph.guards)


def test_memory_replaced_inside_is_refused():
    model, x = nn.Linear(2, 2), noise(3, 2)

    def run(x):
        model.weight.data = model.weight.data * 2
        return model(x)

    with pytest.raises(CaptureError, match="replaces the memory"):
        graph_of(lambda x: (model(x), run(x)), x)

    def rebind(x):
        x.data = x * 2
        return x + 1

    with pytest.raises(CaptureError, match=r"replaces the memory.*test_footguns\.py"):
        graph_of(rebind, x)


def test_tied_weights():
    embedding, head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
    head.weight = embedding.weight
    graph = assert_replays(lambda ids: head(embedding(ids)), lambda number: (torch.tensor([1, 2, number]),))
    assert len(graph.captured) == 1


# --- Python state


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.step, self.seen = 0, 0

    def forward(self, x):
        self.step += 1
        self.seen += 2
        return x * self.step


class Counted(Counting):
    def forward(self, x):
        self.step += 1
        self.seen -= 2
        return x * 2


def test_a_counter_that_is_computed_with_is_refused():
    model = Counting()
    fast, x = capture(model, UNFUSED), noise(2)
    assert torch.equal(fast(x), x)
    with pytest.raises(CaptureError, match="changes step at each call, which a replay would not"):
        fast(x)
    with pytest.raises(SignatureMismatchError, match=r"'?step'? was 0 and is now 1"):
        graph_of(Counting(), x).run(x)


def test_a_counter_that_nothing_depends_on_is_counted_by_replays():
    model = Counted()
    fast, x = capture(model, UNFUSED), noise(2)
    for _ in range(5):
        assert torch.equal(fast(x), x * 2)
    assert (model.step, model.seen) == (5, -10)
    assert len(fast.misses) == 1


def test_what_is_made_at_the_first_call_is_kept():
    class Lazy(nn.Module):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.ones(x.shape[-1]) * 3
            return x * self.table

    fast, x = capture(Lazy(), UNFUSED), noise(2)
    for _ in range(4):
        assert torch.equal(fast(x), x * 3)


def test_state_that_is_replaced_is_refused():
    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.zeros(2))

        def forward(self, x):
            self.state = self.state * 0.5 + x
            return self.state * 1

    with pytest.raises(CaptureError, match=r"'state' .* was replaced by the code"):
        graph_of(Leaky(), noise(2))


FACTOR = 2
TABLE = torch.ones(2)


def test_globals_and_closures_are_guarded(monkeypatch):
    offset = 1
    fast, x = capture(lambda x: x * FACTOR + offset + TABLE, UNFUSED), noise(2)
    assert torch.equal(fast(x), x * 2 + 1 + 1)
    offset = 5
    assert torch.equal(fast(x), x * 2 + 5 + 1)
    monkeypatch.setitem(globals(), "FACTOR", 3)
    monkeypatch.setitem(globals(), "TABLE", torch.full((2,), 9.0))
    assert torch.equal(fast(x), x * 3 + 5 + 9)
    assert torch.equal(fast(x), x * 3 + 5 + 9)
    assert [line.split(":")[0] for line in fast.misses] == ["the first call", "argument offset", "argument FACTOR"]


def test_frozen_python_values_are_found_by_recording_twice():
    def run(x, n):
        return x * float(n.numpy()[0]) if n.dtype is torch.float32 else x ** int(n.shape[0])

    x = noise(3)
    fast = capture(run, UNFUSED, check=(x, torch.ones(3, dtype=torch.int64)))
    fast(x, torch.ones(2, dtype=torch.int64))
    assert "exponent is 2 in one, 3 in the other" in fast.misses[-1]

    tables = iter([1.0, 2.0, 3.0])
    strict = capture(lambda x: x * next(tables), UNFUSED, check=noise(3, seed=1))
    with pytest.raises(DataDependentError, match=r"1\.0 in one, 2\.0 in the other"):
        strict(x)


def test_what_checking_records_leaves_no_trace():
    cache = torch.zeros(3)
    model = capture(lambda x: cache.add_(x) * 1, UNFUSED, check=torch.full((3,), 100.0))
    model(torch.ones(3))
    model(torch.ones(3))
    assert cache.tolist() == [2, 2, 2]


# --- values that Python reads


def branch(x):
    x.add_(1)
    return x * 2 if x.sum() > 0 else x * 3


READERS = {
    "item": lambda x: x * x.sum().item(),
    "bool": lambda x: x * 2 if bool(x[0] > 0) else x * 3,
    "tolist": lambda x: x * x.tolist()[0],
    "numpy": lambda x: x * float(x.numpy()[0]),
    "array": lambda x: x * float(numpy.asarray(x)[0]),
    "mask": lambda x: x[x > 0] * 2,
    "nonzero": lambda x: x.nonzero() * 2,
    "unique": lambda x: x.round().unique() * 2,
    "equal": lambda x: x * (2 if torch.equal(x, x + 0) else 3),
    "masked_select": lambda x: torch.masked_select(x, x > 0),
    "repeat_interleave": lambda x: x.repeat_interleave((x > 0).long() + 1),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_reading_values_is_an_error_or_a_guard(read):
    x = torch.tensor([1.0, -2.0, 3.0, 0.5])
    with pytest.raises(DataDependentError, match=r"(?s)test_footguns\.py:\d+.*last recorded ops"):
        graph_of(read, x)
    with record(x, data_dependent="guard") as recording:
        recording.output(read(x))
    assert torch.equal(recording.graph.run(x.clone()), read(x))
    other = torch.tensor([-1.0, -2.0, 3.0, 0.5])
    try:
        got = recording.graph.run(other)
    except DataDependentError:
        pass
    else:
        assert torch.equal(got, read(other))
    fast = capture(read, FusionConfig(profile="always"), data_dependent="guard")
    for values in (x, other, x, other, other):
        assert torch.equal(fast(values), read(values))


def test_a_failed_guard_leaves_no_trace():
    x = torch.ones(3)
    with record(x, data_dependent="guard") as recording:
        recording.output(branch(x))
    negative = torch.full((3,), -5.0)
    with pytest.raises(DataDependentError, match="record"):
        recording.graph.run(negative)
    assert negative.tolist() == [-5, -5, -5]
    fast = capture(branch, UNFUSED, data_dependent="guard")
    for value in (1.0, -5.0, 2.0):
        ours, theirs = torch.full((3,), value), torch.full((3,), value)
        assert torch.equal(fast(ours), branch(theirs))
        assert torch.equal(ours, theirs)


# --- randomness


def test_dropout_draws_eagers_stream():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    assert_replays(lambda x: (model(x), torch.rand(2), torch.randperm(4)), lambda n: (noise(3, 4, seed=n),), seed=11)


def test_recording_leaves_the_stream_where_eager_would():
    torch.manual_seed(5)
    with record(noise(2)) as recording:
        recording.output(torch.rand(3))
    after_recording = torch.rand(2)
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(after_recording, torch.rand(2))


def test_an_own_generator():
    def run(x, generator):
        return x + torch.rand(3, generator=generator)

    ours, theirs = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    x = noise(3)
    graph = graph_of(run, x, ours)
    for want in (run(x, theirs), run(x, theirs)):
        if torch.equal(want, run(x, torch.Generator().manual_seed(4))):
            continue  # the first one was drawn while recording
        assert torch.equal(graph.run(x, ours), want)


def test_a_seed_set_inside_is_refused():
    def run(x):
        torch.manual_seed(0)
        return x + torch.rand(3)

    with pytest.raises(UnrecordedWriteError, match="seed"):
        graph_of(run, noise(3))


# --- writes that torch does not see


def fill(tensor, value):
    """What a raw kernel does: write through the pointer."""
    array = (ctypes.c_float * tensor.numel()).from_address(tensor.data_ptr())
    for index in range(tensor.numel()):
        array[index] = value


def test_an_unseen_kernel_into_fresh_memory():
    def run(x):
        out = torch.empty_like(x)
        fill(out, 3.0)
        return out + x

    with pytest.raises(UnrecordedWriteError, match=r"another 'add'.*uninitialised memory made at .*test_footguns\.py"):
        graph_of(run, noise(3))


def test_an_unseen_kernel_into_an_intermediate():
    def run(x):
        y = x * 2
        fill(y, 3.0)
        return y + 1

    with pytest.raises(UnrecordedWriteError, match="another 'add'"):
        graph_of(run, noise(3))


@pytest.mark.parametrize("used_before", [True, False])
def test_an_unseen_kernel_into_an_input_or_a_buffer(used_before):
    model = nn.BatchNorm1d(3).eval()

    def run(x):
        y = model(x) if used_before else x
        fill(model.running_mean if used_before else x, 7.0)
        return model(x) + y

    with pytest.raises(UnrecordedWriteError, match=r"changed while recording|another"):
        graph_of(run, noise(2, 3))


def test_numpy_on_shared_memory():
    def run(x, array):
        array += 1
        return x + 1

    x = noise(3)
    array = x.numpy()
    with pytest.raises(UnrecordedWriteError, match="'arg0' changed"), record(x) as recording:
        recording.output(run(x, array))


def test_the_check_can_be_left_out_and_says_what_it_costs():
    x, cache = noise(3), torch.zeros(1024)

    def run(x):
        cache[:3].copy_(x)
        return cache.sum()

    graph = graph_of(run, x)
    assert graph.verification.bytes == 2 * cache.nbytes
    assert graph.verification.seconds > 0
    with record(x, verify=False) as recording:
        recording.output(run(x))
    assert recording.graph.verification is None
