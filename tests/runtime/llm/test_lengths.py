"""Prompts of any length in captured pieces, and guesses of what follows: the tokens stay what they are."""

import pytest
import torch

from graph_capture import FusionConfig, InferEngine
from graph_capture.runtime.llm import lookup as lookups
from graph_capture.runtime.llm.lookup import WIDTH, Lookup
from tests import architectures, zoo

PLAIN = FusionConfig(enable_fusion=False)


def engine(kind="llama", capacity=400, **changes):
    model = architectures.build(kind, max_position_embeddings=512, **changes)
    made = InferEngine(model, max_length=capacity, config=PLAIN)
    made._ends = frozenset()
    return made


def prompt(length, seed=1):
    return (zoo.ids(length, seed=seed)[0] % 60 + 3).tolist()


def plain(ours, row, count):
    ids = torch.tensor([row])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return ours.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(row) :].tolist()


def captured(ours):
    return {name for name in ours.stats()["captured"] if not name.startswith("decode")}


def any_piece_is_faster(ours):
    """What is measured of steps this small says little."""
    for session in ours.sessions.values():
        session._own_seconds.clear()


# --- pieces


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "mistral", "deepseek_v2", "qwen3_moe"])
def test_any_length_is_put_together_from_few_steps(kind):
    ours = engine(kind)
    steps = set()
    for length in (20, 90, 77, 301, 64, 65, 255, 150, 17, 340, 129):
        ours.forget_prompts()
        any_piece_is_faster(ours)
        if length == 17:
            steps = captured(ours)
        row = prompt(length, seed=length)
        assert ours.generate(row, max_new_tokens=5).tokens == plain(ours, row, 5), length
    assert captured(ours) == steps  # three lengths later, nothing more was recorded
    assert len(steps) <= 7
    assert any(name.startswith("continue") for name in steps)
    assert sum(ours.stats()["captured"][name] for name in steps) > 6
    assert ours.stats()["eager"] == {}


def test_padded_batches_are_read_in_pieces_too():
    ours = engine()
    for lengths in ((20, 31), (90, 50), (60, 130), (200, 140)):
        rows = [prompt(length, seed=length) for length in lengths]
        any_piece_is_faster(ours)
        answers = ours.generate(rows, max_new_tokens=5)
        assert [answer.tokens for answer in answers] == [plain(ours, row, 5) for row in rows]
    assert any("continue of 64 tokens, batch 2, padded" in name for name in captured(ours))


def test_a_conversation_goes_on_in_pieces():
    ours = engine()
    row = prompt(80)
    for turn in (0, 23, 41, 18, 35):
        row = row + prompt(turn, seed=turn) if turn else row
        any_piece_is_faster(ours)
        answer = ours.generate(row, max_new_tokens=6).tokens
        assert answer == plain(ours, row, 6)
        row = row + answer
    replays = ours.stats()["captured"]
    assert replays["continue of 16 tokens"] >= 2


def test_pieces_that_measure_slower_are_left_out():
    ours = engine()
    for length in (20, 90, 77):
        ours.forget_prompts()
        ours.generate(prompt(length), max_new_tokens=5)
    session = ours.session(1)
    before = {name: replays for name, replays in ours.stats()["captured"].items() if "continue" in name}
    assert before
    for phase in session.phases.values():
        phase.seconds = 1e3
    ours.forget_prompts()
    row = prompt(101)
    assert ours.generate(row, max_new_tokens=3).tokens == plain(ours, row, 3)
    assert before == {name: replays for name, replays in ours.stats()["captured"].items() if "continue" in name}


def test_a_length_that_comes_often_has_a_step_of_its_own():
    ours = engine()
    for length in (20, *[100] * 5):
        ours.forget_prompts()
        ours.generate(prompt(length), max_new_tokens=5)
    assert "prefill of 128 tokens" in captured(ours)


@pytest.mark.parametrize("kind", ["mamba2", "lfm2", "recurrent_gemma"])
def test_states_are_read_at_once(kind):
    ours = engine(kind)
    for length in (20, 90, 77):
        row = prompt(length)
        assert ours.generate(row, max_new_tokens=5).tokens == plain(ours, row, 5)
    assert not captured(ours)


def test_pieces_up_to_a_full_cache():
    ours = engine(capacity=100)
    for length in (20, 90, 97, 99, 60):
        ours.forget_prompts()
        any_piece_is_faster(ours)
        row = prompt(length, seed=length)
        assert ours.generate(row, max_new_tokens=1).tokens == plain(ours, row, 1)


# --- lookup


def repeating(ours):
    """A model that says the same again and again."""
    return ours.generate(prompt(12), max_new_tokens=120).tokens


def forced(ours, cost=1.0):
    """What is measured of steps this small says little."""
    ours.session(1).lookup.cost = cost


def test_guesses_do_not_change_an_answer():
    ours = engine(initializer_range=0.02)
    row = prompt(12)
    want = plain(ours, row, 120)
    for _ in range(3):
        ours.forget_prompts()
        assert ours.generate(row, max_new_tokens=120).tokens == want
    session = ours.session(1)
    assert session.lookup.look_back(row, want) > lookups.PAYS  # a small model repeats itself
    assert "prompt lookup is" in ours.explain()
    forced(ours)
    before = ours.stats()["captured"]["decode, greedy"]
    for count in (120, 33, 1, 2):
        ours.forget_prompts()
        assert ours.generate(row, max_new_tokens=count).tokens == want[:count]
    assert session.lookup.steps > 5
    assert session.lookup.given / session.lookup.steps > 1.5
    assert ours.stats()["captured"]["decode, greedy"] - before < 100
    assert "prompt lookup is on" in ours.explain()
    # A conversation goes on from what such steps left.
    longer = [*row, *want[:50], 7, 9]
    ours.generate(row, max_new_tokens=50)
    assert ours.generate(longer, max_new_tokens=20).tokens == plain(ours, longer, 20)


def test_guesses_up_to_a_full_cache_and_a_stream_that_is_left():
    ours = engine(capacity=80, initializer_range=0.02)
    row = prompt(12)
    want = plain(ours, row, 68)
    for _ in range(2):
        ours.forget_prompts()
        ours.generate(row, max_new_tokens=60)
    forced(ours)
    ours.forget_prompts()
    assert ours.generate(row, max_new_tokens=200).tokens[:68] == want
    ours.forget_prompts()
    streaming = ours.stream(row, max_new_tokens=50)
    for _ in range(9):
        next(streaming)
    streaming.close()
    assert ours.session(1).filled <= 12 + 9
    longer = [*row, *want[:8], 5]
    assert ours.generate(longer, max_new_tokens=8).tokens == plain(ours, longer, 8)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3}, {"logprobs": 2}, {"logit_bias": {5: 2.0}}, {"n": 2}],
    ids=str,
)
def test_only_the_most_likely_tokens_are_guessed(options):
    ours = engine(initializer_range=0.02)
    want = ours.generate(prompt(12), max_new_tokens=40, **options)
    repeating(ours)
    forced(ours)
    steps = ours.session(1).lookup.steps
    ours.forget_prompts()
    got = ours.generate(prompt(12), max_new_tokens=40, **options)
    alike = [want, got] if options == {"n": 2} else [[want], [got]]
    assert [answer.tokens for answer in alike[0]] == [answer.tokens for answer in alike[1]]
    assert ours.session(1).lookup.steps == steps


def test_guesses_that_lose_are_off():
    ours = engine(initializer_range=0.02)
    for _ in range(2):
        repeating(ours)
    session = ours.session(1)
    forced(ours, cost=WIDTH + 1.0)
    assert "prompt lookup is off" in ours.explain()
    steps = session.lookup.steps
    repeating(ours)
    assert session.lookup.steps == steps
    forced(ours, cost=3.0)
    session.lookup.gain = 3.1
    for _ in range(40):  # guesses that are wrong
        session.lookup.took(1)
    assert not session.lookup.pays


def test_a_text_that_repeats_nothing_records_nothing():
    ours = engine()
    assert ours.session(1).lookup.look_back(list(range(100)), list(range(100, 200))) == 0
    assert ours.session(1).lookup.look_back([1, 2, 3, 4, 1, 2, 3, 4], list(range(10, 60))) == 0


def test_what_followed_last_is_guessed():
    past = Lookup()
    past.begin([5, 6, 7, 8, 9, 1, 5, 6, 7, 2, 3, 5, 6, 7])
    assert past.guess() == [2, 3, 5, 6, 7, 2, 3]
    past.add(8)
    assert past.guess() == [9, 1, 5, 6, 7, 2, 3]
    assert len(past.guess()) == WIDTH - 1
    past.add(4)
    assert past.guess() == []


@pytest.mark.parametrize("kind", ["mamba2", "gpt_neo", "lfm2"])
def test_models_that_cannot_go_back_are_not_guessed(kind):
    ours = engine(kind)
    row = prompt(12)
    for _ in range(2):
        assert ours.generate(row, max_new_tokens=60).tokens == plain(ours, row, 60)
    assert "prompt lookup" not in ours.explain()
