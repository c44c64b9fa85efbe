"""InfiniCore's calls as ops of the table: numbers, data flow, writes, errors, and no trace afterwards."""

import gc
import pathlib

import numpy
import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, SignatureMismatchError, fuse, record
from graph_capture.frontends.infinicore.frontend import to_torch
from graph_capture.frontends.infinicore.ops import OPS
from graph_capture.ir.numerics import distance
from graph_capture.passes import DEFAULT
from tests.infinicore_models import ops, options, recorded, regions, tensors
from tests.replaying import noise

ALWAYS = FusionConfig(profile="always")


def check(ic, function, reference, *values):
    """Recorded, replayed and fused results of `function` are at most a few roundings off torch's."""
    args = [value.double() if value.is_floating_point() else value for value in values]
    exact = reference(*args)
    bar = 4 * distance(reference(*values), exact) + 1e-7
    graph, result = recorded(function, *tensors(ic, *values))
    fused = fuse(graph, ALWAYS)
    for found in (result, graph.run(*tensors(ic, *values)), fused(*tensors(ic, *values))):
        assert type(found) is ic.Tensor
        assert list(found.shape) == list(exact.shape)
        assert distance(to_torch(found), exact) <= bar
    return graph, fused


X, Y = noise(3, 8, seed=1), noise(3, 8, seed=2)
W = noise(8, seed=3)


def test_add_and_mul_are_connected(ic):
    graph, _ = check(ic, lambda a, b: (a + b) * a, lambda a, b: (a + b) * a, X, Y)
    assert ops(graph) == ["add", "mul"]
    assert graph.subgraph.nodes[1].inputs == ("add", "arg0")
    assert graph.subgraph.nodes[0].source.file == __file__


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (5, 7)])
def test_sizes(ic, shape):
    graph, _ = check(ic, lambda a, b: a * b + b, lambda a, b: a * b + b, torch.ones(shape), torch.ones(shape))
    assert ops(graph) == ["mul", "add"]


def test_nan_and_infinity_pass_through(ic):
    values = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]])
    graph, _ = recorded(lambda a: ic.nn.functional.silu(a) * a, *tensors(ic, values))
    want = F.silu(values) * values
    for found in (graph.run(*tensors(ic, values)), fuse(graph, ALWAYS)(*tensors(ic, values))):
        assert torch.equal(to_torch(found).isnan(), want.isnan())
        assert torch.equal(to_torch(found).nan_to_num(), want.nan_to_num())


def test_linear_with_bias(ic):
    graph, _ = check(
        ic, ic.nn.functional.linear, F.linear, noise(2, 3, 8, seed=4), noise(5, 8, seed=5), noise(5, seed=6)
    )
    assert ops(graph) == ["linear"]


def test_matmul_with_a_factor(ic):
    def scores(a, b):
        return ic.matmul(a, b, alpha=0.25)

    graph, _ = check(ic, scores, lambda a, b: a @ b * 0.25, noise(2, 3, 8), noise(2, 8, 4))
    assert ops(graph) == ["matmul", "mul"]


def test_swiglu_gates_with_its_second_operand(ic):
    graph, fused = check(ic, ic.nn.functional.swiglu, lambda a, b: a * F.silu(b), X, Y)
    assert ops(graph) == ["silu", "mul"]
    assert regions(fused) == ["swiglu"]


def test_swiglu_spelled_out(ic):
    act = ic.nn.functional.silu  # looked up before the recording, as models store it
    _, fused = check(ic, lambda a, b: act(a) * b, lambda a, b: F.silu(a) * b, X, Y)
    assert regions(fused) == ["swiglu"]
    assert len(fused.subgraph) == 1


def test_add_rms_norm_gives_both(ic):
    def norm(a, b, w):
        return ic.add_rms_norm(a, b, w, 1e-5)

    graph, (normed, total) = recorded(norm, *tensors(ic, X, Y, W))
    fused = fuse(graph, ALWAYS)
    assert regions(fused) == ["add_rms_norm"]
    exact = (X + Y).double()
    for found in ((normed, total), graph.run(*tensors(ic, X, Y, W)), fused(*tensors(ic, X, Y, W))):
        assert torch.equal(to_torch(found[1]), X + Y)
        assert distance(to_torch(found[0]), F.rms_norm(exact, (8,), W.double(), 1e-5)) < 1e-6


def test_a_sum_in_place_and_its_norm_are_one_kernel(ic):
    norm = ic.nn.functional.rms_norm

    def block(a, w):
        hidden = a * a
        hidden += a
        return hidden, norm(hidden, [8], w)

    graph, _ = recorded(block, *tensors(ic, X, W))
    assert ops(graph) == ["mul", "add", "aten.copy_.default", "rms_norm"]
    fused = fuse(graph, ALWAYS)
    assert "aten.copy_.default" not in [node.op_type for node in fused.subgraph.nodes]
    found = fused(*tensors(ic, X, W))
    assert distance(to_torch(found[0]), (X * X + X).double()) < 1e-6
    assert distance(to_torch(found[1]), F.rms_norm((X * X + X).double(), (8,), W.double(), 1e-5)) < 1e-6


def rope_in_torch(x, cos, sin, interleaved):
    turned = torch.empty_like(x)
    parts = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, 4), slice(4, 8))
    first, second = (x[..., part] for part in parts)
    turned[..., parts[0]], turned[..., parts[1]] = first * cos - second * sin, first * sin + second * cos
    return turned


@pytest.mark.parametrize("algo", ["GPT_NEOX", "GPT_J"])
@pytest.mark.parametrize("batched", [False, True])
def test_rope_in_place_on_a_view(ic, algo, batched):
    rope, table = ic.nn.functional.rope, noise(9, 4, seed=1)
    sin, cos = table.sin(), table.cos()
    positions = torch.tensor([[4, 5, 6], [0, 1, 2]]) if batched else torch.tensor([4, 5, 6])
    tables = tensors(ic, sin, cos)

    def turned(x, at):
        whole = x + x
        heads = whole.view((2, 3, 2, 8))
        rope(heads, at, *tables, algo=getattr(ic.nn.functional.RopeAlgo, algo), out=heads)
        return whole

    x = noise(2, 3, 16)
    at = positions if batched else positions.expand(2, 3)
    exact = rope_in_torch(2 * x.double().view(2, 3, 2, 8), *(t[at][..., None, :] for t in (cos, sin)), algo == "GPT_J")
    graph, result = recorded(turned, *tensors(ic, x, positions))
    assert "rope" in ops(graph)
    for found in (result, graph.run(*tensors(ic, x, positions)), fuse(graph, ALWAYS)(*tensors(ic, x, positions))):
        assert distance(to_torch(found).view(2, 3, 2, 8), exact) < 1e-6


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 6), (4, 4), (3, 7)])
def test_causal_softmax(ic, queries, keys):
    ahead = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    softmax = ic.nn.functional.causal_softmax
    check(ic, softmax, lambda s: s.masked_fill(ahead, -torch.inf).softmax(-1), noise(2, queries, keys))


def test_embedding_and_its_out_form(ic):
    table, ids = noise(9, 4), torch.tensor([[3, 0, 8]])

    def lookup(ids, table, into):
        ic.nn.functional.embedding(ids, table, out=into)
        return ic.nn.functional.embedding(ids, table)

    graph, result = recorded(lookup, *tensors(ic, ids, table, torch.zeros(1, 3, 4)))
    into = tensors(ic, torch.zeros(1, 3, 4))[0]
    assert torch.equal(to_torch(graph.run(*tensors(ic, ids, table), into)), table[ids])
    assert torch.equal(to_torch(into), table[ids])
    assert torch.equal(to_torch(result), table[ids])


@pytest.mark.parametrize("start", [0, 2])
def test_attention_with_its_cache(ic, start):
    q, k, v = noise(4, 3, 8, seed=1), noise(2, 3, 8, seed=2), noise(2, 3, 8, seed=3)
    caches = noise(2, 9, 8, seed=4), noise(2, 9, 8, seed=5)
    total = start + 3
    keys, values = (c.double().clone() for c in caches)
    keys[:, start:total], values[:, start:total] = k, v
    wide = [part[:, :total].repeat_interleave(2, 0) for part in (keys, values)]
    mask = torch.ones(3, total, dtype=torch.bool).tril(start)
    exact = F.scaled_dot_product_attention(q.double(), *wide, mask).transpose(0, 1)

    graph, result = recorded(lambda *args: ic.attention(*args, start), *tensors(ic, q, k, v, *caches))
    args = tensors(ic, q, k, v, *caches)
    assert distance(to_torch(result), exact) < 1e-6
    assert distance(to_torch(graph.run(*args)), exact) < 1e-6
    assert torch.equal(to_torch(args[3]), keys.float())


# --- memory


def test_out_writes_into_the_given_memory(ic):
    def into(a, b, out):
        assert ic.add(a, b, out=out) is out
        return out

    graph, _ = recorded(into, *tensors(ic, X, Y, torch.zeros(3, 8)))
    a, b, out = tensors(ic, X, Y, torch.zeros(3, 8))
    for replay in (graph.run, fuse(graph, ALWAYS)):
        to_torch(out).zero_()
        found = replay(a, b, out)
        assert found.data_ptr() == out.data_ptr()
        assert torch.equal(to_torch(out), X + Y)


def test_a_cache_is_written_through_a_view(ic):
    def step(keys, new):
        keys.narrow(1, 2, 3).copy_(new)
        return keys.narrow(1, 0, 5) + keys.narrow(1, 0, 5)

    keys, new = torch.zeros(2, 6, 4), noise(2, 3, 4)
    graph, _ = recorded(step, *tensors(ic, keys, new))
    for replay in (graph.run, fuse(graph, ALWAYS)):
        held, given = tensors(ic, keys, new)
        found = to_torch(replay(held, given))
        assert torch.equal(to_torch(held)[:, 2:5], new)
        assert torch.equal(found[:, 2:], 2 * new)
        assert not found[:, :2].any()


def test_a_result_outlives_what_it_is_a_view_of(ic):
    graph, _ = recorded(lambda a: a + a, *tensors(ic, X))
    fused = fuse(graph, ALWAYS)
    views = [fused(*tensors(ic, X)).view((8, 3)) for _ in range(8)]  # the whole is dropped at once
    gc.collect()
    [torch.full((3, 8), 7.0) for _ in range(64)]
    assert all(torch.equal(to_torch(view), (X + X).view(8, 3)) for view in views)


def test_results_that_share_memory_still_do(ic):
    def twice(a):
        made = a + a
        return made, made.narrow(0, 1, 2), a

    given = tensors(ic, X)[0]
    graph, _ = recorded(twice, given)
    whole, part, same = graph.run(given)
    assert part.data_ptr() == whole.data_ptr() + 8 * 4
    assert same.data_ptr() == given.data_ptr()
    part.copy_(tensors(ic, torch.zeros(2, 8))[0])
    assert not to_torch(whole)[1:].any()


def test_arguments_that_overlap_are_one_memory(ic):
    whole = tensors(ic, noise(4, 6))[0]

    def shifted(left, right):
        left.copy_(right)
        return right + right

    args = whole.narrow(1, 0, 4), whole.narrow(1, 2, 4)
    before = to_torch(whole).clone()
    graph, _ = recorded(shifted, *args)
    values = graph.subgraph.values
    assert values["arg0"].storage == values["arg1"].storage
    to_torch(whole).copy_(before)
    found = graph.run(*args)
    assert torch.equal(to_torch(found)[:, 2:], 2 * before[:, 4:])
    with pytest.raises(SignatureMismatchError, match="share memory"):
        graph.run(*(part.narrow(1, 0, 4) for part in tensors(ic, before, before)))


def test_wrappers_of_one_tensor_are_one_value(ic):
    a = tensors(ic, X)[0]
    again = ic.Tensor(a._underlying)
    graph, _ = recorded(lambda: a + again)
    assert graph.subgraph.nodes[0].inputs == ("const", "const")
    assert len(graph.captured) == 1


def test_views_share_what_contiguous_gives_back(ic):
    def program(a):
        same = a.contiguous().view((4, 6))
        turned = a.permute((1, 0)).contiguous()
        same.copy_(same + same)
        return a + a, turned.unsqueeze(1).squeeze(1)

    graph, _ = recorded(program, *tensors(ic, X))
    doubled, turned = graph.run(*tensors(ic, X))
    assert torch.equal(to_torch(doubled), 4 * X)
    assert torch.equal(to_torch(turned), X.t())


def test_torch_and_infinicore_on_shared_memory_keep_their_order(ic):
    def mixed(x, t):
        t.mul_(2)  # torch writes what InfiniCore reads
        first = x + x
        x.copy_(first)  # and the other way round
        return t + 1, first

    t = X.clone()
    graph, _ = recorded(mixed, ic.from_torch(t), t)
    assert graph.subgraph.input_names == ("arg0",)
    for replay in (graph.run, fuse(graph, ALWAYS)):
        t = X.clone()
        plus, first = replay(ic.from_torch(t), t)
        assert torch.equal(t, 4 * X)
        assert torch.equal(plus, 4 * X + 1)
        assert torch.equal(to_torch(first), 4 * X)


def test_from_torch_inside_shares_the_recorded_value(ic):
    weight = Y.clone()

    def mixed(t):
        made = t * 2
        x = ic.from_torch(made)
        x += ic.from_torch(weight)
        return made + 0, x

    graph, _ = recorded(mixed, X)
    weight.mul_(3)  # by reference
    plain, x = graph.run(X)
    assert torch.equal(plain, 2 * X + 3 * Y)
    assert torch.equal(to_torch(x), plain)


def test_torch_memory_behind_a_captured_tensor_is_kept_alive(ic):
    held = [Y.clone()]
    held.append(ic.from_torch(held[0]))  # InfiniCore knows the address alone
    graph, _ = recorded(lambda a, ours=held[1], theirs=held[0]: (a + ours, theirs * 2), *tensors(ic, X))
    assert len(graph.captured) == 1
    held.clear()
    gc.collect()
    [torch.full((3, 8), 7.0) for _ in range(64)]
    assert torch.equal(to_torch(graph.run(*tensors(ic, X))[0]), X + Y)


def test_from_numpy_inside_is_a_literal(ic):
    def program(a):
        return a + ic.from_numpy(numpy.full((3, 8), 2.0, dtype=numpy.float32))

    graph, _ = recorded(program, *tensors(ic, X))
    numpy.full((3, 8), 9.0, dtype=numpy.float32)
    assert torch.equal(to_torch(graph.run(*tensors(ic, X))), X + 2)


def test_zeros_made_inside_are_zeros(ic):
    graph, _ = recorded(lambda a: a + ic.zeros([3, 8], **options(ic)), *tensors(ic, X))
    assert torch.equal(to_torch(graph.run(*tensors(ic, X))), X)


def test_what_is_still_alive_is_the_result(ic):
    a = tensors(ic, X)[0]
    with record(a) as recording:
        made = a + a
        (a * a).view((8, 3))  # dropped
    assert type(recording.graph.run(a)) is ic.Tensor
    assert ops(recording.graph)[0] == "add"
    assert torch.equal(to_torch(made), X + X)


# --- ops of InfiniCore's own


def test_ops_without_a_counterpart_run_in_infinicore(ic):
    logits = torch.tensor([0.1, 3.0, -2.0])

    def sample(x):
        return ic.nn.functional.random_sample(x + x, 0.5, 0.9, 1, 1.0)

    graph, result = recorded(sample, *tensors(ic, logits))
    assert ops(graph)[-1] == "infinicore.random_sample_.default"
    for found in (result, graph.run(*tensors(ic, logits)), fuse(graph, ALWAYS)(*tensors(ic, logits))):
        assert to_torch(found).item() == 1
    assert to_torch(graph.run(*tensors(ic, logits.flip(0)))).item() == 1
    assert to_torch(graph.run(*tensors(ic, logits.roll(1)))).item() == 2


def test_an_own_op_writes_in_order(ic):
    if ic.lib._infinicore.__file__.endswith(".so"):
        pytest.skip("the library has no CPU kernel for it")
    caches = [torch.zeros(1, 2, 6, 4), torch.zeros(1, 2, 6, 4)]
    new = noise(1, 2, 3, 4)

    def step(keys, values, key, used):
        double = key + key
        ic.kv_caching(keys, values, double, key, used)
        return keys + values

    args = (*caches, new, torch.tensor([2]))
    graph, _ = recorded(step, *tensors(ic, *args))
    keys, values, *rest = tensors(ic, *args)
    found = to_torch(fuse(graph, ALWAYS)(keys, values, *rest))
    assert torch.equal(to_torch(keys)[:, :, 2:5], 2 * new)
    assert torch.allclose(found[:, :, 2:5], 3 * new)


def test_the_patterns_need_no_word_of_infinicore():
    assert not any("infini" in pattern.name for pattern in DEFAULT)
    assert set(OPS) >= {"add", "mul", "matmul", "linear", "silu", "swiglu", "rms_norm", "add_rms_norm", "rope"}


def test_the_documentation_lists_every_op():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "infinicore.md").read_text()
    rows = {
        f"| `{row.name}` | {row.becomes} | {'puts it off' if row.deferred else 'runs it at once'} |"
        for row in OPS.values()
    }
    assert {line for line in text.splitlines() if line.startswith("| `")} == rows
