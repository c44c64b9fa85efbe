"""Whole transformers models: prefill, then decode steps in a row through a cache, against eager token by token."""

import pytest
import torch
import transformers as hf

from graph_capture import FusionConfig, capture, record
from graph_capture.calls.structure import Walk
from tests import zoo

UNFUSED = FusionConfig(enable_fusion=False)
STEPS = 4

# transformers looks, in Python, whether a padding mask masks anything; OPT also how full a static cache is.
READS_VALUES = {"opt"}
# Layers with a sliding window count their tokens in Python as well: each step is another signature.
COUNTS_IN_PYTHON = {"mistral", "gemma2"}


def tensors_in(result):
    """The tensors of a result, those in caches included, in a fixed order."""
    walk = Walk()
    walk.spec(result)
    return walk.tensors


def assert_decodes(fast, step, caches, tokens):
    """A prefill and greedy steps, captured and eager, each through its own cache: equal logits all the way."""
    for _ in range(1 + STEPS):
        got, want = fast(tokens, caches[0]), step(tokens, caches[1])
        assert torch.equal(got, want)
        tokens = want[:, -1:].argmax(-1)


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_prefill_and_decode_through_a_static_cache(name):
    model = zoo.build(name)

    def step(tokens, mask, cache):
        with torch.no_grad():
            return model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True).logits

    fast = capture(step, UNFUSED, data_dependent="guard")
    ours, theirs = (hf.StaticCache(config=model.config, max_cache_len=16) for _ in range(2))
    tokens = zoo.ids(6, batch=2)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    for _ in range(1 + STEPS):
        got, want = fast(tokens, mask, ours), step(tokens, mask, theirs)
        assert torch.equal(got, want)
        tokens = want[:, -1:].argmax(-1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert int(ours.get_seq_length()) == int(theirs.get_seq_length()) == 6 + STEPS


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_a_static_cache_decodes_in_one_recording(name):
    model = zoo.build(name)

    def step(tokens, cache):
        with torch.no_grad():
            return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits

    fast = capture(step, UNFUSED, data_dependent="guard" if name in READS_VALUES else "error")
    caches = [hf.StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    assert_decodes(fast, step, caches, zoo.ids(6))
    if name not in READS_VALUES | COUNTS_IN_PYTHON:
        assert len(fast.misses) == 2, "\n".join(fast.misses)  # the prefill, and one for all decode steps


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_prefill_and_decode_through_a_dynamic_cache(name):
    model = zoo.build(name)

    def step(tokens, cache):
        with torch.no_grad():
            return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits

    fast = capture(step, UNFUSED)
    for seed in range(2):  # the second time round every step is a replay
        caches = [hf.DynamicCache(config=model.config) for _ in range(2)]
        assert_decodes(fast, step, caches, zoo.ids(5, seed=seed))
    assert len(fast.misses) == 1 + STEPS, "\n".join(fast.misses)


def inputs_for(name, seed):
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}
    if name == "t5":
        mask = torch.ones(2, 7, dtype=torch.int64)
        mask[1, 5:] = 0
        return {"input_ids": zoo.ids(7, 2, seed), "attention_mask": mask, "decoder_input_ids": zoo.ids(3, 2, seed + 9)}
    if name == "bert":
        mask = torch.ones(2, 7, dtype=torch.int64)
        mask[1, 5:] = 0
        return {"input_ids": zoo.ids(7, 2, seed), "attention_mask": mask}
    return {"input_ids": zoo.ids(7, 2, seed)}


@pytest.mark.parametrize("name", [*zoo.ENCODERS, *zoo.DECODERS])
def test_one_forward(name):
    """The whole result, caches included, from a bare recording."""
    model = zoo.build(name)
    first = inputs_for(name, 0)
    with record(**first, data_dependent="guard" if "attention_mask" in first else "error") as recording:
        recording.output(model(**first))
    for seed in (0, 1):
        inputs = inputs_for(name, seed)
        with torch.no_grad():
            want = model(**inputs)
        got = recording.graph.run(**inputs)
        assert type(got) is type(want)
        assert list(got) == list(want)
        assert len(tensors_in(want)) > 0
        for left, right in zip(tensors_in(got), tensors_in(want), strict=True):
            assert torch.equal(left, right)


def test_mamba_decodes_through_its_own_cache():
    model = zoo.build("mamba")

    def step(tokens, cache):
        with torch.no_grad():
            result = model(input_ids=tokens, cache_params=cache, use_cache=True)
        return result.logits, result.cache_params

    fast = capture(step, UNFUSED)
    ours = theirs = None
    tokens = zoo.ids(6)
    for _ in range(1 + STEPS):
        (got, ours), (want, theirs) = fast(tokens, ours), step(tokens, theirs)
        assert torch.equal(got, want)
        tokens = want[:, -1:].argmax(-1)


def test_t5_generates_with_a_captured_decoder():
    model = zoo.build("t5")
    tokens = zoo.ids(7)
    with torch.no_grad():
        encoded = model.encoder(input_ids=tokens)

    def step(decoder_tokens, cache):
        with torch.no_grad():
            return model(
                encoder_outputs=encoded, decoder_input_ids=decoder_tokens, past_key_values=cache, use_cache=True
            ).logits

    fast = capture(step, UNFUSED)
    caches = [hf.EncoderDecoderCache(hf.DynamicCache(), hf.DynamicCache()) for _ in range(2)]
    assert_decodes(fast, step, caches, torch.zeros(1, 1, dtype=torch.int64))
