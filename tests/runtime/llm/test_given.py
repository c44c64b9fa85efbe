"""Models with an encoder, and those that see: the prompt as it is, then captured steps, once they gave the same."""

import copy

import pytest
import torch
import transformers as hf
from transformers import StoppingCriteria

from graph_capture import CaptureError, FusionConfig, InferEngine, accelerate, unaccelerate
from tests import zoo

PLAIN = FusionConfig(enable_fusion=False)
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
IMAGE = 63  # stands in a text for a patch of an image
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
ENCODED = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 3,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}


def t5():
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **ends))


def bart():
    return hf.BartForConditionalGeneration(
        hf.BartConfig(**ENCODED, max_position_embeddings=64, forced_eos_token_id=None)
    )


def whisper():
    sizes = {"num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 40}
    config = hf.WhisperConfig(**ENCODED, **sizes, suppress_tokens=None, begin_suppress_tokens=None)
    return hf.WhisperForConditionalGeneration(config)


def llava():
    vision = hf.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE, vision_feature_layer=-1
    )
    return hf.LlavaForConditionalGeneration(config)


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "in_channels": 3}
    text = {**TEXT, "rope_parameters": ROPE}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision, **TOKENS))


MODELS = {make.__name__: make for make in (t5, whisper, llava, qwen2_vl)}
SEEING = ("llava", "qwen2_vl")


def made(name):
    torch.manual_seed(0)
    model = (MODELS | {"bart": bart})[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    model.generation_config.eos_token_id = None
    return model


def pair(name):
    plain = made(name)
    return accelerate(copy.deepcopy(plain), PLAIN, max_length=40), plain


def prompt(name, seed=0, rows=1, length=9):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (rows, length), generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(rows, 8, 100, generator=generator)}
    if name in SEEING:
        ids[:, 2:6] = IMAGE
    if name == "llava":
        return {"input_ids": ids, "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    if name == "qwen2_vl":
        ids[:, 1], ids[:, 6] = 61, 60
        image = {"pixel_values": torch.randn(16 * rows, 96, generator=generator)}
        image["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        return {"input_ids": ids, **image, "mm_token_type_ids": (ids == IMAGE).int()}
    return {"input_ids": ids}


def both(ours, plain, times=1, **call):
    """Generate with each, `times` over; the tokens are equal. Why ours declined at last, if it did."""
    for _ in range(times):
        want = plain.generate(**{**OPTIONS, **call})
        got = ours.generate(**{**OPTIONS, **call})
        if not isinstance(want, torch.Tensor):
            got, want = got.sequences, want.sequences
        assert torch.equal(got, want)
    return ours.accelerated.declined


def replays(model):
    return sum(model.accelerated.engine.stats()["captured"].values())


@pytest.mark.parametrize("name", MODELS)
def test_the_first_call_is_watched_and_the_next_is_served(name):
    ours, plain = pair(name)
    assert "for the first time" in both(ours, plain, **prompt(name))
    assert replays(ours) == 0
    for seed in (1, 2, 3):
        assert both(ours, plain, **prompt(name, seed)) is None
    assert replays(ours) == 15  # three answers of six tokens; the first of each is the prompt's
    assert ours.accelerated.engine.stats()["eager"] == {}
    assert both(ours, plain, 2, **prompt(name, 4, rows=2)) is None
    assert replays(ours) >= 20


@pytest.mark.parametrize("name", MODELS)
def test_beams(name):
    ours, plain = pair(name)
    assert both(ours, plain, 2, num_beams=3, **prompt(name, rows=2)) is None
    assert replays(ours) == 5


def test_a_step_that_asks_where_it_is_runs_as_it_is():
    """BART makes its positions in Python: what is recorded at one is of no use at another."""
    ours, plain = pair("bart")
    for seed in range(3):
        declined = both(ours, plain, **prompt("bart", seed))
    assert "cannot be captured" in declined
    assert "when it was recorded" in declined


def test_padded_texts_of_any_length_share_steps():
    name = "t5"
    ours, plain = pair(name)
    for length in (9, 12, 5, 15, 10):
        both(ours, plain, **prompt(name, length, length=length))
    stats = ours.accelerated.engine.stats()
    assert (len(stats["captured"]), replays(ours)) == (1, 20)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 6:] = mask[2, 4:] = 0
    assert both(ours, plain, 2, **prompt(name, rows=3), attention_mask=mask) is None
    assert both(ours, plain, **prompt(name, 8, rows=3), attention_mask=mask.flip(0)) is None


@pytest.mark.parametrize("name", MODELS)
def test_changed_weights_and_dtypes(name):
    ours, plain = pair(name)
    both(ours, plain, 2, **prompt(name))
    for change in (
        lambda model: [weight.mul_(-1.1) for weight in model.parameters()],
        lambda model: model.load_state_dict({key: value.flip(0) for key, value in model.state_dict().items()}),
        lambda model: model.to(torch.float64),
    ):
        with torch.no_grad():
            change(ours), change(plain)
        inputs = {
            key: value.to(plain.dtype) if value.is_floating_point() else value for key, value in prompt(name, 5).items()
        }
        assert both(ours, plain, 2, **inputs) is None
    assert replays(ours) > 0


def test_what_is_returned():
    for name in ("t5", "llava", "qwen2_vl"):
        ours, plain = pair(name)
        call = {**prompt(name), **OPTIONS, "return_dict_in_generate": True, "output_scores": True}
        for _ in range(2):
            got, want = (model.generate(**call) for model in (ours, plain))
            torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores), rtol=1e-4, atol=1e-4)
            assert type(got.past_key_values) is type(want.past_key_values)
            assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length()
        assert ours.accelerated.declined is None


def test_whispers_own_generate_takes_results_apart():
    ours, plain = pair("whisper")
    declined = both(ours, plain, **prompt("whisper"), return_dict_in_generate=True)
    assert "takes caches apart" in declined


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"use_cache": False}, "use_cache"),
        ({"decoder_attention_mask": torch.tensor([[1]])}, None),
        ({"decoder_input_ids": torch.tensor([[0, 5, 9]])}, None),
        ({"max_new_tokens": 60}, "do not fit"),
        ({"max_new_tokens": 2}, "for the first time"),  # too short for a proof
        ({"prompt_lookup_num_tokens": 2}, "assisted"),
    ],
    ids=str,
)
def test_calls_of_an_encoder_are_served_or_left(call, reason):
    ours, plain = pair("t5")
    for model in (ours, plain):
        model.set_attn_implementation("eager")
    declined = both(ours, plain, 2, **prompt("t5"), **call)
    assert declined is None if reason is None else reason in declined


def test_positions_of_the_callers_own():
    from tests import architectures

    plain = architectures.build("llama")
    ours = accelerate(copy.deepcopy(plain), PLAIN, max_length=40)
    for step, count in ((5, 3), (1, 1), (2, 2)):
        ids = zoo.ids(9, seed=step)
        for _ in range(count):
            both(ours, plain, inputs=ids, position_ids=torch.arange(9)[None] * step)
    assert ours.accelerated.declined is None
    assert replays(ours) > 10


def test_a_text_without_an_image_is_served_too():
    for name in SEEING:
        ours, plain = pair(name)
        text = {"input_ids": zoo.ids(9) % 50 + 3}
        both(ours, plain, 2, **prompt(name))
        assert both(ours, plain, 3, **text) is None
        assert both(ours, plain, **prompt(name, 7)) is None


def test_a_model_that_sees_answers_text():
    plain = made("llava")
    ids = [5, 9, 12, 40, 7]
    want = plain.generate(torch.tensor([ids]), **OPTIONS)[0, 5:].tolist()
    engine = InferEngine(plain, max_length=40, config=PLAIN)
    for _ in range(2):
        assert engine.generate(ids, max_new_tokens=6).tokens == want
    assert engine.stats()["eager"] == {}


def test_an_engine_of_an_encoder_is_refused():
    with pytest.raises(CaptureError, match="accelerate\\(model\\)"):
        InferEngine(made("t5"))


def test_a_form_that_does_not_hold_is_left_for_ever(monkeypatch):
    """What a model keeps besides its cache makes captured steps differ."""
    from transformers.models.t5.modeling_t5 import T5Stack

    forward = T5Stack.forward

    def counting(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.is_decoder:
            self.calls = getattr(self, "calls", 0) + 1
            output.last_hidden_state = output.last_hidden_state * (1 + self.calls)
        return output

    monkeypatch.setattr(T5Stack, "forward", counting)
    ours, _ = pair("t5")
    for _ in range(2):
        ours.generate(**prompt("t5"), **OPTIONS)
    assert "is not what it is" in ours.accelerated.declined
    assert replays(ours) == 0


def test_an_error_in_between_leaves_nothing_behind():
    class Odd(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            if ids.shape[1] > 3:
                raise KeyError("mine")
            return torch.zeros(ids.shape[0], dtype=torch.bool)

    ours, plain = pair("t5")
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            ours.generate(**prompt("t5"), stopping_criteria=[Odd()], **OPTIONS)
        both(ours, plain, **prompt("t5"))
    assert ours.accelerated.declined is None
    assert not hasattr(unaccelerate(ours), "accelerated")
