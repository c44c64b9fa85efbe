"""What graph capture is known to get silently wrong: each ends in the right number or in a named error."""

import ctypes
import gc
import logging
import threading
import weakref

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from transformers import DynamicCache, StaticCache

from graph_capture import (
    CaptureError,
    DataDependentError,
    FusionConfig,
    SignatureMismatchError,
    UnrecordedWriteError,
    capture,
    record,
)
from tests.models import tiny_llama, token_ids

UNFUSED = FusionConfig(enable_fusion=False)


def graph_of(function, *args, **kwargs):
    with record(*args, **kwargs) as recording:
        recording.output(function(*args, **kwargs))
    return recording.graph


def assert_replays(function, make, *, seed=None):
    """Record on one set of inputs, replay on it and on another: the results and the inputs afterwards are eager's."""
    graph = graph_of(function, *make(0))
    for number in (0, 1):
        ours, theirs = make(number), make(number)
        if seed is not None:
            torch.manual_seed(seed)
        with torch.no_grad():
            want = function(*theirs)
        if seed is not None:
            torch.manual_seed(seed)
        got = graph.run(*ours)
        for left, right in zip(pytree.tree_leaves((got, ours)), pytree.tree_leaves((want, theirs)), strict=True):
            if isinstance(right, torch.Tensor):
                assert torch.equal(left, right)
                assert left.stride() == right.stride()
            else:
                assert left == right
    return graph


def noise(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


# --- every kind of op


def out_and_in_place(x):
    y = torch.empty_like(x)
    torch.add(x, 1, out=y)
    y[1:].mul_(2)
    y.t()[0].zero_()
    torch._foreach_add_([y, x], 1.0)
    return y, x.view(-1)[::2]


def views_of_views(x):
    v = x.view(2, 6)[:, 1:5].unflatten(1, (2, 2)).transpose(1, 2)
    v.add_(1)
    return v, v.diagonal(dim1=1, dim2=2), torch.split(x, 2)


def sizes(x):
    return x.sum(), x[:0], x[:0].sum(), torch.cat([x[:0], x]), torch.tensor(3.0) * x.mean()


def kinds(x):
    c = torch.complex(x, x * 2)
    return c.abs(), torch.view_as_real(c), c.conj() * c, (x > 0) & (x < 1), x.to(torch.int32) // 2, x.argmax(-1)


def factories(x):
    return (
        x + torch.arange(4, device=x.device, dtype=x.dtype),
        torch.full((2,), 7.0),
        x.new_zeros(3),
        torch.eye(4) @ x.T,
    )


def data_under_a_tensor(x):
    y = x * 2
    y.data = x.data + 3
    return y + 1, y.data


def rebuilt(x):
    y = torch.empty(0)
    y.set_(x * 2)
    z = torch.empty(2)
    z.resize_(3).fill_(1)
    return y + 1, z


@pytest.mark.parametrize(
    "function", [out_and_in_place, views_of_views, sizes, kinds, factories, data_under_a_tensor, rebuilt]
)
def test_ops(function):
    assert_replays(function, lambda number: (noise(3, 4, seed=number),))


def test_attention_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    assert_replays(lambda x: (layer(x), attention(x, x, x)), lambda number: (noise(2, 5, 8, seed=number),))


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes(mode):
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))

    def run(x):
        with mode():
            return model(x)

    assert_replays(run, lambda number: (noise(3, 4, seed=number),))


def test_recorded_in_inference_mode_replayed_outside_and_the_other_way_round():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), noise(3, 4)
    with torch.inference_mode():
        inside = graph_of(model, x)
    outside = graph_of(model, x)
    with torch.inference_mode():
        got = outside.run(x)
    assert torch.equal(got, inside.run(x))


def test_channels_last():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().to(memory_format=torch.channels_last)
    assert_replays(
        model, lambda number: (noise(2, 3, 8, 8, seed=number).contiguous(memory_format=torch.channels_last),)
    )


def test_batch_norm_in_training_writes_its_statistics_at_each_replay():
    ours, theirs = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    graph = graph_of(ours, noise(5, 4))
    theirs(noise(5, 4))
    graph.run(noise(5, 4, seed=1))
    theirs(noise(5, 4, seed=1))
    assert torch.equal(ours.running_mean, theirs.running_mean)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 2


def scale_(x, by):
    x.mul_(by)


def test_custom_ops():
    with torch.library._scoped_library("footguns", "DEF") as library:
        library.define("scale_(Tensor(a!) x, float by) -> ()")
        library.impl("scale_", scale_, "CPU")
        library.define("both(Tensor x, Tensor[] others) -> (Tensor, Tensor)")
        library.impl("both", lambda x, others: (x + others[0], x * others[1]), "CPU")

        def run(x):
            y = x + 1
            torch.ops.footguns.scale_(y, 3.0)
            return torch.ops.footguns.both(y, [x, y])

        graph = assert_replays(run, lambda number: (noise(3, seed=number),))
        assert [node.op_type for node in graph.subgraph.nodes][1:] == [
            "footguns.scale_.default",
            "footguns.both.default",
        ]


def test_a_debug_print_changes_nothing(capsys):
    def run(x):
        print(x, repr(x))
        return x + 1

    graph = assert_replays(run, lambda number: (noise(2, seed=number),))
    assert len(graph.subgraph) == 1
    assert "tensor(" in capsys.readouterr().out


# --- inputs and outputs


def test_outputs_that_are_inputs_weights_or_views():
    weight = nn.Parameter(noise(3))
    x = noise(3)
    graph = graph_of(lambda x: (x, x, weight, weight[1:], x[:2], 5, None, "text"), x)
    y = noise(3, seed=1)
    a, b, w, tail, head, *rest = graph.run(y)
    assert a is y
    assert b is y
    assert w is weight
    assert tail.data_ptr() == weight[1:].data_ptr()
    assert head.data_ptr() == y.data_ptr()
    assert rest == [5, None, "text"]


def test_inputs_that_share_memory():
    base = noise(6)

    def run(x, y):
        x.add_(1)
        return y * 2

    graph = graph_of(run, base[:4], base[2:])
    other, twin = noise(6, seed=1), noise(6, seed=1)
    assert torch.equal(graph.run(other[:4], other[2:]), run(twin[:4], twin[2:]))
    with pytest.raises(SignatureMismatchError, match="share memory"):
        graph.run(noise(4), noise(4, seed=1))
    with pytest.raises(SignatureMismatchError, match="share memory"):
        graph.run(other[:4], other[:4])


class State:
    """An object that a model carries its state in."""

    def __init__(self):
        self.steps, self.history, self.total = 0, [], torch.zeros(2)


def advance(x, state):
    state.steps += 1
    state.total = state.total + x
    state.history.append(x * 2)
    state.last = {"x": x}
    return state.total * 1


def test_objects_are_changed_by_a_replay_as_by_the_code():
    def make(number):
        state = State()
        state.total = noise(2, seed=number + 5)
        return noise(2, seed=number), state

    graph = graph_of(advance, *make(0))
    (x, ours), (_, theirs) = make(1), make(1)
    assert torch.equal(graph.run(x, ours), advance(x, theirs))
    assert ours.steps == theirs.steps == 1
    assert torch.equal(ours.total, theirs.total)
    assert torch.equal(ours.history[0], theirs.history[0])
    assert ours.last["x"] is x
    with pytest.raises(SignatureMismatchError, match=r"arg1: 'last' is in only one of .* State"):
        graph.run(x, ours)


def test_captured_functions_follow_the_objects_around_them():
    ours, theirs = State(), State()
    fast = capture(lambda x: advance(x, ours), UNFUSED)
    for number in range(4):
        x = noise(2, seed=number)
        assert torch.equal(fast(x), advance(x, theirs))
    assert ours.steps == theirs.steps == 4
    assert len(ours.history) == 4


def test_numpy_arguments_count_by_content():
    fast = capture(lambda x, a: x + torch.from_numpy(a * 2), UNFUSED)
    x, array = noise(3), numpy.ones(3, numpy.float32)
    assert torch.equal(fast(x, array), x + 2)
    array[:] = 5
    assert torch.equal(fast(x, array), x + 10)


def test_results_are_not_overwritten_by_the_next_call():
    fast = capture(lambda x: (x * 2).relu(), FusionConfig(profile="always"))
    results = [fast(torch.full((4,), float(n))) for n in range(4)]
    assert [result[0].item() for result in results] == [0, 2, 4, 6]


# --- caches


@pytest.mark.parametrize("cache_type", ["dynamic", "static"])
def test_caches_decode_token_by_token(cache_type):
    model = tiny_llama(layers=2)

    def new_cache():
        return DynamicCache() if cache_type == "dynamic" else StaticCache(config=model.config, max_cache_len=16)

    def step(ids, cache):
        with torch.no_grad():
            return model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    fast, ours, theirs = capture(step, UNFUSED), new_cache(), new_cache()
    for number, length in enumerate((5, 1, 1, 1)):
        ids = token_ids(length, seed=number)
        assert torch.equal(fast(ids, ours), step(ids, theirs))
    assert int(ours.get_seq_length()) == int(theirs.get_seq_length()) == 8
    assert len(fast.graphs) == (4 if cache_type == "dynamic" else 2)  # a dynamic cache has another shape at each step
    again_ours, again_theirs = new_cache(), new_cache()
    for number, length in enumerate((5, 1, 1, 1)):  # other caches of the same shapes: nothing is recorded
        ids = token_ids(length, seed=number + 9)
        assert torch.equal(fast(ids, again_ours), step(ids, again_theirs))
    assert len(fast.misses) == len(fast.graphs)


def test_a_cache_that_was_not_passed_in_is_refused():
    model, cache = tiny_llama(layers=1), DynamicCache()
    with torch.no_grad():
        model(input_ids=token_ids(3), past_key_values=cache, use_cache=True)
    ids = token_ids(1)
    with pytest.raises(CaptureError, match="was replaced by the code"):
        graph_of(lambda ids: model(input_ids=ids, past_key_values=cache, use_cache=True).logits, ids)


def test_a_model_that_returns_its_cache():
    model, ids = tiny_llama(layers=1), token_ids(3)
    graph = graph_of(lambda ids: model(input_ids=ids, use_cache=True), ids)
    other = token_ids(3, seed=4)
    with torch.no_grad():
        want = model(input_ids=other, use_cache=True)
    got = graph.run(other)
    assert type(got) is type(want)
    assert torch.equal(got.logits, want.logits)
    assert type(got.past_key_values) is DynamicCache
    assert torch.equal(got.past_key_values.layers[0].keys, want.past_key_values.layers[0].keys)
    assert got.past_key_values is not graph.run(other).past_key_values


# --- weights


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)
        self.scale, self.step = 1.0, 0
        self.table = noise(4)

    def forward(self, x):
        return self.down(self.act(self.up(x))) * self.scale + self.table


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
    assert graph.ledger.addresses[model.up.weight.data_ptr()] == "up.weight"
    assert set(graph.ledger.addresses.values()) == {"up.weight", "up.bias", "down.weight", "down.bias", "table"}
    assert any("scale is 1.0" in line for line in graph.ledger)


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
    def __init__(self, used):
        super().__init__()
        self.step, self.used = 0, used

    def forward(self, x):
        self.step += 1
        return x * self.step if self.used else x * 2


def test_a_counter_that_is_computed_with_is_refused():
    model = Counting(used=True)
    fast, x = capture(model, UNFUSED), noise(2)
    assert torch.equal(fast(x), x)
    with pytest.raises(CaptureError, match="changes step at each call and computes with it"):
        fast(x)
    with pytest.raises(SignatureMismatchError, match=r"'?step'? was 0 and is now 1"):
        graph_of(Counting(used=True), x).run(x)


def test_a_counter_that_nothing_depends_on_is_harmless():
    model = Counting(used=False)
    fast, x = capture(model, UNFUSED), noise(2)
    for _ in range(5):
        assert torch.equal(fast(x), x * 2)
    assert len(fast.misses) == 2


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


# --- one process, many recordings


def test_two_models_in_two_threads():
    models = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))]
    graphs, errors, barrier = {}, [], threading.Barrier(2)

    def work(index):
        try:
            barrier.wait()
            for number in range(20):
                graphs[index, number] = graph_of(models[index], noise(2, 4, seed=number))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for (index, _), graph in graphs.items():
        x = noise(2, 4, seed=99)
        with torch.no_grad():
            assert torch.equal(graph.run(x), models[index](x))


def test_replays_from_several_threads():
    model = Gated().eval()
    fast, results = capture(model, FusionConfig(profile="always")), []

    def work(seed):
        for number in range(20):
            x = noise(2, 4, seed=seed * 100 + number)
            with torch.no_grad():
                results.append(torch.allclose(fast(x), model(x), atol=1e-5))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80


def test_a_recording_keeps_neither_inputs_nor_intermediates():
    x = noise(64)
    held = []

    def run(x):
        y = x * 2
        held.append(weakref.ref(y))
        return (y + 1).sum()

    graph = graph_of(run, x)
    held.append(weakref.ref(x))
    del x
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert len(graph.subgraph) == 3


def test_intermediates_die_while_recording_as_they_do_without():
    x = noise(64)
    with record(x) as recording:
        y = x * 2
        seen = weakref.ref(y)
        z = y + 1
        del y
        assert seen() is None
        recording.output(z)


def test_guards_are_printed_and_misses_explained(caplog):
    model = Gated()
    fast = capture(model, UNFUSED)
    with caplog.at_level(logging.INFO, "graph_capture"):
        fast(noise(2, 4))
        fast(noise(3, 4))
    assert "(arg0: f32[2, 4])" in fast.guards
    assert "up.weight is a Parameter at 0x" in fast.guards
    assert "scale is 1.0" in fast.guards
    assert "argument arg0: expected f32[2, 4]" in fast.misses[-1]
    assert "got f32[3, 4]" in caplog.text


def test_a_function_that_never_settles_is_warned_about(caplog):
    class Engine:
        count = 0

        def step(self, x):
            self.count += 1
            return x * self.count

    engine = Engine()
    engine.count = 0
    fast = capture(engine.step, UNFUSED)
    for number in range(9):
        assert torch.equal(fast(torch.ones(2)), torch.full((2,), number + 1.0))
    assert "has recorded 8 calls in a row" in caplog.text


def test_a_tensor_subclass_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    x = TwoTensor(noise(2), noise(2))
    with pytest.raises(CaptureError, match="is a TwoTensor"):
        graph_of(lambda x: x + 1, x)


def test_silu_of_a_tensor_that_is_written_later():
    """A read is never moved across a write to the same memory, fused or not."""

    def run(x, y):
        gate = F.silu(x)
        x.mul_(0)
        return gate * y + x

    graph = graph_of(run, noise(4, 8), noise(4, 8, seed=1))
    from graph_capture import fuse

    fused = fuse(graph, FusionConfig(profile="always"))
    x, y = noise(4, 8, seed=2), noise(4, 8, seed=3)
    torch.testing.assert_close(fused(x.clone(), y), run(x.clone(), y))
