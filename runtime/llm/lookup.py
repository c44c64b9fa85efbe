"""Prompt lookup: what followed the last words where they stood before is likely to follow again (Saxena, 2023)."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH = 8  # tokens that a step checks: the one that is certain, and those that are guessed
GRAM = 3  # tokens that must have stood together before
PAYS = 1.4  # tokens a step, on an answer that was given, from which on a step of several is worth recording
ENOUGH = 32  # tokens of an answer that says something about that
_SLOW = 0.1  # the part that a new step has in what is known of the past ones


class Lookup:
    """Guesses the next tokens of one sequence, and keeps account of whether that pays.

    Attributes:
        cost: of a step that checks `WIDTH` tokens, in decode steps; 0 where none is captured.
        gain: tokens that such a step has given lately, or would have.
    """

    def __init__(self) -> None:
        self.cost = 0.0
        self.gain = 0.0
        self.seconds = (0.0, 0.0)  # of a decode step and of one that checks
        self.steps = self.given = 0
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}

    @property
    def pays(self) -> bool:
        """Whether a step of several tokens is faster than as many decode steps."""
        return bool(self.cost) and self.gain > self.cost

    def begin(self, tokens: Sequence[int]) -> None:
        """A sequence begins with these tokens."""
        self._tokens, self._places = [], {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """A token follows."""
        if len(self._tokens) >= GRAM:
            self._places[tuple(self._tokens[-GRAM:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self) -> list[int]:
        """What followed the last tokens before, `WIDTH` - 1 tokens; what repeats itself goes on so."""
        place = self._places.get(tuple(self._tokens[-GRAM:]))
        if place is None:
            return []
        guess = self._tokens[place : place + WIDTH - 1]
        while len(guess) < WIDTH - 1:
            guess += guess[: WIDTH - 1 - len(guess)]
        return guess

    def timed(self, decode: float, check: float) -> None:
        """A decode step takes so many seconds, and one that checks `WIDTH` tokens so many."""
        self.seconds = (decode, check)
        self.cost = check / decode

    def took(self, given: int) -> None:
        """A step that checked a guess gave so many tokens."""
        self.steps += 1
        self.given += given
        self.gain += _SLOW * (given - self.gain)

    def look_back(self, prompt: Sequence[int], answer: Sequence[int]) -> float:
        """How many tokens a step would have given, over the steps that had a guess, in an answer; 0 without any."""
        past = Lookup()
        past.begin(prompt)
        at = steps = given = 0
        while at < len(answer):
            guessed = past.guess()
            right = 0
            while right < len(guessed) and at + right < len(answer) and guessed[right] == answer[at + right]:
                right += 1
            count = min(right + 1, len(answer) - at)
            if guessed:
                steps, given = steps + 1, given + count
            for token in answer[at : at + count]:
                past.add(token)
            at += count
        often = steps and 4 * given >= len(answer)  # what seldom helps is not worth a recording
        return given / steps if often else 0.0

    def __str__(self) -> str:
        decode, check = (f"{seconds * 1e3:.2f} ms" for seconds in self.seconds)
        given = f"; {self.given / self.steps:.1f} tokens a step in {self.steps} steps" if self.steps else ""
        return (
            f"prompt lookup is {'on' if self.pays else 'off'}: a step that checks {WIDTH} tokens takes {check}, a "
            f"decode step {decode}, so {self.cost:.2f} tokens a step would pay, and {self.gain:.2f} is expected{given}"
        )
