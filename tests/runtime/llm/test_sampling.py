"""Choosing tokens: the distribution that is asked for, and only tokens that are allowed."""

import pytest
import torch

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
