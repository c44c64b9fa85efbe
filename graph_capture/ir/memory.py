"""State that a run changes and that can be put back: storages and random generators."""

from __future__ import annotations

import torch


class RandomState:
    """The state of torch's global generators (CPU; CUDA's current device once it was used)."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState) or not torch.equal(self._cpu, other._cpu):
            return False
        return self._cuda is None or other._cuda is None or torch.equal(self._cuda, other._cuda)


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's whole storage as bytes, sharing it."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
