"""The tiny model's tokens: a byte each, and marks around what is said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.tiny import text

MARKS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
END, SYSTEM, USER, ASSISTANT = range(256, 260)
VOCABULARY = 260
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Part(NamedTuple):
    """A question and its answer as ids; the question has the marks around it that the answer follows."""

    task: str
    question: list[int]
    answer: list[int]


def chat_part(turn: text.Turn, system: str | None = None) -> Part:
    """A turn as `TEMPLATE` writes it."""
    before = [SYSTEM, *system.encode(), END] if system else []
    return Part(turn.task, [*before, USER, *turn.prompt.encode(), END, ASSISTANT], [*turn.answer.encode(), END])


def bare_part(turn: text.Turn) -> Part:
    """A turn without any marks but the end's: ``17+25=`` and ``42``."""
    return Part(turn.task, [*turn.prompt.encode()], [*turn.answer.encode(), END])


def conversation(talk: text.Conversation, tasks: Sequence[str] = ()) -> Iterator[Part]:
    """A conversation without end; side by side the parts are what `TEMPLATE` makes of it."""
    for index, turn in enumerate(talk.turns(tasks)):
        yield chat_part(turn, None if index else talk.system)


def equations(talk: text.Conversation) -> Iterator[Part]:
    """Sums and differences without end, outside any conversation."""
    while True:
        yield bare_part(talk.equation())


def save_tokenizer(folder: Path) -> None:
    """Write the files that transformers' ``AutoTokenizer`` reads."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    # Byte-level tokenizers write a byte as a printable character: itself, or the next one from 256 on.
    letters = _letters()
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    assert set(letters) == set(ByteLevel.alphabet())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=MARKS[0],
        pad_token=MARKS[0],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def _letters() -> list[str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
