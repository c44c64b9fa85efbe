"""Rotary embedding with its norms and the cache's write: one kernel, for every spelling and layout."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from graph_capture import CompiledKernel, FusionConfig, FusionError, fuse, record
from graph_capture.codegen.spec.rotary import RotarySpec
from graph_capture.ir.numerics import distance

ALWAYS = FusionConfig(profile="always", min_nodes_for_fusion=1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True, params=["ninetoothed"] if DEVICE == "cuda" else ["c", "ninetoothed"])
def target(request, monkeypatch):
    """Every test for both targets."""
    monkeypatch.setitem(globals(), "ALWAYS", replace(ALWAYS, target=request.param))


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def rotate(x, cos, sin, other=half):
    return x * cos + other(x) * sin


def one_kernel(function, *args):
    """The function's one region, checked: its kernel is a rotary one and computes what eager does."""
    with record(*args) as recording:
        recording.output(function(*args))
    fused = fuse(recording.graph, ALWAYS)
    kernels = [region for region in fused.regions if isinstance(region.kernel, CompiledKernel)]
    assert [type(region.kernel.spec) for region in kernels] == [RotarySpec], str(fused)
    (region,) = kernels
    verification = fused.verify(*[arg.clone() for arg in args])
    assert verification.ok, str(verification)
    ours, theirs = [arg.clone() for arg in args], [arg.clone() for arg in args]
    results, expected = fused(*ours), function(*theirs)
    for left, right in zip((*results, *ours), (*expected, *theirs), strict=True):
        assert left.dtype is right.dtype
        assert left.shape == right.shape
        if right.dtype.is_floating_point:
            assert distance(left, right) <= 2 * torch.finfo(right.dtype).eps
        else:
            assert torch.equal(left, right)
    return region


def inputs(batch=1, length=1, heads=4, groups=2, width=16, dtype=torch.float32, table=None):
    """Query, key (as [batch, heads, length, width] views of a projection), cos, sin."""
    query = noise(batch, length, heads, width, dtype=dtype).transpose(1, 2)
    key = noise(batch, length, groups, width, seed=1, dtype=dtype).transpose(1, 2)
    cos, sin = (noise(1, 1, length, table or width, seed=seed, dtype=dtype) for seed in (2, 3))
    return query, key, cos, sin


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("other", [half, pairs])
def test_query_and_key_in_one_kernel(other, dtype):
    region = one_kernel(
        lambda q, k, cos, sin: (rotate(q, cos, sin, other), rotate(k, cos, sin, other)),
        *inputs(2, 2, dtype=dtype),
    )
    assert region.kind == "rope"
    assert region.kernel.spec.interleaved == (other is pairs)


@pytest.mark.parametrize(
    ("heads", "groups", "width", "length"),
    [(4, 4, 16, 1), (8, 2, 2, 2), (6, 2, 6, 1), (7, 1, 16, 1), (3, 3, 96, 1), (12, 4, 6, 1)],
)
def test_head_counts_and_widths(heads, groups, width, length):
    one_kernel(
        lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin)), *inputs(2, length, heads, groups, width)
    )


def test_part_of_a_head():
    def partial(x, cos, sin):
        return torch.cat((rotate(x[..., :6], cos, sin), x[..., 6:]), -1)

    region = one_kernel(lambda q, k, c, s: (partial(q, c, s), partial(k, c, s)), *inputs(1, 2, table=6))
    assert (region.kernel.spec.turned, region.kernel.spec.rest) == (6, 10)


def test_tables_of_half_a_head():
    def by_halves(x, cos, sin):
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    region = one_kernel(lambda q, k, c, s: (by_halves(q, c, s), by_halves(k, c, s)), *inputs(1, 2, table=8))
    assert region.kernel.spec.half_tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_complex_tables_with_the_length_first(dtype):
    def rope(x, table):
        turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * table
        return torch.view_as_real(turned).flatten(3).type_as(x)

    angles = noise(2, 8)
    table = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    query, key, _, _ = inputs(1, 2, dtype=dtype)
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    region = one_kernel(lambda q, k, t: (rope(q, t), rope(k, t)), query, key, table)
    assert region.kernel.spec.axes == (0, 1, 2, 3)


def test_one_token_with_the_length_first():
    query, key, cos, sin = inputs(1, 1)
    query, key = (x.transpose(1, 2).contiguous() for x in (query, key))
    assert query.shape[1] == 1 < query.shape[2]
    region = one_kernel(lambda q, k, c, s: (rotate(q, c, s), rotate(k, c, s)), query, key, cos, sin)
    assert region.kernel.spec.axes == (0, 1, 2, 3)


def test_a_table_for_each_row_of_the_batch():
    query, key, _, _ = inputs(2, 2)
    cos, sin = noise(2, 1, 2, 16, seed=2), noise(2, 1, 2, 16, seed=3)
    one_kernel(lambda q, k, c, s: (rotate(q, c, s), rotate(k, c, s)), query, key, cos, sin)


def caches(batch, heads=2, width=16, slots=9, dtype=torch.float32):
    return tuple(noise(batch, heads, slots, width, seed=seed, dtype=dtype) for seed in (7, 8))


def with_cache(query, key, value, cos, sin, keys, values, position):
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    return query, keys.index_copy_(2, position, key), values.index_copy_(2, position, value)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 2)])
def test_the_write_into_a_cache(batch, length, dtype):
    query, key, cos, sin = inputs(batch, length, dtype=dtype)
    value = noise(batch, 2, length, 16, seed=5, dtype=dtype)
    position = torch.tensor([8, 0, 4][:length], device=DEVICE)
    region = one_kernel(with_cache, query, key, value, cos, sin, *caches(batch, dtype=dtype), position)
    assert region.kind == "rope_cache"
    assert [track.cached for track in region.kernel.spec.tracks].count(True) == 2


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("normed", [False, True])
def test_a_cache_that_counts(normed, batch, length):
    def step(query, key, value, cos, sin, keys, values, steps, count, first, second):
        if normed:
            query, key = (F.rms_norm(x.transpose(1, 2), (16,), w, 1e-6) for x, w in ((query, first), (key, second)))
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        position = steps + count
        count.add_(length)
        return (*with_cache(query, key, value, cos, sin, keys, values, position), count)

    query, key, cos, sin = inputs(batch, length)
    value = noise(batch, length, 2, 16, seed=5).transpose(1, 2)
    steps, count = torch.arange(length, device=DEVICE), torch.tensor(4, device=DEVICE)
    norms = (1 + noise(16, seed=6) / 5, 1 + noise(16, seed=9) / 5)
    region = one_kernel(step, query, key, value, cos, sin, *caches(batch), steps, count, *norms)
    assert region.kind == ("qk_norm_rope_cache" if normed else "rope_cache")
    assert region.kernel.spec.unbatched == (batch == 1)
    assert region.kernel.spec.single == (batch * length == 1)


def test_slots_outside_the_cache_are_left_alone():
    query, key, cos, sin = inputs(1, 1)
    keys, values = caches(1)
    args = (query, key, key, cos, sin, keys, values, torch.tensor([3], device=DEVICE))
    with record(*args) as recording:
        recording.output(with_cache(*args))
    fused = fuse(recording.graph, ALWAYS)
    before = keys.clone(), values.clone()
    for slot in (9, -1, 2**40):
        fused(query, key, key, cos, sin, keys, values, torch.tensor([slot], device=DEVICE))
        assert torch.equal(keys, before[0])
        assert torch.equal(values, before[1])


def test_a_kernel_serves_every_length_and_says_what_does_not_fit():
    def run(kernel, *args):
        by_name = dict(zip(("x0", "x1", "x2", "x3"), (args[0], args[2], args[3], args[1]), strict=True))
        return kernel(*[by_name[operand.name] for operand in kernel.spec.inputs])

    for batch, others in ((1, [(1, 3), (1, 1)]), (2, [(3, 4), (1, 2), (1, 1)])):
        kernel = one_kernel(lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin)), *inputs(batch, 2)).kernel
        for other in others:
            query, key, cos, sin = inputs(*other)
            results = run(kernel, query, key, cos, sin)
            torch.testing.assert_close(results[0], rotate(query, cos, sin))
            torch.testing.assert_close(results[1], rotate(key, cos, sin))
        query, key, cos, sin = inputs(2, 3)
        with pytest.raises(FusionError, match="expected" if batch > 1 else "one sequence, not for 2"):
            run(kernel, query[:, :3], key, cos, sin)


def unlike(query, key, cos, sin):
    """Other tables for the key."""
    return rotate(query, cos, sin), rotate(key, sin, cos)


def escaping(query, key, value, cos, sin, keys, values, steps, count):
    position = steps + count
    return (*with_cache(query, key, value, cos, sin, keys, values, position), position * 2)


def test_what_is_no_such_kernel_replays_right():
    args = inputs(1, 2)
    with record(*args) as recording:
        recording.output(unlike(*args))
    fused = fuse(recording.graph, ALWAYS)
    assert not any(
        isinstance(r.kernel, CompiledKernel) and isinstance(r.kernel.spec, RotarySpec) for r in fused.regions
    )
    for left, right in zip(fused(*args), unlike(*args), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_machine_code_at_llama_sizes(architecture):
    if ALWAYS.target == "c":
        pytest.skip("for GPUs")
    query, key, cos, sin = (x.to(torch.bfloat16) for x in inputs(1, 2, 32, 8, 128))
    value = key.clone()
    position = torch.tensor([5, 6], device=DEVICE)
    keys, values = caches(1, 8, 128, 16, torch.bfloat16)
    region = one_kernel(with_cache, query, key, value, cos, sin, keys, values, position)
    assert ".tile((1, 1, 16, 64))" in region.source  # two groups of heads
    (binary,) = region.kernel.compile_for(architecture)
    assert binary.stack == 0
    assert set(binary.stores) == {128}, binary.stores
    # A row of a table is too short for 16 bytes a thread.
    assert {width: count for width, count in binary.loads.items() if width != 64} == {128: 12, 32: 4}, binary.loads
    assert binary.loads[64] <= 2  # the position, which some versions of Triton load in two layouts
