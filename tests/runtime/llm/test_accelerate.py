"""``accelerate``: transformers' own ``generate``, with everything that it takes, over captured steps."""

import threading

import pytest
import torch
from transformers import AutoTokenizer, TextIteratorStreamer

from graph_capture import CaptureError, FusionConfig, accelerate
from tests import llm, zoo

STATIC = FusionConfig(profile="static")
ROWS = [zoo.ids(6)[0].tolist(), zoo.ids(9, seed=3)[0].tolist(), zoo.ids(1, seed=5)[0].tolist()]
IDS, MASK = llm.padded(ROWS)
CASES = {
    "one": {"inputs": IDS[1:2]},
    "padded": {"inputs": IDS, "attention_mask": MASK},
    "all padded": {"inputs": IDS[:1], "attention_mask": MASK[:1]},
    "beams": {"inputs": IDS, "attention_mask": MASK, "num_beams": 3},
    "sampled": {"inputs": IDS[1:2], "num_return_sequences": 2, "do_sample": True, "top_k": 10},
    "processed": {"inputs": IDS[1:2], "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "bad words": {"inputs": IDS[1:2], "bad_words_ids": [[5], [6, 7]], "min_new_tokens": 4},
}


def generated(model, count=12, **options):
    torch.manual_seed(0)
    return model.generate(**options, max_new_tokens=count)


@pytest.mark.parametrize(
    ("name", "case"),
    [*(("llama", case) for case in CASES), ("gemma2", "beams"), ("gpt2", "beams")]
    + [(name, case) for name in ("qwen2", "mistral", "gemma2", "gpt2") for case in ("one", "padded")],
)
def test_generate_gives_the_same_tokens(name, case):
    model = llm.endless(name)
    want = generated(model, **CASES[case])
    assert accelerate(model, STATIC, max_length=40) is model
    for _ in range(2):
        assert torch.equal(generated(model, **CASES[case]), want)
        assert model.accelerated.declined is None
    stats = model.accelerated.engine.stats()
    assert stats["eager"] == {}
    assert sum(stats["captured"].values()) >= 20
    model.accelerated.undo()
    assert "generate" not in vars(model)
    assert torch.equal(generated(model, **CASES[case]), want)


def test_scores_are_those_of_the_model():
    model = llm.endless("llama")
    options = {"inputs": IDS, "attention_mask": MASK, "return_dict_in_generate": True, "output_scores": True}
    want = generated(model, **options)
    accelerate(model, STATIC, max_length=40)
    got = generated(model, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert len(got.scores) == len(want.scores)
    for ours, theirs in zip(got.scores, want.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"inputs": IDS, "attention_mask": MASK.flip(1)}, "padding is not on the left"),
        ({"inputs": IDS[:1], "use_cache": False}, "use_cache is False"),
        ({"inputs": IDS[1:2], "count": 200}, "do not fit into 40 slots"),
        ({"inputs": IDS[1:2], "cache_implementation": "static"}, "cache_implementation"),
        ({"inputs": IDS[1:2], "prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"inputs": IDS[1:2], "output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds"),
    ],
)
def test_other_calls_run_as_they_are(options, reason):
    model = llm.endless("llama")
    want = generated(model, **options)
    accelerate(model, STATIC, max_length=40)
    got = generated(model, **options)
    tensors = (got, want) if isinstance(got, torch.Tensor) else (got.sequences, want.sequences)
    assert torch.equal(*tensors)
    assert reason in model.accelerated.declined


def test_a_forward_is_the_models_own():
    model = llm.endless("llama")
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        accelerate(model, STATIC)
        assert torch.equal(model(input_ids=IDS).logits, want)


def test_a_streamer_gets_its_tokens(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llm.folder(tmp_path))
    from transformers import AutoModelForCausalLM

    model = accelerate(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), STATIC, max_length=64)
    ids = tokenizer("hello", return_tensors="pt")
    whole = tokenizer.decode(model.generate(**ids, max_new_tokens=10, do_sample=False)[0, 5:], skip_special_tokens=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    worker = threading.Thread(
        target=model.generate, kwargs={**ids, "max_new_tokens": 10, "do_sample": False, "streamer": streamer}
    )
    worker.start()
    assert "".join(streamer) == whole
    worker.join()
    assert model.accelerated.declined is None


def test_accelerating_twice_replaces_the_first():
    model = llm.endless("llama")
    want = generated(model, inputs=IDS[1:2])
    first = accelerate(model, STATIC).accelerated
    second = accelerate(model, STATIC, max_length=40).accelerated
    assert first is not second is model.accelerated
    assert torch.equal(generated(model, inputs=IDS[1:2]), want)
    assert "decode" in model.accelerated.explain()
    second.undo()
    assert not {"generate", "forward", "accelerated"} & set(vars(model))


def test_only_causal_language_models():
    with pytest.raises(CaptureError, match="not a causal language model"):
        accelerate(torch.nn.Linear(2, 2))
