"""A torch.fx graph run node by node, each at the module and the line of the code that the graph was traced from."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from graph_capture.errors import CaptureError
from graph_capture.ir.values import Source
from graph_capture.record.recorded import RecordedGraph
from graph_capture.record.recorder import current_writer, record
from graph_capture.record.source import Owner, is_user_file

_HELD = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")
_ROOT = re.compile(r"^(?:[LG]\['\w+'\]|L__\w+?__)\.?")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def path_of(name: str) -> str:
    """A module or a tensor as torch.compile or torch.export names it (``L['self']._modules['mlp']``), as a path."""
    flat = _HELD.sub(r".\1", name)
    return re.sub(r"[^\w.]+", "_", _ROOT.sub("", flat)).strip("_.")


def source_of(node: torch.fx.Node) -> Source:
    """Where the code was that became `node`: module path, file and line, as far as the graph says."""
    stack = [*(node.meta.get("nn_module_stack") or {}).values()]
    frames = [at for at in _FRAME.findall(node.meta.get("stack_trace") or "") if is_user_file(at[0])]
    file, line = frames[-1] if frames else ("", 0)
    return Source(path_of(str(stack[-1][0])) if stack else "", file, int(line))


class FxRun(torch.fx.Interpreter):
    """One run of an FX graph, recorded if a recording is active.

    Args:
        module: the graph.
        held: tensors among the arguments that a recording captures by reference, by name. Whoever replays it keeps
            this dict as it is.

    Attributes:
        node: the one that runs; after an error, the one that failed.
    """

    def __init__(self, module: torch.fx.GraphModule, held: Mapping[str, torch.Tensor] | None = None) -> None:
        super().__init__(module)
        self.node: torch.fx.Node | None = None
        self._writer = current_writer()
        if self._writer is not None:
            table = dict(held or {})
            for name, tensor in table.items():
                self._writer.modules.owners[id(tensor)] = Owner(table, name, name, weakref.ref(tensor))

    def run_node(self, node: torch.fx.Node) -> Any:
        """Run one node."""
        self.node = node
        if self._writer is None:
            return super().run_node(node)
        self._writer.modules.at = source_of(node)
        try:
            return super().run_node(node)
        finally:
            self._writer.modules.at = None

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A number that torch.compile passes as a tensor may come as itself."""
        return args[0] if target == "item" and isinstance(args[0], float) else super().call_method(target, args, kwargs)


def record_fx(
    program: torch.fx.GraphModule | ExportedProgram,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> RecordedGraph:
    """Record an FX graph on example inputs (default: those that an exported program was made with).

    Raises:
        CaptureError: there are no example inputs; or as `record`.
    """
    if isinstance(program, ExportedProgram):
        if args is None and kwargs is None and program.example_inputs is not None:
            args, kwargs = program.example_inputs
        module: Any = program.module()
    else:
        module = program
    if args is None and kwargs is None:
        raise CaptureError("an FX graph is recorded by running it: give example inputs, fuse(graph, args=(x,))")
    given, named = args or (), dict(kwargs or {})
    with record(*given, **named) as recording:
        writer = current_writer()
        assert writer is not None
        writer.modules.enter(module)
        recording.output(_run(module, given, named))
        writer.modules.leave(module)
    return recording.graph


def _run(module: torch.fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    codegen = module.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        spec = codegen.pytree_info.in_spec
        if spec is not None and spec.num_children == 2 and kwargs:
            order = spec.child(1).context
            kwargs = {name: kwargs[name] for name in order}
        result = FxRun(module).run(*pytree.tree_leaves((args, kwargs)), enable_io_processing=False)
        return module.graph.process_outputs(result)
    places = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    return FxRun(module).run(*args, *(kwargs[name] for name in places[len(args) :] if name in kwargs))
