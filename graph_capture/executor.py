"""Runs a list of steps over numbered slots: what both the recorded graph and the rewritten one replay on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from graph_capture.graph import OpNode
from graph_capture.ops import flatten_outputs, prepare

Call = Callable[[list[torch.Tensor]], Any]


class Executor:
    """A plan bound once: each step reads and fills slots, and frees a slot after its last use.

    Args:
        steps: in order, a node and how to run it (None: its op, as recorded).
        inputs: value names that `run` gets, in order.
        outputs: value names that `run` returns, in order.
    """

    def __init__(
        self, steps: Iterable[tuple[OpNode, Call | None]], inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        steps = list(steps)
        slots: dict[str, int] = {}

        def slot(name: str) -> int:
            return slots.setdefault(name, len(slots))

        self._inputs = [slot(name) for name in inputs]
        self._outputs = [slot(name) for name in outputs]
        last_use: dict[int, int] = {}
        wired: list[tuple[Call, list[int], list[int]]] = []
        for index, (node, call) in enumerate(steps):
            reads, fills = [slot(name) for name in node.inputs], [slot(name) for name in node.outputs]
            wired.append((call or prepare(node), reads, fills))
            last_use.update(dict.fromkeys((*reads, *fills), index))
        kept = {*self._outputs, *self._inputs}
        frees: list[list[int]] = [[] for _ in steps]
        for used, index in last_use.items():
            if used not in kept:
                frees[index].append(used)
        self._steps = [(*step, free) for step, free in zip(wired, frees, strict=True)]
        self._size = len(slots)

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run every step on `tensors` (one for each input) and return one tensor for each output."""
        values: list[Any] = [None] * self._size
        for index, tensor in zip(self._inputs, tensors, strict=True):
            values[index] = tensor
        with _plain_mode():
            for call, reads, fills, frees in self._steps:
                result = call([values[index] for index in reads])
                if len(fills) == 1 and isinstance(result, torch.Tensor):
                    values[fills[0]] = result
                else:
                    for index, tensor in zip(fills, flatten_outputs(result), strict=True):
                        values[index] = tensor
                for index in frees:
                    values[index] = None
        return [values[index] for index in self._outputs]


@contextlib.contextmanager
def _plain_mode() -> Any:
    """No autograd and no autocast: the recorded ops already hold the casts."""
    with contextlib.ExitStack() as stack:
        if not torch.is_inference_mode_enabled():
            stack.enter_context(torch.no_grad())
        if torch._C._is_any_autocast_enabled():
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
        yield
