"""The immutable graph: `OpNode`, `SubGraph`, and what they promise.

A `SubGraph` is a type-checked, topologically ordered list of ops over named values. Values are SSA: every name is
defined once, as a graph input or as an output of one node. A write in place defines a new name for the tensor it
wrote; two values that share memory have the same `TensorMeta.storage`, which is what `order_edges` works from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graph_capture.errors import CaptureError
from graph_capture.ir.effects import order_edges
from graph_capture.ir.printing import format_subgraph
from graph_capture.ir.values import Source, TensorMeta, freeze, typed

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True)
class OpNode:
    """One op call.

    `op_type` names a row of the op table (`graph_capture.ir.ops`). `inputs` are the tensor arguments in the order of
    the op's parameters; `attrs` holds every other argument that differs from its default as sorted pairs
    ``(parameter, value)`` (a mapping is accepted). Parameters that `attrs` names are skipped when `inputs` are bound,
    and an attribute may refer to an input inside a list as ``Arg(i)``.

    Attributes are equal if they are of one type: 2, 2.0 and True are three, 0.0 and -0.0 two. `source` and `origin` do
    not take part in equality. `origin` holds the nodes that this node replaced, which may have
    replaced others (empty for a recorded node): running `recorded` instead is always right, bit for bit.
    """

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: tuple[tuple[str, Any], ...] = field(default=(), compare=False)
    source: Source | None = field(default=None, compare=False, repr=False)
    origin: tuple[OpNode, ...] = field(default=(), compare=False, repr=False)
    _typed_attrs: Any = field(default=(), init=False, repr=False)  # what of `attrs` takes part in equality

    def __post_init__(self) -> None:
        if type(self.inputs) is not tuple or type(self.outputs) is not tuple:
            object.__setattr__(self, "inputs", tuple(self.inputs))
            object.__setattr__(self, "outputs", tuple(self.outputs))
        if self.attrs != ():
            attrs = self.attrs.items() if isinstance(self.attrs, Mapping) else self.attrs
            object.__setattr__(self, "attrs", tuple(sorted([(key, freeze(value)) for key, value in attrs])))
            object.__setattr__(self, "_typed_attrs", typed(self.attrs))

    def attr(self, name: str, default: Any = None) -> Any:
        """The value of attribute `name`, or `default`."""
        return next((value for key, value in self.attrs if key == name), default)

    @property
    def recorded(self) -> tuple[OpNode, ...]:
        """The recorded nodes that this node stands for (itself, where it was recorded), in order."""
        return tuple(leaf for node in self.origin for leaf in node.recorded) if self.origin else (self,)

    def rename(self, names: Mapping[str, str]) -> OpNode:
        """The same node over other value names, its origin too; names not in `names` stay."""
        return replace(
            self,
            inputs=tuple([names.get(name, name) for name in self.inputs]),
            outputs=tuple([names.get(name, name) for name in self.outputs]),
            origin=tuple([node.rename(names) for node in self.origin]),
        )


@dataclass(frozen=True)
class SubGraph:
    """An immutable, hashable dataflow graph in topological order, verified when built.

    `values` maps value names to `TensorMeta` where they are known (always for a recorded graph); it does not take part
    in equality or hashing.

    Raises:
        CaptureError: the graph is malformed; see `check_subgraph`.
    """

    nodes: tuple[OpNode, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    values: Mapping[str, TensorMeta] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "input_names", tuple(self.input_names))
        object.__setattr__(self, "output_names", tuple(self.output_names))
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))
        check_subgraph(self)

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[OpNode]:
        return iter(self.nodes)

    @cached_property
    def producers(self) -> Mapping[str, int]:
        """Value name -> index of the node that defines it; graph inputs are absent."""
        return {name: index for index, node in enumerate(self.nodes) for name in node.outputs}

    @cached_property
    def users(self) -> Mapping[str, tuple[int, ...]]:
        """Value name -> indices of the nodes that read it, each once, in order."""
        found: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in dict.fromkeys(node.inputs):
                found.setdefault(name, []).append(index)
        return {name: tuple(indices) for name, indices in found.items()}

    @cached_property
    def by_op(self) -> Mapping[str, tuple[int, ...]]:
        """Op type -> indices of its nodes, in order."""
        found: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            found.setdefault(node.op_type, []).append(index)
        return {op_type: tuple(indices) for op_type, indices in found.items()}

    @cached_property
    def _structure(self) -> str:
        numbers: dict[str, int] = {}

        def number(name: str) -> int:
            return numbers.setdefault(name, len(numbers))

        parts = [repr([number(name) for name in self.input_names])]
        for node in self.nodes:
            inputs, outputs = [number(n) for n in node.inputs], [number(n) for n in node.outputs]
            parts.append(f"{node.op_type}{inputs}{outputs}{_stable(node.attrs)}")
        parts.append(repr([number(name) for name in self.output_names]))
        return "\n".join(parts)

    def cache_key(
        self,
        input_dtypes: Mapping[str, Any] | Sequence[Any] = (),
        input_shapes: Mapping[str, Any] | Sequence[Any] = (),
    ) -> str:
        """A key (64 hex digits) for this structure at these dtypes and shapes.

        Equal in every process; value names do not count. Both arguments follow `input_names`, or map names.
        """
        dtypes, shapes = (
            [table[name] for name in self.input_names if name in table] if isinstance(table, Mapping) else list(table)
            for table in (input_dtypes, input_shapes)
        )
        text = "\n".join((self._structure, repr([str(d) for d in dtypes]), repr([list(s) for s in shapes])))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_networkx(self) -> networkx.DiGraph:
        """Ops (their indices in `nodes`; attributes ``op_type``, ``node``) and values (their names), all of them nodes.

        Edges between the two carry ``positions``: where an op reads a value among its inputs, or makes it among its
        outputs. Edges between ops, with ``order=True``, are those of `order_edges`.
        """
        import networkx  # slow to import, and not needed for a replay

        graph = networkx.DiGraph()
        graph.add_nodes_from((index, {"op_type": node.op_type, "node": node}) for index, node in enumerate(self.nodes))
        graph.add_nodes_from(self.input_names)
        edges: list[tuple[int | str, int | str, dict[str, Any]]] = []
        for index, node in enumerate(self.nodes):
            reads: dict[str, tuple[int, ...]] = {}
            for position, name in enumerate(node.inputs):
                reads[name] = (*reads[name], position) if name in reads else (position,)
            edges += [(name, index, {"positions": positions, "order": False}) for name, positions in reads.items()]
            edges += [(index, name, {"positions": (place,), "order": False}) for place, name in enumerate(node.outputs)]
        graph.add_edges_from(edges)
        graph.add_edges_from(order_edges(self), positions=(), order=True)
        return graph

    def __str__(self) -> str:
        return format_subgraph(self)


def _stable(value: Any) -> str:
    """A text of an attribute value that is the same in every process."""
    if isinstance(value, tuple):
        return "(" + ",".join(_stable(item) for item in value) + ")"
    if isinstance(value, SubGraph):
        return "{" + value._structure + "}"
    return f"{type(value).__name__}:{value!r}"


def check_subgraph(graph: SubGraph) -> None:
    """Verify that `graph` is well formed.

    Raises:
        CaptureError: a value is defined twice, used before it is defined, or an output does not exist. A graph that
            passes has no cycle, for its nodes are in topological order.
    """
    defined: set[str] = set()

    def define(name: str, where: str) -> None:
        if name in defined:
            raise CaptureError(f"value {name!r} is defined twice, the second time by {where}")
        defined.add(name)

    for name in graph.input_names:
        define(name, "the graph's inputs")
    for index, node in enumerate(graph.nodes):
        where = f"node {index} ({node.op_type})"
        for name in node.inputs:
            if name not in defined:
                raise CaptureError(f"{where} reads {name!r} before it is defined; nodes must be in topological order")
        for name in node.outputs:
            define(name, where)
    for name in graph.output_names:
        if name not in defined:
            raise CaptureError(f"output {name!r} is not defined by any node or input")
