"""Other orders of calls, other types, other changes: nothing is answered with what no longer holds."""

import copy
import threading

import pytest
import torch

from graph_capture import CaptureError, FusionConfig, InferEngine, accelerate, unaccelerate
from tests import architectures, llm, zoo

PLAIN = FusionConfig(enable_fusion=False)
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ONE = zoo.ids(9)
IDS, MASK = llm.padded([zoo.ids(6)[0].tolist(), zoo.ids(9, seed=3)[0].tolist()])


def pair(kind="llama", **changes):
    plain = architectures.build(kind, **changes)
    return accelerate(copy.deepcopy(plain), PLAIN, max_length=48), plain


def both(ours, plain, **call):
    want = plain.generate(**{**OPTIONS, **call})
    assert torch.equal(ours.generate(**{**OPTIONS, **call}), want)
    return ours.accelerated.declined


@pytest.mark.parametrize("kind", ["llama", "lfm2", "deepseek_v2"])
def test_calls_in_any_order(kind):
    ours, plain = pair(kind)
    calls = [
        {"inputs": IDS, "attention_mask": MASK, "num_beams": 2},
        {"inputs": ONE},
        {"inputs": IDS, "attention_mask": MASK},
        {"inputs": ONE, "num_return_sequences": 2, "num_beams": 2},
        {"inputs": ONE[:, :1]},
        {"inputs": IDS.flip(0), "attention_mask": MASK.flip(0)},
    ]
    for call in (*calls, *reversed(calls)):
        assert both(ours, plain, **call) is None


@pytest.mark.parametrize(
    "call",
    [
        {"inputs": ONE.int()},
        {"inputs": ONE, "attention_mask": torch.ones_like(ONE).bool()},
        {"inputs": ONE, "attention_mask": torch.ones_like(ONE).float()},
        {"input_ids": ONE, "max_new_tokens": torch.tensor(5).item()},
    ],
    ids=str,
)
def test_other_types_give_what_transformers_gives(call):
    ours, plain = pair()
    try:
        plain.generate(**{**OPTIONS, **call})
    except Exception as error:
        with pytest.raises(type(error)):
            ours.generate(**{**OPTIONS, **call})
    else:
        both(ours, plain, **call)


def test_options_by_position_and_none_at_all():
    ours, plain = pair()
    config = copy.deepcopy(plain.generation_config)
    config.update(**OPTIONS)
    assert torch.equal(ours.generate(ONE, config), plain.generate(ONE, config))
    assert ours.accelerated.declined is None
    for model in (ours, plain):
        model.generation_config.update(max_new_tokens=4, pad_token_id=0)
    assert torch.equal(ours.generate(), plain.generate())


def test_weights_in_place_between_two_steps_of_one_stream():
    """A processor that changes the model: what comes after it is the changed model's."""
    ours, plain = pair()

    def change(model):
        def process(ids, scores):
            if ids.shape[1] == 12:
                model.lm_head.weight.data.neg_()
            return scores

        return process

    want = plain.generate(ONE, logits_processor=[change(plain)], **OPTIONS)
    assert torch.equal(ours.generate(ONE, logits_processor=[change(ours)], **OPTIONS), want)
    assert both(ours, plain, inputs=ONE) is None


def test_generate_within_generate():
    ours, plain = pair()
    inner = []

    def process(ids, scores):
        if ids.shape[1] == 10:
            inner.append(ours.generate(IDS, attention_mask=MASK, **OPTIONS))
        return scores

    got = ours.generate(ONE, logits_processor=[process], **OPTIONS)
    assert torch.equal(got, plain.generate(ONE, **OPTIONS))
    assert torch.equal(inner[0], plain.generate(IDS, attention_mask=MASK, **OPTIONS))
    assert both(ours, plain, inputs=ONE) is None


def test_two_threads_with_two_models_and_with_one():
    models = [pair(), pair("gpt2")]
    wrong = []

    def work(ours, plain, seed):
        ids = zoo.ids(9, seed=seed)
        want = plain.generate(ids, **OPTIONS)
        for _ in range(3):
            if not torch.equal(ours.generate(ids, **OPTIONS), want):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(*models[seed % 2], seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_back_and_forth_between_dtypes():
    ours, plain = pair()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        for model in (ours, plain):
            model.to(dtype)
        assert both(ours, plain, inputs=ONE) is None


def test_accelerated_twice_and_undone_in_between():
    ours, plain = pair()
    both(ours, plain, inputs=ONE)
    accelerate(accelerate(ours, PLAIN, max_length=48), PLAIN, max_length=20)
    assert both(ours, plain, inputs=ONE) is None
    assert "do not fit into 20 slots" in both(ours, plain, inputs=ONE, max_new_tokens=30)
    unaccelerate(ours)
    assert "_prepare_cache_for_generation" not in vars(ours)
    assert torch.equal(ours.generate(ONE, **OPTIONS), plain.generate(ONE, **OPTIONS))


def test_a_call_that_goes_on_as_it_is_from_the_middle():
    """What steps do not know may come after a prompt that was served."""
    ours, plain = pair()
    for model in (ours, plain):
        prepare = model.prepare_inputs_for_generation

        def odd(*args, prepare=prepare, **kwargs):
            inputs = prepare(*args, **kwargs)
            if args[0].shape[1] == 11:
                inputs["output_attentions"] = True
            return inputs

        model.prepare_inputs_for_generation = odd
    assert "output_attentions" in both(ours, plain, inputs=ONE)
    padded = torch.cat((torch.zeros(2, 2, dtype=torch.int64), IDS[:, 2:]), 1)
    mask = torch.cat((torch.zeros(2, 2, dtype=torch.int64), MASK[:, 2:]), 1)
    assert "output_attentions" in both(ours, plain, inputs=padded, attention_mask=mask)


def test_a_pad_token_that_the_model_looks_for():
    """GPT-2 looks for it among the tokens, in Python, where no mask comes."""
    ours, plain = pair("gpt2", pad_token_id=0)
    assert both(ours, plain, inputs=ONE) is None
    stats = ours.accelerated.engine.stats()
    assert stats["eager"] == {}
    assert sum(stats["captured"].values()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"min_p": -0.1}, "min_p"),
        ({"presence_penalty": None, "top_k": 1.5}, "top_k"),
        ({"logit_bias": [1, 2]}, "logit_bias"),
        ({"logit_bias": {99: 1.0}}, "logit_bias"),
        ({"seed": 2**70}, "seed"),
        ({"seed": [1, 2]}, "2 entries for 1"),
        ({"n": 0}, "n must be"),
        ({"logprobs": 999}, "logprobs"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"stop": 5}, "stop"),
        ({"colour": 1}, "no option"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options, message):
    engine = InferEngine(architectures.build("llama"), max_length=40, config=PLAIN)
    with pytest.raises(CaptureError, match=message):
        engine.generate([5, 6, 7], **options)
    assert engine.generate([5, 6, 7], max_new_tokens=2).tokens


@pytest.mark.parametrize(
    "prompt",
    [[], "", b"text", {"role": "user"}, [1.5], [[1, 2], []], [-1], [64], torch.ones(2, 2), None, 5, [[[1]]]],
    ids=str,
)
def test_prompts_that_are_none(prompt):
    engine = InferEngine(architectures.build("llama"), max_length=40, config=PLAIN)
    with pytest.raises(CaptureError):
        engine.generate(prompt, max_new_tokens=2)
