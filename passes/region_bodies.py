"""What a region of a graph is to a kernel: its body, what kinds of nodes it may hold, and the bytes that it moves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from graph_capture.ir.effects import written_inputs
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import FUSED, Kind, op
from graph_capture.ir.values import TensorMeta
from graph_capture.passes.decode import is_merged
from graph_capture.passes.rewrite import body_of, inline, live_outputs, values_of
from graph_capture.passes.rounding import rounds


def region_body(
    members: Sequence[OpNode], outputs: Sequence[str], values: Mapping[str, TensorMeta], shown: Collection[str]
) -> tuple[SubGraph, tuple[str, ...]]:
    """See `body_of`; linears that were merged are apart again, for a kernel multiplies several weights in place.

    Args:
        members: the nodes of a region, in order.
        outputs: what it makes for others.
        values: the layouts of what they read and make.
        shown: values of which the code can tell how often they were rounded.
    """
    made = {name for node in members for name in node.outputs}
    inputs = tuple(dict.fromkeys(name for node in members for name in node.inputs if name not in made))
    region = inline(SubGraph(tuple(members), inputs, tuple(outputs), values_of(members, values)), is_merged)
    rounded = [name for name in outputs if name in shown]
    rounded = rounded if sum(rounds(region, node) for node in region.nodes) > 1 else []
    return body_of(region, range(len(region)), outputs, rounded)


def rounded_outputs(region: OpNode) -> tuple[str, ...]:
    """The results of a region that its body casts to the dtype that they have; see `region_body`."""
    body: SubGraph = region.attr("body")
    pairs = zip(region.outputs, (body.nodes[body.producers[name]] for name in body.output_names), strict=True)
    return tuple(
        name
        for name, node in pairs
        if node.op_type == "cast" and node.attr("dtype") is body.values[node.inputs[0]].dtype
    )


def is_composed(node: OpNode) -> bool:
    """Whether the node is opaque and no library's: only the nodes that it replaced can run."""
    target = op(node.op_type)
    return target.composed and target.kind is Kind.OPAQUE


def is_library(node: OpNode) -> bool:
    """Whether the node is one library call that stands for several recorded ops."""
    return len(node.recorded) > 1 and not node.op_type.startswith(FUSED) and op(node.op_type).library


def stands_alone(graph: SubGraph, node: OpNode) -> bool:
    """Whether an op is worth a kernel without anything else: a product of few rows, and on a GPU a norm or a softmax,
    for which the library has kernels of any length alone."""
    kind, meta = op(node.op_type).kind, graph.values.get(node.outputs[0])
    return kind is Kind.OPAQUE or (kind is Kind.ROW and meta is not None and meta.device.type == "cuda")


def saved_bytes(graph: SubGraph, nodes: Sequence[int]) -> int:
    """Bytes of memory traffic that one kernel in the place of `nodes` avoids."""
    before = sum(moved_bytes(graph, [index]) for index in nodes)
    return before - moved_bytes(graph, nodes)


def moved_bytes(graph: SubGraph, nodes: Sequence[int]) -> int:
    """Bytes that go in and out of `nodes` as one step: a view moves none, a write in place only what it writes."""
    made = {name for index in nodes for name in graph.nodes[index].outputs}
    written: set[str] = set()
    read: set[str] = set()
    stored = 0
    for index in nodes:
        node = graph.nodes[index]
        if op(node.op_type).kind is Kind.VIEW:
            continue
        targets = [node.inputs[position] for position in written_inputs(node)]
        read.update(name for name in node.inputs if name not in targets)
        if targets:
            written.update((*targets, *node.outputs))
            stored += sum(graph.values[name].nbytes for name in node.inputs if name not in targets)
    outputs = [name for name in live_outputs(graph, nodes) if name not in written]
    moved = [*(read - made), *outputs]
    if len(nodes) == 1 and op(graph.nodes[nodes[0]].op_type).kind is Kind.VIEW:
        return 0
    return stored + sum(graph.values[name].nbytes for name in moved if name in graph.values)
