"""Many architectures: served or left as they are, and the tokens are transformers' own either way."""

import pytest
import torch
import transformers

from graph_capture import CaptureError, FusionConfig, InferEngine, accelerate
from tests import architectures

PLAIN = FusionConfig(enable_fusion=False)  # captured and replayed; kernels have tests of their own
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# What is not served, with a word of the reason. Everything else is.
LEFT = {
    "cpmant": "",
    "gpt_neo": "is not what it is without a cache",  # a window in the model's own code
    "minimax": "cache of its own",
    "rwkv": "takes no cache",
    "xlm-roberta": "is not what it is without a cache",  # looks at what comes later
}
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20):
    LEFT["bloom"] = "is not what it is without a cache"  # its biases are as long as the tokens read so far
LEFT_PADDED = {"trocr": "row 1"}  # its positions do not follow from the mask
PROMISED = {"mamba", "mamba2", "jamba", "lfm2", "qwen3_next", "deepseek_v2", "deepseek_v3", "llama", "gpt2"}


def prompts():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :2] = 0
    ids = torch.where(mask.bool(), ids, 0)
    one = torch.randint(3, 60, (1, 11), generator=generator)
    return {
        "one": {"inputs": one},
        "padded": {"inputs": ids, "attention_mask": mask},
        "beams": {"inputs": ids, "attention_mask": mask, "num_beams": 2},
    }


@pytest.mark.parametrize("kind", architectures.DETAILS)
def test_tokens_are_those_of_transformers(kind):
    model = architectures.build(kind)
    want = {}
    for name, call in prompts().items():
        try:
            want[name] = model.generate(**call, **OPTIONS)
        except (ValueError, NotImplementedError, AttributeError):  # transformers' own does not do it
            assert kind in ("rwkv",), name
    assert want
    accelerate(model, PLAIN, max_length=40)
    for name, tokens in want.items():
        got = model.generate(**prompts()[name], **OPTIONS)
        assert torch.equal(got, tokens), name
        declined = model.accelerated.declined
        reason = LEFT.get(kind, LEFT_PADDED.get(kind) if name != "one" else None)
        if reason is None:
            assert declined is None, name
            assert sum(model.accelerated.engine.stats()["captured"].values()) + len(
                model.accelerated.engine.stats()["eager"]
            )
        else:
            assert reason in declined


def test_at_least_thirty_are_served_and_those_that_were_promised():
    served = set(architectures.DETAILS) - set(LEFT)
    assert len(served) >= 30
    assert served >= PROMISED


@pytest.mark.parametrize("kind", ["mamba2", "lfm2", "gpt_neo", "recurrent_gemma", "deepseek_v2"])
def test_an_engine_answers_with_all_of_them(kind):
    model = architectures.build(kind)
    rows = [row[row != 0].tolist() for row in prompts()["padded"]["inputs"]]
    want = []
    for row in rows:
        ids = torch.tensor([row])
        want.append(model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)[0, len(row) :].tolist())
    engine = InferEngine(model, max_length=40, config=PLAIN)
    engine._ends = frozenset()
    for _ in range(2):
        assert [engine.generate(row, max_new_tokens=5).tokens for row in rows] == want
    if kind in LEFT:
        assert LEFT[kind] in engine.stats()["eager"]["the model"]
        assert "the model runs as it is" in engine.explain()
    # A conversation goes on from what the first turn left, or anew where the model keeps more than a cache.
    longer = [*rows[0], *want[0], 7, 8]
    ids = torch.tensor([longer])
    on = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)[0, len(longer) :].tolist()
    engine.generate(rows[0], max_new_tokens=8)
    assert engine.generate(longer, max_new_tokens=5).tokens == on


@pytest.mark.parametrize("kind", ["gemma3_text", "mistral"])
def test_prompts_beyond_a_window(kind):
    model = architectures.build(kind, sliding_window=44, max_position_embeddings=160)
    ids = torch.randint(3, 60, (1, 90), generator=torch.Generator().manual_seed(2))
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
    accelerate(model, PLAIN, max_length=128)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS), want)
    assert model.accelerated.declined is None


def test_factors_that_change_with_the_length_are_noticed_where_they_change():
    """longrope: beyond `original_max_position_embeddings` all keys are turned in another way."""
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [3.0, 4.0, 5.0, 6.0],
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 48,
        "factor": 4.0,
    }
    model = architectures.build(
        "phi3", max_position_embeddings=192, original_max_position_embeddings=48, rope_parameters=rope
    )
    short, long = (torch.randint(3, 60, (1, n), generator=torch.Generator().manual_seed(n)) for n in (20, 45))
    options = {**OPTIONS, "max_new_tokens": 8}
    want = [model.generate(ids, attention_mask=torch.ones_like(ids), **options) for ids in (short, long)]
    accelerate(model, PLAIN, max_length=128)
    for ids, tokens in zip((short, long, short), [*want, want[0]], strict=True):
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), tokens)


def test_an_encoder_is_no_causal_model():
    from transformers import BertConfig, BertModel

    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    for make in (InferEngine, accelerate):
        with pytest.raises(CaptureError, match="not a causal language model"):
            make(BertModel(small))
