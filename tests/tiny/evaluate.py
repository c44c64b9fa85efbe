"""What the tiny model gets right: greedy answers, compared letter by letter."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tests.tiny import text
from tests.tiny.tokens import END, Part, bare_part, chat_part, conversation

CONVERSATIONS, LENGTH = 1000, 256  # how many, and their tokens at most
TOKENS = 16384  # at once
SEED = 1_000_000  # not one that is trained on
DTYPES = (torch.float32, torch.bfloat16)


class Score(NamedTuple):
    """How many answers are right."""

    what: str
    dtype: str
    right: int
    asked: int


def evaluate(folder: Path) -> list[Score]:
    """Ask all sums of two numbers, in every way, and conversations in which every task comes up."""
    from transformers import AutoModelForCausalLM

    scores = []
    for dtype in DTYPES:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
        right, asked = Counter[str](), Counter[str]()
        for row in answered(model, [*sums(), *conversations(CONVERSATIONS)]):
            for what, ok in row:
                right[what] += ok
                asked[what] += 1
        scores += [Score(what, str(dtype).removeprefix("torch."), right[what], asked[what]) for what in asked]
    return scores


def show(console: Console, scores: Iterable[Score]) -> None:
    """Print a table of scores."""
    table = Table("what", box=SIMPLE_HEAD)
    columns: dict[str, dict[str, Score]] = defaultdict(dict)
    for score in scores:
        columns[score.what][score.dtype] = score
    for dtype in next(iter(columns.values())):
        table.add_column(dtype, justify="right")
    for what, found in columns.items():
        table.add_row(what, *(f"{score.right} of {score.asked}" for score in found.values()))
    console.print(table)


def sums() -> Iterator[list[Part]]:
    """All sums of two numbers, asked in every way, each the first of a conversation or outside any."""
    for a in range(text.LARGEST + 1):
        for b in range(text.LARGEST + 1):
            for example, (prompt, answer) in zip(text.sums(17, 25), text.sums(a, b), strict=True):
                yield [chat_part(text.Turn(example[0], prompt, answer))]
            yield [bare_part(text.Turn("17+25= outside a conversation", f"{a}+{b}=", f"{a + b}"))]


def conversations(count: int) -> Iterator[list[Part]]:
    """Conversations of at most `LENGTH` tokens that it was not trained on."""
    for number in range(count):
        parts, length = [], 0
        for task, question, answer in conversation(text.Conversation(Random(SEED + number))):
            length += len(question) + len(answer)
            if length > LENGTH:
                break
            parts.append(Part(f"in conversation: {task}", question, answer))
        yield parts


def answered(model: Any, rows: list[list[Part]]) -> Iterator[list[tuple[str, bool]]]:
    """Of each row, in any order, what was asked and whether the answer is right.

    An answer is right where each of its tokens, the end too, is the likeliest after what stands before it: just then
    greedy decoding gives it.
    """
    flat = [[token for part in row for token in part.question + part.answer] for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(flat[index]))
    while order:
        length = len(flat[order[-1]])
        batch = [order.pop() for _ in range(min(len(order), max(1, TOKENS // length)))]
        ids = torch.tensor([flat[index] + [END] * (length - len(flat[index])) for index in batch])
        with torch.no_grad():
            likeliest = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        same = torch.nn.functional.pad(likeliest == ids[:, 1:], (1, 0), value=True).tolist()
        for index, right in zip(batch, same, strict=True):
            found, end = [], 0
            for part in rows[index]:
                begin = end + len(part.question)
                end = begin + len(part.answer)
                found.append((part.task, all(right[begin:end])))
            yield found
