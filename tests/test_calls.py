"""Every kind of op, argument, result and cache: recorded, replayed, compared with eager."""

import collections
import dataclasses

import numpy
import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from graph_capture import (
    CaptureError,
    FusionConfig,
    SignatureMismatchError,
    capture,
)
from tests.models import tiny_llama, token_ids
from tests.replaying import UNFUSED, assert_replays, graph_of, noise

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


@pytest.mark.filterwarnings("ignore")
def test_torchscript():
    model = torch.jit.trace(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), noise(2, 4))
    graph = assert_replays(model, lambda number: (noise(3, 4, seed=number),))
    assert set(graph.captured) == {"0.weight", "0.bias"}


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


@dataclasses.dataclass(frozen=True)
class Batch:
    ids: torch.Tensor
    lengths: tuple[int, ...]


@dataclasses.dataclass(slots=True)
class Result:
    scores: dict[str, torch.Tensor]
    batch: Batch
    note: str = ""


Pair = collections.namedtuple("Pair", ["left", "right"])


def test_dataclasses_and_namedtuples():
    def run(batch, pair):
        scores = batch.ids * pair.left + pair.right
        return Result({"scores": scores}, Batch(scores * 2, batch.lengths), "made"), Pair(batch.ids, None)

    graph = graph_of(run, Batch(noise(3), (1, 2)), Pair(noise(3), 2.0))
    batch = Batch(noise(3, seed=1), (1, 2))
    (got, pair), (want, _) = graph.run(batch, Pair(noise(3), 2.0)), run(batch, Pair(noise(3), 2.0))
    assert type(got) is Result
    assert type(got.batch) is Batch
    assert (got.note, got.batch.lengths) == ("made", (1, 2))
    assert torch.equal(got.scores["scores"], want.scores["scores"])
    assert torch.equal(got.batch.ids, want.batch.ids)
    assert type(pair) is Pair
    assert pair.left is batch.ids
    with pytest.raises(SignatureMismatchError, match=r"arg0\.lengths\[1\]: expected 2 \(int\), got 3 \(int\)"):
        graph.run(Batch(noise(3), (1, 3)), Pair(noise(3), 2.0))


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
