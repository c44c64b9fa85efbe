"""Every spelling of every canonical op: found, with the right attributes and numbers; and the twins that are not."""

import math

import pytest
import torch
import torch.nn.functional as F

from graph_capture import record
from graph_capture.ir.interpreter import interpret
from graph_capture.ir.numerics import distance
from graph_capture.passes import canonicalize, clean_up

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
torch.manual_seed(0)
X = torch.randn(2, 3, 16)
WEIGHT, BIAS = 1 + 0.2 * torch.randn(16), torch.randn(16)


def canonical(function, *args):
    """The canonical graph of a call, and its result when its ops run as they are now."""
    with record(*args) as recording:
        recording.output(function(*args))
    graph = recording.graph
    found = canonicalize(clean_up(graph.subgraph))
    return found, interpret(found, [*graph.bind(args, {}).tensors, *graph.captured.values()])


def ops(graph):
    return [node.op_type for node in graph]


def check(function, args, expected, attrs=None, strict=False):
    """`function` becomes the one op `expected`, which computes the same, at least as well as eager does."""
    graph, results = canonical(function, *args)
    assert ops(graph) == [expected]
    if attrs is not None:
        found = dict(graph.nodes[0].attrs)
        assert found.pop("strict", False) == strict
        assert found == pytest.approx(attrs)
    eager = function(*args)
    exact = function(*(arg.double() if arg.is_floating_point() else arg for arg in args))
    rounding = 2 * torch.finfo(eager.dtype).eps
    assert results[0].shape == eager.shape
    assert results[0].dtype is eager.dtype
    assert distance(results[0], exact) <= max(1.5 * distance(eager, exact), rounding)


def absent(function, args, op):
    """The twin: no `op` is made of it; what is left computes what eager does."""
    graph, results = canonical(function, *args)
    assert op not in ops(graph)
    torch.testing.assert_close(results[0], function(*args))


# --- norms

SQUARES = {"pow": lambda x: x.pow(2), "product": lambda x: x * x, "operator": lambda x: x**2}
SCALES = {
    "rsqrt": lambda x, v: x * torch.rsqrt(v),
    "sqrt": lambda x, v: x / torch.sqrt(v),
    "power": lambda x, v: x * v.pow(-0.5),
    "inverse": lambda x, v: x * (1.0 / torch.sqrt(v)),
}
FINISHES = {
    "weight after cast": lambda x, h, w: w * h.to(x.dtype),
    "weight before cast": lambda x, h, w: (h * w).to(x.dtype),
    "weight in float32": lambda x, h, w: (h * w.float()).type_as(x),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("square", SQUARES)
def test_rms_norm(square, scale, finish, dtype):
    def rms_norm(x, weight):
        hidden = x if x.dtype is torch.float64 else x.float()
        variance = SQUARES[square](hidden).mean(-1, keepdim=True)
        return FINISHES[finish](x, SCALES[scale](hidden, variance + 1e-6), weight)

    x, weight = X.to(dtype), WEIGHT.to(dtype)
    graph, _ = canonical(rms_norm, x, weight)
    assert ops(graph) == ["rms_norm"]
    assert graph.nodes[0].attr("eps") == 1e-6
    if finish == "weight after cast":  # the others cast float64 away
        check(rms_norm, (x, weight), "rms_norm", {"eps": 1e-6})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_torch_and_without_a_weight(dtype):
    x, weight = X.to(dtype), WEIGHT.to(dtype)
    check(lambda x, w: F.rms_norm(x, (16,), w, 1e-6), (x, weight), "rms_norm", {"eps": 1e-6})
    check(lambda x, w: torch.rms_norm(x, (16,), w, 1e-6), (x, weight), "rms_norm", {"eps": 1e-6})

    def bare(x):
        hidden = x.to(torch.promote_types(x.dtype, torch.float32))
        return (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    check(bare, (x,), "rms_norm", {"eps": 1e-5})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_gemma_and_of_t5(dtype):
    def gemma(x, weight):
        hidden = x.to(torch.promote_types(x.dtype, torch.float32))
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (hidden * (1.0 + weight.to(hidden.dtype))).type_as(x)

    def t5(x, weight):
        variance = x.to(torch.promote_types(x.dtype, torch.float32)).pow(2).mean(-1, keepdim=True)
        hidden = x * torch.rsqrt(variance + 1e-6)
        return weight * (hidden if x.dtype is torch.float64 else hidden.to(weight.dtype))

    x, weight = X.to(dtype), WEIGHT.to(dtype)
    check(gemma, (x, weight), "rms_norm", {"eps": 1e-6, "offset": 1.0})
    check(t5, (x, weight), "rms_norm", {"eps": 1e-6})


@pytest.mark.parametrize(
    "twin",
    [
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)),  # over another dimension
        lambda x, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-6)),  # another power
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)),  # the sum, not the mean
        lambda x, w: w * (x.abs() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),  # of another value
    ],
)
def test_not_an_rms_norm(twin):
    absent(twin, (X, WEIGHT), "rms_norm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("variance", ["pow", "product", "var"])
def test_layer_norm(variance, scale, dtype):
    def layer_norm(x, weight, bias):
        hidden = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = hidden - hidden.mean(-1, keepdim=True)
        spread = {
            "pow": lambda: centred.pow(2).mean(-1, keepdim=True),
            "product": lambda: (centred * centred).mean(-1, keepdim=True),
            "var": lambda: hidden.var(-1, unbiased=False, keepdim=True),
        }[variance]()
        return weight * SCALES[scale](centred, spread + 1e-5).to(x.dtype) + bias

    args = [value.to(dtype) for value in (X, WEIGHT, BIAS)]
    check(layer_norm, args, "layer_norm", {"eps": 1e-5})


def test_layer_norm_of_torch_and_its_twins():
    check(lambda x, w, b: F.layer_norm(x, (16,), w, b), (X, WEIGHT, BIAS), "layer_norm", {})

    def unbiased(x, w, b):
        return w * ((x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)) + b

    absent(unbiased, (X, WEIGHT, BIAS), "layer_norm")


# --- activations

ERF = {
    "half first": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "half last": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "times": lambda x: x * 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5))),
    "grouped": lambda x: x * (0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "torch": lambda x: F.gelu(x),
}
TANH = {
    "new": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    "integer": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "products": lambda x: x * 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))),
    "fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "torch": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("spelling", ERF)
def test_gelu(spelling):
    check(ERF[spelling], (X,), "gelu", {})


@pytest.mark.parametrize("spelling", TANH)
def test_gelu_tanh(spelling):
    graph, results = canonical(TANH[spelling], X)
    assert ops(graph) == ["gelu"]
    assert graph.nodes[0].attr("approximate") == "tanh"
    torch.testing.assert_close(results[0], TANH[spelling](X))


@pytest.mark.parametrize(
    "twin",
    [
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.9 * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.05 * torch.pow(x, 3.0)))),
        lambda x: 0.5 * x * (1.0 + torch.erf(x / 1.5)),
        lambda x: 0.5 * x.sin() * (1.0 + torch.erf(x / math.sqrt(2.0))),
    ],
)
def test_not_a_gelu(twin):
    absent(twin, (X,), "gelu")


def test_other_activations():
    check(lambda x: x * torch.sigmoid(x), (X,), "silu", {})
    check(lambda x: x / (1.0 + torch.exp(-x)), (X,), "silu", {})
    check(F.silu, (X,), "silu", {})
    check(lambda x: x * torch.sigmoid(1.702 * x), (X,), "quick_gelu", {})
    absent(lambda x: x * torch.sigmoid(1.5 * x), (X,), "quick_gelu")
    absent(lambda x: x * torch.sigmoid(x + 1), (X,), "silu")
    for squared in (lambda x: F.relu(x).pow(2), lambda x: torch.square(F.relu(x)), lambda x: F.relu(x) * F.relu(x)):
        check(squared, (X,), "relu_squared", {})
    check(lambda x: x.clamp(min=0).pow(2), (X,), "relu_squared", {})
    absent(lambda x: F.relu(x).pow(3), (X,), "relu_squared")
    absent(lambda x: x.clamp(min=0.5).pow(2), (X,), "relu_squared")
    check(lambda x: 30.0 * torch.tanh(x / 30.0), (X,), "softcap", {"cap": 30.0})
    absent(lambda x: 30.0 * torch.tanh(x / 20.0), (X,), "softcap")
    assert ops(canonical(lambda x: F.dropout(x, 0.0, training=True) + 1, X)[0]) == ["add"]
    assert ops(canonical(lambda x: F.dropout(x, 0.5, training=False) + 1, X)[0]) == ["add"]


def test_softmax():
    def by_hand(x):
        raised = torch.exp(x - x.amax(-1, keepdim=True))
        return raised / raised.sum(-1, keepdim=True)

    def by_max(x):
        raised = torch.exp(x - torch.max(x, dim=2, keepdim=True)[0])
        return raised / torch.sum(raised, dim=2, keepdim=True)

    for spelling in (by_hand, by_max):
        check(spelling, (X,), "softmax", {"dim": -1})
    absent(lambda x: torch.exp(x - x.amax(-1, keepdim=True)), (X,), "softmax")
    absent(lambda x: torch.exp(x - x.amax(1, True)) / torch.exp(x - x.amax(1, True)).sum(1, True), (X,), "softmax")


# --- rotary embedding

Q = torch.randn(2, 4, 5, 8)
ANGLES = torch.randn(2, 1, 5, 8)
COS, SIN = ANGLES.cos(), ANGLES.sin()


def rotate_half(x):
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def rotate_chunks(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_every_two(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def rotate_unbound(x):
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), dim=-1).flatten(-2)


@pytest.mark.parametrize("rotate", [rotate_half, rotate_chunks, rotate_every_two, rotate_unbound])
@pytest.mark.parametrize("swapped", [False, True])
def test_rope(rotate, swapped):
    def rope(x, cos, sin):
        return rotate(x) * sin + cos * x if swapped else (x * cos) + (rotate(x) * sin)

    interleaved = rotate in (rotate_every_two, rotate_unbound)
    check(rope, (Q, COS, SIN), "rope", {"interleaved": True} if interleaved else {})
    check(rope, (Q[..., :4, :], COS[..., :4, :], SIN[:, :, :4]), "rope")


def test_rope_of_a_part_and_by_halves():
    def partial(x, cos, sin):
        turned, kept = x[..., :4], x[..., 4:]
        return torch.cat(((turned * cos) + (rotate_half(turned) * sin), kept), dim=-1)

    check(partial, (Q, COS[..., :4], SIN[..., :4]), "rope", {})

    def halves(x, cos, sin):
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    check(halves, (Q, COS[..., :4], SIN[..., :4]), "rope", {"half_tables": True})


@pytest.mark.parametrize(
    "twin",
    [
        lambda x, c, s: x * c + torch.cat((-x[..., :4], x[..., 4:]), -1) * s,  # not exchanged
        lambda x, c, s: x * c + torch.cat((-x[..., 2:6], x[..., :4]), -1) * s,  # another part
        lambda x, c, s: x * c + torch.cat((x[..., 4:], x[..., :4]), -1) * s,  # no sign
        lambda x, c, s: x * c - rotate_half(x) * s,
        lambda x, c, s: x * c + torch.cat((-x[..., 6:], x[..., :6]), -1) * s,  # not in the middle
    ],
)
def test_not_a_rope(twin):
    absent(twin, (Q, COS, SIN), "rope")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope_by_complex_numbers(dtype):
    def rope(x, table):
        pairs = torch.view_as_complex(x.to(table.real.dtype).reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table).flatten(3).type_as(x)

    x, table = Q.to(dtype), torch.polar(torch.ones(5, 4), torch.randn(5, 4))
    check(rope, (x, table), "rope", {"half_tables": True, "interleaved": True})

    def flattened(x, table):  # the heads' rows in one
        pairs = torch.view_as_complex(x.to(table.real.dtype).reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table).flatten(2).type_as(x)

    absent(flattened, (x, table), "rope")


# --- attention

KEY, VALUE = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
MASK = torch.zeros(2, 1, 5, 6).masked_fill(torch.rand(2, 1, 5, 6) < 0.3, torch.finfo(torch.float32).min)
TRANSPOSES = [lambda k: k.transpose(2, 3), lambda k: k.transpose(-1, -2), lambda k: k.mT]
SCORES = {
    "times": lambda q, k: (q @ k) * 0.35,
    "over": lambda q, k: torch.matmul(q, k) / math.sqrt(8),
    "query times": lambda q, k: torch.matmul(q * 0.35, k),
    "plain": lambda q, k: q @ k,
}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("transpose", TRANSPOSES)
@pytest.mark.parametrize("score", SCORES)
def test_attention(score, transpose, masked):
    def attention(query, key, value, mask):
        scores = SCORES[score](query, transpose(key))
        if masked:
            scores = scores + mask
        return torch.matmul(
            F.softmax(scores, dim=-1, dtype=query.dtype if query.dtype is torch.float64 else torch.float32).to(
                query.dtype
            ),
            value,
        )

    scale = {"times": 0.35, "over": 1 / math.sqrt(8), "query times": 0.35, "plain": 1.0}[score]
    check(attention, (Q, KEY, VALUE, MASK), "scaled_dot_product_attention", {"scale": scale}, masked)


@pytest.mark.parametrize(("scale", "masked"), [(0.35, True), (0.35, False), (1.0, True)])
def test_attention_with_capped_scores(scale, masked):
    def attention(query, key, value, *mask):
        scores = torch.tanh(query @ key.mT * scale / 20.0) * 20.0
        return torch.matmul(F.softmax(scores + mask[0] if mask else scores, dim=-1), value)

    inputs = (Q, KEY, VALUE, MASK)[: 4 if masked else 3]
    check(attention, inputs, "capped_attention", {"scale": scale, "cap": 20.0})
    absent(lambda q, k, v: torch.tanh(q @ k.mT / 20.0) * 21.0 @ v, (Q, KEY, VALUE), "capped_attention")


def test_attention_in_bfloat16_and_grouped():
    def eager(query, key, value, mask):
        key, value = (
            x[:, :, None, :, :].expand(2, 2, 2, 6, 8).reshape(2, 4, 6, 8) if x.shape[1] == 2 else x
            for x in (key, value)
        )
        scores = torch.matmul(query, key.transpose(2, 3)) * 0.5 + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
        return torch.matmul(weights, value)

    for heads in (4, 2):
        args = [x.bfloat16() for x in (Q, KEY[:, :heads], VALUE[:, :heads], MASK.clamp(min=-1e4))]
        grouped = {"scale": 0.5, "enable_gqa": True} if heads == 2 else {"scale": 0.5}
        check(eager, args, "scaled_dot_product_attention", grouped, strict=True)


def test_repeated_heads():
    key = KEY[:, :2]
    check(lambda k: k[:, :, None].expand(2, 2, 3, 6, 8).reshape(2, 6, 6, 8), (key,), "repeat_kv", {"repeats": 3})
    check(lambda k: torch.repeat_interleave(k, 3, dim=1), (key,), "repeat_kv", {"repeats": 3})
    check(lambda k: k.repeat_interleave(2, 1), (key,), "repeat_kv", {"repeats": 2})
    absent(lambda k: k[:, None].expand(2, 3, 2, 6, 8).reshape(2, 6, 6, 8), (key,), "repeat_kv")  # heads in turns

    def attention(q, k, v):
        k, v = torch.repeat_interleave(k, 2, dim=1), torch.repeat_interleave(v, 2, dim=1)
        return F.scaled_dot_product_attention(q, k, v, scale=0.3)

    check(attention, (Q, key, VALUE[:, :2]), "scaled_dot_product_attention", {"scale": 0.3, "enable_gqa": True})


TOKENS = KEY[0, :2].transpose(0, 1).contiguous()  # [S, H, E]


def repeated_tokens(x, repeats):
    length, heads, width = x.shape
    return x.unsqueeze(2).expand(length, heads, repeats, width).contiguous().view(length, heads * repeats, width)


def test_repeated_heads_where_tokens_come_first():
    expected = {"repeats": 3, "tokens_first": True}
    check(lambda k: repeated_tokens(k, 3).permute(1, 0, 2), (TOKENS,), "repeat_kv", expected)
    check(lambda k: repeated_tokens(k, 3).transpose(0, 1), (TOKENS,), "repeat_kv", expected)
    absent(lambda k: repeated_tokens(k, 3), (TOKENS,), "repeat_kv")  # its heads are not brought to the front
    absent(lambda k: repeated_tokens(k, 3).permute(2, 1, 0), (TOKENS,), "repeat_kv")
    in_turns = lambda k: k[:, None].expand(-1, 3, 2, 8).contiguous().view(-1, 6, 8).transpose(0, 1)  # noqa: E731
    absent(in_turns, (TOKENS,), "repeat_kv")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_where_tokens_come_first(groups, masked):
    query, value = Q[0, : 2 * groups].transpose(0, 1).contiguous(), TOKENS.flip(0)
    ahead = torch.ones(query.shape[0], TOKENS.shape[0], dtype=torch.bool).triu(1)

    def attention(query, key, value):
        if groups > 1:
            key, value = repeated_tokens(key, groups), repeated_tokens(value, groups)
        scores = torch.matmul(query.permute(1, 0, 2), key.permute(1, 2, 0)) * 0.5
        scores.copy_(F.softmax(scores.masked_fill(ahead, -math.inf) if masked else scores, -1))
        return torch.matmul(scores, value.permute(1, 0, 2))

    graph, results = canonical(attention, query, TOKENS, value)
    found = [node for node in graph if node.op_type == "scaled_dot_product_attention"]
    assert len(found) == 1
    assert not {"repeat_kv", "softmax", "matmul", "aten.copy_.default"} & set(ops(graph))
    assert found[0].attr("scale") == 0.5
    assert (found[0].attr("enable_gqa"), found[0].attr("tokens_first")) == (
        (True, True) if groups > 1 else (None, None)
    )
    exact = attention(query.double(), TOKENS.double(), value.double())
    assert distance(results[0], exact) <= max(1.5 * distance(attention(query, TOKENS, value), exact), 1e-6)


LOWEST = torch.finfo(torch.float32).min
FILLS = {
    "masked_fill": lambda scores, mask, fill: scores.masked_fill(mask, fill),
    "where": lambda scores, mask, fill: torch.where(mask, fill, scores),
    "where kept": lambda scores, mask, fill: torch.where(~mask, scores, fill),
}


@pytest.mark.parametrize("fill", [-math.inf, LOWEST])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mask", FILLS)
def test_attention_with_a_filled_mask(mask, score, fill):
    def attention(query, key, value, left_out):
        scores = FILLS[mask](SCORES[score](query, key.transpose(2, 3)), left_out, fill)
        return F.softmax(scores, dim=-1) @ value

    left_out = MASK < 0
    left_out[..., 0] = False  # no row is masked as a whole
    graph, (result,) = canonical(attention, Q, KEY, VALUE, left_out)
    assert ops(graph)[-1] == "scaled_dot_product_attention"
    assert graph.nodes[-1].attr("fill") == fill
    assert "matmul" not in ops(graph)
    exact = attention(Q.double(), KEY.double(), VALUE.double(), left_out)
    assert distance(result, exact) < 1e-6


def test_attention_whose_rows_are_filled_as_a_whole():
    def attention(query, key, value, left_out):
        return F.softmax((query @ key.mT).masked_fill(left_out, LOWEST), dim=-1) @ value

    everything = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    check(attention, (Q, KEY, VALUE, everything), "scaled_dot_product_attention", {"scale": 1.0, "fill": LOWEST})

    def near(query, key, value, left_out):  # adding -10000 to a score is not -10000
        return F.softmax((query @ key.mT).masked_fill(left_out, -1e4), dim=-1) @ value

    absent(near, (Q, KEY, VALUE, everything), "scaled_dot_product_attention")


@pytest.mark.parametrize("options", [{}, {"beta": 1.0}])
def test_attention_by_baddbmm(options):
    query, key, value = Q.flatten(0, 1), KEY.flatten(0, 1), VALUE.flatten(0, 1)

    def attention(query, key, value, bias):
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=0.3, **options)
        return torch.bmm(F.softmax(scores, dim=-1), value)

    bias = torch.randn(8, 1, 6)
    check(attention, (query, key, value, bias), "scaled_dot_product_attention", {"scale": 0.3}, strict=True)

    def halved(query, key, value, bias):
        return torch.bmm(F.softmax(torch.baddbmm(bias, query, key.mT, beta=0.5), dim=-1), value)

    absent(halved, (query, key, value, bias), "scaled_dot_product_attention")


@pytest.mark.parametrize(
    "twin",
    [
        lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v,  # over the queries
        lambda q, k, v: torch.softmax(30 * torch.tanh((q @ k.mT) / 30), -1) @ v,  # soft-capped
        lambda q, k, v: torch.sigmoid(q @ k.mT) @ v,
    ],
)
def test_not_an_attention(twin):
    absent(twin, (Q, KEY, VALUE), "scaled_dot_product_attention")


def test_attention_whose_weights_are_used_stays():
    def program(q, k, v):
        weights = torch.softmax(q @ k.mT, -1)
        return weights @ v, weights

    graph, results = canonical(program, Q, KEY, VALUE)
    assert "scaled_dot_product_attention" not in ops(graph)
    for got, want in zip(results, program(Q, KEY, VALUE), strict=True):
        assert torch.equal(got, want)


# --- linear


def test_linear_of_gpt2():
    weight, bias = torch.randn(16, 6), torch.randn(6)

    def conv1d(x, weight, bias):
        return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view((*x.size()[:-1], 6))

    check(conv1d, (X, weight, bias), "linear", {"transposed": True})
    absent(lambda x, w, b: torch.addmm(b, x.view(6, 16), w, beta=2).view(2, 3, 6), (X, weight, bias), "linear")


def test_a_pass_keeps_what_it_replaced():
    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    with record(X) as recording:
        recording.output(gelu(X))
    node = canonicalize(clean_up(recording.graph.subgraph)).nodes[0]
    assert [inner.op_type for inner in node.recorded] == [inner.op_type for inner in recording.graph.subgraph]
