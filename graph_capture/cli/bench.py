"""``graph-capture bench``: a model end to end, the ways of running it side by side in one run.

Eager is transformers as it comes, with a growing cache. torch.compile has a static cache and the choice of the token in
the compiled step, on CUDA with ``mode="reduce-overhead"``. Ours is the engine, without and with fusion.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

import graph_capture
from graph_capture import CaptureError
from graph_capture.cli.ways import COMPILED, EAGER, FUSED, UNFUSED, WAYS, Ours, Setting, Way, make
from graph_capture.runtime.account.explain import format_bytes

Progress = Callable[[str], None]


NONE = "not measured"


@dataclass
class BenchRow:
    """One way. Seconds, tokens a second, bytes; None where it was not measured.

    Attributes:
        first_token: from the prompt to its first token, on the host.
        decode_p50, decode_p99: of one step, a token for each sequence.
        cold, warm: in a new process, from the loaded model to the second token: with empty caches on disk, and again.
        memory: the most that process held: device memory, on the CPU resident memory.
    """

    way: str
    first_token: float | None = None
    decode_p50: float | None = None
    decode_p99: float | None = None
    tokens_per_second: float | None = None
    cold: float | None = None
    warm: float | None = None
    memory: int | None = None
    note: str = ""


@dataclass
class BenchReport:
    """What was found.

    Attributes:
        bandwidth: bytes a second that were measured: read on the CPU, read and written on a GPU.
        step_bytes: that a decode step has to read: the weights, and half-filled caches.
        agreement: of greedy tokens with and without fusion.
    """

    setting: Setting
    machine: str
    rows: list[BenchRow] = field(default_factory=list)
    bandwidth: float = 0.0
    step_bytes: int = 0
    agreement: str = ""
    ok: bool = True

    @property
    def roofline(self) -> float:
        """Tokens a second of all sequences if a step took as long as reading what it must."""
        return self.setting.batch * self.bandwidth / self.step_bytes

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"roofline": self.roofline}

    def table(self) -> Table:
        """The ways side by side."""
        s = self.setting
        title = f"{s.model}, {s.dtype}, {s.device}: prompt {s.prompt}, then {s.tokens} tokens, batch {s.batch}"
        table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
        for column in ("", *self._ways()):
            table.add_column(column, justify="right" if column else "left")
        for cells in self._lines():
            table.add_row(*cells)
        return table

    def markdown(self) -> str:
        """The table for docs."""
        ways = self._ways()
        lines = ["| | " + " | ".join(ways) + " |", "| --- |" + " ---: |" * len(ways)]
        return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in self._lines())])

    def notes(self) -> list[str]:
        """What the table does not say."""
        known = f"{format_bytes(self.step_bytes)} a step at {self.bandwidth / 1e9:.1f} GB/s"
        lines = [self.machine, f"roofline: {known}", self.agreement]
        return [line for line in [*lines, *(f"{row.way}: {row.note}" for row in self.rows if row.note)] if line]

    def _ways(self) -> list[str]:
        return [row.way for row in self.rows] + ["roofline"]

    def _lines(self) -> list[tuple[str, ...]]:
        base = next((row.tokens_per_second for row in self.rows if row.way == EAGER), None)

        def line(
            name: str, value: Callable[[BenchRow], Any], form: Callable[[Any], str], last: str = ""
        ) -> tuple[str, ...]:
            return (name, *(_cell(value(row), form) for row in self.rows), last)

        lines = [
            line("first token", lambda row: row.first_token, _ms),
            line("decode p50", lambda row: row.decode_p50, _ms, _ms(self.setting.batch / self.roofline)),
            line("decode p99", lambda row: row.decode_p99, _ms),
            line("tokens/s", lambda row: row.tokens_per_second, "{:.1f}".format, f"{self.roofline:.1f}"),
            line("x eager", lambda row: _div(row.tokens_per_second, base), "{:.2f}".format),
            line("of roofline", lambda row: _div(row.tokens_per_second, self.roofline), "{:.2f}".format),
            line("cold start", lambda row: row.cold, "{:.2f} s".format),
            line("warm start", lambda row: row.warm, "{:.2f} s".format),
            line("peak memory", lambda row: row.memory, format_bytes),
        ]
        return [cells for cells in lines if {*cells[1:-1]} != {NONE}]


def _cell(value: Any, form: Callable[[Any], str]) -> str:
    return NONE if value is None else form(value)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _div(value: float | None, by: float | None) -> float | None:
    return value / by if value and by else None


# --- measuring


def run(
    setting: Setting, ways: tuple[str, ...] = WAYS, *, starts: bool = True, progress: Progress = print
) -> BenchReport:
    """Measure `ways`, in turns within one process; starts in processes of their own.

    Raises:
        CaptureError: the model cannot be loaded, or prompt and answer do not fit into it.
    """
    progress(f"loading {setting.model}")
    model = setting.load()
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and setting.capacity > longest:
        raise CaptureError(f"{setting.capacity} tokens are more than the {longest} that {setting.model} is made for")
    report = BenchReport(setting, machine(setting.device))
    report.bandwidth = bandwidth(setting.device)
    report.step_bytes = step_bytes(model, setting)
    ids = _prompt(model, setting)
    made: dict[str, Way] = {}
    # The fused one first: weights that another way holds cannot be merged. torch.compile last: merged weights are
    # views, and it would compile again for them.
    for way in sorted(ways, key=lambda way: (way == COMPILED) - (way == FUSED)):
        progress(f"preparing {way}")
        try:
            made[way] = make(way, model, setting)
            for _ in range(3):
                made[way].prefill(ids)
                for _ in range(3):
                    made[way].decode()
        except Exception as error:  # the others are worth measuring all the same
            made.pop(way, None)
            report.rows.append(BenchRow(way, note=f"{type(error).__name__}: {error}"))
    first: dict[str, list[float]] = {way: [] for way in made}
    steps: dict[str, list[float]] = {way: [] for way in made}
    for number in range(setting.rounds):
        progress(f"round {number + 1} of {setting.rounds}")
        for way, runner in made.items():
            if setting.device == "cuda":
                torch.cuda.synchronize()  # the step that the way before has under way is none of this one's
            first[way].append(_seconds(lambda: runner.prefill(ids)))  # noqa: B023
            steps[way] += [_seconds(runner.decode) for _ in range(setting.tokens)]
    for way in made:
        report.rows.append(_row(way, first[way], steps[way], setting.batch))
    report.rows.sort(key=lambda row: WAYS.index(row.way))
    ours = made.get(FUSED)
    if isinstance(ours, Ours):
        progress("comparing what fused and unfused steps say")
        agreement = ours.engine.agreement(ids[0].tolist(), setting.tokens)
        report.agreement, report.ok = str(agreement), agreement.ok
    made.clear()
    del model
    if starts:
        for row in report.rows:
            progress(f"starting {row.way} in new processes")
            _starts(row, setting)
    return report


def _row(way: str, first: list[float], steps: list[float], batch: int) -> BenchRow:
    ordered = sorted(steps)
    p99 = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
    median = statistics.median(steps)
    return BenchRow(way, statistics.median(first), median, p99, batch / median)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _prompt(model: Any, setting: Setting) -> torch.Tensor:
    size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(size, (setting.batch, setting.prompt), generator=generator).to(setting.device)


def step_bytes(model: Any, setting: Setting) -> int:
    """Bytes that a decode step reads at least: every weight but the table of embeddings, unless the head shares it, and
    the keys and values of the prompt and half of the answer."""
    table = model.get_input_embeddings().weight
    shared = model.get_output_embeddings().weight is table
    weights = sum(p.nbytes for p in model.parameters()) - (0 if shared else table.nbytes)
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    filled = setting.prompt + setting.tokens // 2
    return weights + 2 * config.num_hidden_layers * heads * width * filled * setting.batch * table.element_size()


def bandwidth(device: str) -> float:
    """Bytes a second: of reading 512 MB on the CPU, of copying 1 GB, read and written, on a GPU."""
    if device == "cuda":
        source = torch.empty(2**30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        best = math.inf
        for _ in range(10):
            events[0].record()
            target.copy_(source)
            events[1].record()
            torch.cuda.synchronize()
            best = min(best, events[0].elapsed_time(events[1]) / 1e3)
        return 2 * source.nbytes / best
    values = torch.ones(2**27)
    return values.nbytes / min(_seconds(values.sum) for _ in range(10))


def machine(device: str) -> str:
    """What was measured on, and with which versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, torch {torch.__version__}, graph_capture {graph_capture.__version__}"


def _starts(row: BenchRow, setting: Setting) -> None:
    """Fill in cold and warm start and memory: two processes, one after the other, over one new folder of caches."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: f"{folder}/{name}" for name in CACHES}
        for temperature in ("cold", "warm"):
            command = [sys.executable, "-m", "graph_capture.cli.bench", row.way, json.dumps(asdict(setting))]
            done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["it failed"]
                row.note = row.note or next((line for line in reversed(lines) if "Error" in line), lines[-1])
                return
            measured = json.loads(done.stdout.splitlines()[-1])
            setattr(row, temperature, measured["seconds"])
            row.memory = measured["memory"]


CACHES = ("GRAPH_CAPTURE_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def start(way: str, setting: Setting) -> dict[str, Any]:
    """From the loaded model to the second token, in this process; and the most memory it held."""
    model = setting.load()
    ids = _prompt(model, setting)

    def first() -> None:
        runner = make(way, model, setting)
        runner.prefill(ids)
        runner.decode()

    seconds = _seconds(first)
    if setting.device == "cuda":
        return {"seconds": seconds, "memory": torch.cuda.max_memory_reserved()}
    return {"seconds": seconds, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def plot(report: BenchReport, file: str) -> None:
    """Tokens a second of each way, and the roofline, as a bar chart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in report.rows if row.tokens_per_second]
    colors = {EAGER: "#b0b0b0", COMPILED: "#7a9cc6", UNFUSED: "#e0b070", FUSED: "#d1603d"}
    bars = axes.bar(
        [row.way for row in rows],
        [row.tokens_per_second or 0.0 for row in rows],
        color=[colors[row.way] for row in rows],
    )
    axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.axhline(report.roofline, color="#404040", linewidth=1, linestyle="--")
    axes.annotate(f"roofline {report.roofline:.0f}", (0, report.roofline), va="bottom", fontsize=8)
    axes.set_ylabel("tokens/s")
    s = report.setting
    axes.set_title(f"{s.model}, {s.dtype}, batch {s.batch}: decoding after {s.prompt} tokens", fontsize=10)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    print(json.dumps(start(sys.argv[1], Setting(**json.loads(sys.argv[2])))))
