"""``graph-capture demo``: the whole path on a Llama, with every number checked."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from graph_capture import CompiledKernel, FusedGraph, FusionConfig, RecordedGraph, fuse, record
from graph_capture.cli import exchange
from graph_capture.cli.console import show_table
from graph_capture.ir.graph import SubGraph
from graph_capture.ir.numerics import distance
from graph_capture.ir.ops import FUSED

ROUNDS = 25  # of timing
# Two correct roundings of one forward differ by chance, and Triton's interpreter truncates where it stores bfloat16.
SLACK = {torch.float32: 1.25, torch.bfloat16: 1.5}


@dataclass(frozen=True)
class Shape:
    """The model and the prompt of the demo."""

    layers: int = 4
    hidden: int = 256
    intermediate: int = 688
    heads: int = 8
    kv_heads: int = 2
    vocab: int = 1024
    length: int = 16
    seed: int = 0


@dataclass
class DemoReport:
    """What the demo found; `ok` is its verdict."""

    shape: Shape
    checks: list[dict[str, Any]] = field(default_factory=list)
    receipts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)  # dtype -> how -> a forward pass
    exchange: exchange.Exchange | None = None

    @property
    def ok(self) -> bool:
        """Whether every check passed, and every answer is right."""
        checked = bool(self.checks) and all(check["ok"] for check in self.checks)
        return checked and (self.exchange is None or self.exchange.ok)

    def to_json(self) -> str:
        """Everything as one JSON object."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)


def build_model(shape: Shape) -> torch.nn.Module:
    """A Llama of this shape in float32, with random weights that follow the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(shape.seed)
    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=max(128, shape.length),
    )
    return LlamaForCausalLM(config).eval()


def run(
    shape: Shape,
    console: Console,
    *,
    kernel: str = "add_rms_norm",
    show_graph: bool = False,
    compare: bool = False,
    plot: str | None = None,
    talk: bool = True,
) -> DemoReport:
    """Run the demo, printing to `console`.

    Args:
        kernel: the kind of region whose kernel is shown.
        show_graph: also print the rewritten graph.
        compare: also time torch.compile.
        plot: a file for a bar chart of the times.
        talk: end with a few questions to the tiny model that comes with the package.

    Raises:
        ImportError: a plot is wanted and matplotlib is not installed.
    """
    if plot:
        import matplotlib.pyplot  # noqa: F401
    report = DemoReport(shape)
    with _step(console, "building the model"):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = build_model(shape).to(device)
    console.print(
        f"[bold]graph_capture[/bold]: a Llama of {shape.layers} layers, hidden size {shape.hidden}, "
        f"{shape.heads} heads over {shape.kv_heads} key/value heads, random weights, on {device.type}\n"
    )
    prompts = torch.Generator().manual_seed(shape.seed + 1)
    ids, other = (torch.randint(0, shape.vocab, (1, shape.length), generator=prompts).to(device) for _ in range(2))
    shown = False
    for dtype in SLACK:
        typed = copy.deepcopy(model).to(dtype)
        with _step(console, f"recording in {_short(dtype)}"):
            start = time.perf_counter()
            graph = _record(typed, ids)
            recorded_in = time.perf_counter() - start
        with _step(console, f"finding, compiling and timing the fusions in {_short(dtype)}"):
            start = time.perf_counter()
            fused = fuse(graph, FusionConfig(profile="measure"))
            fused_in = time.perf_counter() - start
        with _step(console, f"running every kernel in {_short(dtype)}"):
            forced = fuse(graph, FusionConfig(profile="always"))
            _check(report, model, typed, dtype, graph, fused, forced, other)
        report.receipts[_short(dtype)] = fused.explain().rows
        with _step(console, f"timing a forward pass in {_short(dtype)}"):
            report.seconds[_short(dtype)] = _seconds(typed, fused, other, compare)
        if not shown:
            _show_ops(console, graph, fused, recorded_in, fused_in)
            shown = True
        _show_receipts(console, fused, dtype)
        if dtype is torch.float32:
            _show_kernel(console, forced, kernel)
            if show_graph:
                console.print(str(fused), highlight=False, markup=False)
    _show_checks(console, report)
    _show_times(console, report)
    if talk:
        report.exchange = exchange.run(console)
    _show_verdict(console, report, fused)
    if plot:
        _plot(report, plot)
    return report


def _record(model: Any, ids: torch.Tensor) -> RecordedGraph:
    with record(input_ids=ids) as recording:
        recording.output(model(input_ids=ids, use_cache=False).logits)
    return recording.graph


def _forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _seconds(model: Any, fused: FusedGraph, ids: torch.Tensor, compare: bool) -> dict[str, float]:
    """A forward pass, in seconds: the median of rounds that take turns."""
    ways: dict[str, Callable[[], Any]] = {"eager": lambda: _forward(model, ids)}
    if compare:
        compiled = torch.compile(model)
        ways["torch.compile"] = lambda: _forward(compiled, ids)
    ways["graph_capture"] = lambda: fused(input_ids=ids)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    for _ in range(ROUNDS):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            if ids.is_cuda:
                torch.cuda.synchronize()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in samples.items()}


def _check(
    report: DemoReport,
    model: Any,
    typed: Any,
    dtype: torch.dtype,
    graph: RecordedGraph,
    fused: FusedGraph,
    forced: FusedGraph,
    ids: torch.Tensor,
) -> None:
    """Replay on a prompt that was not recorded, and compare with the same weights in float64."""
    exact = _forward(copy.deepcopy(typed).double(), ids)
    eager = _forward(typed, ids)
    error = distance(eager, exact)
    allowed = error * SLACK[dtype]
    unfused = graph.run(input_ids=ids)
    rows: list[tuple[str, float, bool]] = [
        ("eager", error, bool(eager.isfinite().all())),
        ("replay, unfused", distance(unfused, exact), torch.equal(unfused, eager)),
        ("replay, as decided", (decided := distance(fused(input_ids=ids), exact)), decided <= allowed),
        ("replay, every kernel", (every := distance(forced(input_ids=ids), exact)), every <= allowed),
    ]
    for name, value, ok in rows:
        report.checks.append({"dtype": _short(dtype), "what": name, "error": value, "ok": bool(ok)})
    kernels = forced.verify(input_ids=ids)
    worst = max((row["error_fused"] for row in kernels.rows), default=0.0)
    name = f"{len(kernels.rows)} kernels one by one"
    every_region = len(kernels.rows) == sum(region.kernel is not None for region in forced.regions) > 0
    report.checks.append({"dtype": _short(dtype), "what": name, "error": worst, "ok": kernels.ok and every_region})


# --- output


@contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    if console.quiet:
        yield
    else:
        with console.status(f"{what} ..."):
            yield


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _show_ops(console: Console, graph: RecordedGraph, fused: FusedGraph, recorded: float, took: float) -> None:
    before, after = _counts(graph.subgraph), _counts(fused.subgraph)
    table = Table("op", "recorded", "rewritten", title="ops by type", title_justify="left")
    names = sorted(before | after, key=lambda name: (not name.startswith(FUSED), -before[name] - after[name], name))
    for name in names[:18]:
        table.add_row(name, str(before[name] or ""), str(after[name] or ""))
    if len(names) > 18:
        rest = names[18:]
        table.add_row(f"{len(rest)} others", str(sum(before[n] for n in rest)), str(sum(after[n] for n in rest)))
    table.add_row("all", str(before.total()), str(after.total()), style="bold")
    show_table(table, console)
    console.print(f"recorded in {recorded:.2f} s; found, compiled and timed in {took:.2f} s\n")


def _counts(graph: SubGraph) -> Counter[str]:
    return Counter(node.op_type for node in graph.nodes)


def _show_receipts(console: Console, fused: FusedGraph, dtype: torch.dtype) -> None:
    table = fused.explain().table()
    table.title, table.title_justify = f"receipts, {_short(dtype)} (times are of one region)", "left"
    show_table(table, console)
    console.print()


def _show_kernel(console: Console, fused: FusedGraph, kind: str) -> None:
    region = next((region for region in fused.regions if region.kind == kind and region.source), None)
    if region is None:
        kinds = ", ".join(sorted({region.kind for region in fused.regions}))
        console.print(f"there is no kernel of kind {kind!r}; there are: {kinds}\n")
        return
    target = region.kernel.target.name if isinstance(region.kernel, CompiledKernel) else ""
    console.print(f"[italic]the kernel of {region.name} ({region.where or 'top level'}), target {target}[/italic]")
    language = "c" if target == "c" else "python"
    console.print(Syntax(region.source.strip(), language, theme="ansi_dark", background_color="default"))
    console.print()


def _show_checks(console: Console, report: DemoReport) -> None:
    title = "relative error against float64, on a prompt that was not recorded"
    table = Table("dtype", "what", "error", "", title=title, title_justify="left")
    for check in report.checks:
        verdict = "ok" if check["ok"] else "[bold red]OFF[/bold red]"
        if check["what"] == "replay, unfused" and check["ok"]:
            verdict = "bit-equal to eager"
        table.add_row(check["dtype"], check["what"], f"{check['error']:.2e}", verdict)
    show_table(table, console)


def _show_times(console: Console, report: DemoReport) -> None:
    table = Table("dtype", "what", "time", "against eager", title="one forward pass", title_justify="left")
    for dtype, ways in report.seconds.items():
        for name, seconds in ways.items():
            table.add_row(dtype, name, f"{seconds * 1e3:.2f} ms", f"{ways['eager'] / seconds:.2f} x")
    console.print()
    show_table(table, console)


def _plot(report: DemoReport, file: str) -> None:
    """The times of a forward pass as a bar chart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    names = list(next(iter(report.seconds.values())))
    for index, name in enumerate(names):
        places = [place + 0.8 * index / len(names) for place in range(len(report.seconds))]
        bars = axes.bar(places, [ways[name] * 1e3 for ways in report.seconds.values()], 0.75 / len(names), label=name)
        axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.set_xticks([place + 0.4 - 0.4 / len(names) for place in range(len(report.seconds))], list(report.seconds))
    axes.set_ylabel("milliseconds")
    shape = report.shape
    axes.set_title(f"one forward pass: Llama, {shape.layers} layers, hidden {shape.hidden}, {shape.length} tokens")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def _show_verdict(console: Console, report: DemoReport, fused: FusedGraph) -> None:
    if not report.ok:
        console.print("\n[bold red]Something is off; see above.[/bold red]")
        return
    used = sum(bool(region.decision) for region in fused.regions)
    kernels = sum(isinstance(region.kernel, CompiledKernel) for region in fused.regions)
    console.print(
        f"\nEvery number is right. {used} of {len(fused.regions)} regions are used: they measured faster than the "
        "recorded ops."
    )
    if not kernels:
        reason = next((region.decision.reason for region in fused.regions), "there are no regions")
        console.print(f"There are no kernels here, only calls of torch's own: {reason}.")
