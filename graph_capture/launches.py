"""Kernels bound to addresses, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

Launch = Callable[[], object]
Tensors = Sequence[torch.Tensor]


@runtime_checkable
class Prepares(Protocol):
    """A step that can be bound to addresses."""

    def prepare(self, inputs: Tensors, outputs: Tensors) -> Launch:
        """A launch that reads `inputs` and writes `outputs` whenever it is called; it need not keep them alive.

        Raises:
            FusionError: they do not fit.
        """

    def failed(self, error: Exception, inputs: Tensors, outputs: Tensors) -> Launch:
        """What to launch in its place after `error`, which is raised where there is nothing."""


class Renewed:
    """Replaces a launch that failed, for good."""

    def __init__(
        self, kernel: Prepares, inputs: Tensors, outputs: Tensors, launches: list[Launch], number: int
    ) -> None:
        self._kernel, self._known, self._launches, self._number = kernel, (inputs, outputs), launches, number

    def __call__(self, error: Exception) -> None:
        launch = self._launches[self._number] = self._kernel.failed(error, *self._known)
        launch()


class Rebound:
    """Launches of one kernel for the addresses that calls have brought lately."""

    KEPT = 4  # callers that take turns, each with tensors of its own

    def __init__(self, kernel: Prepares) -> None:
        self._kernel = kernel
        self._known: dict[tuple[int, ...], Launch] = {}
        self._failure: Exception | None = None

    def __call__(self, inputs: Tensors, outputs: Tensors) -> None:
        if self._failure is None:
            key = tuple([tensor.data_ptr() for tensor in inputs])
            try:
                launch = self._known.get(key)
                if launch is None:
                    launch = self._kernel.prepare(inputs, outputs)
                    if len(self._known) == self.KEPT:
                        del self._known[next(iter(self._known))]
                    self._known[key] = launch
                launch()
                return
            except Exception as error:
                self._known.clear()
                self._failure = error
        self._kernel.failed(self._failure, inputs, outputs)()
