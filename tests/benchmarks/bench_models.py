"""Models that are not language models to generate with, on any device: eager, torch.compile and `capture`; markdown.

    python -m tests.benchmarks.bench_models --file models.jsonl --seconds 400
    python -m tests.benchmarks.bench_models --device cpu --dtype float32 --models resnet-50,vit-base --batches 1

Random weights. Each model, batch and way is a line of the file; what is there is not measured again, and the table
comes last. torch.compile runs with ``mode="reduce-overhead"`` on CUDA. Medians of rounds in a process for each line.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MODELS = ("resnet-50", "convnext-tiny", "whisper-encoder", "bert-base", "vit-base")
BATCHES = (1, 32)
WAYS = ("ours", "compiled", "eager")
ROUNDS = 10


def make(name: str, batch: int, dtype: torch.dtype, device: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model and its inputs."""
    import transformers as hf

    torch.manual_seed(0)
    pixels = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    with torch.device(device):
        if name == "resnet-50":
            return _ready(hf.ResNetForImageClassification(hf.ResNetConfig()), dtype), {"pixel_values": pixels}
        if name == "convnext-tiny":
            return _ready(hf.ConvNextForImageClassification(hf.ConvNextConfig()), dtype), {"pixel_values": pixels}
        if name == "vit-base":
            return _ready(hf.ViTModel(hf.ViTConfig()), dtype), {"pixel_values": pixels}
        if name == "bert-base":
            ids = torch.randint(0, 30000, (batch, 128), device=device)
            return _ready(hf.BertModel(hf.BertConfig()), dtype), {"input_ids": ids}
        if name == "whisper-encoder":
            config = hf.WhisperConfig(  # whisper-small's
                d_model=768, encoder_layers=12, encoder_attention_heads=12, encoder_ffn_dim=3072, num_mel_bins=80
            )
            features = torch.randn(batch, 80, 3000, device=device, dtype=dtype)
            return _ready(hf.WhisperModel(config).encoder, dtype), {"input_features": features}
    raise SystemExit(f"no model {name!r}: {', '.join(MODELS)}")


def _ready(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for buffer in model.buffers():  # statistics that say something
        if buffer.is_floating_point() and buffer.dim() == 1:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.to(dtype).eval()


def measure(name: str, batch: int, way: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Seconds of a call, and of the first one."""
    model, inputs = make(name, batch, dtype, device)
    call: Callable[..., Any] = model
    if way == "ours":
        from graph_capture import capture

        call = capture(model)
    elif way == "compiled":
        call = torch.compile(model, dynamic=False, mode="reduce-overhead" if device == "cuda" else "default")
    with torch.no_grad():
        start = time.perf_counter()
        call(**inputs)
        _wait(device)
        first = time.perf_counter() - start
        for _ in range(4):
            result = call(**inputs)
        exact = model(**inputs)[0].float()
        error = float((result[0].float() - exact).norm() / exact.norm())
        single = _seconds(lambda: call(**inputs), 1, device)
        count = max(1, min(50, round(0.1 / single)))
        times = [_seconds(lambda: call(**inputs), count, device) for _ in range(ROUNDS)]
    row = {"seconds": statistics.median(times), "first": first, "error": error}
    if device == "cuda":
        row["reserved"] = torch.cuda.max_memory_reserved()
    return row


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds(call: Callable[[], Any], count: int, device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return (time.perf_counter() - start) / count


def table(rows: list[dict[str, Any]]) -> str:
    """What is known, as markdown."""
    if not rows:
        return "nothing was measured"
    known = {(row["model"], row["batch"], row["way"]): row for row in rows}
    lines = [
        f"{rows[-1]['device']}, torch {torch.__version__}, Python {platform.python_version()}, {rows[-1]['dtype']}",
        "",
        "| model | batch | eager, ms | torch.compile | ours | torch.compile / ours | eager / ours | first call, s "
        "| torch.compile, s |",
        "| --- |" + " ---: |" * 8,
    ]
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        eager, compiled, ours = (known.get((model, batch, way), {}) for way in ("eager", "compiled", "ours"))
        lines.append(
            f"| {model} | {batch} | {_ms(eager)} | {_ms(compiled)} | {_ms(ours)} | {_ratio(compiled, ours)} | "
            f"{_ratio(eager, ours)} | {_first(ours)} | {_first(compiled)} |"
        )
    failed = [f"{row['model']}, batch {row['batch']}, {row['way']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n".join([*lines, "", *failed])


def _ms(row: dict[str, Any]) -> str:
    return f"{row['seconds'] * 1e3:.3f}" if "seconds" in row else ""


def _first(row: dict[str, Any]) -> str:
    return f"{row['first']:.1f}" if "first" in row else ""


def _ratio(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    return f"{theirs['seconds'] / ours['seconds']:.2f}" if "seconds" in theirs and "seconds" in ours else ""


def main() -> int:
    """Measure as long as there is time, then print what is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="models.jsonl")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, batch, way = options.one.split("/")
        found = measure(name, int(batch), way, getattr(torch, options.dtype), options.device)
        print(json.dumps(found))
        return 0
    file, until = Path(options.file), time.time() + options.seconds
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["model"], row["batch"], row["way"]) for row in rows}
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for name in options.models.split(","):
        for batch in map(int, options.batches.split(",")):
            for way in options.ways.split(","):
                if (name, batch, way) in done or time.time() > until - 15:
                    continue
                row = {"model": name, "batch": batch, "way": way, "device": device, "dtype": options.dtype}
                row |= _in_a_process(f"{name}/{batch}/{way}", options, max(1.0, until - time.time()))
                rows.append(row)
                with file.open("a") as output:
                    output.write(json.dumps(row) + "\n")
    print(table(rows))
    return 0


def _in_a_process(one: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_models", "--one", one]
    command += ["--device", options.device, "--dtype", options.dtype]
    limit = None if math.isinf(seconds) else seconds
    try:
        run = subprocess.run(command, timeout=limit, check=False, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return {"failed": "stopped at the time limit"}
    if run.returncode:
        return {"failed": (run.stderr.strip().splitlines() or ["it failed"])[-1][:300]}
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
