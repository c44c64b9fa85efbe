"""Runs a list of steps over numbered slots: what every replay can fall back on, and what a plan is made from."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from graph_capture.ir.binding import flatten_outputs, prepare
from graph_capture.ir.graph import OpNode, SubGraph

Call = Callable[[list[torch.Tensor]], Any]
Watch = Callable[[int, list[torch.Tensor], Any], None]


@dataclass(frozen=True)
class Step:
    """One call, wired to slots.

    Attributes:
        node: what it computes.
        call: runs it on a list of tensors.
        own: `call` is not the node's own op (a kernel).
        reads: the slots of its inputs.
        fills: the slots of its outputs.
        frees: the slots that nothing needs after it.
        label: the region that it is a part of, or "".
    """

    node: OpNode
    call: Call
    own: bool
    reads: tuple[int, ...]
    fills: tuple[int, ...]
    frees: tuple[int, ...]
    label: str


class Executor:
    """A list of steps bound once: each reads and fills slots, and frees a slot after its last use.

    Args:
        steps: in order, a node and how to run it (None: its op, as recorded).
        inputs: value names that `run` gets, in order.
        outputs: value names that `run` returns, in order.
        labels: names of regions, by the position of their steps.

    Attributes:
        steps: the wired steps. Each definition of a name has a slot of its own.
        inputs: the inputs' slots.
        outputs: the outputs' slots.
        names: the value name of each slot.
    """

    def __init__(
        self,
        steps: Iterable[tuple[OpNode, Call | None]],
        inputs: Sequence[str],
        outputs: Sequence[str],
        labels: Mapping[int, str] | None = None,
    ) -> None:
        self.names: list[str] = []
        slots: dict[str, int] = {}

        def define(name: str) -> int:
            slots[name] = len(self.names)
            self.names.append(name)
            return slots[name]

        self.inputs = [define(name) for name in inputs]
        wired: list[tuple[OpNode, Call | None, tuple[int, ...], tuple[int, ...]]] = []
        last_use: dict[int, int] = {}
        for index, (node, call) in enumerate(steps):
            reads = tuple([slots[name] for name in node.inputs])
            fills = tuple([define(name) for name in node.outputs])
            wired.append((node, call, reads, fills))
            last_use.update(dict.fromkeys((*reads, *fills), index))
        self.outputs = [slots[name] for name in outputs]
        kept = {*self.outputs, *self.inputs}
        frees: list[list[int]] = [[] for _ in wired]
        for used, index in last_use.items():
            if used not in kept:
                frees[index].append(used)
        names = labels or {}
        self.steps = [
            Step(node, call or prepare(node), call is not None, reads, fills, tuple(free), names.get(index, ""))
            for index, ((node, call, reads, fills), free) in enumerate(zip(wired, frees, strict=True))
        ]
        self._bound = [(step.call, step.reads, step.fills, step.frees) for step in self.steps]

    @classmethod
    def of(cls, graph: SubGraph) -> Executor:
        """Every node of `graph` as its op."""
        return cls([(node, None) for node in graph.nodes], graph.input_names, graph.output_names)

    def part(self, start: int, stop: int, outputs: Sequence[int]) -> tuple[Executor, list[int]]:
        """The steps from `start` to `stop` as an executor of their own, and which slot here each of its slots is.

        Its inputs are what these steps read and do not fill, and those `outputs` (slots here) that they do not fill.
        """
        steps = self.steps[start:stop]
        filled = [slot for step in steps for slot in step.fills]
        before = dict.fromkeys(slot for slots in (*(step.reads for step in steps), outputs) for slot in slots)
        inputs = [slot for slot in before if slot not in set(filled)]
        slots = [*inputs, *filled]
        own = {slot: number for number, slot in enumerate(slots)}
        kept = {*inputs, *outputs}
        found = copy.copy(self)
        found.names = [self.names[slot] for slot in slots]
        found.inputs, found.outputs = list(range(len(inputs))), [own[slot] for slot in outputs]
        found.steps = [
            replace(
                step,
                reads=tuple(own[slot] for slot in step.reads),
                fills=tuple(own[slot] for slot in step.fills),
                frees=tuple(own[slot] for slot in step.frees if slot not in kept),
            )
            for step in steps
        ]
        found._bound = [(step.call, step.reads, step.fills, step.frees) for step in found.steps]
        return found, slots

    def run(self, tensors: Sequence[torch.Tensor], watch: Watch | None = None) -> list[torch.Tensor]:
        """Run every step on `tensors` (one for each input) and return one tensor for each output.

        `watch` is called after each step with its number, the tensors that it got and what it gave.
        """
        values: list[Any] = [None] * len(self.names)
        for index, tensor in zip(self.inputs, tensors, strict=True):
            values[index] = tensor
        with plain_mode():
            for number, (call, reads, fills, frees) in enumerate(self._bound):
                given = [values[index] for index in reads]
                result = call(given)
                if len(fills) == 1 and isinstance(result, torch.Tensor):
                    values[fills[0]] = result
                else:
                    for index, tensor in zip(fills, flatten_outputs(result), strict=True):
                        values[index] = tensor
                if watch is not None:
                    watch(number, given, result)
                for index in frees:
                    values[index] = None
        return [values[index] for index in self.outputs]


def interpret(graph: SubGraph, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Run a graph's ops, one by one, on a tensor for each input; one tensor for each output."""
    return Executor.of(graph).run(tensors)


@contextlib.contextmanager
def plain_mode() -> Any:
    """No autograd and no autocast: the recorded ops already hold the casts."""
    with contextlib.ExitStack() as stack:
        if not torch.is_inference_mode_enabled():
            stack.enter_context(torch.no_grad())
        if torch._C._is_any_autocast_enabled():
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
        yield
