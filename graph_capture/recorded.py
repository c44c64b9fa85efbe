"""`RecordedGraph`: what a recording leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from graph_capture.errors import DataDependentError, SignatureMismatchError
from graph_capture.executor import Executor
from graph_capture.graph import SubGraph
from graph_capture.ledger import Ledger
from graph_capture.ops import GUARD, written_inputs
from graph_capture.plan import Plan
from graph_capture.replay import Replay
from graph_capture.signature import Bound, Call, Signature, Surroundings
from graph_capture.structure import Template
from graph_capture.witness import RandomState, Verification, storage_bytes

if TYPE_CHECKING:
    import networkx


class RecordedGraph:
    """An immutable recording: the ops, the structure of inputs and outputs, and the captured tensors by reference.

    Attributes:
        subgraph: the ops. Its inputs are the example inputs' tensors, then the captured tensors.
        signature: what a call must look like.
        template: how the result is made, and what a replay changes in the objects of a call.
        captured: the tensors that were used but not passed in, by value name: parameters and buffers under their
            module names, others as ``const``. They are read at each replay, so changes in place are honoured.
        ledger: the addresses of the captured tensors, and the guards on the modules that ran.
        verification: what checking the recording cost; None where it was recorded with ``verify=False``.
    """

    def __init__(
        self,
        subgraph: SubGraph,
        signature: Signature,
        template: Template,
        captured: Mapping[str, torch.Tensor],
        ledger: Ledger,
        verification: Verification | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        self.subgraph = subgraph
        self.signature = signature
        self.template = template
        self.captured = MappingProxyType(dict(captured))
        self.ledger = ledger
        self.verification = verification
        self.surroundings = surroundings

    @cached_property
    def _replay(self) -> Replay:
        graph = self.subgraph
        executor = Executor([(node, None) for node in graph.nodes], graph.input_names, graph.output_names)
        return Replay(executor, len(graph.input_names) - len(self.captured))

    @property
    def plan(self) -> Plan | None:
        """How `run` replays; None before the first replay, or where there can be no plan."""
        return self._replay.plan

    @property
    def writes(self) -> bool:
        """Whether a replay changes memory that the caller can see: an input's or a captured tensor's."""
        return bool(self._written_inputs(len(self.subgraph)))

    @cached_property
    def written(self) -> frozenset[str]:
        """The inputs of `subgraph` (arguments' and captured tensors) that lie in memory which a replay writes."""
        values = self.subgraph.values
        names = self.subgraph.input_names
        written = {values[names[position]].storage for position in self._written_inputs(len(self.subgraph))}
        return frozenset(name for name in names if values[name].storage in written)

    @cached_property
    def guarded(self) -> bool:
        """Whether a replay checks values that Python read while recording."""
        return any(node.op_type.startswith(GUARD) for node in self.subgraph.nodes)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Replay op by op, unfused, on new arguments of the recorded signature; returns what ``output()`` was given.

        Raises:
            SignatureMismatchError: the arguments differ in structure, shape, stride, dtype, device or aliasing; or a
                weight, a submodule or a plain attribute of a module that ran was replaced since.
            DataDependentError: a value that Python read while recording is another one now; nothing has been changed.
        """
        return self.replay(self.bind(args, kwargs))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Bound:
        """A call that fits, with the modules as they were.

        Raises:
            SignatureMismatchError: as `run`.
        """
        call: Bound | None = self.signature.match(args, kwargs, self.surroundings)
        if call is None:
            call = Call(args, self.signature.ordered(kwargs), self.surroundings)
            self.signature.check(call)
        broken = self.ledger.broken()
        if broken is not None:
            raise SignatureMismatchError(f"{broken}; record again")
        return call

    def replay(
        self, call: Bound, replay: Replay | None = None, constants: Sequence[torch.Tensor] = (), version: int = 0
    ) -> Any:
        """Run `replay` (of a graph made from this one that also takes `constants`; default: of this one) on a call that
        fits, and make the result. `version` changes whenever `constants` are other tensors."""
        replay = replay or self._replay
        fixed = [*self._weights, *constants]
        stamp = (self.ledger.moves, version)
        if self.guarded:
            with self._undone_on_mismatch([*call.tensors, *fixed]):
                results = replay.run(call.tensors, fixed, stamp)
        else:
            results = replay.run(call.tensors, fixed, stamp)
        return self.template.build(results, call.objects)

    @cached_property
    def _weights(self) -> list[torch.Tensor]:
        return list(self.captured.values())

    @contextlib.contextmanager
    def _undone_on_mismatch(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Put back what was written before a guard failed."""
        last = max(i for i, node in enumerate(self.subgraph.nodes) if node.op_type.startswith(GUARD))
        restore = self._snapshot(tensors, last)
        try:
            yield
        except DataDependentError:
            restore()
            raise

    @contextlib.contextmanager
    def undone(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Put back, at the end, what the recorded ops write into `tensors` (one for each input) and draw at random."""
        restore = self._snapshot(tensors, len(self.subgraph))
        try:
            yield
        finally:
            restore()

    def _snapshot(self, tensors: Sequence[torch.Tensor], until: int) -> Callable[[], None]:
        memories = [storage_bytes(tensors[i]) for i in self._written_inputs(until)]
        copies = [(memory, memory.clone()) for memory in memories]
        random = RandomState()

        def restore() -> None:
            for memory, copy in copies:
                memory.copy_(copy)
            random.restore()

        return restore

    def _written_inputs(self, until: int) -> list[int]:
        """Positions of the graph's inputs, one for each memory that the nodes before `until` write."""
        values = self.subgraph.values
        written = {
            values[node.inputs[position]].storage
            for node in self.subgraph.nodes[:until]
            for position in written_inputs(node)
        }
        first: dict[int, int] = {}  # one position for each storage
        for position, name in enumerate(self.subgraph.input_names):
            if values[name].storage in written:
                first.setdefault(values[name].storage, position)
        return list(first.values())

    def to_networkx(self) -> networkx.MultiDiGraph:
        """See `SubGraph.to_networkx`."""
        return self.subgraph.to_networkx()

    def __str__(self) -> str:
        return str(self.subgraph)

    def __repr__(self) -> str:
        return f"<RecordedGraph: {len(self.subgraph)} ops, {len(self.captured)} captured tensors>"
