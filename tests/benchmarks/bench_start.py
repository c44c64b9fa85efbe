"""From a fresh process to the first fused replay: with an empty cache folder, and with what that run left in it.

    python -m tests.benchmarks.bench_start [--layers 2] [--hidden 64]

Prints markdown, seconds; each column is a process of its own. "beyond eager" is what the fused way to the first replay
adds to torch's import, the model and its own eager forward.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

STEPS = ("import", "record", "passes", "compile", "decide", "other", "first replay", "beyond eager")


def child(layers: int, hidden: int) -> dict[str, float]:
    """Times of one process, by step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=1024,
        )
    ).eval()
    ids = torch.arange(16).view(1, 16)
    spent = dict.fromkeys(STEPS, 0.0)
    with torch.no_grad():
        eager = _timed(lambda: model(input_ids=ids, use_cache=False).logits)
        spent["import"] = _timed(lambda: __import__("graph_capture"))

        from graph_capture import fuse, record
        from graph_capture.codegen import KernelCompiler
        from graph_capture.runtime import fuse as scheduler
        from graph_capture.runtime.decide import heuristics, whole

        _count(spent, "passes", scheduler, "rewrite", "load_templates", "store_templates")
        _count(spent, "compile", KernelCompiler, "compile")
        _count(spent, "decide", heuristics, "compare")
        _count(spent, "decide", whole, "compare")
        found: list[Any] = []

        def recording() -> None:
            with record(input_ids=ids) as recorder:
                recorder.output(model(input_ids=ids, use_cache=False).logits)
            found.append(recorder.graph)

        spent["record"] = _timed(recording)
        fusing = _timed(lambda: found.append(fuse(found[0])))
        spent["other"] = fusing - sum(spent[name] for name in ("passes", "compile", "decide"))
        spent["first replay"] = _timed(lambda: found[1](input_ids=ids))
    spent["beyond eager"] = sum(spent.values())
    return spent | {"eager": eager}


def _timed(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _count(spent: dict[str, float], step: str, owner: Any, *names: str) -> None:
    """Add the time that functions of `owner` take to a step."""
    for name in names:
        setattr(owner, name, _counted(spent, step, getattr(owner, name)))


def _counted(spent: dict[str, float], step: str, function: Any) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[step] += time.perf_counter() - start

    return counted


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.layers, options.hidden)))
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.benchmarks.bench_start", "--child"]
        command += ["--layers", str(options.layers), "--hidden", str(options.hidden)]
        environment = {**os.environ, "GRAPH_CAPTURE_CACHE_DIR": folder}
        runs = [
            json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
            for _ in ("cold", "warm")
        ]
    import torch

    print(
        f"Llama, {options.layers} layers, hidden size {options.hidden}; {torch.get_num_threads()} threads; torch "
        f"{torch.__version__}, Python {platform.python_version()}; eager's first forward {runs[1]['eager']:.3f} s\n"
    )
    print("| step, s | cold | warm |\n| --- | --- | --- |")
    for step in STEPS:
        print(f"| {step} | {runs[0][step]:.3f} | {runs[1][step]:.3f} |")


if __name__ == "__main__":
    main()
