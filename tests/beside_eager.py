"""A captured function beside the code as it is: values, dtypes, strides, infinities, NaN and the signs of zeros."""

import copy

import pytest
import torch

from graph_capture import FusionConfig, capture, fuse, record

TARGETS = ("ninetoothed",) if torch.cuda.is_available() else ("c", "ninetoothed")
LOOSE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-9}


def rand(*shape, seed=0, dtype=torch.float32):
    """Noise that is the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def always(target, **options):
    """A configuration in which every kernel runs that can be made."""
    return FusionConfig(profile="always", target=target, **options)


def fused_of(function, *arguments, target="c", **options):
    """A function, recorded and fused."""
    with torch.no_grad(), record(*arguments) as recording:
        recording.output(function(*arguments))
    return fuse(recording.graph, always(target, **options))


def same(got, want, exact=False):
    """Raises AssertionError where a result (or one in a tuple) is another than eager's."""
    if isinstance(want, (tuple, list)):
        assert len(got) == len(want)
        for ours, theirs in zip(got, want, strict=True):
            same(ours, theirs, exact)
        return
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    got, want = got.resolve_conj().resolve_neg(), want.resolve_conj().resolve_neg()
    plain = exact or not (want.is_floating_point() or want.is_complex())
    loose = 0 if plain else LOOSE.get(want.dtype, 1e-5)
    torch.testing.assert_close(got, want, rtol=loose, atol=loose, equal_nan=True)


def beside_eager(function, *arguments, targets=TARGETS, exact=False, times=3, config=None):
    """Several calls for each target, with every kernel that can be made, beside the function itself."""
    for target in targets:
        fast = capture(function, config or always(target))
        with torch.no_grad():
            for _ in range(times):
                ours, plain = copy.deepcopy(arguments), copy.deepcopy(arguments)
                same(fast(*ours), function(*plain), exact)
                same(ours, plain, exact)


on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about kernels on the CPU")
