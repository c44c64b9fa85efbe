"""Where two recordings of the same code differ."""

from __future__ import annotations

import torch

from graph_capture.ir.graph import OpNode
from graph_capture.record.recorded import RecordedGraph


def differences(first: RecordedGraph, second: RecordedGraph) -> list[str]:
    """Every scalar that differs, a line each, up to the first op that differs."""
    lines: list[str] = []
    for left, right in zip(first.subgraph.nodes, second.subgraph.nodes, strict=False):
        if left.op_type != right.op_type or left.inputs != right.inputs:
            return [*lines, f"{_where(left)}: {left.op_type} in one, {right.op_type} ({right.source}) in the other"]
        attrs = dict(left.attrs), dict(right.attrs)
        for key in sorted({*attrs[0], *attrs[1]}):
            values = [table.get(key, "its default") for table in attrs]
            if values[0] != values[1]:
                lines.append(f"{_where(left)}: {key} is {values[0]!r} in one, {values[1]!r} in the other")
    if len(first.subgraph) != len(second.subgraph):
        lines.append(f"{len(first.subgraph)} ops in one, {len(second.subgraph)} in the other")
    for name, tensor in first.captured.items():
        other = second.captured.get(name)
        if other is not tensor and not (other is not None and _constant(first, name) and torch.equal(tensor, other)):
            lines.append(f"the captured tensor {name} is another one")
    if first.template != second.template:
        lines.append("the results, or the changes to objects, are not made alike")
    return lines


def _constant(graph: RecordedGraph, name: str) -> bool:
    """Whether a captured tensor is a literal of the code, which each recording copies."""
    users = [graph.subgraph.nodes[index] for index in graph.subgraph.users.get(name, ())]
    return all(node.op_type == "aten.lift_fresh_copy.default" for node in users)


def _where(node: OpNode) -> str:
    return f"{node.outputs[0] if node.outputs else node.op_type} ({node.source})"
