"""`RecordedGraph`: what a recording leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from graph_capture.calls.context import Context, context, difference, transformed, without_grad
from graph_capture.calls.foreign import Form, settle
from graph_capture.calls.signature import Bound, Call, Signature, Surroundings
from graph_capture.calls.template import ResultTemplate
from graph_capture.errors import DataDependentError, SignatureMismatchError
from graph_capture.ir.effects import written_inputs
from graph_capture.ir.graph import SubGraph
from graph_capture.ir.interpreter import Executor
from graph_capture.ir.memory import RandomState, storage_bytes
from graph_capture.ir.ops import GUARD
from graph_capture.record.check import CheckCost
from graph_capture.record.fit import Fit, Property
from graph_capture.record.gradients import requiring, tied
from graph_capture.record.guards import Guards
from graph_capture.record.rebinding import Rebinding

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
        guards: the addresses of the captured tensors, and the guards on everything else that the run read.
        verification: what checking the recording cost; None where it was recorded with ``verify=False``.
        context: what was switched on around the recording; None where that does not count (a loaded graph).
        fit: what a call must be beyond its signature.
        rebindings: names outside the arguments that a replay assigns. If there are any, the template makes a pair of
            the result and the values for them.
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
        properties: Sequence[Property] = (),
        around: Context | None = None,
        graded: frozenset[str] | None = None,
        rebindings: Sequence[Rebinding] = (),
    ) -> None:
        self.subgraph = subgraph
        self.signature = signature
        self.template = template
        self.captured = MappingProxyType(dict(captured))
        self.guards = guards
        self.verification = verification
        self.surroundings = surroundings
        self.context = around
        self._graded = graded
        self.rebindings = tuple(rebindings)
        self.fit = Fit(properties, signature.names, self.captured, subgraph, self.written)

    @cached_property
    def _interpreter(self) -> Executor:
        return Executor.of(self.subgraph)

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
        self._check_context()
        call: Bound | None = self.signature.match(args, kwargs, self.surroundings)
        if call is None:
            call = Call(args, self.signature.ordered(kwargs), self.surroundings)
            self.signature.check(call)
        broken = self.guards.broken() or self.fit.misfit(call.tensors, self.guards.moves)
        if broken is not None:
            raise SignatureMismatchError(f"{broken}; record again")
        return call

    def _check_context(self) -> None:
        """Refuse a call that is traced or transformed, or under another mode than the recording was.

        Raises:
            SignatureMismatchError: it is.
        """
        reason = transformed()
        if reason is not None:
            raise SignatureMismatchError(f"{reason}: a replay runs on plain tensors only; call the code itself there")
        now = context()
        if self.context is not None and without_grad(now) != without_grad(self.context):
            changed = difference(without_grad(self.context), without_grad(now))
            raise SignatureMismatchError(f"{changed}; record again under it")

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
        if torch.is_grad_enabled() and any(self.requiring):
            results = tied(results, self.requiring)
        if self.template.forms:
            results = settle(results, *self._settled)
        return self.built(results, call.objects)

    def built(self, results: Sequence[Any], objects: Sequence[Any]) -> Any:
        """The result, from one tensor for each output; what the code assigns is assigned."""
        made = self.template.build(results, objects)
        if not self.rebindings:
            return made
        result, values = made
        for rebinding, value in zip(self.rebindings, values, strict=True):
            rebinding.assign(value)
        return result

    @cached_property
    def requiring(self) -> tuple[bool, ...]:
        """Which outputs would require a gradient if one could be computed."""
        if self._graded is None:
            return requiring(self.subgraph, self.captured)
        return tuple(name in self._graded for name in self.subgraph.output_names)

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

    def to_networkx(self) -> networkx.DiGraph:
        """See `SubGraph.to_networkx`."""
        return self.subgraph.to_networkx()

    def __str__(self) -> str:
        return str(self.subgraph)

    def __repr__(self) -> str:
        return f"<RecordedGraph: {len(self.subgraph)} ops, {len(self.captured)} captured tensors>"
