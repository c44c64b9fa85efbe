"""A region as calls of torch's own ops, where those are fewer or better than what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from graph_capture.passes.cleanup import split_constants

from graph_capture.executor import Executor
from graph_capture.graph import OpNode, SubGraph
from graph_capture.ledger import move

Tensors = Sequence[torch.Tensor]


class LibraryKernel:
    """The ops of a region's body, one call each.

    Args:
        body: the region.
        weights: inputs of `body` that are the same in every replay; what depends on them alone is computed at `bind`.
    """

    interpreted = False

    def __init__(self, body: SubGraph, weights: Collection[str] = ()) -> None:
        self.body = body
        self.name = "_".join(node.op_type for node in body.nodes)
        once, rest = split_constants(body, weights) if weights else (None, body)
        self._once = once if once is not None and once.nodes else None
        self._rest = Executor([(node, None) for node in rest.nodes], rest.input_names, rest.output_names)

    @property
    def source(self) -> str:
        """The body as readable Python."""
        return str(self.body)

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run on the region's inputs, in order."""
        return tuple(self._rest.run([*tensors, *self._constants(tensors)]))

    def _constants(self, tensors: Tensors) -> Tensors:
        if self._once is None:
            return ()
        given = dict(zip(self.body.input_names, tensors, strict=True))
        return run(self._once, [given[name] for name in self._once.input_names])

    def bind(self, tensors: Tensors, share: bool) -> Callable[[Tensors], list[torch.Tensor]]:
        """A call for replays in which the weights are those of `tensors`.

        Args:
            share: let the weights become views of what they are concatenated into.
        """
        if self._once is None:
            return self._rest.run
        given = dict(zip(self.body.input_names, tensors, strict=True))
        weights = [given[name] for name in self._once.input_names]
        constants = Constants(self._once, weights, share)
        return lambda inputs: self._rest.run([*inputs, *constants()])

    def __repr__(self) -> str:
        return f"<LibraryKernel {self.name}>"


class Constants:
    """What a graph makes of weights, made again when one of them was written."""

    def __init__(self, graph: SubGraph, weights: Tensors, share: bool) -> None:
        self.graph, self.weights = graph, weights
        nodes = {node.outputs[0]: node for node in graph.nodes}
        self._live: list[torch.Tensor] | None = None
        if share and all(_concatenates(node) for node in nodes.values()):
            given = dict(zip(graph.input_names, weights, strict=True))
            merged = [merge([given[name] for name in nodes[output].inputs]) for output in graph.output_names]
            if all(tensor is not None for tensor in merged):
                self._live = [tensor for tensor in merged if tensor is not None]
        self._seen: tuple[object, ...] | None = None
        self._values: list[torch.Tensor] = []

    def __call__(self) -> list[torch.Tensor]:
        if self._live is not None:  # the weights are views of it
            return self._live
        state = state_of(self.weights)
        if state is None or state != self._seen:
            self._values, self._seen = run(self.graph, self.weights), state
        return self._values


def state_of(tensors: Tensors) -> tuple[object, ...] | None:
    """Changes whenever one of `tensors` is written or moved; None where torch does not keep count."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple([(tensor._version, tensor.data_ptr()) for tensor in tensors])


def run(graph: SubGraph, tensors: Tensors) -> list[torch.Tensor]:
    """A graph's ops on tensors, one by one."""
    return Executor([(node, None) for node in graph.nodes], graph.input_names, graph.output_names).run(tensors)


def _concatenates(node: OpNode) -> bool:
    return node.op_type == "aten.cat.default" and node.attr("dim", 0) == 0


def merge(tensors: Tensors) -> torch.Tensor | None:
    """The concatenation of `tensors` over their first dimension, of which they become views.

    None where that would part a tensor from others that share its memory.
    """
    with torch.no_grad():
        if _adjacent(tensors):
            first = tensors[0]
            rows = sum(tensor.shape[0] for tensor in tensors)
            return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
        if not all(_owns_its_memory(tensor) for tensor in tensors):
            return None
        merged = torch.cat([tensor.detach() for tensor in tensors])
        for tensor, part in zip(tensors, merged.split([tensor.shape[0] for tensor in tensors]), strict=True):
            move(tensor, part)
    return merged


def _adjacent(tensors: Tensors) -> bool:
    """Whether each tensor begins where the one before ends."""
    end = tensors[0].data_ptr()
    storage = tensors[0].untyped_storage().data_ptr()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == storage and tensor.is_contiguous()
        if not same or tensor.data_ptr() != end:
            return False
        end += tensor.nbytes
    return True


def _owns_its_memory(tensor: torch.Tensor) -> bool:
    return (
        tensor.is_contiguous()
        and not tensor.is_inference()
        and tensor.untyped_storage().nbytes() == tensor.nbytes
        and _uses(tensor) <= _uses(torch.empty(1))
    )


def _uses(tensor: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
