"""Train the tiny Llama on two cores: ``python -m graph_capture.tiny.train``. Deterministic by its seed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.nn import functional as F

from graph_capture.tiny import FOLDER, text
from graph_capture.tiny.evaluate import evaluate, show
from graph_capture.tiny.tokens import END, VOCABULARY, conversation, equations, save_tokenizer

LENGTH = 512  # positions that the model has seen
HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 128, 3, 4, 2, 256
BARE = 0.35  # of the rows are sums and differences outside any conversation
IGNORED = -100  # as F.cross_entropy has it


def build() -> Any:
    """The model with random weights, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            intermediate_size=INTERMEDIATE,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=END,
        )
    )


def rows(rng: Random, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of `length` tokens without end: their ids, and the ids to predict (questions are `IGNORED`)."""
    while True:
        ids: list[int] = []
        labels: list[int] = []
        talk = text.Conversation(rng)
        parts = equations(talk) if rng.random() < BARE else conversation(talk)
        while len(ids) <= length:
            _, question, answer = next(parts)
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
        yield ids[: length + 1], labels[: length + 1]


def batches(seed: int, length: int, tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of `tokens` tokens: inputs and labels, int64 ``[tokens / length, length]``."""
    source = rows(Random(seed), length)
    while True:
        batch = [next(source) for _ in range(tokens // length)]
        yield torch.tensor([row[:-1] for row, _ in batch]), torch.tensor([row[1:] for _, row in batch])


def main(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = FOLDER,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 4000,
    tokens: Annotated[int, typer.Option(help="Tokens in a batch.")] = 8192,
    rate: Annotated[float, typer.Option(help="The largest learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of the weights and the text.")] = 0,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
) -> None:
    """Train, write the model in bfloat16 with its tokenizer, and print what it gets right."""
    console = Console()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = build()
    console.print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters")
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
    )
    warm_up = min(200, steps // 10)
    # Short rows while it learns what to say, long ones at the end, for conversations.
    short, long = batches(seed, LENGTH // 4, tokens), batches(seed + 1, LENGTH, tokens)
    start = time.perf_counter()
    model.train()
    for step in range(steps):
        progress = max(0, step - warm_up) / (steps - warm_up)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm_up, 1 - progress)
        ids, labels = next(short if step < 0.85 * steps else long)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            took = time.perf_counter() - start
            console.print(
                f"step {step + 1} of {steps}: loss {loss.item():.4f}, {took:.0f} s, "
                f"{(step + 1) * tokens / took:.0f} tokens/s"
            )
    model.eval().to(torch.bfloat16).save_pretrained(out)
    save_tokenizer(out)
    show(console, evaluate(out))


if __name__ == "__main__":
    typer.run(main)
