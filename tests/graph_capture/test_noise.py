"""Ops that are not deterministic: the check of a recording tells their noise from writes that torch does not see."""

import ctypes

import pytest
import torch
from torch import nn

from graph_capture import FusionConfig, UnrecordedWriteError, capture, record
from tests.noisy import SIZE, noisy, noisy_argmax
from tests.replaying import noise

LOWEST = torch.finfo(torch.float32).min


def ties(rows, columns=8):
    """Rows whose largest elements are nearly equal."""
    x = noise(rows, columns)
    x[:, 3] = x.max(-1).values
    x[:, 5] = x[:, 3] * (1 + SIZE / 10)
    return x


def recorded(function, *args):
    with record(*args) as recording:
        recording.output(function(*args))
    return recording.graph


def cache_step(x, cache, position):
    cache.index_copy_(0, position, noisy(x))
    position.add_(1)
    return cache.sum(0)


def routed(x):
    """Experts chosen by noisy scores: what comes out depends on the choice, not a little."""
    weights = torch.arange(1.0, 9.0)[:, None] * torch.ones(8, 4)
    scores, experts = noisy(x).softmax(-1).topk(2)
    return (scores[..., None] * weights[experts]).sum(1)


def sampled(x):
    heights = noisy(x).softmax(-1).cumsum(-1)
    return (heights <= torch.full((len(x), 1), 0.5)).sum(-1)


NOISY = {
    "linear": (lambda x: noisy(x) @ torch.ones(8, 3), lambda: (noise(5, 8),)),
    "a scalar": (lambda x: noisy(x).sum(), lambda: (noise(5, 8),)),
    "nearly nothing": (lambda x: noisy(x) - x, lambda: (noise(5, 8),)),
    "halves": (lambda x: noisy(x).bfloat16().float(), lambda: (noise(50, 8),)),
    "masked": (lambda x: noisy(x).masked_fill(x > 0, float("-inf")), lambda: (noise(50, 8),)),
    "lowest": (
        lambda x: noisy(x).masked_fill(torch.arange(8) < 3, torch.finfo(x.dtype).min).argmax(-1),
        lambda: (ties(64),),
    ),
    "argmax": (lambda x: noisy(x).argmax(-1), lambda: (ties(64),)),
    "argmax, whole": (lambda x: noisy(x).argmax(), lambda: (ties(64),)),
    "argmax as int32": (lambda x: noisy(x).argmax(-1).int()[:, None], lambda: (ties(64),)),
    "max": (lambda x: noisy(x).max(0), lambda: (ties(64).t().contiguous(),)),
    "sort": (lambda x: noisy(x).sort(-1), lambda: (ties(64),)),
    "argsort": (lambda x: noisy(x).argsort(-1, descending=True), lambda: (ties(64),)),
    "topk": (lambda x: noisy(x).topk(3, sorted=False), lambda: (ties(64),)),
    "an expert": (routed, lambda: (ties(64),)),
    "sampling": (sampled, lambda: (ties(4096),)),
    "a threshold": (lambda x: (noisy(x) > x).float() @ torch.ones(8, 3), lambda: (noise(64, 8),)),
    "integers": (lambda x: (noisy(x) * 1000).to(torch.int64), lambda: (noise(64, 8),)),
    "quantised": (
        lambda x: (noisy(x) * 100).round().clamp(-127, 127).to(torch.int8).float() @ torch.ones(8, 2),
        lambda: (noise(64, 8),),
    ),
    "in place": (lambda x: noisy(x).round_().mul_(2), lambda: (noise(64, 8) * 100,)),
    "pooled": (
        lambda x: nn.functional.max_pool2d(noisy(x), 2, return_indices=True),
        lambda: (ties(64, 16).view(4, 4, 16, 4).repeat_interleave(2, -1),),
    ),
    "buckets": (lambda x: torch.bucketize(noisy(x), torch.linspace(-1, 1, 200)), lambda: (noise(64, 8),)),
    "an op that chooses": (noisy_argmax, lambda: (ties(64),)),
    "a cache": (cache_step, lambda: (noise(1, 8), torch.zeros(16, 8), torch.zeros(1, dtype=torch.int64))),
}


@pytest.mark.parametrize(("function", "arguments"), NOISY.values(), ids=NOISY)
def test_noise_is_not_a_hidden_write(function, arguments):
    replays = [recorded(function, *arguments()).verification.replays for _ in range(10)]
    assert max(replays) > 1


def hidden(tensor, amount=0.5):
    """A write that torch does not see."""
    kind = ctypes.c_float if tensor.dtype is torch.float32 else ctypes.c_int64
    kind.from_address(tensor.data_ptr() + tensor.itemsize).value += amount


def before_argmax(x):
    y = noisy(x)
    hidden(y, 40)
    return y.argmax(-1)


def before_an_expert(x):
    y = noisy(x)
    hidden(y, 40)
    return torch.ones(8, 2).cumsum(0)[y.topk(1).indices[:, 0]]


def into_the_result(x):
    y = noisy(x) * 2
    hidden(y)
    return y


def into_what_is_exact(x):
    y = noisy(x) * 2
    z = x + 1
    hidden(z, 1e-3)
    return y, z


def into_a_cache(x, cache, position):
    result = cache_step(x, cache, position)
    hidden(cache[5:], 1e-3)
    return result


def into_tokens(x):
    tokens = noisy(x).argmax(-1)
    hidden(tokens, 2)
    return tokens


def into_small_elements(x):
    y = noisy(torch.cat([x * 1000, x[:1] * 0.01]))
    hidden(y[-1], 0.1)
    return y


def into_an_integer(x):
    y, counts = noisy(x), torch.arange(9) * 2
    hidden(counts, 1)
    return y.argmax(-1), counts


HIDDEN = {
    f.__name__: (f, a)
    for f, a in (
        (into_the_result, lambda: (noise(5, 8),)),
        (into_what_is_exact, lambda: (noise(5, 8),)),
        (into_small_elements, lambda: (noise(5, 8),)),
        (before_argmax, lambda: (ties(64),)),
        (before_an_expert, lambda: (ties(64),)),
        (into_tokens, lambda: (noise(64, 8),)),
        (into_an_integer, lambda: (noise(64, 8),)),
        (into_a_cache, lambda: (noise(1, 8), torch.zeros(16, 8), torch.zeros(1, dtype=torch.int64))),
    )
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("function", "arguments"), HIDDEN.values(), ids=HIDDEN)
def test_a_hidden_write_among_noise_is_found(function, arguments, seed):
    args = arguments()
    with pytest.raises(UnrecordedWriteError, match=r"another|leaves other values"):
        recorded(function, *args)


def test_the_state_is_the_codes_own_afterwards():
    x, cache, position = noise(1, 8), torch.zeros(16, 8), torch.zeros(1, dtype=torch.int64)
    with record(x, cache, position) as recording:
        result = cache_step(x, cache, position)
        kept = cache.clone()
        recording.output(result)
    assert torch.equal(cache, kept)
    assert position.item() == 1
    assert torch.equal(result, cache.sum(0))


def test_what_is_deterministic_is_replayed_once():
    assert recorded(lambda x: (x @ torch.ones(8, 3)).argmax(-1), noise(5, 8)).verification.replays == 1


def test_capture_of_a_noisy_model_replays():
    fast = capture(lambda x: torch.tanh(noisy(x)) * 2 + x, FusionConfig(profile="always"))
    x = noise(64, 8)
    for _ in range(3):
        torch.testing.assert_close(fast(x), torch.tanh(x) * 2 + x, rtol=2e-2, atol=2e-2)
    assert len(fast.misses) == 1
