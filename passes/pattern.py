"""Patterns: plain PyTorch functions, recorded with our own recorder, to be found in larger graphs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import networkx
import torch

from graph_capture.errors import CaptureError
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.passes.flow import part
from graph_capture.record.recorder import Recording

_PROBE = 0.0123456789  # stands for a hole while a pattern is recorded; found again in the attributes
_WIDTH = 8
_STEP = 6

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Hole:
    """Stands for an attribute value that a match captures."""

    name: str


@dataclass(frozen=True, eq=False)
class Piece:
    """What one result of a template needs, as far as no piece before has it: what networkx looks for at a place.

    Attributes:
        root: the op that makes the result.
        ops: it and what feeds it, every op before what feeds it, last operands first.
        shared: a value that pieces before read or make too; None for the first.
        network: `ops`, and the values that go from one of them to another.
        depth: how far above the root its ops may be; rounded up, so that templates share what is found out about cones.
    """

    root: int
    ops: tuple[int, ...]
    shared: str | None
    network: networkx.DiGraph
    depth: int


@dataclass(frozen=True)
class Template:
    """One recorded form of a pattern. All its nodes are connected; the last one is its anchor."""

    graph: SubGraph

    @property
    def anchor(self) -> OpNode:
        """The last node."""
        return self.graph.nodes[-1]

    @cached_property
    def above(self) -> frozenset[str]:
        """The op types that feed the anchor."""
        return op_types_above(self.graph, self.anchor)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The first has the anchor; each other hangs together with those before it by a value."""
        graph, network = self.graph, self.graph.to_networkx()
        pieces: list[Piece] = []
        placed: list[int] = []
        while len(placed) < len(graph):
            bound = {name for index in placed for name in (*graph.nodes[index].inputs, *graph.nodes[index].outputs)}
            left = [index for index in range(len(graph)) if index not in placed]
            root = max((i for i in left if not bound.isdisjoint(graph.nodes[i].inputs)), default=left[-1])
            pending, ops = [root], list[int]()
            while pending:
                index = pending.pop()
                if index in left and index not in ops:
                    ops.append(index)
                    pending += [graph.producers[n] for n in graph.nodes[index].inputs if n in graph.producers]
            shared = next((name for name in graph.nodes[root].inputs if name in bound), None)
            inner = part(network, ops)
            depth = networkx.dag_longest_path_length(inner) // 2
            depth = depth if depth <= 2 else -(-depth // _STEP) * _STEP
            pieces.append(Piece(root, tuple(ops), shared, inner, depth))
            placed += ops
        return tuple(pieces)


def op_types_above(graph: SubGraph, node: OpNode) -> frozenset[str]:
    """The op types of those that make `node`'s inputs."""
    return frozenset(graph.nodes[graph.producers[n]].op_type for n in node.inputs if n in graph.producers)


@dataclass(frozen=True, eq=False)
class Pattern:
    """A named function of tensors; a parameter with a default is a number that a match captures.

    Attributes:
        name: names the rule and the regions it makes.
        function: the PyTorch function.
        spellings: other functions of the same parameters and results, found as well.
        outputs: a name for each tensor it returns.
        shapes: example shapes of parameters that are not ``[2, 8]``; more than one set gives more templates.
        dtypes: dtypes to record it in, where casts make a difference.
        kinds: dtypes of single parameters (positions are integers).
        keep_whole: record it with semantic ops whole, as models are.
        ignore: attributes that may have any value.
        compound: keep a match as a region even where no target has a kernel for it: its parts then run one by one.
        prepare: what models' graphs go through before patterns are looked for.
    """

    name: str
    function: Function
    spellings: tuple[Function, ...] = ()
    outputs: tuple[str, ...] = ("output",)
    shapes: tuple[Mapping[str, tuple[int, ...]], ...] = ({},)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    kinds: Mapping[str, torch.dtype] | None = None
    keep_whole: bool = True
    ignore: frozenset[str] = frozenset()
    compound: bool = False
    prepare: Callable[[SubGraph], SubGraph] | None = None

    @cached_property
    def templates(self) -> tuple[Template, ...]:
        """The recorded forms, each distinct one once, the largest first: it may contain the others.

        Raises:
            CaptureError: a function cannot be recorded as a pattern.
        """
        found: dict[SubGraph, Template] = {}
        for function in (self.function, *self.spellings):
            for shapes in self.shapes:
                for dtype in self.dtypes:
                    graph = self._record(function, shapes, dtype)
                    found.setdefault(graph, Template(graph))
        return tuple(sorted(found.values(), key=lambda template: -len(template.graph)))

    def _record(self, function: Function, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> SubGraph:
        parameters = inspect.signature(function).parameters.values()
        holes = [p.name for p in parameters if p.default is not inspect.Parameter.empty]
        numbers = {name: _PROBE * (index + 1) for index, name in enumerate(holes)}
        kinds = self.kinds or {}
        tensors = {
            p.name: torch.ones(shapes.get(p.name, (2, _WIDTH)), dtype=kinds.get(p.name, dtype))
            for p in parameters
            if p.name not in holes
        }
        with _no_autocast(), _recording(tensors, self.keep_whole) as recording:
            recording.output(function(**tensors, **numbers))
        graph = recording.graph.subgraph
        if recording.graph.captured:
            raise CaptureError(f"pattern {self.name!r} uses tensors that are not its parameters")
        if len(graph.output_names) != len(self.outputs):
            raise CaptureError(
                f"pattern {self.name!r} returns {len(graph.output_names)} tensors and names {len(self.outputs)}"
            )
        if self.prepare is not None:
            graph = self.prepare(graph)
        names = dict(zip(graph.output_names, self.outputs, strict=True))
        nodes = [_with_holes(node.rename(names), {v: k for k, v in numbers.items()}) for node in graph.nodes]
        result = SubGraph(tuple(nodes), graph.input_names, self.outputs)
        if not nodes or not _is_connected(result):
            raise CaptureError(f"pattern {self.name!r}: its ops must be connected by the values they share")
        return result

    def subgraph(self, **numbers: float) -> SubGraph:
        """The pattern as a graph, with its holes filled by `numbers` or the function's defaults."""
        parameters = inspect.signature(self.function).parameters
        values = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
        graph = self.templates[0].graph
        return replace(graph, nodes=tuple(_filled(node, values | numbers) for node in graph.nodes))


def _recording(tensors: Mapping[str, torch.Tensor], keep_whole: bool) -> Recording:
    return Recording((), dict(tensors), keep_whole=keep_whole, verify=False, follow=False)


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """A pattern is the same whatever context it happens to be recorded in."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _is_connected(graph: SubGraph) -> bool:
    """Whether its ops hang together by the values that they read or make."""
    network = graph.to_networkx()
    network.remove_edges_from([(before, after) for before, after, order in network.edges(data="order") if order])
    network.remove_nodes_from([name for name in graph.input_names if name not in graph.users])
    return bool(networkx.is_weakly_connected(network))


def _with_holes(node: OpNode, holes: Mapping[float, str]) -> OpNode:
    attrs = tuple((k, Hole(holes[v]) if isinstance(v, float) and v in holes else v) for k, v in node.attrs)
    return replace(node, attrs=attrs, source=None, origin=())


def _filled(node: OpNode, values: Mapping[str, float]) -> OpNode:
    return replace(node, attrs=tuple((k, values[v.name] if isinstance(v, Hole) else v) for k, v in node.attrs))
