"""``graph-capture chat``: talk to a model in a terminal, or through a pipe."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from rich import progress as bars
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graph_capture import InferEngine
from graph_capture.cli.console import show_error
from graph_capture.errors import CaptureError
from graph_capture.runtime.llm import Completion
from graph_capture.tiny import FOLDER

PROMPT = "> "
# What a model writes must not steer the terminal.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")}, "\N{REPLACEMENT CHARACTER}")


class Progress:
    """Shows what an engine is doing, and for how long; nothing where `console` is no terminal.

    Attributes:
        quiet: shows nothing for now: the line belongs to an answer.
    """

    def __init__(self, console: Console) -> None:
        self.quiet = False
        self._console = console
        self._bar: bars.Progress | None = None

    def __call__(self, text: str) -> None:
        if self.quiet or not self._console.is_terminal:
            return
        if self._bar is None:
            columns = (bars.TextColumn("{task.description}"), bars.BarColumn(16), bars.TimeElapsedColumn())
            self._bar = bars.Progress(*columns, console=self._console, transient=True)
            self._bar.start()
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task(text, total=None)

    def done(self) -> None:
        """Take the line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Lines:
    """The lines of the standard input.

    Raises:
        UnicodeError: on reading a line that is not UTF-8; the next can be read.
        EOFError: there are no more.
    """

    def __init__(self) -> None:
        self.terminal = sys.stdin.isatty()
        if self.terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  # gives input() a history and the keys to edit a line

    def read(self) -> str:
        """The next line, without its end."""
        if self.terminal:
            line = input(PROMPT)
            line.encode()  # in a C locale, strange bytes come as surrogates
            return line
        raw = sys.stdin.buffer.readline()
        if not raw:
            raise EOFError
        return raw.decode().rstrip("\r\n")


class Chat:
    """One conversation.

    Args:
        engine: answers.
        progress: what the engine was given.
        out, notes: consoles for answers, and for what is said about them.
        system: the system message.
        options: of `InferEngine.stream`.

    Attributes:
        messages: what was said.
        failed: whether a line got no answer.
    """

    def __init__(
        self,
        engine: InferEngine,
        progress: Progress,
        out: Console,
        notes: Console,
        *,
        system: str | None = None,
        max_new_tokens: int = 128,
        **options: Any,
    ) -> None:
        self.engine, self.progress, self.out, self.notes = engine, progress, out, notes
        self.options = {"max_new_tokens": max_new_tokens, **options}
        self.room = engine.capacity - min(max_new_tokens, engine.capacity // 2)  # for the prompt
        self._opening = [{"role": "system", "content": system}] if system else []
        self._templated = bool(getattr(engine.tokenizer, "chat_template", None))
        self.messages = list(self._opening)
        self.failed = False

    def run(self) -> None:
        """Read and answer lines until there are no more, or the user leaves."""
        lines = Lines()
        if lines.terminal:
            self.note("/help lists the commands; Ctrl-C stops an answer")
        if not self._templated:
            self.note("the model has no chat template: it continues each line by itself")
        with suppress(EOFError, KeyboardInterrupt):  # Ctrl-C at the prompt, or while a command prints
            while self._take(lines):
                pass
            return
        if lines.terminal:
            self.out.print()

    def _take(self, lines: Lines) -> bool:
        """Read a line and do what it asks; whether to go on."""
        try:
            line = lines.read().strip()
        except UnicodeError:
            self.fail(CaptureError("the line is not UTF-8; it was left out"))
            return True
        if line == "/quit":
            return False
        if line.startswith("/"):
            self.command(*line.split())
        elif line:
            self.answer(line)
        return True

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        self.notes.print(text, style="dim", soft_wrap=True, highlight=False, markup=False)

    def fail(self, error: CaptureError) -> None:
        """Say what went wrong; the conversation goes on."""
        self.failed = True
        show_error(self.notes, error)

    # --- answers

    def answer(self, line: str) -> None:
        """Answer one line, piece by piece; Ctrl-C stops it, and what was said until then counts."""
        said: list[str] = []
        self.messages.append({"role": "user", "content": line})
        with _interruptible() as interrupted:
            try:
                pieces = self.engine.stream(self._prompt(), **self.options)
                for piece in pieces:
                    self.progress.done()
                    self.progress.quiet = True
                    said.append(piece)
                    self.out.out(piece.translate(_CONTROLS), end="", highlight=False)
                    if interrupted():
                        break
                del pieces  # an engine waits for its stream to end
            except KeyboardInterrupt:  # the second, while the engine was at something that takes long
                pass
            except CaptureError as error:
                self.messages.pop()
                self.progress.done()
                if said:
                    self.out.print()
                self.fail(error)
                return
            finally:
                self.progress.done()
                self.progress.quiet = False
        if said:
            self.out.print()
            self.messages.append({"role": "assistant", "content": "".join(said)})
        else:
            self.messages.pop()
        if interrupted() or self.engine.last is None:
            self.note("stopped")
        else:
            self.note(f"{summary(self.engine.last)}, fusion {_switch(self.engine.enable_fusion)}")

    def _prompt(self) -> str | list[dict[str, str]]:
        """The conversation, without its oldest turns where it leaves too little room for an answer."""
        if not self._templated:
            return self.messages[-1]["content"]
        first, before = len(self._opening), len(self.messages)
        while len(self.messages) > first + 2 and len(self.engine.encode_messages(self.messages)) > self.room:
            del self.messages[first : first + 2]
        if len(self.messages) < before:
            self.note(f"the oldest {before - len(self.messages)} messages do not fit any more, and are forgotten")
        return self.messages

    # --- commands

    def command(self, name: str, *arguments: str) -> None:
        """Do what a line that starts with a slash says."""
        match (name, *arguments):
            case ("/help",):
                self.out.print(HELP, highlight=False, markup=False)
            case ("/stats",):
                self.out.print(_stats_table(self.engine.stats()))
            case ("/explain",):
                self.out.print(self.engine.explain(), soft_wrap=True, highlight=False, markup=False)
            case ("/fusion", ("on" | "off") as switch):
                self.engine.enable_fusion = switch == "on"
                self.note(f"fusion {switch}")
            case ("/fusion",):
                self.note(f"fusion {_switch(self.engine.enable_fusion)}")
            case ("/reset",):
                self.messages = list(self._opening)
                self.note("the conversation is forgotten")
            case _:
                self.fail(CaptureError(f"there is no command {' '.join((name, *arguments))}; /help lists them"))


HELP = """\
/stats          the latest answer, the cache, the captured steps
/explain        the receipts: what was fused and why, what was not and why not
/fusion on|off  use the fused steps, or the model as it is
/reset          forget the conversation
/help           this list
/quit           leave; so do Ctrl-D, and Ctrl-C at the prompt"""


def summary(answer: Completion) -> str:
    """One line about an answer's speed."""
    parts = [f"{len(answer.tokens)} tokens"]
    if answer.tokens_per_second:
        parts.append(f"{answer.tokens_per_second:.0f} tokens/s")
    parts.append(f"first token after {answer.time_to_first_token * 1e3:.0f} ms")
    if answer.finish_reason == "length":
        parts.append("cut off at the limit")
    return ", ".join(parts)


def hide_progress_bars() -> None:
    """Those of transformers: we show our own."""
    with suppress(ImportError):  # loading says so
        from transformers.utils import logging

        logging.disable_progress_bar()


def _switch(on: bool) -> str:
    return "on" if on else "off"


def _stats_table(stats: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=SIMPLE_HEAD)
    for name, value in stats.items():
        if isinstance(value, dict):
            value = "\n".join(f"{key}: {inner}" for key, inner in value.items())
        elif isinstance(value, float):
            value = f"{value:.4g}"
        table.add_row(name.replace("_", " "), Text("" if value is None else str(value)))
    return table


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C is only remembered: work under way ends in good order. The next one raises."""
    asked = False

    def remember(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():  # where signals cannot be had
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def run(
    model: str | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    fusion: bool = True,
    system: str | None = None,
    **options: Any,
) -> bool:
    """Load a model and talk to it; whether every line got an answer.

    Args:
        model, device, dtype, fusion: of `InferEngine`; without a model the tiny one that comes with the package.
        system: the system message.
        options: of `InferEngine.stream`.

    Raises:
        CaptureError: see `InferEngine`.
    """
    hide_progress_bars()
    out, notes = Console(), Console(stderr=True)
    progress = Progress(notes)
    try:
        engine = InferEngine(model or FOLDER, device, fusion, dtype, progress=progress)
        if engine.enable_fusion:
            engine.warm_up(**options)
    finally:
        progress.done()
    chat = Chat(engine, progress, out, notes, system=system, **options)
    chat.run()
    return not chat.failed
