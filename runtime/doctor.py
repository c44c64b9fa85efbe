"""`doctor`: the ways to run a model side by side, each against float64, and the first op after which one is off."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graph_capture.errors import CaptureError
from graph_capture.ir.numerics import MULTIPLE, ROUNDINGS, SAME, distance, in_float64, rounding
from graph_capture.log import log
from graph_capture.record.fx import source_of
from graph_capture.record.recorded import RecordedGraph
from graph_capture.record.recorder import record
from graph_capture.runtime.account.misses import near_misses
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.fuse import fuse
from graph_capture.runtime.fused import FusedGraph

RUNS = 3  # of each way, to learn how much it differs from run to run
LUCK = 4  # how many times eager's own error a way may have
Run = Callable[..., Any]
Backend = Callable[[torch.fx.GraphModule, Sequence[Any]], Run]


@dataclass(frozen=True)
class Finding:
    """One way to run the model.

    Attributes:
        way: its name.
        error: the relative L2 distance to float64, the largest over the outputs of both calls that were made.
        noise: the largest distance between two runs on the same data.
        ok: whether it is as close as eager is, up to rounding and noise.
        first: the first op after which it leaves its tolerance: name, module, file and line.
        ties: choices (the largest along the last dimension) that differ from eager's, between candidates that lie
            within rounding.
        choices: those that differ by more.
        failed: what it raised.
    """

    way: str
    error: float = 0.0
    noise: float = 0.0
    ok: bool = True
    first: str = ""
    ties: int = 0
    choices: int = 0
    failed: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The outcome of `doctor`.

    Attributes:
        findings: one for each way.
        not_fused: what was found and not fused, with reasons.
        in_float64: whether the ops run in float64; else errors are distances to eager.
    """

    findings: list[Finding]
    not_fused: list[str] = field(default_factory=list)
    in_float64: bool = True

    @property
    def ok(self) -> bool:
        """Whether every way is right."""
        return all(finding.ok for finding in self.findings)

    def to_json(self) -> str:
        """All of it as one JSON object; distances that are not finite as null."""
        rows = [
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in row.items()
            }
            for row in map(asdict, self.findings)
        ]
        return json.dumps(
            {"ok": self.ok, "in_float64": self.in_float64, "ways": rows, "not_fused": self.not_fused}, indent=2
        )

    def __str__(self) -> str:
        lines = [f"{'way':<16} {'error':>9} {'noise':>9}  verdict"]
        for row in self.findings:
            verdict = "ok" if row.ok else f"OFF: {row.failed or row.first or 'no op by itself is off'}"
            if row.ties or row.choices:
                verdict += f"; choices that differ: {row.ties} near ties, {row.choices} by more than rounding"
            lines.append(f"{row.way:<16} {row.error:>9.2e} {row.noise:>9.2e}  {verdict}")
        if not self.in_float64:
            lines.append("an op does not run in float64: errors are distances to eager")
        return "\n".join([*lines, *(f"not fused: {line}" for line in self.not_fused)])


def doctor(
    model: Any,
    inputs: Any,
    *,
    config: FusionConfig | None = None,
    backends: Mapping[str, str | Backend] | None = None,
) -> Diagnosis:
    """Run a model in several ways on the same data, and say which is off, by how much, and since which op.

    The ways: eager (float64 is what all are compared with), torch.compile with each of `backends`, CUDA graphs
    where the model is on a GPU, ours as recorded and ours fused. Each is called on other data first, then on `inputs`,
    so that a result which is kept from an earlier call shows. Of a way that is off, torch.compile's graphs are compiled
    cut short, to find the first op; of ours `FusedGraph.bisect` says the pass or region. Parameters and buffers are
    left as they were.

    Args:
        model: a module, in evaluation mode, or a function.
        inputs: a tuple of positional or a dict of keyword arguments, or one argument.
        config: how ours is fused.
        backends: name -> a backend as torch.compile takes it (default: inductor).

    Raises:
        CaptureError: the model itself fails on `inputs`.
    """
    return _Examination(
        model, inputs, config or FusionConfig(), {"torch.compile": "inductor"} if backends is None else backends
    ).findings()


class _Examination:
    def __init__(self, model: Any, inputs: Any, config: FusionConfig, backends: Mapping[str, str | Backend]) -> None:
        self.model, self.config, self.backends = model, config, backends
        self.args, self.kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (_tuple(inputs), {})
        tensors = [*model.parameters(), *model.buffers()] if isinstance(model, torch.nn.Module) else []
        self.state = [(tensor, tensor.detach().clone()) for tensor in tensors]
        narrow = [leaf.dtype for leaf in [*tensors, *_tensors(inputs)] if leaf.dtype.is_floating_point]
        self.unit = max(map(rounding, narrow), default=rounding(torch.float32))

    def findings(self) -> Diagnosis:
        try:
            self.eager = self.run(self.model)
            self.again = [self.run(self.model) for _ in range(RUNS - 1)]
        except Exception as error:
            raise CaptureError(f"the model itself fails on these inputs: {type(error).__name__}: {error}") from error
        graph: RecordedGraph | CaptureError
        try:
            graph = self._recorded()
            exact = self._exact(graph)
        except CaptureError as error:
            graph, exact = error, None
        self.exact = self.eager if exact is None else exact
        found = [self._finding("eager", self.model)]
        for name, backend in self.backends.items():
            torch._dynamo.reset()
            found.append(self._finding(name, self._compiled(backend), partial(self._first, backend)))
        fused = None
        if any(tensor.is_cuda for tensor in [*_tensors((self.args, self.kwargs))]):
            torch._dynamo.reset()
            found.append(self._finding("CUDA graphs", self._compiled("cudagraphs")))
        for name, config in (("ours, unfused", FusionConfig(enable_fusion=False)), ("ours, fused", self.config)):
            if isinstance(graph, CaptureError):
                found.append(Finding(name, math.inf, ok=False, failed=f"{type(graph).__name__}: {graph}"))
                continue
            fused = fuse(graph, config)
            found.append(self._finding(name, fused, partial(self._first_of_ours, fused)))
        return Diagnosis(found, self._not_fused(fused), exact is not None)

    def _compiled(self, backend: str | Backend) -> Run:
        """The model compiled; within a function, for torch.compile would set attributes on a module."""
        model = self.model
        return torch.compile(lambda *args, **kwargs: model(*args, **kwargs), backend=backend)

    def run(self, way: Run, other: bool = False) -> list[torch.Tensor]:
        """The floats and integers that a call gives, from the state before; `other` data: each tensor turned round."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        if other:
            args, kwargs = pytree.tree_map_only(torch.Tensor, _turned, (args, kwargs))
        try:
            with torch.no_grad():
                return [tensor.detach().clone() for tensor in _tensors(way(*args, **kwargs))]
        finally:
            for tensor, before in self.state:
                tensor.data.copy_(before)

    def _exact(self, recorded: RecordedGraph) -> list[torch.Tensor] | None:
        """The results in float64; None where an op does not run in it."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))

        def wide(dynamic: Sequence[torch.Tensor], static: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return in_float64(recorded.subgraph, [*dynamic, *static])

        try:
            with torch.no_grad():
                return _tensors(recorded.replay(recorded.bind(args, kwargs), wide))
        except Exception as error:
            log.info("%s: %s; errors are distances to eager", type(error).__name__, error)
            return None

    def _finding(self, name: str, way: Run, locate: Callable[[], str] | None = None) -> Finding:
        try:
            self.run(way, other=True)
            results = [self.run(way) for _ in range(RUNS)]
        except Exception as error:
            return Finding(name, math.inf, ok=False, failed=f"{type(error).__name__}: {str(error)[:300]}")
        if [(t.shape, t.dtype) for t in results[0]] != [(t.shape, t.dtype) for t in self.eager]:
            return Finding(name, math.inf, ok=False, first=locate() if locate else "")
        noise = max(_apart(results[0], run) for run in results[1:])
        base = max(_apart(self.eager, run) for run in self.again)
        ok, ties, choices, worst = True, 0, 0, 0.0
        for eager, exact, *ours in zip(self.eager, self.exact, *results, strict=True):
            if not eager.dtype.is_floating_point:
                continue
            off_by = max(distance(tensor, exact) for tensor in ours)
            worst = max(worst, off_by)
            allowed = max(LUCK * distance(eager, exact), SAME * self.unit) + MULTIPLE * base
            ok &= off_by <= allowed and noise <= allowed
            near, far = _choices(eager, ours[-1], allowed)
            ties, choices = ties + near, choices + far
        noisy = noise > MULTIPLE * base + SAME * self.unit
        off = not ok or noisy
        return Finding(name, worst, noise, not off, locate() if off and locate else "", ties, choices)

    def _recorded(self) -> RecordedGraph:
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        with torch.no_grad(), record(*args, **kwargs, data_dependent="guard") as recording:
            recording.output(self.model(*args, **kwargs))
        for tensor, before in self.state:
            tensor.data.copy_(before)
        return recording.graph

    def _first_of_ours(self, fused: FusedGraph) -> str:
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        with torch.no_grad():
            found = fused.bisect(*args, tolerance=LUCK * SAME * self.unit, **kwargs)
        region = next((region for region in fused.regions if region.name == found.culprit), None)
        if region is None:
            return f"the pass {found.culprit}" if found.culprit else ""
        return f"{region.name}: {', '.join(n.op_type for n in region.nodes)} ({region.nodes[0].source})"

    def _not_fused(self, fused: FusedGraph | None) -> list[str]:
        if fused is None:
            return []
        kinds = dict.fromkeys([r.rule for r in fused.receipts if r.refused and not r.spelling])
        kinds |= dict.fromkeys(region.kind for region in fused.regions if not region.decision)
        return [line for kind in kinds for line in near_misses(fused, kind)]

    # --- the first op after which torch.compile is off

    def _first(self, backend: str | Backend) -> str:
        compile_graph: Any = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        graphs: list[tuple[torch.fx.GraphModule, list[Any]]] = []

        def keep(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Run:
            def call(*args: Any) -> Any:
                graphs.append((module, [_copied(given) for given in args]))
                return module(*args)

            return call

        torch._dynamo.reset()
        self.run(self._compiled(keep))
        for module, args in graphs:
            nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
            if not nodes or not self._leaves(compile_graph, module, nodes, len(nodes), args):
                continue
            good, bad = 0, len(nodes)
            while bad - good > 1:
                middle = (good + bad) // 2
                good, bad = (
                    (good, middle) if self._leaves(compile_graph, module, nodes, middle, args) else (middle, bad)
                )
            node = nodes[bad - 1]
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            return f"{node.name} = {name} ({source_of(node)})"
        return ""

    def _leaves(self, compile_graph: Any, module: Any, nodes: list[torch.fx.Node], count: int, args: list[Any]) -> bool:
        """Whether the first `count` nodes, compiled, give something else than run one by one; on other data first."""
        cut = _cut(module, nodes[:count])
        want = _tensors((cut(*(mine := [*map(_copied, args)])), mine))
        try:
            compiled = compile_graph(_cut(module, nodes[:count]), [*map(_copied, args)])
            compiled(*[_turned(_copied(x)) if _is_data(x) else _copied(x) for x in args])
            runs = []
            for _ in range(RUNS):
                with torch.no_grad():
                    runs.append(_tensors((compiled(*(mine := [*map(_copied, args)])), mine)))
        except Exception:
            return True
        for got in runs:
            if [(t.shape, t.dtype) for t in got] != [(t.shape, t.dtype) for t in want]:
                return True
            for left, right in zip(got, want, strict=True):
                narrow = max(self.unit, rounding(right.dtype))
                if distance(left, right) > (SAME * narrow if right.dtype.is_floating_point else 0.0):
                    return True
        return False


def _cut(module: torch.fx.GraphModule, nodes: Sequence[torch.fx.Node]) -> torch.fx.GraphModule:
    """The graph up to the last of `nodes`, which gives its value and those that are still needed."""
    kept, graph = set(nodes), torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr") or node in kept:
            values[node] = graph.node_copy(node, values.__getitem__)
    needed = [n for n in nodes if n is nodes[-1] or any(user not in kept for user in n.users)]
    graph.output(tuple(values[node] for node in needed))
    return torch.fx.GraphModule(module, graph)


def _choices(eager: torch.Tensor, ours: torch.Tensor, allowed: float) -> tuple[int, int]:
    """How many of the largest along the last dimension are others than in eager: by rounding, and by more."""
    if eager.dim() < 2 or not eager.numel():
        return 0, 0
    left, right = eager.argmax(-1, keepdim=True), ours.argmax(-1, keepdim=True)
    margin = (eager.gather(-1, left) - eager.gather(-1, right)).double()
    near = margin <= max(allowed, ROUNDINGS * rounding(eager.dtype)) * eager.double().abs().amax(-1, keepdim=True)
    other = left != right
    return int((other & near).sum()), int((other & ~near).sum())


def _apart(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    return max((distance(a, b) for a, b in zip(left, right, strict=True)), default=0.0)


def _tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _copied(given: Any) -> Any:
    return given.detach().clone() if _is_data(given) else given


def _is_data(given: Any) -> bool:
    return isinstance(given, torch.Tensor) and not isinstance(given, torch.nn.Parameter)


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flip(tuple(range(tensor.dim()))) if tensor.dim() else tensor
