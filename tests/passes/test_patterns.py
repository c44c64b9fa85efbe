"""Every named pattern: each spelling found, counted and as close to float64 as eager; twins that must not be found."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, fuse, record
from graph_capture.ir.numerics import distance
from graph_capture.passes import DEFAULT

ALWAYS = FusionConfig(profile="always")
GENERATOR = torch.Generator()
POSITION = torch.tensor([4, 5, 6])
IDS = torch.tensor([3, 1, 3, 0])
SCALE = torch.tensor(5.657)


def noise(*shape):
    return torch.randn(shape, generator=GENERATOR)


@dataclass
class Case:
    """What is called with what: `twins` look alike and are something else."""

    args: Callable[[], tuple[torch.Tensor, ...]]
    spellings: list[Callable[..., Any]]
    twins: list[Callable[..., Any]]


def pair():
    return noise(6, 16), noise(6, 16)


def vector():
    return noise(6, 16), 1 + 0.3 * noise(16)


def normed_sum(branches, vectors):
    return lambda: (*(noise(6, 16) for _ in range(branches)), *(1 + 0.3 * noise(16) for _ in range(vectors)))


# --- norms, as models spell them


def llama_norm(x, weight, eps=1e-6):
    hidden = x.float() if x.dtype != torch.float64 else x
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return weight * hidden.to(x.dtype)


def gemma_norm(x, weight, eps=1e-6):
    hidden = x.float() if x.dtype != torch.float64 else x
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return (hidden * (1.0 + weight.to(hidden.dtype))).to(x.dtype)


def torch_norm(x, weight, eps=1e-6):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def spelled_layer_norm(x, weight, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight + bias


def layer_norm(x, weight, bias, eps=1e-5):
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_then(norm):
    def program(x, residual, *weights):
        total = x + residual
        return total, norm(total, *weights)

    return program


def add_bias_then(norm):
    def program(x, extra, residual, weight, bias):
        total = (x + extra) + residual
        return total, norm(total, weight, bias)

    return program


def two_norms(norm, other=None):
    def program(x, extra, residual, weight, bias, weight_2, bias_2):
        total = x + extra + residual
        return total, norm(total, weight, bias), (other or norm)(total, weight_2, bias_2)

    return program


def norm_add_norm(norm):
    def program(x, residual, first, second):
        total = residual + norm(x, first)
        return total, norm(total, second)

    return program


# --- rotary embedding: [batch, heads, length, width]


def angles(dtype=torch.float32):
    inverse = 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)
    phase = torch.cat([torch.arange(3.0)[:, None] * inverse] * 2, dim=-1)[None, None]
    return phase.cos().to(dtype), phase.sin().to(dtype)


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def half(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def half_chunked(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def interleaved(x, cos, sin):
    pairs = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + pairs * sin


def wrong_sign(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, -first), dim=-1) * sin


def swapped_halves(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((first, -second), dim=-1) * sin


def roped(rotate):
    return lambda query, key, cos, sin: (rotate(query, cos, sin), rotate(key, cos, sin))


def headed(rotate, norm=torch_norm):
    def program(query, key, first, second, cos, sin):
        query, key = norm(query, first).transpose(1, 2), norm(key, second).transpose(1, 2)
        return rotate(query, cos, sin), rotate(key, cos, sin)

    return program


def write(keys, values, position, key, value):
    keys.index_copy_(2, position, key)
    values.index_copy_(2, position, value)
    return keys, values


def put(keys, values, position, key, value):
    keys[:, :, position] = key
    values[:, :, position] = value
    return keys, values


def cached(rotate, store=write):
    def program(query, key, value, cos, sin, keys, values):
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return query, *store(keys, values, POSITION, key, value)

    return program


def counted(rotate):
    def program(query, key, value, cos, sin, keys, values, count):
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        position = torch.arange(3) + count
        count.add_(3)
        return query, *write(keys, values, position, key, value)

    return program


def headed_cached(rotate, norm=torch_norm):
    def program(query, key, first, second, value, cos, sin, keys, values):
        query, key = norm(query, first).transpose(1, 2), norm(key, second).transpose(1, 2)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return query, *write(keys, values, POSITION, key, value)

    return program


def rope_args():
    return noise(2, 4, 3, 8), noise(2, 2, 3, 8), *angles()


def headed_args():
    return noise(2, 3, 4, 8), noise(2, 3, 2, 8), noise(8), noise(8), *angles()


def caches():
    return noise(2, 2, 9, 8), noise(2, 2, 9, 8)


def cached_args():
    return noise(2, 4, 3, 8), noise(2, 2, 3, 8), noise(2, 2, 3, 8), *angles(), *caches()


def headed_cached_args():
    query, key, first, second, cos, sin = headed_args()
    return query, key, first, second, noise(2, 2, 3, 8), cos, sin, *caches()


def embedded(scale, norm=None):
    def program(table, *weight):
        scaled = F.embedding(IDS, table) * scale
        return scaled if norm is None else (scaled, norm(scaled, *weight))

    return program


CASES = {
    "swiglu": Case(
        pair,
        [
            lambda g, u: F.silu(g) * u,
            lambda g, u: u * (g * torch.sigmoid(g)),
            lambda g, u: g / (1 + torch.exp(-g)) * u,
        ],
        [lambda g, u: torch.sigmoid(g) * u, lambda g, u: F.silu(g) + u, lambda g, u: F.silu(g) / u],
    ),
    "geglu": Case(
        pair,
        [lambda g, u: F.gelu(g) * u, lambda g, u: g * 0.5 * (1 + torch.erf(g / 2**0.5)) * u],
        [lambda g, u: F.gelu(g) + u, lambda g, u: g * 0.5 * (1 + torch.erf(g / 3**0.5)) * u],
    ),
    "geglu_tanh": Case(
        pair,
        [
            lambda g, u: u * F.gelu(g, approximate="tanh"),
            lambda g, u: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g.pow(3)))) * u,
        ],
        [lambda g, u: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.05 * g.pow(3)))) * u],
    ),
    "relu_squared_glu": Case(
        pair,
        [
            lambda g, u: F.relu(g).square() * u,
            lambda g, u: u * torch.relu(g) ** 2,
            lambda g, u: torch.pow(F.relu(g), 2) * u,
        ],
        [lambda g, u: F.relu(g).pow(3) * u, lambda g, u: F.relu(g) * u],
    ),
    "bias_gelu": Case(vector, [lambda x, b: F.gelu(x + b), lambda x, b: F.gelu(b + x)], [lambda x, b: F.gelu(x - b)]),
    "bias_gelu_tanh": Case(
        vector, [lambda x, b: F.gelu(x + b, approximate="tanh")], [lambda x, b: F.gelu(x * b, approximate="tanh")]
    ),
    "bias_silu": Case(
        vector,
        [lambda x, b: F.silu(x + b), lambda x, b: (x + b) * torch.sigmoid(x + b)],
        [lambda x, b: (x + b) * torch.sigmoid(x)],
    ),
    "bias_relu": Case(vector, [lambda x, b: F.relu(x + b), lambda x, b: (x + b).relu()], [lambda x, b: F.relu(x * b)]),
    "scaled_residual": Case(
        pair,
        [lambda x, r: r + x * 0.22, lambda x, r: x * 0.22 + r, lambda x, r: r + 0.22 * x],
        [lambda x, r: r - x * 0.22, lambda x, r: (r + x) * 0.22],
    ),
    "norm_add_norm": Case(
        normed_sum(2, 2),
        [norm_add_norm(llama_norm), norm_add_norm(gemma_norm), norm_add_norm(torch_norm)],
        [norm_add_norm(lambda x, weight: torch_norm(x * x, weight))],
    ),
    "add_rms_norm": Case(
        normed_sum(2, 1),
        [add_then(llama_norm), add_then(gemma_norm), add_then(torch_norm)],
        [add_then(lambda x, weight: F.softmax(x, -1) * weight)],
    ),
    "add_layer_norm": Case(
        normed_sum(2, 2),
        [add_then(layer_norm), add_then(spelled_layer_norm)],
        [add_then(lambda x, weight, bias: spelled_layer_norm(x, weight, 0) - bias)],
    ),
    "bias_add_layer_norm": Case(
        lambda: (noise(6, 16), noise(16), noise(6, 16), noise(16), noise(16)),
        [add_bias_then(layer_norm), add_bias_then(spelled_layer_norm)],
        [lambda x, extra, r, w, b: add_then(layer_norm)((x * extra), r, w, b)],
    ),
    "add_two_layer_norms": Case(
        normed_sum(3, 4),
        [two_norms(layer_norm), two_norms(layer_norm, spelled_layer_norm)],
        [two_norms(layer_norm, lambda x, w, b: x * w + b)],
    ),
    "rms_norm": Case(
        normed_sum(1, 1),
        [llama_norm, gemma_norm],
        [
            torch_norm,  # one op already
            lambda x, w: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)),
            lambda x, w: w * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6)),
        ],
    ),
    "layer_norm": Case(
        normed_sum(1, 2),
        [spelled_layer_norm],
        [lambda x, w, b: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b],
    ),
    "rope": Case(
        rope_args,
        [roped(half), roped(half_chunked), roped(interleaved)],
        [roped(wrong_sign), roped(swapped_halves)],
    ),
    "qk_norm_rope": Case(
        headed_args,
        [headed(half), headed(half, llama_norm), headed(interleaved)],
        [headed(wrong_sign), headed(half, lambda x, weight: F.softmax(x, -1) * weight)],
    ),
    "rope_cache": Case(
        cached_args,
        [cached(half), cached(interleaved), cached(half, put)],
        [
            cached(half, lambda keys, values, position, key, value: (keys.index_add_(2, position, key), values)),
            cached(half, lambda k, v, position, key, value: write(k, v, position, key * 2, value)),
        ],
    ),
    "qk_norm_rope_cache": Case(
        headed_cached_args,
        [headed_cached(half), headed_cached(half, llama_norm)],
        [headed_cached(wrong_sign)],
    ),
    "scale_mask_softmax": Case(
        lambda: (noise(2, 4, 3, 16), noise(16)),
        [
            lambda s, m: F.softmax(s * 0.25 + m, dim=-1),
            lambda s, m: torch.softmax(s / 4 + m, -1),
            lambda s, m: F.softmax(s * 0.25 + m, -1, dtype=torch.float32 if s.dtype == torch.float32 else None),
        ],
        [lambda s, m: F.softmax(s * 0.25 * m, dim=-1), lambda s, m: F.softmax(s * 0.25 + m, dim=-2)],
    ),
    "embedding_scale": Case(
        lambda: (noise(9, 16),), [embedded(5.657), embedded(SCALE)], [lambda t: F.embedding(IDS, t) + 5.657]
    ),
    "embedding_scale_norm": Case(
        lambda: (noise(9, 16), noise(16)),
        [embedded(5.657, torch_norm), embedded(5.657, gemma_norm), embedded(SCALE, llama_norm)],
        [embedded(5.657, lambda x, weight: F.softmax(x, -1) * weight)],
    ),
    "softcap": Case(
        lambda: (noise(6, 16),),
        [lambda x: torch.tanh(x / 30) * 30, lambda x: 30 * torch.tanh(x / 30), lambda x: torch.tanh(x * (1 / 30)) * 30],
        [lambda x: torch.tanh(x / 30) * 20, lambda x: torch.sigmoid(x / 30) * 30],
    ),
    "temperature_softmax": Case(
        lambda: (noise(6, 16),),
        [lambda x: F.softmax(x / 0.7, dim=-1), lambda x: torch.softmax(x * (1 / 0.7), -1)],
        [lambda x: F.log_softmax(x / 0.7, dim=-1), lambda x: F.softmax(x / 0.7, dim=0)],
    ),
}

SPELLINGS = [pytest.param(n, f, id=f"{n}-{i}") for n, case in CASES.items() for i, f in enumerate(case.spellings)]
TWINS = [pytest.param(n, f, id=f"{n}-{i}") for n, case in CASES.items() for i, f in enumerate(case.twins)]


def fused_twice(name, function):
    """`function` of two sets of arguments in one graph, fused; and the arguments."""
    GENERATOR.manual_seed(0)
    args = CASES[name].args() + CASES[name].args()
    half = len(args) // 2

    def program(*args):
        results = (function(*args[:half]), function(*args[half:]))
        return tuple(t for result in results for t in (result if isinstance(result, tuple) else (result,)))

    examples = tuple(t.clone() for t in args)
    with record(*examples) as recording:
        recording.output(program(*examples))
    return fuse(recording.graph, ALWAYS), program, args


def regions_called(fused, name):
    return [region for region in fused.regions if region.kind == name and not region.parent]


def test_every_pattern_has_spellings_and_twins():
    assert set(CASES) == {pattern.name for pattern in DEFAULT}
    assert all(case.spellings and case.twins for case in CASES.values())


@pytest.mark.parametrize(("name", "function"), SPELLINGS)
def test_a_spelling_is_found_and_right(name, function):
    fused, program, args = fused_twice(name, function)
    assert len(regions_called(fused, name)) == 2, fused.subgraph
    assert {node.op_type for node in fused.subgraph.nodes} == {f"fused.{name}"}, fused.subgraph
    fresh = [t * 0.75 if t.is_floating_point() else t for t in args]
    ours, eager = [t.clone() for t in fresh], [t.clone() for t in fresh]
    exact = [t.double() if t.is_floating_point() else t.clone() for t in fresh]
    results = zip((*fused(*ours), *ours), (*program(*eager), *eager), (*program(*exact), *exact), strict=True)
    for got, want, reference in results:
        assert got.dtype is want.dtype
        assert distance(got, reference) <= max(2 * distance(want, reference), 2**-24)


@pytest.mark.parametrize(("name", "function"), TWINS)
def test_a_twin_is_left_alone_and_right(name, function):
    fused, program, args = fused_twice(name, function)
    assert regions_called(fused, name) == []
    ours, eager = [t.clone() for t in args], [t.clone() for t in args]
    for got, want in zip((*fused(*ours), *ours), (*program(*eager), *eager), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "cut", [lambda x: x.chunk(2, -1), lambda x: (x[..., :16], x[..., 16:]), lambda x: x.split(16, -1)]
)
def test_a_merged_projection_is_swiglu(cut):
    """Phi-3's gate_up_proj: one linear, cut in two."""
    layer, x = torch.nn.Linear(8, 32, bias=False), noise(3, 5, 8)  # more rows than a decode step

    def mlp(x):
        gate, up = cut(layer(x))
        return F.silu(gate) * up

    with torch.no_grad(), record(x) as recording:
        recording.output(mlp(x))
    fused = fuse(recording.graph, ALWAYS)
    assert [region.kind for region in fused.regions] == ["swiglu"]
    assert fused.regions[0].kernel.spec.columns == 16  # in place, row by row
    with torch.no_grad():
        torch.testing.assert_close(fused(x + 1), mlp(x + 1))
