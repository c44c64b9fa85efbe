"""`RecordedGraph`: what a recording leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import networkx
import torch

from graph_capture.executor import Executor
from graph_capture.graph import SubGraph
from graph_capture.ops import written_inputs
from graph_capture.signature import InputSpec, OutputSpec


class RecordedGraph:
    """An immutable recording: the ops, the structure of inputs and outputs, and the captured tensors by reference.

    Attributes:
        subgraph: the ops. Its inputs are the example inputs' tensors, then the captured tensors.
        inputs: the recorded arguments.
        outputs: the structure of the result.
        captured: the tensors that were used but not passed in, by value name: parameters and buffers under their
            module names, others as ``const``. They are read at each replay, so changes in place are honoured.
    """

    def __init__(
        self, subgraph: SubGraph, inputs: InputSpec, outputs: OutputSpec, captured: Mapping[str, torch.Tensor]
    ) -> None:
        self.subgraph = subgraph
        self.inputs = inputs
        self.outputs = outputs
        self.captured = MappingProxyType(dict(captured))

    @cached_property
    def _executor(self) -> Executor:
        graph = self.subgraph
        return Executor([(node, None) for node in graph.nodes], graph.input_names, graph.output_names)

    @property
    def writes(self) -> bool:
        """Whether a replay changes memory that the caller can see: an input's or a captured tensor's."""
        values = self.subgraph.values
        outer = {values[name].storage for name in self.subgraph.input_names}
        return any(
            values[node.inputs[position]].storage in outer
            for node in self.subgraph.nodes
            for position in written_inputs(node)
        )

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Replay op by op, unfused, on new arguments of the recorded signature; returns what ``output()`` was given.

        Raises:
            SignatureMismatchError: the arguments differ in structure, shape, stride, dtype, device or aliasing.
        """
        tensors = self.inputs.bind(args, kwargs)
        return self.outputs.build(self._executor.run([*tensors, *self.captured.values()]))

    def to_networkx(self) -> networkx.MultiDiGraph:
        """See `SubGraph.to_networkx`."""
        return self.subgraph.to_networkx()

    def __str__(self) -> str:
        return str(self.subgraph)

    def __repr__(self) -> str:
        return f"<RecordedGraph: {len(self.subgraph)} ops, {len(self.captured)} captured tensors>"
