"""Writes that only say where a result is to lie: whoever reads the memory afterwards can read the result itself.

``h.copy_(h + r)`` is how a library with ``out=`` arguments spells ``h = h + r``. Such a copy is left out where nobody
can tell: the memory it writes was made in the graph, and from then on is only read through what the copy returned.
A pointwise op in place (``relu_``, ``add_``) makes memory of its own there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from graph_capture.ir.binding import flatten_outputs, prepare
from graph_capture.ir.effects import alias_set, written_inputs
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.layouts import is_contiguous
from graph_capture.ir.ops import TABLE, Kind, op, op_of
from graph_capture.ir.values import TensorMeta

_COPY = "aten.copy_.default"


def forward_writes(graph: SubGraph) -> SubGraph:
    """Without the copies whose source can stand for what they wrote, and the writes of pointwise ops; bit for bit."""
    writes = {index: _functional(node.op_type) for index, node in enumerate(graph.nodes) if written_inputs(node)}
    if not any(name or graph.nodes[index].op_type == _COPY for index, name in writes.items()):
        return graph
    scan = _Scan(graph)
    for index, name in reversed(writes.items()):
        if name is not None:
            scan.write_elsewhere(index, name)
        elif graph.nodes[index].op_type == _COPY:
            scan.forward(index)
    return scan.result()


@cache
def _functional(op_type: str) -> str | None:
    """The pointwise op of the table that an op in place computes."""
    overload = op(op_type).overload
    packet, _, variant = op_type.removeprefix("aten.").partition(".")
    if overload is None or overload.namespace != "aten" or not packet.endswith("_") or op_type == _COPY:
        return None
    function = getattr(getattr(torch.ops.aten, packet[:-1], None), variant, None)
    row = None if function is None else op_of(function)
    return row.name if row is not None and row.name in TABLE and row.kind is Kind.POINTWISE else None


class _Scan:
    def __init__(self, graph: SubGraph) -> None:
        self.graph = graph
        self.names: dict[str, str] = {}  # what a copy returned -> its source
        self.nodes: dict[int, OpNode | None] = {}  # replaced, or left out
        self.moved: set[str] = set()  # values that lie in other memory now
        self.values: dict[str, TensorMeta] = dict(graph.values)
        self.uses: dict[Any, list[tuple[int, str]]] = {}  # alias set -> where which of its values is used
        self.writes: dict[Any, list[int]] = {}
        for index, node in enumerate(graph.nodes):
            for name in node.inputs:
                self.uses.setdefault(alias_set(graph, name), []).append((index, name))
            for position in written_inputs(node):
                self.writes.setdefault(alias_set(graph, node.inputs[position]), []).append(index)
        for name in graph.output_names:
            self.uses.setdefault(alias_set(graph, name), []).append((len(graph), name))
        self.outside = {alias_set(graph, name) for name in graph.input_names}

    def forward(self, index: int) -> None:
        """Leave out the copy at `index`, or make it one into memory of its own."""
        node = self.graph.nodes[index]
        if len(node.inputs) != 2 or node.attrs or not {*node.inputs, *node.outputs} <= self.values.keys():
            return
        target, source = (self.graph.values[name] for name in node.inputs)
        memory, other = (alias_set(self.graph, name) for name in node.inputs)
        (written,) = node.outputs
        if (target.shape, target.dtype, target.device) != (source.shape, source.dtype, source.device):
            return
        if target.bits or source.bits:  # what lies in memory is not what is read
            return
        if memory in self.outside or memory == other or min(target.storage, source.storage) < 0:
            return
        seen = self._views(written)
        later = self._later(memory, index)
        if any(name not in seen for _, name in later) or self._written(memory, index):
            return
        end = len(self.graph)
        returned = any(at == end for at, _ in later)
        shared = other in self.outside or any(at == end for at, _ in self._later(other, index))
        shared = shared or node.inputs[1] in self.names
        if source.stride == target.stride and not self._written(other, index) and not (returned and shared):
            self.nodes[index] = None
            if written in self.graph.output_names:  # an output keeps its name
                self.names[node.inputs[1]] = written
            else:
                self.names[written] = node.inputs[1]
            self._moved(seen, source.offset - target.offset, source.storage)
        elif is_contiguous(target):
            attrs = (("memory_format", torch.contiguous_format),)
            self.nodes[index] = replace(node, op_type="aten.clone.default", inputs=node.inputs[1:], attrs=attrs)
            self._moved(seen, -target.offset, -2 - index)

    def write_elsewhere(self, index: int, name: str) -> None:
        """Let an op in place at `index` be op `name`, with memory of its own."""
        node = self.graph.nodes[index]
        if not {*node.inputs, *node.outputs} <= self.values.keys() or len(node.outputs) != 1:
            return
        metas = [self.graph.values[given] for given in node.inputs]
        memory, target = alias_set(self.graph, node.inputs[0]), metas[0]
        if memory in self.outside or target.storage < 0 or any(meta.bits for meta in metas):
            return
        seen = self._views(node.outputs[0])
        if any(used not in seen for _, used in self._later(memory, index)) or self._written(memory, index):
            return
        made = replace(node, op_type=name)
        given = [torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta") for meta in metas]
        (result,) = flatten_outputs(prepare(made)(given))
        if (result.shape, result.stride(), result.dtype) == (target.shape, target.stride, target.dtype):
            self.nodes[index] = made
            self._moved(seen, -target.offset, -2 - index)

    def _later(self, memory: Any, index: int) -> list[tuple[int, str]]:
        """Where values of an alias set are used after a node, as far as they are still of it."""
        found = [(at, name) for at, name in self.uses.get(memory, ()) if at > index and name not in self.moved]
        return [(at, name) for at, name in found if at not in self.nodes or name != self.graph.nodes[at].inputs[0]]

    def _written(self, memory: Any, index: int) -> bool:
        return any(at > index and at not in self.nodes for at in self.writes.get(memory, ()))

    def _views(self, name: str) -> set[str]:
        """`name` and the views of it."""
        found, pending = {name}, [name]
        while pending:
            for user in self.graph.users.get(pending.pop(), ()):
                node = self.graph.nodes[user]
                if op(node.op_type).kind is Kind.VIEW:
                    pending.extend(view for view in node.outputs if view not in found)
                    found.update(node.outputs)
        return found

    def _moved(self, names: set[str], by: int, storage: int) -> None:
        self.moved |= names
        for name in names & self.values.keys():
            meta = self.values[name]
            self.values[name] = meta._replace(offset=meta.offset + by, storage=storage)

    def result(self) -> SubGraph:
        """The graph without what was left out."""
        if not self.nodes:
            return self.graph
        names = {name: self._root(name) for name in self.names}
        kept = [self.nodes.get(index, node) for index, node in enumerate(self.graph.nodes)]
        nodes = tuple(_renamed(node, names) for node in kept if node is not None)
        return replace(self.graph, nodes=nodes, values=_numbered(self.values))

    def _root(self, name: str) -> str:
        while name in self.names:
            name = self.names[name]
        return name


def _renamed(node: OpNode, names: Mapping[str, str]) -> OpNode:
    return node if names.keys().isdisjoint((*node.inputs, *node.outputs)) else node.rename(names)


def _numbered(values: Mapping[str, TensorMeta]) -> dict[str, TensorMeta]:
    """Alias sets made here are numbered below -1; they get numbers of their own."""
    first = max((meta.storage for meta in values.values()), default=-1) + 1
    return {
        name: meta if meta.storage >= -1 else meta._replace(storage=first - 2 - meta.storage)
        for name, meta in values.items()
    }
