"""An op that is not deterministic, as kernels on a GPU are whose sums add up in any order."""

import numpy
import torch

SIZE = 1e-3  # of the noise, relative


@torch.library.custom_op("graph_capture_tests::noisy", mutates_args=())
def noisy(x: torch.Tensor) -> torch.Tensor:
    """`x`, but for relative noise: another one at each call, from no generator that torch has."""
    chance = numpy.random.default_rng()
    return x * (1 + SIZE * torch.from_numpy(chance.standard_normal(x.shape)).to(x.dtype))


@torch.library.custom_op("graph_capture_tests::noisy_argmax", mutates_args=())
def noisy_argmax(x: torch.Tensor) -> torch.Tensor:
    """Chooses inside, so that nobody sees the candidates."""
    return noisy(x).argmax(-1)
