"""``graph-capture inspect``: what is recorded of a model, which regions are found in it, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from graph_capture import CaptureError, FusedGraph, FusionConfig, RecordedGraph, fuse, load, record
from graph_capture.runtime.llm.models import build_model, load_config


def inspect(
    name: str,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    prompt: int = 128,
    slots: int = 256,
    layers: int | None = None,
    measure: bool = True,
) -> Iterator[tuple[str, FusedGraph]]:
    """A model's decode step and prefill with random weights, fused; or the graph that is saved in a file.

    Args:
        name: a saved graph (`FusedGraph.save`), or a model as `load_config` takes it.
        dtype: of the weights.
        device: where they are.
        prompt: tokens of the prefill.
        slots: of the static cache.
        layers: only so many.
        measure: decide by measurement, as for a replay.

    Raises:
        CaptureError: there is no such model.
    """
    if Path(name).is_file():
        yield "saved", load(name)
        return
    if prompt > slots:
        raise CaptureError(f"{prompt} tokens do not fit into a cache of {slots} slots")
    config = FusionConfig(profile="measure" if measure else "static")
    for step, graph in record_steps(name, dtype, prompt, slots, layers, device):
        yield step, fuse(graph, config)


def record_steps(
    name: str, dtype: torch.dtype, prompt: int, slots: int, layers: int | None, device: str
) -> Iterator[tuple[str, RecordedGraph]]:
    """A model's decode step and prefill, recorded with a static cache; on the meta device without memory for it."""
    from transformers import StaticCache

    model = build_model(load_config(name, layers), dtype=dtype, device=device)
    config = model.config.get_text_config()
    for step, length in (("decode", 1), (f"prefill {prompt}", prompt)):
        with torch.device(device), torch.no_grad():
            cache = StaticCache(config=config, max_cache_len=slots)
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            cache.early_initialization(1, heads, width, dtype, torch.device(device))
            ids = torch.zeros(1, length, dtype=torch.long)
            # Without a mask, transformers asks in Python whether the cache is empty.
            mask = torch.zeros(1, 1, length, slots, dtype=dtype) if length > 1 else None
            with record(ids, cache, mask, verify=device != "meta") as recording:
                call = {"input_ids": ids, "past_key_values": cache, "attention_mask": mask, "use_cache": True}
                recording.output(model(**call).logits)
        yield step, recording.graph
