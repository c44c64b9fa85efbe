"""Turns calls into nodes: knows the name of every live tensor and the alias set of every live storage.

A tensor is known by identity, a memory by its storage, both weakly: recording keeps no intermediate alive.
"""

from __future__ import annotations

import contextlib
import functools
import re
import types
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from graph_capture.calls.foreign import meets
from graph_capture.calls.signature import Call, Signature, Surroundings
from graph_capture.calls.structure import ResultTemplate, Walk
from graph_capture.errors import CaptureError, DataDependentError
from graph_capture.ir.binding import flatten_outputs, pack
from graph_capture.ir.effects import is_random, written_inputs
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.layouts import like
from graph_capture.ir.op_table import external
from graph_capture.ir.ops import EXTERNAL, GUARD, Kind, Op, op
from graph_capture.ir.printing import format_node
from graph_capture.ir.values import TensorMeta
from graph_capture.record.check import RecordingCheck, orphaned
from graph_capture.record.guards import Guards
from graph_capture.record.recorded import RecordedGraph
from graph_capture.record.source import ModulePaths, caller

_STATELESS = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, torch.nn.Module)


class GraphBuilder:
    """One recording in progress.

    Attributes:
        modules: where the user's code is.
        nodes, values, captured: what has been recorded so far.
        suspended: while true, calls run unrecorded.
        result: the graph, once the recording has ended.
        metadata_only: while true, calls are recorded but do not run: what they would read is not there yet.
    """

    def __init__(self, args: Any, kwargs: Any, surroundings: Surroundings | None, *, guard: bool, verify: bool) -> None:
        self.modules = ModulePaths()
        self.nodes: list[OpNode] = []
        self.values: dict[str, TensorMeta] = {}
        self.captured: dict[str, torch.Tensor] = {}
        self.suspended = False
        self.metadata_only = False
        self.result: SubGraph | None = None
        self._arguments = Call(args, kwargs, surroundings)
        self._surroundings = surroundings
        self._signature = Signature(self._arguments)
        self._guard = guard
        self._check = RecordingCheck() if verify else None
        self._constants: set[str] = set()
        self._lent: set[str] = set()  # captured tensors that stand for another library's
        self._made: dict[int, weakref.ref[torch.Tensor]] = {}  # tensors that ops made, in order
        self._names: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._views: dict[int, dict[torch.dtype, str]] = {}  # alias set -> a value in it, for each dtype
        self._counts: dict[str, int] = {}
        self._dynamic: set[int] = {-1}  # alias sets whose data depends on an input, a captured tensor or randomness
        self.exposures = self._arguments.walk.exposures
        for name, tensor in zip(self._signature.names, self._arguments.tensors, strict=True):
            self._outside(tensor, self._fresh(name))
        self.exposures.others = lambda: (*self._arguments.tensors, *self.captured.values())

    # --- names

    def _fresh(self, base: str) -> str:
        count = self._counts.get(base, 0)
        self._counts[base] = count + 1
        name = f"{base}_{count}" if count else base
        return name if name not in self.values else self._fresh(base)

    def _storage(self, tensor: torch.Tensor) -> int:
        if tensor.layout != torch.strided:
            return -1
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is not None:  # the weak reference pins the address: a freed storage is never taken for a new one
            return known[1]
        index = len(self._storages)
        self._storages[storage._cdata] = (StorageWeakRef(storage), index)
        return index

    def _bind(self, tensor: torch.Tensor, name: str) -> int:
        """Give `tensor` this name; returns its alias set."""
        storage = self._storage(tensor)
        self._names[id(tensor)] = (weakref.ref(tensor), name)
        self.values[name] = TensorMeta.of(tensor, storage)
        if storage >= 0:
            self._views.setdefault(storage, {}).setdefault(tensor.dtype, name)
        return storage

    def _outside(self, tensor: torch.Tensor, name: str) -> None:
        """Bind a tensor that exists outside the recording.

        Raises:
            CaptureError: it is a subclass whose ops torch does not run as ATen ops on plain memory.
        """
        if type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            raise CaptureError(
                f"{name!r} is a {type(tensor).__name__}, whose ops do not run on plain memory; unwrap it before the "
                f"recording ({self.modules.source()})"
            )
        if tensor.layout == torch.strided and storage_of(tensor) not in self._storages and tensor.numel():
            self._check_apart(tensor, name)
        storage = self._bind(tensor, name)
        self._dynamic.add(storage)
        if self._check is not None:
            with self.suspend():
                self._check.sees(name, tensor, storage)

    def _check_apart(self, tensor: torch.Tensor, name: str) -> None:
        """Refuse a tensor of torch's that lies in memory which stands for another library's by another storage."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        for known in self.exposures:
            other = known.untyped_storage()
            if other._cdata != storage._cdata and meets(known, start, start + storage.nbytes()):
                raise CaptureError(
                    f"{name!r} shares memory with a tensor of another library in a way that the recording does not "
                    f"see ({self.modules.source()}); pass both to the recording as inputs"
                )

    def adopt(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Let `tensor` stand for the recorded `value` from now on: it holds the same elements, with the same layout."""
        name, storage = self.name_of(value), tensor.untyped_storage()
        self._storages[storage._cdata] = (StorageWeakRef(storage), self._storage(value))
        self._names[id(tensor)] = (weakref.ref(tensor), name)
        self._made.pop(id(tensor), None)
        self._made[id(tensor)] = weakref.ref(tensor)

    def unwatched(self) -> None:
        """Give up the check at the end: what the code computes is not there yet when it ends."""
        self._check = None

    def live(self) -> Iterator[torch.Tensor]:
        """The tensors with a name that somebody holds."""
        return (tensor for ref, _ in tuple(self._names.values()) if (tensor := ref()) is not None)

    def name_of(self, tensor: torch.Tensor) -> str:
        """The name of `tensor`; one never seen before is captured by reference."""
        known = self._names.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        owner = self.modules.owner_of(tensor)
        views = self._views.get(self._storage(tensor), {})
        if views and owner is None:
            return self._view(tensor, views)
        name = self._fresh(owner.path if owner else "const")
        self.captured[name] = tensor
        if self.exposures.stands(tensor) and not tensor.untyped_storage().resizable():  # else it is torch's memory
            self._lent.add(name)
        self._outside(tensor, name)
        return name

    def _view(self, tensor: torch.Tensor, views: dict[torch.dtype, str]) -> str:
        """A tensor made below the dispatcher (``.data``) from memory that is recorded: a view of it."""
        if tensor.dtype not in views:
            raise CaptureError(
                f"a tensor of {tensor.dtype} shares memory with {next(iter(views.values()))!r} in a way that was not "
                f"recorded ({caller()}); use Tensor.view(dtype)"
            )
        attrs = {"size": tuple(tensor.shape), "stride": tensor.stride(), "storage_offset": tensor.storage_offset()}
        name = self._fresh("as_strided")
        self._bind(tensor, name)
        self._append("aten.as_strided.default", (views[tensor.dtype],), (name,), attrs)
        return name

    def replaces_memory(self, tensor: torch.Tensor) -> None:
        """``tensor.data = ...`` is about to run.

        Raises:
            CaptureError: the tensor exists outside the recording, and a replay would leave it as it is.
        """
        known = self._names.pop(id(tensor), None)
        outside = known is not None and (known[1] in self.captured or known[1] in self._signature.names)
        if outside or self.modules.owner_of(tensor) is not None:
            raise CaptureError(
                f"the code replaces the memory of a tensor that exists outside it (.data = ..., "
                f"{self.modules.source()}): a replay would not; write in place (copy_)"
            )

    # --- calls

    def call(self, target: Op, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        """Run one op and write it down."""
        inputs, attrs = pack(target, args, kwargs, self.name_of)
        if self._check is not None:
            self._announce(target, inputs, attrs)
        result = shaped(target, args, kwargs, run) if self.metadata_only else run()
        outputs = flatten_outputs(result)
        if outputs or not target.returns_values:
            self._write(target, inputs, attrs, outputs)
        return result

    def external(self, kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run a kernel that torch does not know and write it down as one op that may write every tensor it got."""
        with self.suspend():
            self.call(op(EXTERNAL), (kernel, args, tuple(kwargs.items())), {}, lambda: external(kernel, args, kwargs))

    def _announce(self, target: Op, inputs: tuple[str, ...], attrs: Any) -> None:
        """Tell the check what this call is about to write and draw."""
        assert self._check is not None
        for name, value in attrs:
            if name == "generator":
                self._check.draws(value)
        if target.may_write:
            node = OpNode(target.name, inputs, (), attrs)
            with self.suspend():
                for position in written_inputs(node):
                    self._check.before_write(self.values[inputs[position]].storage)

    def _append(self, op_type: str, inputs: tuple[str, ...], outputs: tuple[str, ...], attrs: Any = ()) -> OpNode:
        node = OpNode(op_type, inputs, outputs, attrs, source=self.modules.source())
        self.nodes.append(node)
        return node

    def _write(self, target: Op, inputs: tuple[str, ...], attrs: Any, outputs: list[torch.Tensor]) -> None:
        """Append a node that produced `outputs`."""
        names = []
        stem = short_name(target.name)
        for tensor in outputs:
            known = self._names.get(id(tensor))
            if known is None or known[0]() is not tensor:
                self._made.pop(id(tensor), None)
                self._made[id(tensor)] = weakref.ref(tensor)
            name = self._fresh(stem)
            self._bind(tensor, name)
            names.append(name)
        node = self._append(target.name, inputs, tuple(names), attrs)
        if is_random(node) or any(self.values[name].storage in self._dynamic for name in inputs):
            touched = (*names, *(inputs[position] for position in written_inputs(node)))
            self._dynamic.update(self.values[name].storage for name in touched)

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

    def reads(self, target: Op, args: Any, kwargs: Any, run: Callable[[], Any], what: str | None = None) -> Any:
        """Run a call whose result Python sees, under a guard where the result depends on data."""
        if not self.suspended and self.depends(f"what {what or target.name} gives Python", args):
            with self.suspend():
                expected = target.function(*args, **kwargs)
            self._append_guard(target, args, kwargs, expected)
        return run()

    def guard_shapes(self, result: Any) -> None:
        """Guard the shapes of tensors that an op has just made: they depend on data."""
        for tensor in flatten_outputs(result):
            self._append_guard(op("shape"), (tensor,), {}, tuple(tensor.shape))

    def _append_guard(self, target: Op, args: Any, kwargs: Any, expected: Any) -> None:
        guard = op(GUARD + target.name)
        inputs, attrs = pack(guard, args, {**kwargs, "expected": expected}, self.name_of)
        self._append(guard.name, inputs, (), attrs)

    @contextlib.contextmanager
    def suspend(self) -> Iterator[None]:
        """Run calls unrecorded."""
        before, self.suspended = self.suspended, True
        try:
            with torch._C._DisableTorchDispatch():
                yield
        finally:
            self.suspended = before

    # --- the end

    def alive(self) -> Any:
        """The tensors that ops made and the user still holds: one as it is, several as a tuple."""
        tensors = tuple(tensor for ref in self._made.values() if (tensor := ref()) is not None)
        for tensor in tensors:
            tensor._fix_weakref()  # type: ignore[attr-defined]
        found = tuple(map(self.exposures.original, tensors)) if self.exposures.adapters else tensors
        return found[0] if len(found) == 1 else found

    def finish(self, output: Any, *, rollback: bool = False) -> RecordedGraph:
        """The immutable graph.

        Raises:
            CaptureError: there is no output, or a replay could not make it.
            UnrecordedWriteError: the replay differs from what the code did.
        """
        before = self._arguments.walk
        after = before.again()
        template = ResultTemplate.of(output, before, after)
        self._check_closed(before, after)
        outputs = [after.tensors[number] for number in template.tensors]
        names = tuple(map(self.name_of, outputs))
        subgraph = SubGraph(
            nodes=tuple(self.nodes),
            input_names=(*self._signature.names, *self.captured),
            output_names=names,
            values=self.values,
        )
        self.result = subgraph
        guarded = any(node.op_type.startswith(GUARD) for node in self.nodes)
        if not names and not template.changes and not guarded and not any(map(written_inputs, self.nodes)):
            raise CaptureError(
                "the recording has no output: no op ran, or nothing it produced is still alive; "
                "call recording.output(y) inside the context"
            )
        verification = None
        if self._check is not None:
            self._check_replaced()
            verification = self._check.check(subgraph, before.tensors, self.captured, outputs)
            if rollback:
                self._check.rollback(random=True)
            self._check = None  # it holds on to the memory of every weight
        guards = Guards(self.modules, {k: v for k, v in self.captured.items() if k not in self._constants})
        return RecordedGraph(
            subgraph, self._signature, template, self.captured, guards, verification, self._surroundings
        )

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

    def _check_replaced(self) -> None:
        for name in self.captured:
            if name not in self._constants and (orphaned(self.captured, name) or name in self._freed()):
                user = next(node for node in self.nodes if name in node.inputs)
                raise CaptureError(
                    f"the captured tensor {name!r} {self.values[name]}, read at {user.source}, was replaced by the "
                    "code: the next call would read another one, a replay this one. Write in place (copy_), or pass "
                    "the object that holds it (a cache) to the recording as an input"
                )


def storage_of(tensor: torch.Tensor) -> int:
    """What identifies a tensor's storage while that lives."""
    return tensor.untyped_storage()._cdata


def shaped(target: Op, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
    """What a call would give, without running it: uninitialised memory, or views of what there is."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if target.kind is Kind.VIEW or not leaves:
        return run()
    if target.may_write:
        return args[0] if target.returns_values else None
    with torch._C._DisableTorchDispatch():
        given = pytree.tree_map_only(torch.Tensor, lambda tensor: like(tensor, "meta"), (args, kwargs))
        made = target.function(*given[0], **given[1])
        return pytree.tree_map_only(torch.Tensor, lambda tensor: like(tensor, leaves[0].device), made)


@functools.cache
def short_name(op_type: str) -> str:
    """``aten.index_copy_.default`` -> ``index_copy_``; the stem for value names."""
    parts = op_type.split(".")
    return re.sub(r"\W", "_", parts[1] if len(parts) == 3 else parts[0])
