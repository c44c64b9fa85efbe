"""What nodes do besides giving results: writes in place, random draws, and the order that follows from both."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from graph_capture.ir.binding import arguments
from graph_capture.ir.ops import EXTERNAL, FUSED, UNDECLARED_WRITES, op, written_parameters
from graph_capture.ir.values import arg_indices

if TYPE_CHECKING:
    from graph_capture.ir.graph import OpNode, SubGraph


def written_inputs(node: OpNode) -> list[int]:
    """Positions in ``node.inputs`` of the tensors that the op writes in place."""
    if node.op_type == EXTERNAL:  # what a foreign kernel writes is not known
        return list(range(len(node.inputs)))
    if node.op_type.startswith(FUSED):
        return _written_by_body(node.attr("body"))
    if node.op_type in UNDECLARED_WRITES and node.attr("training") is False:
        return []
    written = written_parameters(node.op_type)
    if not written:
        return []
    return [index for name, value in arguments(node).items() if name in written for index in arg_indices(value)]


def _written_by_body(body: SubGraph) -> list[int]:
    """Positions of the inputs whose memory a region writes."""
    storages = {body.values[n.inputs[i]].storage for n in body.nodes for i in written_inputs(n)}
    return [index for index, name in enumerate(body.input_names) if storages and body.values[name].storage in storages]


@cache
def _random(op_type: str) -> bool:
    overload = op(op_type).overload
    return overload is not None and torch.Tag.nondeterministic_seeded in overload.tags


def is_random(node: OpNode) -> bool:
    """Whether the op draws from the global random number generator."""
    return _random(node.op_type) or (
        node.op_type == "scaled_dot_product_attention" and bool(node.attr("dropout_p", 0.0))
    )


RNG = ("rng",)  # the alias set that every random op writes


def order_edges(graph: SubGraph) -> list[tuple[int, int]]:
    """Pairs of node indices ``(before, after)`` that must keep their order although no value flows between them.

    A write is ordered after every earlier and before every later use of its alias set; random ops keep the order in
    which they draw. Linear in the number of uses.
    """
    edges: list[tuple[int, int]] = []
    last_write: dict[Any, int] = {}
    uses_since: dict[Any, list[int]] = {}
    for index, node in enumerate(graph.nodes):
        writes: set[Any] = {alias_set(graph, node.inputs[position]) for position in written_inputs(node)}
        touched: set[Any] = {alias_set(graph, name) for name in (*node.inputs, *node.outputs)} | writes
        if is_random(node):
            writes.add(RNG)
            touched.add(RNG)
        for key in touched:
            if key in last_write:
                edges.append((last_write[key], index))
            if key in writes:
                edges.extend((use, index) for use in uses_since.pop(key, ()) if use != last_write.get(key))
                last_write[key] = index
            else:
                uses_since.setdefault(key, []).append(index)
    return sorted(set(edges))


def alias_set(graph: SubGraph, name: str) -> Any:
    """What stands for the memory of a value: its storage, or, where nothing is known to share it, its name."""
    meta = graph.values.get(name)
    return name if meta is None or meta.storage < 0 else meta.storage
