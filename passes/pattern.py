"""Patterns: plain PyTorch functions, recorded with our own recorder, to be found in larger graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import networkx
import torch

from graph_capture.errors import CaptureError
from graph_capture.graph import OpNode, SubGraph
from graph_capture.recorder import Recording

_PROBE = 0.0123456789  # stands for a hole while a pattern is recorded; found again in the attributes
_WIDTH = 8


@dataclass(frozen=True, slots=True)
class Hole:
    """Stands for an attribute value that a match captures."""

    name: str


@dataclass(frozen=True)
class Template:
    """One recorded form of a pattern. Its anchor is its last node; every other node is an ancestor of it."""

    graph: SubGraph

    @cached_property
    def structure(self) -> networkx.DiGraph:
        """The nodes' indices with their op types; which node feeds which."""
        return dataflow(self.graph, range(len(self.graph)))

    @cached_property
    def depth(self) -> int:
        """Edges on the longest path."""
        return int(networkx.dag_longest_path_length(self.structure, weight=None))

    @property
    def anchor(self) -> OpNode:
        """The last node."""
        return self.graph.nodes[-1]


def dataflow(graph: SubGraph, indices: Sequence[int] | range | set[int]) -> networkx.DiGraph:
    """The given nodes of `graph` and the values that flow between them."""
    flow: networkx.DiGraph = networkx.DiGraph()
    for index in indices:
        flow.add_node(index, op_type=graph.nodes[index].op_type)
    for index in indices:
        for name in graph.nodes[index].inputs:
            producer = graph.producers.get(name)
            if producer is not None and producer in flow:
                flow.add_edge(producer, index)
    return flow


@dataclass(frozen=True)
class Pattern:
    """A named function of tensors; a parameter with a default is a number that a match captures.

    Attributes:
        name: names the rule and the regions it makes.
        function: the PyTorch function.
        outputs: a name for each tensor it returns.
        shapes: example shapes of parameters that are not ``[2, 8]``; more than one set gives more templates.
        dtypes: dtypes to record it in, where casts make a difference.
        keep_whole: record it with semantic ops whole, as models are.
    """

    name: str
    function: Callable[..., Any]
    outputs: tuple[str, ...] = ("output",)
    shapes: tuple[Mapping[str, tuple[int, ...]], ...] = ({},)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    keep_whole: bool = True

    @cached_property
    def templates(self) -> tuple[Template, ...]:
        """The recorded forms, each distinct one once, the largest first: it may contain the others.

        Raises:
            CaptureError: the function cannot be recorded as a pattern.
        """
        found: dict[SubGraph, Template] = {}
        for shapes in self.shapes:
            for dtype in self.dtypes:
                graph = self._record(shapes, dtype)
                found.setdefault(graph, Template(graph))
        return tuple(sorted(found.values(), key=lambda template: -len(template.graph)))

    def _record(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> SubGraph:
        parameters = inspect.signature(self.function).parameters.values()
        holes = [p.name for p in parameters if p.default is not inspect.Parameter.empty]
        numbers = {name: _PROBE * (index + 1) for index, name in enumerate(holes)}
        tensors = {
            p.name: torch.ones(shapes.get(p.name, (2, _WIDTH)), dtype=dtype) for p in parameters if p.name not in holes
        }
        with Recording((), tensors, keep_whole=self.keep_whole) as recording:
            recording.output(self.function(**tensors, **numbers))
        graph = recording.graph.subgraph
        if recording.graph.captured:
            raise CaptureError(f"pattern {self.name!r} uses tensors that are not its parameters")
        if len(graph.output_names) != len(self.outputs):
            raise CaptureError(
                f"pattern {self.name!r} returns {len(graph.output_names)} tensors and names {len(self.outputs)}"
            )
        names = dict(zip(graph.output_names, self.outputs, strict=True))
        nodes = [_with_holes(node.rename(names), {v: k for k, v in numbers.items()}) for node in graph.nodes]
        result = SubGraph(tuple(nodes), graph.input_names, self.outputs)
        anchor = len(result) - 1
        flow = dataflow(result, range(len(result)))
        if anchor < 0 or len(networkx.ancestors(flow, anchor)) != anchor:
            raise CaptureError(f"pattern {self.name!r}: every op must feed the last one")
        return result

    def subgraph(self, **numbers: float) -> SubGraph:
        """The pattern as a graph, with its holes filled by `numbers` or the function's defaults."""
        parameters = inspect.signature(self.function).parameters
        values = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
        graph = self.templates[0].graph
        return replace(graph, nodes=tuple(_filled(node, values | numbers) for node in graph.nodes))


def _with_holes(node: OpNode, holes: Mapping[float, str]) -> OpNode:
    attrs = tuple((k, Hole(holes[v]) if isinstance(v, float) and v in holes else v) for k, v in node.attrs)
    return replace(node, attrs=attrs, source=None)


def _filled(node: OpNode, values: Mapping[str, float]) -> OpNode:
    return replace(node, attrs=tuple((k, values[v.name] if isinstance(v, Hole) else v) for k, v in node.attrs))


class PatternRegistry:
    """Patterns by name, in the order in which they are tried."""

    def __init__(self, patterns: Sequence[Pattern] = ()) -> None:
        self._patterns: dict[str, Pattern] = {}
        for item in patterns:
            self.add(item)

    def add(self, item: Pattern) -> None:
        """Append a pattern.

        Raises:
            CaptureError: another one has its name.
        """
        known = self._patterns.get(item.name)
        if known is not None and known.function is not item.function:
            raise CaptureError(f"a pattern named {item.name!r} is registered already; choose another name")
        self._patterns[item.name] = item

    def __iter__(self) -> Any:
        return iter(tuple(self._patterns.values()))

    def __getitem__(self, name: str) -> Pattern:
        return self._patterns[name]


DEFAULT = PatternRegistry()


def pattern(
    name: str, *, registry: PatternRegistry = DEFAULT, **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a pattern: its ops, wherever they occur connected like this, become one region.

    `options` are the other attributes of `Pattern`; `registry` is the process-wide one unless given.

    Raises:
        CaptureError: the name is taken.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        registry.add(Pattern(name, function, **options))
        return function

    return register
