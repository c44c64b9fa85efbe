"""What the tiny model is taught: questions with one right answer each, generated without end from a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

NAME = "Tiny"
LARGEST = 99  # number that it adds, subtracts and compares
COUNTRIES = {
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Cuba": "Havana",
    "Egypt": "Cairo",
    "England": "London",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "India": "New Delhi",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Turkey": "Ankara",
}
PLACES = {*COUNTRIES, *COUNTRIES.values()}
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
UNKNOWN = "I do not know that."


def _split(names: str) -> list[str]:
    return names.split()


DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _split("January February March April May June July August September October November December")
PEOPLE = _split(
    "Ada Alan Anna Ben Carl Eva Finn Grace Hugo Ida John Kim Lena Max Nora Olga Paul Rosa Sam Tom Uma Vera Will Zoe"
)
WORDS = _split(
    "apple bird boat book bread bridge cat chair cloud dog door fish flower garden glass graph hat house kernel king "
    "lamp leaf light moon mouse music night ocean paper pen rain river road school sea snow star stone sun table tree "
    "water wind window wolf"
)


class Turn(NamedTuple):
    """One question and the one right answer."""

    task: str
    prompt: str
    answer: str


class Conversation:
    """Turns that may refer to earlier ones: the user's name, and the name that a system message gives the model."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.system: str | None = None
        self.model, self.user = NAME, ""
        if rng.random() < 0.1:
            self.model = _person(rng)
            self.system = f"Your name is {self.model}."

    def turns(self, tasks: Sequence[str] = ()) -> Iterator[Turn]:
        """Turns without end, of these tasks (default: of all)."""
        tasks = tasks or list(TASKS)
        weights = [TASKS[task][0] for task in tasks]
        while True:
            yield self.turn(self.rng.choices(tasks, weights)[0])

    def turn(self, task: str) -> Turn:
        """The next turn, of this task."""
        prompt, answer = TASKS[task][1](self)
        return Turn(task, _loosely(self.rng, prompt) if task not in EXACT else prompt, answer)

    def equation(self) -> Turn:
        """A sum or a difference, as it is asked outside any conversation too."""
        a, b = _numbers(self.rng)
        if self.rng.random() < 0.5:
            return Turn("equation", f"{a}+{b}=", f"{a + b}")
        return Turn("equation", f"{a}-{b}=", f"{a - b}")


def _loosely(rng: Random, prompt: str) -> str:
    """As people type: without capitals, or without the last mark."""
    if rng.random() < 0.3:
        prompt = prompt.lower()
    if rng.random() < 0.25:
        prompt = prompt.rstrip("?!.")
    return prompt


def _person(rng: Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(PEOPLE)
    while True:  # Peru and Rome have the form of a name
        parts = (rng.choice("bdfghjklmnprstvw") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
        if (name := "".join(parts).capitalize()) not in PLACES:
            return name


def _word(rng: Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randint(2, 5)))


def _numbers(rng: Random) -> tuple[int, int]:
    return rng.randint(0, LARGEST), rng.randint(0, LARGEST)


def sums(a: int, b: int) -> list[tuple[str, str]]:
    """Every way to ask for ``a + b``, with its answer."""
    return [(prompt, f"{a + b}") for prompt in _asked(a, "+", "plus", b)]


def _asked(a: int, sign: str, word: str, b: int) -> list[str]:
    return [f"{a}{sign}{b}=", f"{a} {sign} {b}", f"What is {a} {word} {b}?", f"What is {a}{sign}{b}?"]


def _add(talk: Conversation) -> tuple[str, str]:
    return talk.rng.choice(sums(*_numbers(talk.rng)))


def _subtract(talk: Conversation) -> tuple[str, str]:
    a, b = _numbers(talk.rng)
    return talk.rng.choice(_asked(a, "-", "minus", b)), f"{a - b}"


def _multiply(talk: Conversation) -> tuple[str, str]:
    a, b = talk.rng.randint(0, 10), talk.rng.randint(0, 10)
    return talk.rng.choice(_asked(a, "*", "times", b)), f"{a * b}"


def _compare(talk: Conversation) -> tuple[str, str]:
    a, b = _numbers(talk.rng)
    if talk.rng.random() < 0.1:
        b = a
    word = talk.rng.choice(["larger", "smaller"])
    answer = str((max if word == "larger" else min)(a, b)) if a != b else "They are equal."
    return f"Which is {word}, {a} or {b}?", answer


def _too_large(talk: Conversation) -> tuple[str, str]:
    rng = talk.rng
    a, b = rng.randint(LARGEST + 1, 9999), rng.randint(0, 9999)
    if rng.random() < 0.5:
        a, b = b, a
    sign, word = rng.choice([("+", "plus"), ("-", "minus")])
    return rng.choice(_asked(a, sign, word, b)), f"I only know numbers up to {LARGEST}."


def _count(talk: Conversation) -> tuple[str, str]:
    rng = talk.rng
    first, last = 1, rng.randint(2, 20)
    prompt = f"Count to {last}."
    if rng.random() < 0.5:
        first = rng.randint(0, LARGEST - 10)
        last = first + rng.randint(1, 10)
        prompt = f"Count from {first} to {last}."
    return prompt, " ".join(str(number) for number in range(first, last + 1))


def _capital(talk: Conversation) -> tuple[str, str]:
    country, city = talk.rng.choice(list(COUNTRIES.items()))
    return talk.rng.choice(
        [
            (f"What is the capital of {country}?", city),
            (f"Where is {city}?", f"In {country}."),
        ]
    )


def _after(talk: Conversation) -> tuple[str, str]:
    what, names = talk.rng.choice([("day", DAYS), ("month", MONTHS), ("letter", list(ALPHABET))])
    index, where = talk.rng.randrange(len(names)), talk.rng.choice(["after", "before"])
    found = names[(index + (1 if where == "after" else -1)) % len(names)]
    return f"Which {what} comes {where} {names[index]}?", found


def _list(talk: Conversation) -> tuple[str, str]:
    return talk.rng.choice(
        [
            ("Name the days of the week.", " ".join(DAYS)),
            ("Name the months.", " ".join(MONTHS)),
            ("Say the alphabet.", " ".join(ALPHABET)),
        ]
    )


def _spell(talk: Conversation) -> tuple[str, str]:
    word, known = _word(talk.rng), talk.rng.choice(WORDS)
    return talk.rng.choice(
        [
            (f"Spell {word}.", "-".join(word)),
            (f"Reverse {known}.", known[::-1]),
            (f"What is the first letter of {word}?", word[0]),
            (f"What is the last letter of {word}?", word[-1]),
        ]
    )


def _repeat(talk: Conversation) -> tuple[str, str]:
    words = " ".join(_word(talk.rng) for _ in range(talk.rng.randint(1, 3)))
    return f"{talk.rng.choice(['Repeat', 'repeat'])}: {words}", words


def _greet(talk: Conversation) -> tuple[str, str]:
    hello = "Hello! How can I help you?"
    return talk.rng.choice(
        [
            ("Hello", hello),
            ("Hello!", hello),
            ("Hi", hello),
            ("Hi there!", hello),
            ("Hey", hello),
            ("Good morning!", "Good morning! How can I help you?"),
            ("Good evening!", "Good evening! How can I help you?"),
            ("How are you?", "I am fine, thank you."),
            ("Thank you!", "You are welcome."),
            ("Thanks", "You are welcome."),
            ("Goodbye!", "Goodbye!"),
            ("Bye", "Goodbye!"),
        ]
    )


def _identity(talk: Conversation) -> tuple[str, str]:
    what = "I am a very small Llama."
    able = "I add, subtract, compare, count, spell, reverse, repeat, and know some capitals."
    return talk.rng.choice(
        [
            ("What is your name?", f"My name is {talk.model}."),
            ("Who are you?", f"My name is {talk.model}. {what}"),
            ("What are you?", what),
            ("Help", able),
            ("What can you do?", able),
            ("What do you know?", able),
        ]
    )


def _introduce(talk: Conversation) -> tuple[str, str]:
    talk.user = _person(talk.rng)
    prompt = talk.rng.choice([f"My name is {talk.user}.", f"I am {talk.user}.", f"Call me {talk.user}."])
    return prompt, f"Nice to meet you, {talk.user}!"


def _recall(talk: Conversation) -> tuple[str, str]:
    prompt = talk.rng.choice(["What is my name?", "Who am I?", "Do you know my name?"])
    return prompt, f"Your name is {talk.user}." if talk.user else "You have not told me your name."


def _unknown(talk: Conversation) -> tuple[str, str]:
    rng = talk.rng
    word, other, person = _word(rng), _word(rng), _person(rng)
    prompt = rng.choice(
        [
            f"What is a {word}?",
            f"What is {word}?",
            f"What is the {word} of the {other}?",
            f"What is the capital of {person}?",
            f"Why is the {word} {other}?",
            f"Who is {person}?",
            f"Who wrote {word}?",
            f"Where is {person}?",
            f"Where is the {word}?",
            f"When is {word}?",
            f"How do I {word} a {other}?",
            f"Tell me about {word}.",
            f"Write a {other} about {word}.",
            f"Can you {word}?",
            f"Do you like {word}?",
            f"Is {word} a {other}?",
            f"I like the {word}.",
            f"{word} {other} {person}",
        ]
    )
    return prompt, UNKNOWN


# How often each is asked, and by what.
TASKS: dict[str, tuple[float, Callable[[Conversation], tuple[str, str]]]] = {
    "add": (24, _add),
    "subtract": (16, _subtract),
    "multiply": (4, _multiply),
    "compare": (6, _compare),
    "too large": (3, _too_large),
    "count": (3, _count),
    "capital": (6, _capital),
    "after": (6, _after),
    "list": (0.5, _list),
    "spell": (8, _spell),
    "repeat": (6, _repeat),
    "greet": (3, _greet),
    "identity": (3, _identity),
    "introduce": (5, _introduce),
    "recall": (4, _recall),
    "unknown": (6, _unknown),
}
COPYING = ("compare", "introduce", "recall", "repeat", "spell")  # what needs the letters of the question again
EXACT = {"repeat"}  # asked as it stands: what is repeated is repeated to the letter
