"""From tokens to text while they come: whole characters only, and nothing that a stop string may still claim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class Detokenizer:
    """The text of one answer.

    Attributes:
        text: what is settled.
        stopped: whether a stop string has come; it is not part of the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._start = 0  # tokens from here on are decoded together: a tokenizer joins what follows another
        self._settled = 0  # and those before here are in the text
        self._whole = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What the token adds to the text."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._settled])
        now = self._decode(self._tokens[self._start :])
        if now.endswith(BROKEN) or len(now) <= len(before):
            return ""
        self._start, self._settled = self._settled, len(self._tokens)
        return self._settle(now[len(before) :], final=False)

    def finish(self) -> str:
        """What was held back."""
        rest = self._decode(self._tokens[self._start :])[len(self._decode(self._tokens[self._start : self._settled])) :]
        self._start = self._settled = len(self._tokens)
        return self._settle(rest, final=True)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""

    def _settle(self, more: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._whole += more
        places = [
            at for at in (self._whole.find(word, max(0, len(self.text) - len(word))) for word in self._stop) if at >= 0
        ]
        if places:
            self.stopped = True
            end = min(places)
        elif final:
            end = len(self._whole)
        else:
            end = len(self._whole) - max((_overlap(self._whole, word) for word in self._stop), default=0)
        piece = self._whole[len(self.text) : end]
        self.text = self._whole[: max(end, len(self.text))]
        return piece


def _overlap(text: str, word: str) -> int:
    """The length of the longest beginning of `word` that `text` ends with."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:size])), 0)
