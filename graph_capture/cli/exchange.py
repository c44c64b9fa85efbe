"""A short exchange with the tiny model that comes with the package, for the end of the demo."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graph_capture import InferEngine
from graph_capture.cli.chat import Progress, hide_progress_bars
from graph_capture.cli.console import show_table
from graph_capture.tiny import FOLDER

# Some of what it was taught (`tiny.text`), with the one right answer.
QUESTIONS = {
    "Hello!": "Hello! How can I help you?",
    "What is 17 plus 25?": "42",
    "What is the capital of France?": "Paris",
    "My name is Ada.": "Nice to meet you, Ada!",
    "What is my name?": "Your name is Ada.",
}
TIMED, ROUNDS = "Say the alphabet.", 7


@dataclass
class Exchange:
    """What was said, and how fast.

    Attributes:
        answers: for each question the answer, and whether it is right.
        tokens_per_second: of decoding, without and with fusion: the median of rounds that take turns.
        same: whether both gave the same tokens.
    """

    answers: list[dict[str, Any]] = field(default_factory=list)
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    same: bool = False

    @property
    def ok(self) -> bool:
        """Whether all answers are right, and fusion changes none."""
        return self.same and all(answer["right"] for answer in self.answers)


def run(console: Console) -> Exchange:
    """Ask, and time one answer without and with fusion."""
    hide_progress_bars()
    exchange = Exchange()
    progress = Progress(console)
    engine = InferEngine(FOLDER, progress=progress)
    console.print("\na conversation with the tiny Llama that comes with the package", style="italic")
    messages: list[dict[str, str]] = []
    for question, right in QUESTIONS.items():
        messages.append({"role": "user", "content": question})
        answer = engine.chat(messages).text
        progress.done()
        messages.append({"role": "assistant", "content": answer})
        exchange.answers.append({"question": question, "answer": answer, "right": answer == right})
        mark = "" if answer == right else f"   [bold red]OFF: not {right!r}[/bold red]"
        console.print(f"  [bold]{question}[/bold]  {escape(answer)}{mark}", highlight=False)
    rates: dict[bool, list[float]] = {False: [], True: []}
    tokens = {}
    for number in range(ROUNDS + 1):
        for fusion in rates:
            engine.enable_fusion = fusion
            timed = engine.chat([{"role": "user", "content": TIMED}])
            tokens[fusion] = timed.tokens
            if number:  # the first round captures
                rates[fusion].append(timed.tokens_per_second)
    progress.done()
    exchange.same = tokens[False] == tokens[True]
    exchange.tokens_per_second = {("on" if fusion else "off"): statistics.median(r) for fusion, r in rates.items()}
    off, on = exchange.tokens_per_second["off"], exchange.tokens_per_second["on"]
    table = Table("fusion", "tokens/s", "against off", title=f"{len(tokens[True])} tokens, one by one")
    table.add_row("off", f"{off:.0f}", "")
    table.add_row("on", f"{on:.0f}", f"{on / off:.2f} x" if off else "")
    show_table(table, console)
    if not exchange.same:
        console.print("[bold red]Fusion changed an answer.[/bold red]")
    return exchange
