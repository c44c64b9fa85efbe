"""The tiny Llama that comes with the package: what it is taught, its tokens, what it answers."""

import re
from itertools import islice
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graph_capture import InferEngine
from graph_capture.tiny import FOLDER
from tests.tiny import evaluate, text, tokens, train

STATEFUL = {"identity", "introduce", "recall"}  # the answer depends on more than the question
QUESTIONS = {
    "17+25=": "42",
    "What is 17 plus 25?": "42",
    "99 + 99": "198",
    "what is 8 minus 90": "-82",
    "What is the capital of France?": "Paris",
    "Which day comes after Monday?": "Tuesday",
    "Spell cat.": "c-a-t",
    "What is 1234 plus 5678?": "I only know numbers up to 99.",
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def test_it_is_small():
    files = [path for path in FOLDER.iterdir() if path.suffix in {".json", ".jinja", ".safetensors"}]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 2e6


# --- the text


def test_a_question_has_one_right_answer():
    answers = {}
    for turn in islice(text.Conversation(Random(1)).turns(), 20000):
        if turn.task not in STATEFUL:
            assert answers.setdefault(turn.prompt, turn.answer) == turn.answer, turn


def test_arithmetic_is_right():
    seen = 0
    for turn in islice(text.Conversation(Random(2)).turns(), 5000):
        if found := re.fullmatch(r"(\d+) ?([-+*]) ?(\d+)=?", turn.prompt):
            a, sign, b = int(found[1]), found[2], int(found[3])
            right = {"+": a + b, "-": a - b, "*": a * b}[sign]
            assert turn.answer == (str(right) if max(a, b) <= text.LARGEST else "I only know numbers up to 99.")
            seen += 1
    assert seen > 500


def test_the_same_seed_says_the_same():
    first, second, other = (list(islice(text.Conversation(Random(seed)).turns(), 50)) for seed in (3, 3, 4))
    assert first == second
    assert first != other


def test_every_task_comes_up():
    assert {turn.task for turn in islice(text.Conversation(Random(5)).turns(), 5000)} == set(text.TASKS)


# --- the tokens


@pytest.mark.parametrize("words", ["17+25=", "", " two  spaces ", "é 🙂\n\t\0", "<|end", "don't"])
def test_a_token_is_a_byte(tokenizer, words):
    ids = tokenizer(words)["input_ids"]
    assert ids == list(words.encode())
    assert tokenizer.decode(ids) == words


def test_the_template_is_what_it_was_trained_on(tokenizer):
    talk = text.Conversation(Random(0))
    talk.system = "Your name is Ada."
    messages, ids = [{"role": "system", "content": talk.system}], []
    for number, turn in enumerate(islice(talk.turns(), 3)):
        part = tokens.chat_part(turn, None if number else talk.system)
        messages.append({"role": "user", "content": turn.prompt})
        made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tokenizer(made)["input_ids"] == ids + part.question
        messages.append({"role": "assistant", "content": turn.answer})
        ids += part.question + part.answer
    assert tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"] == ids


# --- the answers


@pytest.mark.parametrize("dtype", evaluate.DTYPES, ids=str)
def test_it_was_taught_well(dtype):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype, local_files_only=True).eval()
    every_47th = list(islice(evaluate.sums(), 0, None, 47))
    found = [answer for row in evaluate.answered(model, every_47th) for answer in row]
    assert len(found) > 1000
    assert sum(right for _, right in found) >= 0.99 * len(found), [what for what, right in found if not right]
    talk = [answer for row in evaluate.answered(model, list(evaluate.conversations(30))) for answer in row]
    learned = [right for what, right in talk if what not in {"in conversation: count", "in conversation: identity"}]
    assert len(learned) > 200
    assert sum(learned) >= 0.97 * len(learned), [what for what, right in talk if not right]


@pytest.mark.parametrize("fusion", [True, False], ids=["fused", "eager"])
def test_the_engine_answers(fusion):
    engine = InferEngine(FOLDER, "cpu", fusion)
    answers = {question: engine.chat([{"role": "user", "content": question}]).text for question in QUESTIONS}
    assert answers == QUESTIONS
    assert engine.generate("17+25=").text == "42"
    assert bool(engine.stats()["captured"]) == fusion


def test_it_remembers_a_name():
    engine = InferEngine(FOLDER, "cpu", dtype=torch.float32)
    messages = []
    for question, right in {
        "My name is Ada.": "Nice to meet you, Ada!",
        "17+25=": "42",
        "What is my name?": "Your name is Ada.",
        "What is your name?": "My name is Tiny.",
    }.items():
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": engine.chat(messages).text})
        assert messages[-1]["content"] == right


# --- training


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
def test_training_follows_its_seed(tmp_path):
    losses = []
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(model := train.build())
        train.train(model, 4, 512, 0, lambda step, loss: losses.append(loss))
    assert losses[:4] == losses[4:]
    assert losses[3] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    train.save(models[0], tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, models[0].lm_head.weight.bfloat16())
    assert AutoTokenizer.from_pretrained(tmp_path, local_files_only=True).chat_template == tokens.TEMPLATE
