"""A region as calls of torch's own ops, where those are fewer or better than what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from graph_capture.codegen import CompiledKernel
from graph_capture.errors import FusionError
from graph_capture.ir.graph import SubGraph
from graph_capture.ir.interpreter import Executor, interpret
from graph_capture.ir.ops import LINEARS
from graph_capture.passes.cleanup import split_constants
from graph_capture.record.guards import move

Tensors = Sequence[torch.Tensor]


class LibraryKernel:
    """The ops of a region's body, one call each.

    Args:
        body: the region.
        weights: inputs of `body` that are the same in every replay; what depends on them alone is computed at `bind`.
        product: a kernel of our own for the linear among the ops.

    Attributes:
        way: which of the ways to run the region it is.
        once: what is computed at `bind`; None where that is nothing.
        rest: what each call computes; takes the results of `once` as further inputs.
    """

    interpreted = False

    def __init__(self, body: SubGraph, weights: Collection[str] = (), product: CompiledKernel | None = None) -> None:
        self.body, self.weights, self.product = body, tuple(weights), product
        self.way = "library" if product is None else "merged"
        self.name = "_".join(node.op_type for node in body.nodes)
        once, rest = split_constants(body, weights) if weights else (None, body)
        self.once = once if once is not None and once.nodes else None
        self.rest = rest
        calls = [None if product is None or node.op_type not in LINEARS else _spread(product) for node in rest.nodes]
        self._rest = Executor(list(zip(rest.nodes, calls, strict=True)), rest.input_names, rest.output_names)

    @property
    def source(self) -> str:
        """The body as readable Python, and the code of the kernel in it."""
        return str(self.body) + ("" if self.product is None else f"\n\n{self.product.source}")

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run on the region's inputs, in order."""
        return tuple(self._rest.run([*tensors, *self._constants(tensors)]))

    def _constants(self, tensors: Tensors) -> Tensors:
        if self.once is None:
            return ()
        given = dict(zip(self.body.input_names, tensors, strict=True))
        return interpret(self.once, [given[name] for name in self.once.input_names])

    def bind(self, tensors: Tensors, share: bool) -> Callable[[Tensors], list[torch.Tensor]]:
        """A call for replays in which the weights are those of `tensors`.

        Args:
            share: let the weights become views of what they are concatenated into.

        Raises:
            FusionError: they cannot, for other tensors share their memory.
        """
        if self.once is None:
            return self._rest.run
        given = dict(zip(self.body.input_names, tensors, strict=True))
        return BoundLibrary(self._rest, Constants(self.once, [given[name] for name in self.once.input_names], share))

    def __repr__(self) -> str:
        return f"<LibraryKernel {self.name}>"


def _spread(kernel: CompiledKernel) -> Callable[[Tensors], Any]:
    return lambda tensors: kernel(*tensors)


class BoundLibrary:
    """A region as library calls, with what its weights make computed."""

    def __init__(self, rest: Executor, constants: Constants) -> None:
        self._rest, self.constants = rest, constants

    def __call__(self, inputs: Tensors) -> list[torch.Tensor]:
        return self._rest.run([*inputs, *self.constants()])


class Constants:
    """What a graph makes of weights, made again when torch has counted a write into one of them.

    Torch does not count writes through ``.data``: `refresh` is for them. If the graph but concatenates, `share` makes
    the weights views of the result, and nothing is ever to be made again.
    """

    def __init__(self, graph: SubGraph, weights: Tensors, share: bool) -> None:
        self.graph, self.weights = graph, weights
        self._live: list[torch.Tensor] | None = None
        if share and all(node.op_type == "aten.cat.default" for node in graph.nodes):
            given = dict(zip(graph.input_names, weights, strict=True))
            groups = [[given[name] for name in node.inputs] for node in graph.nodes]
            if not all(_adjacent(group) or all(map(_owns_its_memory, group)) for group in groups):
                raise FusionError("other tensors, or another library, share the weights' memory")
            self._live = [merge(group) for group in groups]
        self.version = 0  # of the results
        self._seen: tuple[object, ...] | None = None
        self._values: list[torch.Tensor] = []

    def __call__(self) -> list[torch.Tensor]:
        if self._live is not None:  # the weights are views of it
            return self._live
        state = state_of(self.weights)
        if state is None or state != self._seen:
            self._values, self._seen = interpret(self.graph, self.weights), state
            self.version += 1
        return self._values

    def refresh(self) -> None:
        """Make them again at the next call."""
        self._seen = None


def state_of(tensors: Tensors) -> tuple[object, ...] | None:
    """Changes whenever one of `tensors` is written or moved; None where torch does not keep count."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple([(tensor._version, tensor.data_ptr()) for tensor in tensors])


def merge(tensors: Tensors) -> torch.Tensor:
    """The concatenation of `tensors` over their first dimension, of which they become views."""
    with torch.no_grad():
        if _adjacent(tensors):
            first = tensors[0]
            rows = sum(tensor.shape[0] for tensor in tensors)
            return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
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
        and bool(tensor.untyped_storage().resizable())  # else it is another library's
        and _uses(tensor) <= _uses(torch.empty(1))
    )


def _uses(tensor: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
