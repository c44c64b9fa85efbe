"""The flow of a graph as networkx has it: what must come before what, and what lies near what.

`SubGraph.to_networkx` makes the one graph: ops (by index) and values (by name) are nodes, edges say at which positions
an op reads or makes a value, and order edges join ops directly. Everything here asks networkx about that graph or a
small part of it, so that the work for one layer does not grow with the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import networkx

from graph_capture.errors import CaptureError
from graph_capture.ir.graph import SubGraph
from graph_capture.ir.ops import op


def successors(network: networkx.DiGraph, index: int) -> Iterator[int]:
    """The ops that must come after op `index`: those that read what it makes, and those that an order edge names."""
    for near in network.succ[index]:
        if isinstance(near, int):
            yield near
        else:
            yield from network.succ[near]


def part(network: networkx.DiGraph, ops: Sequence[int]) -> networkx.DiGraph:
    """`ops`, the first of them marked as ``root``, and the values that one of them makes and another reads.

    Where a commutative op reads a value, ``positions`` is only how often.
    """
    inside = set(ops)
    result = networkx.DiGraph()
    result.add_nodes_from((index, {"node": network.nodes[index]["node"], "root": index == ops[0]}) for index in ops)
    for index in ops:
        for name, read in network.pred[index].items():
            producer = None if isinstance(name, int) else next(iter(network.pred[name]), None)
            if producer in inside:
                result.add_edge(producer, name, positions=network[producer][name]["positions"])
                free = len(network.nodes[index]["node"].inputs) == 2 and op(network.nodes[index]["op_type"]).commutative
                result.add_edge(name, index, positions=len(read["positions"]) if free else read["positions"])
    return result


class CyclicGroupsError(CaptureError):
    """Groups of nodes that cannot all be contracted; `nodes` are those of one cycle."""

    def __init__(self, nodes: set[int]) -> None:
        super().__init__(f"contracted, nodes {sorted(nodes)} would form a cycle")
        self.nodes = nodes


class Dependencies:
    """What must come before what in a graph: data flow and order edges, by node index."""

    def __init__(self, graph: SubGraph) -> None:
        self.graph = graph

    @cached_property
    def network(self) -> networkx.DiGraph:
        """See `SubGraph.to_networkx`."""
        return self.graph.to_networkx()

    def detour(self, nodes: Iterable[int]) -> int | None:
        """A node outside `nodes` on a path that leaves them and comes back, or None: then they are convex.

        Looks only at nodes between the first and the last of them, for the graph is in topological order.
        """
        inside = set(nodes)
        last = max(inside)
        exits = {after for index in inside for after in successors(self.network, index) if after < last} - inside

        def neighbours(near: int | str) -> list[int | str]:
            return [after for after in self.network.succ[near] if isinstance(after, str) or after <= last]

        for start in sorted(exits):
            if any(after in inside for _, after in networkx.generic_bfs_edges(self.network, start, neighbours)):
                return start
        return None

    def blocked(self, nodes: Iterable[int]) -> str | None:
        """Why `nodes` cannot become one node, or None."""
        detour = self.detour(nodes)
        if detour is None:
            return None
        return f"would have created a cycle through {self.graph.nodes[detour].op_type}"

    def order(self, groups: Sequence[Sequence[int]]) -> list[int]:
        """The nodes in topological order, as close to the old one as can be, once each group is contracted.

        A group (ascending indices) stands where its last node stood, and under that index. Only stretches in which a
        group's reader stands before it are sorted anew.

        Raises:
            CyclicGroupsError: the groups are convex one by one, and form a cycle together.
        """
        owners = {index: group[-1] for group in groups for index in group}
        members = {group[-1]: group for group in groups}

        def readers(owner: int) -> Iterator[int]:
            for index in members.get(owner, (owner,)):
                for after in successors(self.network, index):
                    if owners.get(after, after) != owner:
                        yield owners.get(after, after)

        late = sorted((reader, owner) for owner in members for reader in readers(owner) if reader < owner)[::-1]
        result: list[int] = []
        done = 0
        while late:
            first, last = late.pop()
            while late and late[-1][0] <= last:
                last = max(last, late.pop()[1])
            quotient = networkx.DiGraph()
            quotient.add_nodes_from(index for index in range(first, last + 1) if owners.get(index, index) == index)
            quotient.add_edges_from(
                [(index, reader) for index in quotient for reader in readers(index) if reader in quotient]
            )
            result += [index for index in range(done, first) if owners.get(index, index) == index]
            try:
                result += networkx.lexicographical_topological_sort(quotient)
            except networkx.NetworkXUnfeasible:
                raise CyclicGroupsError({before for before, _ in networkx.find_cycle(quotient)}) from None
            done = last + 1
        return result + [index for index in range(done, len(self.graph)) if owners.get(index, index) == index]
