"""Turns calls into nodes, and what was recorded into a `RecordedGraph`."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graph_capture.calls.context import context
from graph_capture.calls.foreign import handle_of
from graph_capture.calls.signature import Call, Surroundings
from graph_capture.calls.structure import Walk, attributes_of
from graph_capture.calls.template import ResultTemplate
from graph_capture.errors import CaptureError, DataDependentError
from graph_capture.ir.binding import flatten_outputs, pack
from graph_capture.ir.effects import is_random, written_inputs
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.op_table import external
from graph_capture.ir.ops import EXTERNAL, GUARD, Op, op
from graph_capture.ir.printing import format_node
from graph_capture.ir.values import TensorMeta
from graph_capture.record.check import RecordingCheck, orphaned
from graph_capture.record.fit import Property, itself, place
from graph_capture.record.gradients import tied
from graph_capture.record.guards import Guards
from graph_capture.record.names import Names
from graph_capture.record.reads import Reads, is_looked_at
from graph_capture.record.rebinding import Rebinding, rebindings
from graph_capture.record.recorded import RecordedGraph
from graph_capture.record.shapes import shaped, short_name, storage_of

_STATELESS = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, torch.nn.Module)


class GraphBuilder(Names):
    """One recording in progress.

    Attributes:
        result: the graph, once the recording has ended.
        metadata_only: while true, calls are recorded but do not run: what they would read is not there yet.
    """

    def __init__(
        self,
        args: Any,
        kwargs: Any,
        surroundings: Surroundings | None,
        *,
        guard: bool,
        verify: bool,
        roots: Sequence[Any] = (),
    ) -> None:
        super().__init__(Call(args, kwargs, surroundings), RecordingCheck() if verify else None)
        self.metadata_only = False
        self.autocast = False  # whether it was on around the function of torch's that was called last
        self.result: SubGraph | None = None
        self.reads_of_code = Reads(self._state, grad=torch.is_grad_enabled())
        self._context = context()
        self._properties: list[Property] = []
        self._surroundings = surroundings
        self._guard = guard
        self._constants: set[str] = set()
        for root in (*roots, *self._arguments.walk.closed.values()):
            self._state.see(root, "")

    # --- calls

    def call(self, target: Op, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        """Run one op and write it down."""
        inputs, attrs = pack(target, args, kwargs, self.name_of)
        if self._check is not None:
            self._announce(target, args, kwargs, inputs, attrs)
        with self.reads_of_code.elsewhere():
            result = shaped(target, args, kwargs, run) if self.metadata_only else run()
        outputs = flatten_outputs(result)
        if outputs or not target.returns_values:
            self._write(target, inputs, attrs, outputs)
        return result

    def external(self, kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run a kernel that torch does not know and write it down as one op that may write every tensor it got."""
        with self.suspend():
            self.call(op(EXTERNAL), (kernel, args, tuple(kwargs.items())), {}, lambda: external(kernel, args, kwargs))

    def _announce(self, target: Op, args: Any, kwargs: Any, inputs: tuple[str, ...], attrs: Any) -> None:
        """Tell the witness what this call is about to write and draw."""
        assert self._check is not None
        for name, value in attrs:
            if name == "generator":
                self._check.draws(value)
        if target.may_write:
            node, tensors = OpNode(target.name, inputs, (), attrs), list[torch.Tensor]()

            def noted(tensor: torch.Tensor) -> str:
                tensors.append(tensor)
                return ""

            pack(target, args, kwargs, noted)
            with self.suspend():
                for position in written_inputs(node):
                    self._check.before_write(self.values[inputs[position]].storage, node, tensors, position)

    def _write(self, target: Op, inputs: tuple[str, ...], attrs: Any, outputs: list[torch.Tensor]) -> None:
        """Append a node that produced `outputs`."""
        names = []
        for tensor in outputs:
            known = self._names.get(id(tensor))
            if known is None or known[0]() is not tensor:
                self._made.pop(id(tensor), None)
                self._made[id(tensor)] = weakref.ref(tensor)
            name = self._fresh(short_name(target.name))
            self._bind(tensor, name)
            names.append(name)
        node = self._append(target.name, inputs, tuple(names), attrs)
        if self._graded and not self._graded.isdisjoint(inputs) and self._differentiates(target):
            self._graded.update(
                n for n in names if self.values[n].dtype.is_floating_point or self.values[n].dtype.is_complex
            )
        if self._check is not None:
            self._check.gave(node, [self.values[name].dtype for name in inputs], outputs)
        if is_random(node) or any(self.values[name].storage in self._dynamic for name in inputs):
            touched = (*names, *(inputs[position] for position in written_inputs(node)))
            self._dynamic.update(self.values[name].storage for name in touched)

    def _differentiates(self, target: Op) -> bool:
        """Whether eager's result would require a gradient where an input does."""
        return self.grad.enabled and not torch.is_inference_mode_enabled() and target.name != "aten.detach.default"

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """``torch.tensor(...)``: every replay starts from a fresh copy, for the code may write into it."""
        name = self._fresh("const")
        kept = tensor.clone()
        self.captured[name] = kept
        self._constants.add(name)
        self.values[name] = TensorMeta.of(kept, self._storage(kept))
        self._write(op("aten.lift_fresh_copy.default"), (name,), (), [tensor])
        return tensor

    # --- values that Python reads

    def depends(self, what: str, args: Any) -> bool:
        """Whether Python is about to see values that depend on more than shapes and constants.

        Raises:
            DataDependentError: it is, and the recording has no guards.
        """
        tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if all(self.values[self.name_of(tensor)].storage not in self._dynamic for tensor in tensors):
            return False
        if self._guard:
            return True
        around = "".join(f"\n    {format_node(node, self.values)}" for node in self.nodes[-3:])
        raise DataDependentError(
            f"{what} depends on a tensor's values, at {self.modules.source()}. A replay would keep the recorded one "
            "for ever. Keep the decision on the device (torch.where, masks), compute the value before the recording "
            'and pass it in, or record(..., data_dependent="guard") to check it at each replay.'
            f"\n  The last recorded ops:{around}"
        )

    def asked(self, read: Callable[[torch.Tensor], Any], what: str, tensor: torch.Tensor) -> None:
        """The user's code asks something of a tensor that its signature does not hold.

        Raises:
            CaptureError: the answer depends on gradients, which a recording does not follow.
        """
        frame = sys._getframe(2)  # whoever asks the function mode
        if not is_looked_at(frame):
            return
        numbers = {id(given): number for number, given in enumerate(self._arguments.tensors)}
        if id(tensor) in numbers:
            self._properties.append(Property(numbers[id(tensor)], what, read, read(tensor)))
        elif id(tensor) in self._state.tensors or self.name_of(tensor) in self.captured:
            self._state.probe(functools.partial(read, tensor), f"{what} of {self.name_of(tensor)!r}")
        elif what in ("requires_grad", "grad_fn", "is_leaf") and self._graded and self.name_of(tensor) in self._graded:
            raise CaptureError(
                f"the code asks for {what} of a tensor that it made ({self.modules.source()}): gradients are enabled, "
                "and a recording computes none. Call it under torch.no_grad()"
            )

    def reads(self, target: Op, args: Any, kwargs: Any, run: Callable[[], Any], what: str | None = None) -> Any:
        """Run a call whose result Python sees, under a guard where the result depends on data."""
        if not self.suspended and self.depends(f"what {what or target.name} gives Python", args):
            with self.suspend(), self.reads_of_code.elsewhere():
                expected = target.function(*args, **kwargs)
            self._append_guard(target, args, kwargs, expected)
        with self.reads_of_code.elsewhere():
            return run()

    def guard_shapes(self, result: Any) -> None:
        """Guard the shapes of tensors that an op has just made: they depend on data."""
        for tensor in flatten_outputs(result):
            self._append_guard(op("shape"), (tensor,), {}, tuple(tensor.shape))

    def _append_guard(self, target: Op, args: Any, kwargs: Any, expected: Any) -> None:
        guard = op(GUARD + target.name)
        inputs, attrs = pack(guard, args, {**kwargs, "expected": expected}, self.name_of)
        self._append(guard.name, inputs, (), attrs)

    # --- the end

    def alive(self) -> Any:
        """The tensors that ops made and the user still holds: one as it is, several as a tuple."""
        tensors = tuple(tensor for ref in self._made.values() if (tensor := ref()) is not None)
        for tensor in tensors:
            tensor._fix_weakref()  # type: ignore[attr-defined]
        found = tuple(map(self.exposures.original, tensors)) if self.exposures.adapters else tensors
        return found[0] if len(found) == 1 else found

    def undo(self) -> None:
        """Put back what recorded ops have written, if the recording is checked."""
        if self._check is not None:
            with torch.no_grad():
                self._check.rollback(random=True)

    def finish(self, output: Any, *, rollback: bool = False) -> RecordedGraph:
        """The immutable graph.

        Raises:
            CaptureError: there is no output, or a replay could not make it.
            UnrecordedWriteError: the replay differs from what the code did.
        """
        before = self._arguments.walk
        self.reads_of_code.finish()
        assigned, template, after = self._assigned(output)
        outputs = [after.tensors[number] for number in template.tensors]
        names = tuple(map(self.name_of, outputs))
        subgraph = SubGraph(
            nodes=tuple(self.nodes),
            input_names=(*self._signature.names, *self.captured),
            output_names=names,
            values=self.values,
        )
        self.result = subgraph
        changed = [*self._state.differences(), *self._attributes_set()]
        guarded = any(node.op_type.startswith(GUARD) for node in self.nodes)
        if (
            not names
            and not template.changes
            and not guarded
            and not assigned
            and not any(map(written_inputs, self.nodes))
        ):
            raise CaptureError(
                "the recording has no output: no op ran, or nothing it produced is still alive; "
                "call recording.output(y) inside the context"
            )
        verification = None
        if self._check is not None:
            self._check_replaced(changed)
            verification = self._check.check(subgraph, before.tensors, self.captured, outputs)
            if rollback:
                self._check.rollback(random=True)
            self._check = None  # it holds on to the memory of every weight
        kept = {name: tensor for name, tensor in self.captured.items() if name not in self._constants}
        guards = Guards(kept, self._state.entries, self.modules, changed)
        graph = RecordedGraph(
            subgraph,
            self._signature,
            template,
            self.captured,
            guards,
            verification,
            self._surroundings,
            [*self._properties, *self._held_elsewhere()],
            self._context,
            None if self._graded is None else frozenset(self._graded - {*self._signature.names, *self.captured}),
            assigned,
        )
        clash = graph.fit.misfit(before.tensors) or graph.fit.inside()
        if clash is not None:
            raise CaptureError(
                f"{clash.replace(', and the recorded ones did not', ' without sharing a storage')}, and "
                "the code writes: what it does depends on it. Make both from one tensor, or copy one"
            )
        self._finished = (graph, outputs)
        return graph

    def settled(self, output: Any) -> Any:
        """The output of the finished recording as a replay gives it: where gradients are enabled, tied to an error."""
        graph, outputs = self._finished
        if not torch.is_grad_enabled() or not any(graph.requiring):
            return output
        made = graph.template.build(tied(outputs, graph.requiring), self._arguments.objects)
        return made[0] if graph.rebindings else made

    def _attributes_set(self) -> Iterator[tuple[str, Any, Any]]:
        """The arguments on which the code has set attributes, which a replay would not."""
        before = self._arguments.walk.attributes
        for number, (name, tensor) in enumerate(zip(self._signature.names, self._arguments.tensors, strict=True)):
            known = before[number][0] if number in before else ()
            if tuple(attributes_of(tensor)) != known:
                yield f"the attributes of {name}", known, tuple(attributes_of(tensor))

    def _held_elsewhere(self) -> Iterator[Property]:
        """For arguments that the code also reaches by itself, or that share memory with such: which they are."""
        held = {id(tensor): tensor for tensor, _ in self._state.tensors.values()}
        held |= {id(tensor): tensor for tensor in self.captured.values()}
        strided = [tensor for tensor in held.values() if tensor.layout == torch.strided and not tensor.is_meta]
        storages = {storage_of(tensor) for tensor in strided}
        for number, tensor in enumerate(self._arguments.tensors):
            if id(tensor) in held or self.modules.owner_of(tensor) is not None:
                yield Property(number, "identity", itself, tensor)
            elif tensor.layout == torch.strided and not tensor.is_meta and storage_of(tensor) in storages:
                yield Property(number, "memory", place, place(tensor))

    def _assigned(self, output: Any) -> tuple[Sequence[Rebinding], ResultTemplate, Walk]:
        """What a replay assigns outside its arguments; the template of that and the output, and the walk over both."""
        before = self._arguments.walk
        found = list(zip(*rebindings(self._state.entries, self.reads_of_code.codes), strict=True))
        for chosen in (found, [pair for pair in found if pair[0].by is not None]):
            after = before.again()
            template = ResultTemplate.of((output, tuple(value for _, value in chosen)), before, after)
            try:
                self._check_closed(before, after)
            except CaptureError:  # a value that a replay could not make
                continue
            if chosen:
                assigned = tuple(rebinding for rebinding, _ in chosen)
                self._state.without([(id(rebinding.table), rebinding.name) for rebinding in assigned])
                return assigned, template, after
        after = before.again()
        template = ResultTemplate.of(output, before, after)
        self._check_closed(before, after)
        return (), template, after

    def _check_closed(self, before: Walk, after: Walk) -> None:
        for key, value in after.closed.items():
            if key not in before.closed and not isinstance(value, _STATELESS):
                raise CaptureError(
                    f"the output holds a {type(value).__name__}, which a replay could not renew. Return the tensors in "
                    "it, or leave it out"
                )

    def _freed(self) -> Collection[str]:
        """The captured tensors of other libraries that nobody holds any more."""
        return [name for name in self._lent if not self.exposures.stands(self.captured[name])]

    def _check_replaced(self, changed: Sequence[tuple[str, Any, Any]]) -> None:
        """Refuse code that lets go of a tensor that it read, or that uses up what no replay would.

        Raises:
            CaptureError: it does.
        """
        replaced = {id(before) for _, before, _ in changed if isinstance(before, torch.Tensor)}
        handles = (handle_of(before) for _, before, _ in changed) if self.exposures.adapters else ()
        replaced |= {id(self.exposures.get(handle)) for handle in handles if handle is not None}
        for name, tensor in self.captured.items():
            if name not in self._constants and (
                id(tensor) in replaced or orphaned(self.captured, name) or name in self._freed()
            ):
                user = next(node for node in self.nodes if name in node.inputs)
                raise CaptureError(
                    f"the captured tensor {name!r} {self.values[name]}, read at {user.source}, was replaced by the "
                    "code: the next call would read another one, a replay this one. Write in place (copy_), or pass "
                    "the object that holds it (a cache) to the recording as an input"
                )
        drawn = next((found[0] for entry in self._state.generators if (found := entry.difference())), None)
        if drawn is not None:
            raise CaptureError(
                f"the code draws from {drawn}: a replay would keep the first ones. Draw with torch (torch.rand), or "
                "pass the numbers in"
            )
