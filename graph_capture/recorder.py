"""The recorder: runs the user's code as it is and writes down every op it calls.

Two torch modes do the work. The dispatch mode sees each ATen op after autograd and autocast; the function mode above it
keeps a few calls whole (`graph_capture.optable.SEMANTIC`). A tensor is known by identity, a memory by its storage,
both weakly: recording keeps no intermediate alive.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

from graph_capture.errors import CaptureError, DataDependentError
from graph_capture.graph import OpNode, SubGraph, TensorMeta
from graph_capture.ops import Op, flatten_outputs, is_random, op, op_of, pack, written_inputs
from graph_capture.optable import SEMANTIC
from graph_capture.recorded import RecordedGraph
from graph_capture.signature import InputSpec, OutputSpec
from graph_capture.source import ModulePaths, caller

_active = threading.local()
aten = torch.ops.aten

# Methods that hand a tensor's data to Python below the dispatcher.
_READS_DATA = {
    torch.Tensor.tolist: "tolist()",
    torch.Tensor.numpy: "numpy()",
    torch.Tensor.__array__: "numpy.asarray()",
}


class Recording:
    """What `record` yields. Call `output` inside the context; read `graph` after it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, keep_whole: bool = True) -> None:
        self._inputs, self._tensors = InputSpec.of(args, kwargs)
        self._keep_whole = keep_whole
        self._output: Any = None
        self._has_output = False
        self._graph: RecordedGraph | None = None
        self._writer: _Writer | None = None
        self._stack = contextlib.ExitStack()

    def output(self, value: Any) -> None:
        """Declare what `RecordedGraph.run` returns: any pytree of tensors and Python values.

        Raises:
            CaptureError: called outside the context, or twice.
        """
        if self._writer is None:
            raise CaptureError("recording.output() must be called inside the recording context")
        if self._has_output:
            raise CaptureError("recording.output() was called twice; pass all outputs at once, as a tuple or a dict")
        self._output, self._has_output = value, True

    @property
    def graph(self) -> RecordedGraph:
        """The recorded graph.

        Raises:
            CaptureError: the context has not ended, or ended with an exception.
        """
        if self._graph is None:
            raise CaptureError("there is no graph: the recording has not ended, or it ended with an exception")
        return self._graph

    def __enter__(self) -> Recording:
        if getattr(_active, "recording", None) is not None:
            raise CaptureError("a recording is already active in this thread; end it before you start another")
        writer = _Writer(self._inputs, self._tensors)
        with contextlib.ExitStack() as stack:
            if not torch.is_inference_mode_enabled():
                stack.enter_context(torch.no_grad())
            stack.enter_context(writer.modules)
            stack.enter_context(_DispatchMode(writer))
            if self._keep_whole:
                stack.enter_context(_FunctionMode(writer))
            self._stack = stack.pop_all()
        self._writer = writer
        _active.recording = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        writer, self._writer = self._writer, None
        _active.recording = None
        self._stack.close()
        assert writer is not None
        try:
            if error is None:
                self._graph = writer.finish(self._output if self._has_output else writer.alive())
        finally:
            self._output, self._tensors = None, {}


def record(*args: Any, **kwargs: Any) -> Recording:
    """Record every op called inside ``with record(...) as recording``.

    The arguments are example inputs: any pytree, positional and keyword. `RecordedGraph.run` later takes the same
    structure. A tensor used inside that is not one of them is captured by reference, like a weight.

    Raises (on entry or inside the context):
        CaptureError: a recording is already active in this thread; nothing was produced that could be an output.
        DataDependentError: the code reads a tensor's value into Python.
    """
    return Recording(args, kwargs)


def start_graph_recording(*args: Any, **kwargs: Any) -> None:
    """Begin a recording that `stop_graph_recording` ends; the arguments are those of `record`.

    Raises:
        CaptureError: a recording is already active in this thread.
    """
    record(*args, **kwargs).__enter__()


def stop_graph_recording() -> RecordedGraph:
    """End the recording that `start_graph_recording` began, and return its graph.

    Raises:
        CaptureError: no recording is active, or nothing was produced that could be an output.
    """
    recording = getattr(_active, "recording", None)
    if recording is None:
        raise CaptureError("no recording is active in this thread; call start_graph_recording() first")
    recording.__exit__(None, None, None)
    return recording.graph


class _Writer:
    """Turns calls into nodes: knows the name of every live tensor and the alias set of every live storage."""

    def __init__(self, inputs: InputSpec, tensors: dict[str, torch.Tensor]) -> None:
        self.modules = ModulePaths()
        self.inputs = inputs
        self.nodes: list[OpNode] = []
        self.values: dict[str, TensorMeta] = {}
        self.captured: dict[str, torch.Tensor] = {}
        self.suspended = False
        self._made: dict[int, TensorWeakRef] = {}  # tensors that ops made, in order
        self._names: dict[int, tuple[TensorWeakRef, str]] = {}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._views: dict[int, dict[torch.dtype, str]] = {}  # alias set -> a value in it, for each dtype
        self._counts: dict[str, int] = {}
        self._dynamic: set[int] = {-1}  # alias sets whose data depends on an input, a captured tensor or randomness
        for name, tensor in tensors.items():
            self._bind(tensor, self._fresh(name))
            self._dynamic.add(self._storage(tensor))

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

    def _bind(self, tensor: torch.Tensor, name: str) -> str:
        storage = self._storage(tensor)
        self._names[id(tensor)] = (TensorWeakRef(tensor), name)
        self.values[name] = TensorMeta.of(tensor, storage)
        if storage >= 0:
            self._views.setdefault(storage, {}).setdefault(tensor.dtype, name)
        return name

    def name_of(self, tensor: torch.Tensor) -> str:
        """The name of `tensor`; one never seen before is captured by reference."""
        known = self._names.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        views = self._views.get(self._storage(tensor), {})
        if views and not any(name in self.captured for name in views.values()):
            return self._view(tensor, views)
        wanted = self.modules.parameter_names.get(id(tensor), "const")
        name = self._bind(tensor, self._fresh(wanted))
        self.captured[name] = tensor
        self._dynamic.add(self._storage(tensor))
        return name

    def is_static(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's values follow from shapes and constants alone: reading them into Python is safe."""
        return self.values[self.name_of(tensor)].storage not in self._dynamic

    def _view(self, tensor: torch.Tensor, views: dict[torch.dtype, str]) -> str:
        """A tensor made below the dispatcher (``.data``) from memory that is recorded: a view of it."""
        if tensor.dtype not in views:
            raise CaptureError(
                f"a tensor of {tensor.dtype} shares memory with {next(iter(views.values()))!r} in a way that was not "
                f"recorded ({caller()}); use Tensor.view(dtype)"
            )
        target = op("aten.as_strided.default")
        attrs = {"size": tuple(tensor.shape), "stride": tensor.stride(), "storage_offset": tensor.storage_offset()}
        name = self._bind(tensor, self._fresh("as_strided"))
        self.nodes.append(OpNode(target.name, (views[tensor.dtype],), (name,), attrs, source=self.modules.source()))  # type: ignore[arg-type]
        return name

    # --- calls

    def call(self, target: Op, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        """Run one op and write it down."""
        inputs, attrs = pack(target, args, kwargs, self.name_of)
        result = run()
        outputs = flatten_outputs(result)
        if outputs or not target.returns_values:
            self.write(target, inputs, attrs, outputs)
        return result

    def write(self, target: Op, inputs: tuple[str, ...], attrs: Any, outputs: list[torch.Tensor]) -> None:
        """Append a node that produced `outputs`."""
        names = []
        for tensor in outputs:
            known = self._names.get(id(tensor))
            if known is None or known[0]() is not tensor:
                self._made.pop(id(tensor), None)
                self._made[id(tensor)] = TensorWeakRef(tensor)
            names.append(self._bind(tensor, self._fresh(short_name(target.name))))
        node = OpNode(target.name, inputs, tuple(names), attrs, source=self.modules.source())
        self.nodes.append(node)
        if is_random(node) or any(self.values[name].storage in self._dynamic for name in inputs):
            touched = (*names, *(inputs[position] for position in written_inputs(node)))
            self._dynamic.update(self.values[name].storage for name in touched)

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """``torch.tensor(...)``: every replay starts from a fresh copy, for the code may write into it."""
        name = self._fresh("const")
        kept = tensor.clone()
        self.captured[name] = kept
        self.values[name] = TensorMeta.of(kept, self._storage(kept))
        self.write(op("aten.lift_fresh_copy.default"), (name,), (), [tensor])
        return tensor

    def read(self, what: str, args: Any) -> None:
        """Python is about to see the values of the tensors in `args`.

        Raises:
            DataDependentError: they depend on more than shapes and constants.
        """
        tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if not all(map(self.is_static, tensors)):
            raise DataDependentError(
                f"{what}, at {self.modules.source()}. A replay would keep the recorded value for ever. "
                "Keep the decision on the device (torch.where, masks), or compute the value before the recording and "
                "pass it in."
            )

    # --- the end

    def alive(self) -> Any:
        """The tensors that ops made and the user still holds: one as it is, several as a tuple."""
        tensors = tuple(tensor for ref in self._made.values() if (tensor := ref()) is not None)
        return tensors[0] if len(tensors) == 1 else tensors

    def finish(self, output: Any) -> RecordedGraph:
        """The immutable graph."""
        outputs = OutputSpec.of(output, self.name_of)
        outputs.check_objects([leaf.value for leaf in self.inputs.leaves])
        subgraph = SubGraph(
            nodes=tuple(self.nodes),
            input_names=(*self.inputs.tensor_names, *self.captured),
            output_names=outputs.tensor_names,
            values=self.values,
        )
        if not subgraph.output_names and not any(map(written_inputs, self.nodes)):
            raise CaptureError(
                "the recording has no output: no op ran, or nothing it produced is still alive; "
                "call recording.output(y) inside the context"
            )
        return RecordedGraph(subgraph, self.inputs, outputs, self.captured)


class _DispatchMode(TorchDispatchMode):
    def __init__(self, writer: _Writer) -> None:
        super().__init__()
        self.writer = writer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.writer.suspended or not isinstance(func, torch._ops.OpOverload) or func.namespace == "profiler":
            return func(*args, **kwargs)
        if func is aten.lift_fresh.default:
            return self.writer.constant(args[0])
        if torch.Tag.data_dependent_output in func.tags:
            self.writer.read(f"{func} reads a tensor's value into Python", args)
            return func(*args, **kwargs)
        if torch.Tag.dynamic_output_shape in func.tags:
            self.writer.read(f"the shape of the result of {func} depends on a tensor's values", args)
        return self.writer.call(op_of(func), args, kwargs, lambda: func(*args, **kwargs))


class _FunctionMode(TorchFunctionMode):
    def __init__(self, writer: _Writer) -> None:
        super().__init__()
        self.writer = writer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS_DATA:
            self.writer.read(f"{_READS_DATA[func]} reads a tensor's values into Python", args)
        adapter = SEMANTIC.get(func)
        # Under autocast the casts belong to the context, not to the call: record what happens inside.
        if adapter is None or torch._C._is_any_autocast_enabled():
            return func(*args, **kwargs)
        call = adapter(*args, **kwargs)
        if call is None:
            return func(*args, **kwargs)
        name, arguments = call
        return self.writer.call(op(name), arguments, {}, lambda: self._whole(func, args, kwargs))

    def _whole(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.writer.suspended = True
        try:
            return func(*args, **kwargs)
        finally:
            self.writer.suspended = False


def short_name(op_type: str) -> str:
    """``aten.index_copy_.default`` -> ``index_copy_``; the stem for value names."""
    parts = op_type.split(".")
    return re.sub(r"\W", "_", parts[1] if len(parts) == 3 else parts[0])
