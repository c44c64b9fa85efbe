"""What is typed, pasted or piped into a chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

PROMPT = "> "
_PASTE, _PASTED = "\x1b[200~", "\x1b[201~"  # what terminals put around it


class Lines:
    """What comes from the standard input, a message at a time: a line, or what a terminal says was pasted.

    Raises:
        UnicodeError: on reading a line that is not UTF-8; the next can be read.
        EOFError: there are no more.
    """

    def __init__(self) -> None:
        self.terminal = sys.stdin.isatty()
        self._marks = False  # whether marks around a paste come with the text: readline takes them itself
        if self.terminal:
            try:
                import readline  # gives input() a history and the keys to edit a line

                self._marks = "GNU" not in (readline.__doc__ or "")  # another library under that name knows no paste
                readline.parse_and_bind("set enable-bracketed-paste on")
            except ImportError:
                self._marks = True

    @contextmanager
    def open(self) -> Iterator[Lines]:
        """Have the terminal mark what is pasted."""
        try:
            if self._marks:
                print("\x1b[?2004h", end="", flush=True)
            yield self
        finally:
            if self._marks:
                print("\x1b[?2004l", end="", flush=True)

    def read(self) -> str:
        """The next message, without its end."""
        if self.terminal:
            line = input(PROMPT)
            while line.count(_PASTE) > line.count(_PASTED):
                line += f"\n{input()}"
            line = line.replace(_PASTE, "").replace(_PASTED, "")
            line.encode()  # in a C locale, strange bytes come as surrogates
            return line
        raw = sys.stdin.buffer.readline()
        if not raw:
            raise EOFError
        return raw.decode().rstrip("\r\n")
