"""``graph-capture chat``: talk to a model in a terminal, or through a pipe."""

from __future__ import annotations

import signal
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
from graph_capture.cli.conversation import Conversation, plain_text, read_value
from graph_capture.cli.lines import Lines
from graph_capture.errors import CaptureError
from graph_capture.runtime.llm import Completion
from graph_capture.tiny import FOLDER

# What a model writes must not steer the terminal.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")}, "\N{REPLACEMENT CHARACTER}")


class Progress:
    """Shows what an engine is doing, and for how long; nothing where `console` is no terminal.

    Attributes:
        quiet: shows nothing for now: the line belongs to an answer.
        ended: asked while quiet: whether the answer has ended, and its line with it.
    """

    def __init__(self, console: Console) -> None:
        self.quiet = False
        self.ended: Callable[[], bool] = lambda: False
        self._console = console
        self._bar: bars.Progress | None = None

    def __call__(self, text: str) -> None:
        if not self._console.is_terminal or (self.quiet and not self.ended()):
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


class Chat:
    """One conversation.

    Args:
        engine: answers.
        progress: what the engine was given.
        out, notes: consoles for answers, and for what is said about them.
        system: the system message.
        options: of `InferEngine.stream`.

    Attributes:
        talk: what was said.
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
        self.talk = Conversation(system)
        self._templated = bool(getattr(engine.tokenizer, "chat_template", None))
        self._line_open = False
        self.failed = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What was said."""
        return self.talk.messages

    @property
    def room(self) -> int:
        """Tokens for the prompt, where an answer may be as long as it is to be."""
        return self.engine.capacity - min(self.options["max_new_tokens"], self.engine.capacity // 2)

    def run(self) -> None:
        """Read and answer lines until there are no more, or the user leaves."""
        lines = Lines()
        if lines.terminal:
            self.note("/help lists the commands; Ctrl-C stops an answer")
        if not self._templated:
            self.note("the model has no chat template: it continues each line by itself")
        with lines.open(), suppress(EOFError, KeyboardInterrupt):  # Ctrl-C at the prompt, or while a command prints
            while self._take(lines):
                pass
            return
        if lines.terminal:
            self.out.print()

    def _take(self, lines: Lines) -> bool:
        """Read a message and do what it asks; whether to go on."""
        try:
            line = lines.read().strip()
        except UnicodeError:
            self.fail(CaptureError("the line is not UTF-8; it was left out"))
            return True
        if line == "/quit":
            return False
        if line.startswith("/") and "\n" not in line:  # what has several lines was pasted
            self.command(*line.split(maxsplit=1))
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
        """Answer one message, piece by piece; Ctrl-C stops it, and what was said until then counts."""
        said: list[str] = []
        before, answered = list(self.messages), self.engine.last
        self.messages.append({"role": "user", "content": line})
        self.progress.ended = lambda: self.engine.last is not answered and self._end_line()
        with _interruptible() as interrupted:
            try:
                pieces = self.engine.stream(self._prompt(), **self.options)
                for piece in pieces:
                    self.progress.done()
                    self.progress.quiet = self._line_open = True
                    said.append(piece)
                    self.out.out(piece.translate(_CONTROLS), end="", highlight=False)
                    if interrupted():
                        break
                del pieces  # an engine waits for its stream to end
            except KeyboardInterrupt:  # the second, while the engine was at something that takes long
                pass
            except CaptureError as error:
                self.talk.messages = before
                self.progress.done()
                self._end_line()
                self.fail(error)
                return
            finally:
                self.progress.done()
                self.progress.quiet = False
        self._end_line()
        if said:
            self.messages.append({"role": "assistant", "content": "".join(said)})
        else:
            self.messages.pop()
        if interrupted() or self.engine.last is None:
            self.note("stopped")
        else:
            self.note(f"{summary(self.engine.last)}, fusion {_switch(self.engine.enable_fusion)}")

    def _end_line(self) -> bool:
        """End the line of an answer, if it is open."""
        if self._line_open:
            self.out.print()
        self._line_open = False
        return True

    def _prompt(self) -> str | list[dict[str, Any]]:
        """The conversation, without its oldest turns where it leaves too little room for an answer.

        Raises:
            CaptureError: the last message does not fit even alone; nothing is forgotten.
        """
        if not self._templated:
            return plain_text(self.messages[-1])
        talk, encode = self.talk, self.engine.encode_messages
        if len(talk.messages) > talk.first + 1 and len(encode(talk.messages)) > self.room:
            alone = len(encode(talk.last()))
            if alone >= self.engine.capacity:
                raise CaptureError(
                    f"the message has {alone} tokens, and the cache {self.engine.capacity} slots: shorten it, or take "
                    "a larger --max-length; it was left out, and the conversation is as it was"
                )
            count = talk.forget(lambda messages: len(encode(messages)) <= self.room)
            self.note(f"the oldest {count} messages do not fit any more, and are forgotten")
        return talk.messages

    # --- commands

    def command(self, name: str, rest: str = "") -> None:
        """Do what a line that starts with a slash says."""
        rest = rest.strip()
        try:
            self._command(name, rest)
        except CaptureError as error:
            self.fail(error)

    def _command(self, name: str, rest: str) -> None:
        match name, rest:
            case "/help", "":
                self.out.print(HELP, highlight=False, markup=False)
            case "/stats", "":
                self.out.print(_stats_table(self.engine.stats()))
            case "/explain", "":
                self.out.print(self.engine.explain(), soft_wrap=True, highlight=False, markup=False)
            case "/fusion", ("on" | "off"):
                self.engine.enable_fusion = rest == "on"
                self.note(f"fusion {rest}")
            case "/fusion", "":
                self.note(f"fusion {_switch(self.engine.enable_fusion)}")
            case "/reset", "":
                self.talk.reset()
                self.note("the conversation is forgotten")
            case "/system", "":
                self.note(f"system message: {self.talk.system}" if self.talk.system else "there is no system message")
            case "/system", _:
                self.talk.system = None if rest == "off" else rest
                self.note("there is no system message" if rest == "off" else "the system message is set")
            case "/set", "":
                self.note(", ".join(f"{key} {value}" for key, value in self.options.items() if value is not None))
            case "/set", _:
                key, value = read_value(rest)
                self.options = {**self.options, key: value}
                if value is None:
                    self.options = {"max_new_tokens": 128} | {k: v for k, v in self.options.items() if v is not None}
                self.note(f"{key} {'is as the model has it' if value is None else value}")
            case "/save", _ if rest:
                self.talk.save(rest, self.options)
                self.note(f"{len(self.messages)} messages are in {rest}")
            case "/load", _ if rest:
                self.options |= self.talk.load(rest)
                self.note(f"{len(self.messages)} messages are back")
            case (("/save" | "/load"), _):
                raise CaptureError(f"{name} takes the name of a file: {name} talk.json")
            case _:
                raise CaptureError(f"there is no command {' '.join((name, rest)).strip()}; /help lists them")


HELP = """\
/stats          the latest answer, the cache, the captured steps
/explain        the receipts: what was fused and why, what was not and why not
/fusion on|off  use the fused steps, or the model as it is
/system TEXT    a message that says how to answer; /system shows it, /system off drops it
/set NAME VALUE temperature 0.7, top_p 0.9, max_new_tokens 200 ...; /set shows them, default drops one
/save FILE      keep the conversation
/load FILE      go on with one that was kept
/reset          forget the conversation
/help           this list; several lines that are pasted are one message
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
    max_length: int | None = None,
    quantize: str | None = None,
    system: str | None = None,
    **options: Any,
) -> bool:
    """Load a model and talk to it; whether every line got an answer.

    Args:
        model, device, dtype, fusion, quantize: of `InferEngine`; without a model the tiny one that comes along.
        max_length: tokens of a conversation (default: what the model was made for, and memory allows).
        system: the system message.
        options: of `InferEngine.stream`; None leaves one as the model has it.

    Raises:
        CaptureError: see `InferEngine`.
    """
    hide_progress_bars()
    out, notes = Console(), Console(stderr=True)
    progress = Progress(notes)
    options = {name: value for name, value in options.items() if value is not None}
    try:
        engine = InferEngine(
            model or FOLDER,
            device,
            fusion,
            dtype,
            max_length="most" if max_length is None else max_length,
            progress=progress,
            quantize=quantize,
        )
        if engine.enable_fusion:
            engine.warm_up(**options)
    finally:
        progress.done()
    chat = Chat(engine, progress, out, notes, system=system, **options)
    chat.run()
    return not chat.failed
