"""`RecordedGraph`: what a recording leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from graph_capture.calls.foreign import Form, settle
from graph_capture.calls.signature import Bound, Call, Signature, Surroundings
from graph_capture.calls.structure import ResultTemplate
from graph_capture.errors import DataDependentError, SignatureMismatchError
from graph_capture.ir.effects import written_inputs
from graph_capture.ir.graph import SubGraph
from graph_capture.ir.interpreter import Executor
from graph_capture.ir.memory import RandomState, storage_bytes
from graph_capture.ir.ops import GUARD
from graph_capture.record.check import CheckCost
from graph_capture.record.guards import Guards

if TYPE_CHECKING:
    import networkx


Execute = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], list[torch.Tensor]]


class RecordedGraph:
    """An immutable recording: the ops, the structure of inputs and outputs, and the captured tensors by reference.

    Attributes:
        subgraph: the ops. Its inputs are the example inputs' tensors, then the captured tensors.
        signature: what a call must look like.
        template: how the result is made, and what a replay changes in the objects of a call.
        captured: the tensors that were used but not passed in, by value name: parameters and buffers under their
            module names, others as ``const``. They are read at each replay, so changes in place are honoured.
        guards: the addresses of the captured tensors, and the guards on the modules that ran.
        verification: what checking the recording cost; None where it was recorded with ``verify=False``.
    """

    def __init__(
        self,
        subgraph: SubGraph,
        signature: Signature,
        template: ResultTemplate,
        captured: Mapping[str, torch.Tensor],
        guards: Guards,
        verification: CheckCost | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        self.subgraph = subgraph
        self.signature = signature
        self.template = template
        self.captured = MappingProxyType(dict(captured))
        self.guards = guards
        self.verification = verification
        self.surroundings = surroundings

    @cached_property
    def _interpreter(self) -> Executor:
        graph = self.subgraph
        return Executor([(node, None) for node in graph.nodes], graph.input_names, graph.output_names)

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
        """Interpret op by op on new arguments of the recorded signature; returns what ``output()`` was given.

        This is the reference that every other way to run the graph is compared with.

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
        broken = self.guards.broken()
        if broken is not None:
            raise SignatureMismatchError(f"{broken}; record again")
        return call

    def replay(self, call: Bound, execute: Execute | None = None) -> Any:
        """Run the graph on a call that fits, and make the result.

        Args:
            call: the call's tensors and objects.
            execute: takes the dynamic inputs (the call's tensors) and the static ones (the captured tensors), and gives
                one tensor for each output of `subgraph`; op by op unless given.
        """
        execute = execute or self._interpret
        if self.guarded:
            with self._undone_on_mismatch([*call.tensors, *self.static]):
                results = execute(call.tensors, self.static)
        else:
            results = execute(call.tensors, self.static)
        if self.template.forms:
            results = settle(results, *self._settled)
        return self.template.build(results, call.objects)

    @cached_property
    def _settled(self) -> tuple[list[Form | None], list[bool]]:
        """What becomes of each output: another library's tensor of that form; whether it lies in outside memory."""
        values = self.subgraph.values
        outside = {values[name].storage for name in self.subgraph.input_names}
        forms = [self.template.forms.get(number) for number in self.template.tensors]
        return forms, [values[name].storage in outside for name in self.subgraph.output_names]

    @cached_property
    def static(self) -> list[torch.Tensor]:
        """The captured tensors, in the order of the graph's inputs."""
        return list(self.captured.values())

    def _interpret(self, dynamic: Sequence[torch.Tensor], static: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._interpreter.run([*dynamic, *static])

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
