"""Language models on a CUDA device over batches, contexts and prompts: eager, torch.compile and ours; prints markdown.

    python -m tests.benchmarks.bench_sweep --file sweep.jsonl --seconds 450
    python -m tests.benchmarks.bench_sweep --file sweep.jsonl --models llama-3-8b --batches 8,32,64 --ways ours,compiled
    python -m tests.benchmarks.bench_sweep --file sweep.jsonl --table   # only what is known

Every cell that was measured is a line of the file: what is there is not measured again, so a sweep can be cut into
pieces of any length, and the tables come last. Each way of a model has a process of its own, which runs as many cells
as fit. Decoding is timed over steps that follow each other on the device, as a server launches them, each with the
choice of its token; bounds are the bytes that a step must read (every weight once, keys and values of the context) by
the bandwidth of a large copy in the same run, and by the data sheet's. Random weights, greedy, bfloat16.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

MODELS = ("llama-3-8b", "llama-3.2-1b", "qwen3-0.6b", "gemma-3-1b", "qwen3-30b-a3b:12")
BATCHES = (1, 8, 64, 32, 4, 16, 2)  # the most telling first
CONTEXTS = (128, 2048, 8192, 32768)
PROMPTS = (2048, 128, 8192, 512, 4096, 1024)
WAYS = ("ours", "compiled", "eager")
STEPS, ROUNDS = 24, 4
SHEET = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}  # bytes a second that the makers state
DEVICE = os.environ.get("SWEEP_DEVICE", "cuda")  # "cpu" shows only that it runs
CACHE = 60 * 2**30  # bytes of keys and values that a cell may take


@dataclass(frozen=True)
class Cell:
    """One measurement: a decode step after `length` tokens, a prompt of `length` tokens, or the memory of both.

    `model` may end in a number of layers: ``llama-3-8b:8``.
    """

    model: str
    way: str
    kind: str
    batch: int
    length: int

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for a cell that was measured before."""
        return self.model, self.way, self.kind, self.batch, self.length


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """The cell's that a line is of."""
    return tuple(row[name] for name in ("model", "way", "kind", "batch", "length"))


def load(name: str) -> Any:
    """A model on the device, with random weights in bfloat16."""
    from graph_capture.runtime.llm.models import build_model, load_config

    name, _, layers = name.partition(":")
    config = load_config(name, int(layers) if layers else None)
    config.max_position_embeddings = max(config.max_position_embeddings, 2**16)  # a position costs what any other does
    return build_model(config, dtype=torch.bfloat16, device=DEVICE)


def cache_bytes(model: Any, tokens: int) -> int:
    """Bytes of keys and values of so many tokens."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * config.num_hidden_layers * config.num_key_value_heads * width * tokens


def weight_bytes(model: Any, batch: int) -> int:
    """Bytes of weights that a step reads: of a mixture of experts those that so many tokens choose on average."""
    table = model.get_input_embeddings().weight
    shared = model.get_output_embeddings().weight is table
    total = sum(p.nbytes for p in model.parameters()) - (0 if shared else table.nbytes)
    count, chosen = (getattr(model.config, name, 0) for name in ("num_experts", "num_experts_per_tok"))
    if count:
        experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
        total -= round(experts * (1 - chosen / count) ** batch)
    return int(total)


def flops(model: Any, batch: int, length: int) -> float:
    """Multiplications and additions of a prefill: the weights for each token, the head for the last one, attention."""
    config = model.config
    head = model.get_output_embeddings().weight.numel()
    weights = sum(p.numel() for p in model.parameters()) - head
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        weights -= model.get_input_embeddings().weight.numel()
    count, chosen = (getattr(config, name, 0) for name in ("num_experts", "num_experts_per_tok"))
    if count:
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        weights -= experts - experts * chosen // count
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * width * length**2  # half of it is masked
    return 2.0 * batch * (weights * length + head) + batch * attention


# --- the ways


class Runner:
    """One way of running a model at one batch and a number of slots."""

    def __init__(self, model: Any, batch: int, slots: int) -> None:
        self.model, self.batch, self.slots = model, batch, slots

    def prompt(self, ids: torch.Tensor) -> torch.Tensor:
        """Forget everything and read prompts [B, L]; the next tokens."""
        raise NotImplementedError

    def fill(self, length: int) -> None:
        """Have so many tokens in the cache."""
        raise NotImplementedError

    def step(self) -> torch.Tensor:
        """Launch one step."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """What else is worth knowing."""
        return {}


class OurRunner(Runner):
    """The engine's steps."""

    def __init__(self, model: Any, batch: int, slots: int) -> None:
        from graph_capture import InferEngine
        from graph_capture.runtime.llm import Sampling

        super().__init__(model, batch, slots)
        self.engine = InferEngine(model, max_length=slots)
        self._session = self.engine.session(batch)
        self._session.eager_first = False  # what is timed is a replay
        self._kind = Sampling().kind

    def prompt(self, ids: torch.Tensor) -> torch.Tensor:
        self._session.truncate(0)
        return self._session.prefill(ids.tolist(), self._kind)

    def fill(self, length: int) -> None:
        self._session.truncate(length)

    def step(self) -> torch.Tensor:
        return self._session.decode(self._kind)

    def about(self) -> dict[str, Any]:
        phases = self._session.phases.values()
        memory = [phase.fused.explain().memory for phase in phases if phase.fused is not None]
        return {
            "uncaptured": [f"{phase.name}: {phase.reason}" for phase in phases if phase.fused is None],
            "graphs": sum(phase.fused is not None and phase.fused.cuda_graphs is not None for phase in phases),
            "memory": [{k: m.get(k) for k in ("planned", "arena", "results", "graphs")} for m in memory],
        }


class TorchRunner(Runner):
    """transformers with a static cache: as it is, or through torch.compile with CUDA graphs."""

    def __init__(self, model: Any, batch: int, slots: int, compiled: bool) -> None:
        super().__init__(model, batch, slots)
        self._compiled = compiled
        torch.compiler.reset()
        self._call: Callable[..., torch.Tensor] = self._forward
        if compiled:
            self._call = torch.compile(self._forward, dynamic=False, mode="reduce-overhead")
        self._new()

    def _new(self) -> None:
        from transformers import StaticCache

        self._cache = StaticCache(config=self.model.config, max_cache_len=self.slots)
        self._token = torch.zeros(self.batch, 1, dtype=torch.int64, device=DEVICE)

    def _forward(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        result = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return result.logits[:, -1:].argmax(-1)

    def prompt(self, ids: torch.Tensor) -> torch.Tensor:
        self._cache.reset()
        self._token = ids
        return self.step()

    def fill(self, length: int) -> None:
        self._cache.reset()
        piece = max(1, 4096 // self.batch)
        for start in range(0, length, piece):
            count = min(piece, length - start)
            self._forward(torch.zeros(self.batch, count, dtype=torch.int64, device=DEVICE), self._cache)
        self._token = torch.zeros(self.batch, 1, dtype=torch.int64, device=DEVICE)

    def step(self) -> torch.Tensor:
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        self._token = self._call(self._token, self._cache).clone()
        return self._token


def make(way: str, model: Any, batch: int, slots: int) -> Runner:
    """A way of running `model`."""
    return OurRunner(model, batch, slots) if way == "ours" else TorchRunner(model, batch, slots, way == "compiled")


# --- measuring


def wait() -> None:
    """Until the device has done everything."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], count: int) -> float:
    """Seconds of one of `count` calls in a row, to the end of the last on the device."""
    wait()
    start = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return (time.perf_counter() - start) / count


def peak() -> dict[str, int]:
    """The most device memory in use and reserved since the last call."""
    found = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return found


def measure(model: Any, cell: Cell) -> dict[str, Any]:
    """A cell's row: seconds (the median of rounds, and the least), peaks of memory, and bounds."""
    steps = STEPS * ROUNDS + 16
    if cache_bytes(model, cell.batch * (cell.length + steps)) > CACHE:
        return {"skipped": "the cache alone is too large"}
    torch.cuda.empty_cache()
    peak()
    begin = time.perf_counter()
    with torch.no_grad():
        runner = make(cell.way, model, cell.batch, cell.length + steps)
        row: dict[str, Any] = {}
        if cell.kind == "decode":
            runner.fill(cell.length)
            for _ in range(5):
                runner.step()
            wait()
            row["preparing"] = time.perf_counter() - begin
            times = [seconds_of(runner.step, STEPS) for _ in range(ROUNDS)]
            filled = cell.length + STEPS * ROUNDS // 2
            row["bytes"] = weight_bytes(model, cell.batch) + cache_bytes(model, cell.batch * filled)
        else:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(model.config.vocab_size, (cell.batch, cell.length), generator=generator).to(DEVICE)
            peaks = []
            for _ in range(4):  # recorded, watched, captured, replayed
                runner.prompt(ids)
                wait()
                peaks.append(peak())
            row["phases"] = peaks
            row["preparing"] = time.perf_counter() - begin
            times = [seconds_of(lambda: runner.prompt(ids), 3) for _ in range(ROUNDS)]
            row["flops"] = flops(model, cell.batch, cell.length)
        row |= {"seconds": statistics.median(times), "least": min(times), **peak(), **runner.about()}
        row["weights"] = sum(p.nbytes for p in model.parameters())
    return row


def machine() -> dict[str, Any]:
    """The device, and what it can do: bytes a second of a large copy, operations a second of a large product."""
    import triton

    size, width = (2**29, 8192) if DEVICE == "cuda" else (2**20, 64)
    source = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copying = min(seconds_of(lambda: target.copy_(source), 10) for _ in range(3))
    a, b = (torch.randn(width, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = min(seconds_of(lambda: a @ b, 10) for _ in range(3))
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "versions": f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "copy": 4 * size / copying,
        "matmul": 2 * width**3 / product,
    }


def run_cells(file: Path, cells: list[Cell], until: float) -> None:
    """Measure cells of one model and way, each as a line of the file, as long as there is time."""
    start = time.time()
    model = load(cells[0].model)
    longest = time.time() - start
    for cell in cells:
        begun = time.time()
        if begun + longest > until:
            return
        try:
            row = measure(model, cell)
        except Exception as error:  # the others are worth measuring all the same
            row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        gc.collect()
        torch.cuda.empty_cache()
        longest = max(longest, time.time() - begun)
        write(file, asdict(cell) | row)


def write(file: Path, row: dict[str, Any]) -> None:
    """Add a line."""
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """The lines."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wanted(options: argparse.Namespace) -> Iterator[list[Cell]]:
    """Cells by model and way, in the order of their worth."""
    for model in options.models:
        for way in options.ways:
            decode = [Cell(model, way, "decode", b, c) for c in options.contexts for b in options.batches]
            prefill = [Cell(model, way, "prefill", b, p) for b in options.prefill_batches for p in options.prompts]
            yield decode + prefill


# --- the tables


def tables(rows: list[dict[str, Any]]) -> str:
    """Everything that is known, as markdown."""
    known = {key_of(row): row for row in rows if "kind" in row}
    about = [row for row in rows if "copy" in row]
    if not about:
        return "nothing was measured"
    machine = about[-1]
    copy, sheet = machine["copy"], SHEET.get(machine["device"])
    lines = [
        f"{machine['device']}, {machine['versions']}, {machine['date']}: copy {copy / 1e12:.2f} TB/s, "
        f"matmul {machine['matmul'] / 1e12:.0f} TFLOP/s",
        "",
        "| model | batch | context | eager | torch.compile | ours, tokens/s | / torch.compile | of copy | of the sheet "
        "| GiB reserved |",
        "| --- |" + " ---: |" * 9,
    ]
    places = sorted({(k[0], k[3], k[4]) for k in known if k[2] == "decode"}, key=lambda p: (order_of(p[0]), *p[:0:-1]))
    for model, batch, length in places:
        found = {way: known.get((model, way, "decode", batch, length), {}) for way in WAYS}
        ours = found["ours"]
        bound = ours["bytes"] / copy / ours["seconds"] if "seconds" in ours else None
        lines.append(
            f"| {model} | {batch} | {length} | {_rate(found['eager'], batch)} | {_rate(found['compiled'], batch)} | "
            f"{_rate(ours, batch)} | {_ratio(found['compiled'], ours)} | {_two(bound)} | "
            f"{_two(bound * copy / sheet if bound and sheet else None)} | {_gib(ours.get('reserved'))} |"
        )
    lines += [
        "",
        "| model | batch | prompt | eager, ms | torch.compile | ours | torch.compile / ours | of matmul | GiB, eager "
        "| GiB, ours | ours / eager |",
        "| --- |" + " ---: |" * 10,
    ]
    places = sorted({(k[0], k[3], k[4]) for k in known if k[2] == "prefill"}, key=lambda p: (order_of(p[0]), *p[1:]))
    for model, batch, length in places:
        found = {way: known.get((model, way, "prefill", batch, length), {}) for way in WAYS}
        ours = found["ours"]
        share = ours["flops"] / ours["seconds"] / machine["matmul"] if "seconds" in ours else None
        peaks = {way: max((p["reserved"] for p in row.get("phases", ())), default=None) for way, row in found.items()}
        over = peaks["ours"] / peaks["eager"] if peaks["ours"] and peaks["eager"] else None
        lines.append(
            f"| {model} | {batch} | {length} | {_ms(found['eager'])} | {_ms(found['compiled'])} | {_ms(ours)} | "
            f"{_ratio(found['compiled'], ours)} | {_two(share)} | {_gib(peaks['eager'])} | {_gib(peaks['ours'])} | "
            f"{_two(over)} |"
        )
    lines += ["", *_troubles(known.values())]
    return "\n".join(lines)


def order_of(name: str) -> tuple[int, str]:
    """Where a model stands in tables."""
    return (MODELS.index(name) if name in MODELS else len(MODELS)), name


def _troubles(rows: Any) -> list[str]:
    found = []
    for row in rows:
        what = row.get("failed") or row.get("skipped") or "; ".join(row.get("uncaptured") or ())
        if what:
            found.append(f"{row['model']} {row['way']} {row['kind']} batch {row['batch']} at {row['length']}: {what}")
    return found


def _rate(row: dict[str, Any], batch: int) -> str:
    return f"{batch / row['seconds']:.0f}" if "seconds" in row else _absent(row)


def _ms(row: dict[str, Any]) -> str:
    return f"{row['seconds'] * 1e3:.2f}" if "seconds" in row else _absent(row)


def _absent(row: dict[str, Any]) -> str:
    return "failed" if "failed" in row else "-"


def _ratio(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    return f"{theirs['seconds'] / ours['seconds']:.2f}" if "seconds" in theirs and "seconds" in ours else ""


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _gib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**30:.1f}"


def main() -> int:
    """Measure as long as there is time, then print what is known."""
    options = arguments()
    file, until = Path(options.file), time.time() + options.seconds
    if not options.table:
        if DEVICE == "cuda" and not torch.cuda.is_available():
            print("needs a CUDA device", file=sys.stderr)
            return 1
        if not any("copy" in row for row in read(file)):
            write(file, machine())
        for cells in wanted(options):
            done = {key_of(row) for row in read(file) if "kind" in row}
            left = [cell for cell in cells if cell.key not in done]
            if not left or time.time() > until - 20:
                continue
            _in_a_process(file, left, until)
    print(tables(read(file)))
    return 0


def _in_a_process(file: Path, cells: list[Cell], until: float) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as listed:
        json.dump([asdict(cell) for cell in cells], listed)
        listed.flush()
        command = [sys.executable, "-m", "tests.benchmarks.bench_sweep", "--file", str(file), "--cells", listed.name]
        try:
            spent = max(1.0, until - time.time())
            environment = os.environ | {"SWEEP_UNTIL": str(until)}
            subprocess.run(command, env=environment, timeout=spent, check=False)
        except subprocess.TimeoutExpired:
            print(f"{cells[0].model}, {cells[0].way}: stopped at the time limit", file=sys.stderr)


def arguments() -> argparse.Namespace:
    """The command line."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", required=True, help="lines that were measured; more are added")
    parser.add_argument("--seconds", type=float, default=math.inf, help="when to stop")
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument("--batches", type=numbers, default=list(BATCHES))
    parser.add_argument("--contexts", type=numbers, default=list(CONTEXTS))
    parser.add_argument("--prompts", type=numbers, default=list(PROMPTS))
    parser.add_argument("--prefill-batches", type=numbers, default=[1])
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--cells", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    if given.cells:
        cells = [Cell(**cell) for cell in json.loads(Path(given.cells).read_text())]
        run_cells(Path(given.file), cells, float(os.environ["SWEEP_UNTIL"]))
        sys.exit(0)
    sys.exit(main())
