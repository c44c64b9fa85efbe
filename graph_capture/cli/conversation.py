"""What was said in a chat, and how it is kept in a file; the options that can be set in between."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graph_capture.errors import CaptureError
from graph_capture.runtime.llm.prompts import Prompts

WHOLE = ("top_k", "max_new_tokens", "seed")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_ROLES = ("system", "user", "assistant", "tool")


class Conversation:
    """Messages, the system's first where there is one.

    Attributes:
        messages: ``{"role": ..., "content": ...}`` each.
    """

    def __init__(self, system: str | None = None) -> None:
        self.messages: list[dict[str, Any]] = []
        self.system = system

    @property
    def first(self) -> int:
        """How many messages stand before the turns."""
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    @property
    def system(self) -> str | None:
        """The message that says how to answer."""
        return plain_text(self.messages[0]) if self.first else None

    @system.setter
    def system(self, text: str | None) -> None:
        opening = [{"role": "system", "content": text}] if text else []
        self.messages = [*opening, *self.messages[self.first :]]

    def reset(self) -> None:
        """Forget the turns."""
        del self.messages[self.first :]

    def last(self) -> list[dict[str, Any]]:
        """The latest message, as if nothing had been said before it."""
        return [*self.messages[: self.first], self.messages[-1]]

    def forget(self, fits: Callable[[list[dict[str, Any]]], bool]) -> int:
        """Leave out the oldest turns until the rest `fits`, but for the latest message; how many messages went."""
        before = len(self.messages)
        while len(self.messages) > self.first + 2 and not fits(self.messages):
            del self.messages[self.first : self.first + 2]
        if len(self.messages) == self.first + 2 and not fits(self.messages):
            del self.messages[self.first]
        return before - len(self.messages)

    def save(self, path: str, options: Mapping[str, Any]) -> None:
        """Write all of it into a file, as a whole.

        Raises:
            CaptureError: it cannot be written.
        """
        target = Path(path).expanduser()
        made = target.with_name(f".{target.name}.new")
        text = json.dumps({"messages": self.messages, "options": dict(options)}, indent=2, ensure_ascii=False)
        try:
            made.write_text(text + "\n", encoding="utf-8")
            os.replace(made, target)
        except (OSError, UnicodeError, ValueError) as error:
            raise CaptureError(f"{path} cannot be written: {error}") from error

    def load(self, path: str) -> dict[str, Any]:
        """Go on with what a file holds; its options.

        Raises:
            CaptureError: it cannot be read, or holds something else; nothing has changed.
        """
        try:
            held = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise CaptureError(f"{path} cannot be read: {error}") from error
        held = {"messages": held} if isinstance(held, list) else held
        messages = held.get("messages") if isinstance(held, dict) else None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise CaptureError(f"{path} holds no conversation: a list of messages, each with a role and a content")
        options = held.get("options", {})
        if not isinstance(options, dict):
            raise CaptureError(f"{path} holds options that are no table")
        kept = {str(name): _checked(str(name), value) for name, value in options.items() if value is not None}
        self.messages = messages
        return kept


def plain_text(message: Mapping[str, Any]) -> str:
    """The text of a message whose content may be a list of parts, or nothing."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
    return content or ""


def read_value(line: str) -> tuple[str, Any]:
    """An option and its value, of ``temperature 0.7``; None for ``default``.

    Raises:
        CaptureError: there is no such option, or the value is not one of its.
    """
    name, _, text = line.replace("=", " ", 1).partition(" ")
    text = text.strip()
    if name not in (*WHOLE, *NUMBERS, "stop"):
        raise CaptureError(f"there is no option {name!r}; there are {', '.join((*NUMBERS, *WHOLE))}, stop")
    if not text:
        raise CaptureError(f"/set {name} takes a value: /set {name} {'...' if name == 'stop' else 1}")
    if text == "default":
        return name, None
    if name == "stop":
        return name, text
    try:
        value = int(text) if name in WHOLE else float(text)
    except ValueError:
        raise CaptureError(f"{name} must be a {'whole ' if name in WHOLE else ''}number, got {text!r}") from None
    return name, _checked(name, value)


def _checked(name: str, value: Any) -> Any:
    """`value`, if an engine would take it.

    Raises:
        CaptureError: it would not.
    """
    if name not in (*WHOLE, *NUMBERS, "stop", "logit_bias"):
        raise CaptureError(f"there is no option {name!r}")
    Prompts(object(), 2**62).request([[0]], **{name: value})
    return value


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("role") not in _ROLES:
        return False
    content = value.get("content")
    parts = content if isinstance(content, list) else []
    return (content is None or isinstance(content, (str, list))) and all(isinstance(p, (str, dict)) for p in parts)
