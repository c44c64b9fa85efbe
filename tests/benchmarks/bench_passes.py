"""Time of all passes against the number of layers: it should grow with the number of nodes and no faster.

python -m tests.benchmarks.bench_passes [--layers 8,20,80] [--markdown]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from graph_capture import RecordedGraph, record
from graph_capture.codegen import supports
from graph_capture.passes import DEFAULT, Passes, Rewritten, rewrite
from graph_capture.passes.spellings import ROUNDS


def decode_step(layers: int) -> RecordedGraph:
    """The recording of one decode step of a small Llama of so many layers, with a static cache."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).eval()
    cache = StaticCache(config=config, max_cache_len=16)
    ids, position = torch.ones(1, 1, dtype=torch.int64), torch.tensor([5])
    with torch.no_grad():
        model(input_ids=torch.ones(1, 5, dtype=torch.int64), past_key_values=cache)
        with record(ids, cache, position, verify=False) as recording:
            logits = model(input_ids=ids, past_key_values=cache, position_ids=position[None]).logits
            recording.output(logits)
    return recording.graph


def analyse(graph: RecordedGraph) -> Rewritten:
    """All passes, without compiling or measuring anything."""
    return rewrite(graph.subgraph, Passes(supports, weights=frozenset(graph.captured)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="8,20,80")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    for rules in ROUNDS:  # recording the patterns is a constant, paid once by a process
        for rule in rules:
            _ = rule.pattern.templates
    for item in DEFAULT:
        _ = item.templates
    rows = []
    for layers in map(int, options.layers.split(",")):
        graph = decode_step(layers)
        analyse(graph)
        times = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            result = analyse(graph)
            times.append(time.perf_counter() - start)
        rows.append((layers, len(graph.subgraph), len(result.graph), statistics.median(times)))
    first = rows[0][3] / rows[0][1]
    if options.markdown:
        print("| layers | recorded ops | rewritten | seconds | us a node | against the first |")
        print("| --- | --- | --- | --- | --- | --- |")
    for layers, before, after, seconds in rows:
        cells = (
            layers,
            before,
            after,
            f"{seconds:.3f}",
            f"{1e6 * seconds / before:.0f}",
            f"{seconds / before / first:.2f}",
        )
        print(("| " + " | ".join(map(str, cells)) + " |") if options.markdown else "  ".join(map(str, cells)))


if __name__ == "__main__":
    main()
