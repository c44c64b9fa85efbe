"""Choosing tokens: the distribution that is asked for, and only tokens that are allowed."""

import pytest
import torch

from graph_capture import CaptureError
from graph_capture.runtime.llm.sampling import Sampler, Sampling
from tests.llm import tokenizer

ROWS = 20000
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, float("-inf")])


def draw(sampling, logits=LOGITS, seed=0, seen=(5,)):
    sampler = Sampler(ROWS, 1, len(logits), torch.device("cpu"))
    sampler.prepare(sampling, seed, torch.tensor([seen]).expand(ROWS, -1))
    return sampler.choose(sampling.kind, logits.expand(ROWS, -1), torch.tensor(1))


def expected(logits, sampling):
    """Probabilities in float64, one rule after the other."""
    logits = logits.double() / sampling.temperature
    order = logits.argsort(descending=True)
    if sampling.top_k:
        logits[order[sampling.top_k :]] = -torch.inf
    chances = logits.softmax(0)
    before = chances[order].cumsum(0) - chances[order]
    chances[order[before >= sampling.top_p]] = 0
    return chances / chances.sum()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.5), Sampling(2.0), Sampling(1.0, top_k=2), Sampling(1.0, top_k=100),
     Sampling(1.0, top_p=0.7), Sampling(1.0, top_p=1e-6), Sampling(1.5, top_k=4, top_p=0.8)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_frequencies_are_the_probabilities(sampling, dtype):
    chances = expected(LOGITS.clone(), sampling)
    counts = torch.bincount(draw(sampling, LOGITS.to(dtype)), minlength=len(LOGITS)).double()
    assert (counts[chances == 0] == 0).all()
    spread = (chances * (1 - chances) * ROWS).sqrt()
    assert ((counts - chances * ROWS).abs() <= 5 * spread + 1e-9).all()


def test_the_extremes_of_the_noise_choose_allowed_tokens():
    sampling = Sampling(1.0)
    for noise, want in ((0.0, 1), (1 - 2.0**-22, 3)):
        sampler = Sampler(1, 1, 5, torch.device("cpu"))
        sampler._noise.fill_(noise)
        logits = torch.tensor([[-torch.inf, 0.0, 0.0, 0.0, -torch.inf]])
        assert sampler.choose(sampling.kind, logits, torch.tensor(1)).tolist() == [want]
    sampler = Sampler(1, 1, 50000, torch.device("cpu"))
    sampler._noise.fill_(1 - 2.0**-22)
    many = torch.full((1, 50000), -torch.inf).index_fill(1, torch.arange(0, 49000), 0.0)
    assert sampler.choose(sampling.kind, many, torch.tensor(1)).item() < 49000


def test_greedy_takes_the_largest_and_a_penalty_moves_it():
    assert set(draw(Sampling()).tolist()) == {0}
    assert set(draw(Sampling(repetition_penalty=3.0), seen=(0,)).tolist()) == {1}
    negative = torch.tensor([-1.0, -1.5, -9.0])
    assert set(draw(Sampling(repetition_penalty=2.0), negative, seen=(0,)).tolist()) == {1}
    assert set(draw(Sampling(repetition_penalty=0.5), torch.tensor([1.0, 1.5]), seen=(0,)).tolist()) == {0}


def test_what_was_chosen_is_seen():
    sampling = Sampling(repetition_penalty=10.0)
    sampler = Sampler(1, 3, 3, torch.device("cpu"))
    sampler.prepare(sampling, None, torch.tensor([[2]]))
    logits = torch.tensor([[3.0, 2.0, 2.5]])
    assert [sampler.choose(sampling.kind, logits, torch.tensor(i)).item() for i in (1, 2)] == [0, 1]


def test_what_is_unlikely_beside_the_best_is_left_out():
    chances = LOGITS.double().softmax(0)
    sampling = Sampling(1.0, min_p=0.2)
    counts = torch.bincount(draw(sampling), minlength=len(LOGITS)).double()
    kept = chances >= 0.2 * chances.max()
    assert kept.tolist() == [True, True, True, False, False, False]
    assert (counts[~kept] == 0).all()
    wanted = torch.where(kept, chances, 0) / chances[kept].sum() * ROWS
    assert ((counts - wanted).abs() <= 5 * (wanted + 1).sqrt()).all()


def choices(sampling, logits, steps, seen=(5,)):
    """Tokens that are chosen one after the other from the same logits."""
    sampler = Sampler(1, steps + 1, len(logits), torch.device("cpu"))
    kind = sampler.prepare(sampling, 0, torch.tensor([seen]))
    return [sampler.choose(kind, logits[None], torch.tensor(step)).item() for step in range(steps)]


def test_presence_and_frequency_count_the_answer_alone():
    logits = torch.tensor([3.0, 2.5, 1.0])
    assert choices(Sampling(presence_penalty=1.0), logits, 4) == [0, 1, 0, 0]  # 3 - 1 is more than 2.5 - 1
    assert choices(Sampling(frequency_penalty=1.0), logits, 4) == [0, 1, 0, 1]  # 3, 2.5, 2, 1.5 ...
    assert choices(Sampling(presence_penalty=1.0), logits, 1, seen=(0,)) == [0]  # the prompt does not count
    assert choices(Sampling(presence_penalty=-1.0), logits, 3) == [0, 0, 0]


def test_a_bias_moves_the_choice():
    logits = torch.tensor([3.0, 2.5, 1.0])
    assert choices(Sampling(logit_bias={2: 5.0}), logits, 1) == [2]
    assert choices(Sampling(logit_bias={0: -torch.inf}), logits, 2) == [1, 1]
    assert set(draw(Sampling(1.0, logit_bias={0: -torch.inf, 1: -100.0})).tolist()) <= {2, 3, 4}


def test_equals_of_the_last_of_the_best_are_candidates_too():
    ties = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert set(draw(Sampling(1.0, top_k=2), ties).tolist()) == {0, 1, 2}


OTHERS = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.7, top_k=3),
    Sampling(1.3, top_k=5, top_p=0.8),
    Sampling(1.0, min_p=0.1, repetition_penalty=1.4),
    Sampling(0.9, presence_penalty=0.5, frequency_penalty=0.2),
    Sampling(1.0, logit_bias={3: 2.0}),
]


@pytest.mark.parametrize("mine", OTHERS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(mine):
    """The same tokens alone, and beside rows with other options, seeds and places."""
    logits = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)) * 2

    def tokens(rows, seeds, place):
        sampler = Sampler(len(rows), 13, 40, torch.device("cpu"))
        kind = sampler.prepare(rows, seeds, torch.tensor([[1, 2, 3]]).expand(len(rows), -1))
        found = []
        for step in range(12):
            batch = torch.stack([logits[step] if row == place else logits[-1 - step] for row in range(len(rows))])
            found.append(sampler.choose(kind, batch, torch.full((len(rows),), step))[place].item())
        return found

    alone = tokens([mine], [5], 0)
    for other in OTHERS:
        assert tokens([other, mine], [9, 5], 1) == alone
        assert tokens([mine, other, OTHERS[3]], [5, 5, None], 0) == alone


def test_log_probabilities_are_the_models_own():
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])
    sampler = Sampler(1, 1, 6, torch.device("cpu"))
    kind = sampler.prepare(Sampling(logit_bias={1: 9.0}), None, torch.tensor([[2]]), told=4)
    assert sampler.choose(kind, logits, torch.tensor(0)).item() == 1
    wanted = logits[0].log_softmax(-1)
    assert sampler.told_tokens[0, :4].tolist() == [1, 0, 1, 2]
    torch.testing.assert_close(sampler.told_values[0, :4], wanted[[1, 0, 1, 2]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"top_k": 2.5}, "top_k must be a whole number, got 2.5"),
        ({"top_k": True}, "top_k must be a whole number, got True"),
        ({"min_p": 1.5}, "min_p must be 0 or more and at most 1"),
        ({"min_p": -0.1}, "min_p must be"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be a finite number"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be a finite number"),
        ({"logit_bias": [1, 2]}, "logit_bias must map tokens to numbers"),
        ({"logit_bias": {"a": 1.0}}, "a token of logit_bias must be a whole number"),
        ({"logit_bias": {1: "x"}}, "a value of logit_bias must be a number"),
    ],
)
def test_wrong_types_and_ranges_are_named(options, message):
    with pytest.raises(CaptureError, match=message):
        Sampling(**options)


def test_text_settles_by_whole_characters_and_stop_strings():
    from graph_capture.runtime.llm.text import Detokenizer

    coder = tokenizer()
    text = Detokenizer(coder, ["END", "NDX"])
    pieces = [text.add(token) for token in coder("aé€E")["input_ids"]]
    assert pieces == ["a", "", "é", "", "", "€", ""]  # the E may be the beginning of END
    pieces = [text.add(token) for token in coder("NxEEND tail")["input_ids"]]
    assert "".join(pieces) == "ENxE"
    assert text.stopped
    assert text.text == "aé€ENxE"
    assert text.finish() == ""


def test_what_was_held_back_comes_at_the_end():
    from graph_capture.runtime.llm.text import Detokenizer

    coder = tokenizer()
    text = Detokenizer(coder, ["END"])
    for token in coder("aEN")["input_ids"]:
        text.add(token)
    assert (text.text, text.finish(), text.text) == ("a", "EN", "aEN")
    broken = Detokenizer(coder)
    for token in coder("a€")["input_ids"][:-1]:
        broken.add(token)
    assert broken.text == "a"
    assert broken.finish() == "\ufffd"
