"""Graphs as readable Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graph_capture.ir.values import Arg, Source, TensorMeta, arg_indices

if TYPE_CHECKING:
    from graph_capture.ir.graph import OpNode, SubGraph


def format_subgraph(graph: SubGraph, name: str = "graph") -> str:
    """`graph` as a Python function: one op a line with its result's dtype and shape, module and source as comments."""
    lines = [f"def {name}("]
    lines += [f"    {_typed(graph.values, value)}," for value in graph.input_names]
    lines.append("):")
    module, at = None, None
    for node in graph.nodes:
        source = node.source or Source()
        if source.module != module:
            lines.append(f"    # {source.module or 'top level'}")
            module = source.module
        text = f"    {format_node(node, graph.values)}"
        where = f"{os.path.basename(source.file)}:{source.line}" if source.file else ""
        if where and where != at:
            text = f"{text:<88}  # {where}"
            at = where
        lines.append(text)
    lines.append(f"    return {', '.join(graph.output_names)}")
    return "\n".join(lines)


def format_node(node: OpNode, values: Mapping[str, TensorMeta]) -> str:
    """One op as an assignment."""
    attrs = dict(node.attrs)
    body = attrs.pop("body", None) if node.op_type.startswith("fused.") else None
    listed = {index for value in attrs.values() for index in arg_indices(value)}
    parts = [value for index, value in enumerate(node.inputs) if index not in listed]
    parts += [f"{key}={_text(value, node)}" for key, value in attrs.items()]
    targets = ", ".join(_typed(values, value) for value in node.outputs)
    call = f"{node.op_type}({', '.join(parts)})"
    if body is not None:
        call += f"  # {' -> '.join(inner.op_type for inner in body.nodes)}"
    return f"{targets} = {call}" if targets else call


def _typed(values: Mapping[str, TensorMeta], value: str) -> str:
    meta = values.get(value)
    return value if meta is None else f"{value}: {meta}"


def _text(value: Any, node: OpNode) -> str:
    if isinstance(value, Arg):
        return node.inputs[value.index]
    if isinstance(value, tuple):
        return "[" + ", ".join(_text(item, node) for item in value) + "]"
    return repr(value)
