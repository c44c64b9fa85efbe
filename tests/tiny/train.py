"""Train the tiny Llama: ``python -m tests.tiny.train``. One core, torch 2.9; deterministic by seed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.nn import functional as F

from graph_capture.tiny import FOLDER
from tests.tiny import text
from tests.tiny.evaluate import evaluate, show
from tests.tiny.tokens import END, VOCABULARY, conversation, equations, save_tokenizer

LENGTH = 256  # positions that the model has seen
HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 128, 3, 4, 2, 256
RATE, OUTER_RATE, WARM_UP = 8e-3, 3e-3, 50
STEADY = 0.3  # of the steps are at the full rate, before it falls to zero
BARE = 0.4  # of the rows are sums and differences outside any conversation: many in few tokens
DRILLS = 0.15  # of the rows are conversations about what has to be copied, which takes longest to learn
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
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=END,
        )
    )


def rows(rng: Random, length: int, drills: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of `length` tokens without end: their ids, and the ids to predict (questions are `IGNORED`).

    Args:
        drills: tasks that some rows keep to.
    """
    while True:
        ids: list[int] = []
        labels: list[int] = []
        talk = text.Conversation(rng)
        kind = rng.random()
        tasks = drills if kind < BARE + DRILLS else ()
        parts = equations(talk) if kind < BARE else conversation(talk, tasks)
        while len(ids) <= length:
            _, question, answer = next(parts)
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
        yield ids[: length + 1], labels[: length + 1]


def batches(seed: int, length: int, tokens: int, drills: Sequence[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of `tokens` tokens: inputs and labels, int64 ``[tokens / length, length]``."""
    source = rows(Random(seed), length, drills)
    while True:
        batch = [next(source) for _ in range(tokens // length)]
        yield torch.tensor([row[:-1] for row, _ in batch]), torch.tensor([row[1:] for _, row in batch])


def train(
    model: Any,
    steps: int,
    tokens: int,
    seed: int,
    progress: Callable[[int, float], None],
    *,
    rate: float = 1.0,
    lengths: Sequence[int] = (LENGTH,),
    drills: Sequence[str] = text.COPYING,
) -> None:
    """Train in place: Muon (Jordan et al., 2024) for the matrices, AdamW for the rest, autocast to bfloat16.

    Args:
        steps, tokens: optimizer steps, and tokens in each.
        seed: of the text.
        progress: is told the step and its loss.
        rate: times the usual learning rates.
        lengths: of rows, in turns.
        drills: tasks that some rows keep to.
    """
    inner = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    ids_of_inner = {id(parameter) for parameter in inner}
    outer = [parameter for parameter in model.parameters() if id(parameter) not in ids_of_inner]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(inner, lr=rate * RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=rate * OUTER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / WARM_UP, (1 - step / steps) / (1 - STEADY), 1)
        )
        for optimizer in optimizers
    ]
    sources = [batches(seed, length, tokens, drills) for length in lengths]
    model.train()
    for step in range(steps):
        ids, labels = next(sources[step % len(sources)])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        progress(step, loss.item())
    model.eval()


def main(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = FOLDER,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 3600,
    tokens: Annotated[int, typer.Option(help="Tokens in a batch.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the weights and the text.")] = 0,
    start: Annotated[Path | None, typer.Option(help="A folder with a model to train on.")] = None,
    rate: Annotated[float, typer.Option(help="Times the usual learning rates.")] = 1.0,
    length: Annotated[list[int] | None, typer.Option(help="Of rows; several take turns.")] = None,
    drill: Annotated[list[str] | None, typer.Option(help="A task that some rows keep to; several.")] = None,
    threads: Annotated[int, typer.Option(help="Of torch; its number changes the last bits.")] = 1,
) -> None:
    """Train, write the model in bfloat16 with its tokenizer, and print what it gets right."""
    console = Console()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = load(start) if start else build()
    console.print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters")
    began = time.perf_counter()

    def progress(step: int, loss: float) -> None:
        if (step + 1) % 50 == 0:
            took = time.perf_counter() - began
            speed = (step + 1) * tokens / took
            console.print(
                f"step {step + 1} of {steps}: loss {loss:.4f}, {took:.0f} s, {time.process_time():.0f} s of processor "
                f"time, {speed:.0f} tokens/s"
            )
        if (step + 1) % 500 == 0:  # so that a run that is stopped leaves something
            save(model, out)

    lengths, drills = length or (LENGTH,), drill or text.COPYING
    train(model, steps, tokens, seed, progress, rate=rate, lengths=lengths, drills=drills)
    save(model, out)
    show(console, evaluate(out))


def load(folder: Path) -> Any:
    """A model that was saved, float32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def save(model: Any, folder: Path) -> None:
    """Write the model, in bfloat16, and its tokenizer, as transformers reads them."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)


if __name__ == "__main__":
    typer.run(main)
