"""What accelerate serves and what it leaves to the model: calls, caches, changes, copies, wrappers, surroundings."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StaticCache,
    TextStreamer,
)

from graph_capture import CaptureError, FusionConfig, InferEngine, accelerate, unaccelerate
from tests import architectures, llm, zoo

PLAIN = FusionConfig(enable_fusion=False)
ROWS = [zoo.ids(6)[0].tolist(), zoo.ids(9, seed=3)[0].tolist()]
IDS, MASK = llm.padded(ROWS)
ONE = IDS[1:2]
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def endless(kind="llama"):
    """A model that no token ends, with weights so large that each change shows."""
    return architectures.build(kind)


def models(kind="llama"):
    """An accelerated model and its like."""
    plain = endless(kind)
    return accelerate(copy.deepcopy(plain), PLAIN, max_length=48), plain


def both(ours, plain, **call):
    """Generate with each; the tokens are equal. Why ours declined, if it did."""
    want = plain.generate(**{**OPTIONS, **call})
    got = ours.generate(**{**OPTIONS, **call})
    if not isinstance(want, torch.Tensor):
        got, want = got.sequences, want.sequences
    assert torch.equal(got, want)
    return ours.accelerated.declined


# --- arguments


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"inputs": ONE, "attention_mask": torch.ones_like(ONE)}, None),
        ({"input_ids": ONE}, None),
        ({"inputs": ONE, "stop_strings": None, "output_attentions": None, "past_key_values": None}, None),
        ({"inputs": ONE, "generation_config": GenerationConfig(max_new_tokens=4, num_beams=2)}, None),
        ({"inputs": ONE, "attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1]])}, "not on the left"),
        ({"inputs": ONE, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 0]])}, "not on the left"),
        ({"inputs": ONE, "inputs_embeds": torch.ones(1, 9, 32)}, "inputs_embeds"),
        ({"inputs": ONE, "logits_to_keep": 2}, "logits_to_keep"),
        ({"inputs": ONE, "guidance_scale": 1.5}, None),
        ({"inputs": ONE, "prompt_lookup_num_tokens": 2}, "assisted_generation"),
        ({"inputs": ONE, "generation_config": GenerationConfig(cache_implementation="static")}, "cache_implementation"),
        ({"inputs": ONE, "generation_config": GenerationConfig(use_cache=False)}, "use_cache"),
        ({"inputs": ONE, "output_hidden_states": True}, "output_hidden_states"),
    ],
    ids=str,
)
def test_a_call_is_served_or_left_for_what_it_asks(call, reason):
    ours, plain = models()
    declined = both(ours, plain, **call)
    assert declined is None if reason is None else reason in declined


def test_an_option_of_the_models_own_configuration_counts_too():
    ours, plain = models()
    for model in (ours, plain):
        model.generation_config.prefill_chunk_size = 4
    assert "prefill_chunk_size" in both(ours, plain, inputs=ONE)


def test_an_argument_that_nobody_knows_is_the_error_that_it_was():
    ours, plain = models()
    for model in (plain, ours):
        with pytest.raises(ValueError, match="not used by the model"):
            model.generate(ONE, colour="red", **OPTIONS)


def test_an_error_of_a_processor_is_the_users_own():
    class Odd(LogitsProcessor):
        def __call__(self, ids, scores):
            if ids.shape[1] > 11:
                raise KeyError("mine")
            return scores

    ours, _ = models()
    with pytest.raises(KeyError, match="mine"):
        ours.generate(ONE, logits_processor=[Odd()], **OPTIONS)
    assert ours.accelerated.declined is None


def test_a_streamer_hears_a_call_that_runs_again_only_once():
    class Streamer:
        def __init__(self):
            self.heard = []

        def put(self, value):
            self.heard.append(value.tolist())

        def end(self):
            self.heard.append("end")

    ours, plain = models()
    right = torch.ones_like(ONE)
    right[0, 3] = 0
    heard = []
    for model in (plain, ours):
        streamer = Streamer()
        model.generate(ONE, attention_mask=right, streamer=streamer, **OPTIONS)
        heard.append(streamer.heard)
    assert ours.accelerated.declined is not None
    assert heard[0] == heard[1]


def test_a_text_streamer_prints_what_it_did(tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llm.folder(tmp_path))
    printed = []
    for change in (lambda model: model, lambda model: accelerate(model, PLAIN, max_length=64)):
        model = change(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
        model.generate(**tokenizer("hello", return_tensors="pt"), streamer=TextStreamer(tokenizer), **OPTIONS)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


# --- caches


@pytest.mark.parametrize("rows", [ONE, IDS], ids=["one", "two"])
def test_a_returned_cache_is_a_filled_one(rows):
    ours, plain = models()
    mask = torch.ones_like(rows) if rows is ONE else MASK
    for name in ("qwen3", "mistral"):
        ours, plain = models(name)
        call = {"inputs": rows, "attention_mask": mask, "return_dict_in_generate": True, **OPTIONS}
        results = [model.generate(**call) for model in (ours, plain)]
        assert ours.accelerated.declined is None
        caches = [result.past_key_values for result in results]
        assert type(caches[0]) is type(caches[1]) is DynamicCache
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == rows.shape[1] + 5
        for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
            assert layer.keys.shape == other.keys.shape
        longer = torch.cat((results[1].sequences, zoo.ids(3, rows.shape[0], seed=8)), 1)
        whole = torch.cat((mask, torch.ones(rows.shape[0], 9, dtype=torch.int64)), 1)
        ends = [
            model.generate(longer, attention_mask=whole, past_key_values=cache, **OPTIONS)
            for model, cache in zip((ours, plain), caches, strict=True)
        ]
        assert torch.equal(*ends)
        assert "past_key_values" in ours.accelerated.declined


def test_a_returned_cache_outlives_the_next_call():
    ours, _plain = models()
    kept = ours.generate(ONE, return_dict_in_generate=True, **OPTIONS)
    keys = kept.past_key_values.layers[0].keys.clone()
    ours.generate(zoo.ids(9, seed=8), **OPTIONS)
    assert torch.equal(kept.past_key_values.layers[0].keys, keys)


def test_states_are_returned_as_well():
    plain = endless("lfm2")
    ours = accelerate(copy.deepcopy(plain), PLAIN, max_length=48)
    results = [model.generate(ONE, return_dict_in_generate=True, **OPTIONS) for model in (ours, plain)]
    assert ours.accelerated.declined is None
    last = results[1].sequences[:, -1:]
    with torch.no_grad():
        logits = [
            model(last, past_key_values=result.past_key_values).logits
            for model, result in zip((ours, plain), results, strict=True)
        ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
def test_a_callers_cache_is_filled_by_the_model_itself(kind):
    ours, plain = models()
    caches = [kind(config=plain.config, **({"max_cache_len": 32} if kind is StaticCache else {})) for _ in range(2)]
    results = [
        model.generate(ONE, past_key_values=cache, **OPTIONS)
        for model, cache in zip((ours, plain), caches, strict=True)
    ]
    assert torch.equal(*results)
    assert int(caches[0].get_seq_length()) == int(caches[1].get_seq_length()) == 14
    assert "past_key_values" in ours.accelerated.declined


def test_a_handle_that_is_closed_raises():
    ours, _ = models()
    kept = []
    prepare = ours.prepare_inputs_for_generation

    def keeping(*args, **kwargs):
        kept.append(kwargs["past_key_values"])
        return prepare(*args, **kwargs)

    ours.prepare_inputs_for_generation = keeping
    ours.generate(ONE, **OPTIONS)
    assert ours.accelerated.declined is None
    for use in (
        lambda: kept[0].get_seq_length(),
        lambda: ours(ONE, past_key_values=kept[0]),
        lambda: kept[0].reorder_cache(torch.tensor([0])),
    ):
        with pytest.raises(CaptureError, match="belongs to a call of generate\\(\\) that has ended"):
            use()


# --- changes of the model


def swap_layers(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def patch_class(model):
    kind = type(model.model.layers[0].mlp)
    model.model.layers[0].mlp.__class__ = type("Other", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 2})


def scale_data(model):
    model.lm_head.weight.data.mul_(torch.linspace(-1, 1, 64)[:, None])


def assign_data(model):
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0).clone()


CHANGES = {
    "layers swapped": swap_layers,
    "class of one module replaced": patch_class,
    "weight scaled through data": scale_data,
    "other memory behind a weight": assign_data,
    "attribute of a norm": lambda model: setattr(model.model.layers[0].input_layernorm, "variance_epsilon", 3.0),
    "a module put before the head": lambda model: setattr(
        model, "lm_head", nn.Sequential(nn.Linear(32, 32, bias=False), model.lm_head)
    ),
    "another attention": lambda model: model.set_attn_implementation("eager"),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "weights loaded": lambda model: model.load_state_dict(
        {name: tensor.flip(0) for name, tensor in model.state_dict().items()}
    ),
    "one layer fewer": lambda model: (model.model.layers.pop(1), setattr(model.config, "num_hidden_layers", 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_answers_as_it_is_now(change):
    ours, plain = models()
    assert both(ours, plain, inputs=ONE) is None
    before = plain.generate(ONE, **OPTIONS)
    with torch.no_grad():
        for model in (ours, plain):
            torch.manual_seed(3)
            CHANGES[change](model)
    for _ in range(2):
        both(ours, plain, inputs=ONE)
    if change not in ("another attention", "bfloat16"):
        assert not torch.equal(plain.generate(ONE, **OPTIONS), before)


@pytest.mark.parametrize("change", ["weight scaled through data", "weights loaded", "layers swapped", "bfloat16"])
def test_an_engine_goes_on_from_nothing_that_other_weights_made(change):
    model = endless()
    engine = InferEngine(model, max_length=64, config=PLAIN)
    prompt = zoo.ids(20)[0].tolist()
    first = engine.generate(prompt, max_new_tokens=6).tokens
    with torch.no_grad():
        CHANGES[change](model)
    longer = [*prompt, *first, 5]
    ids = torch.tensor([longer])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)[0, len(longer) :].tolist()
    assert engine.generate(longer, max_new_tokens=6).tokens == want


def test_a_write_that_nobody_can_see_needs_a_reset():
    model = endless()
    engine = InferEngine(model, max_length=64, config=PLAIN)
    prompt = zoo.ids(20)[0].tolist()
    answer = engine.generate(prompt, max_new_tokens=4).tokens
    model.model.embed_tokens.weight.data[prompt[0]] += 1  # one row, past torch's counter
    engine.reset()
    longer = [*prompt, *answer, 5]
    ids = torch.tensor([longer])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)[0, len(longer) :].tolist()
    assert engine.generate(longer, max_new_tokens=6).tokens == want
    assert engine.session(1).filled == len(longer) + 6 - 1


def test_an_unchanged_model_goes_on_from_what_is_there():
    engine = InferEngine(endless(), max_length=64, config=PLAIN)
    prompt = zoo.ids(20)[0].tolist()
    answer = engine.generate(prompt, max_new_tokens=4).tokens
    seen = []
    extend = type(engine.session(1))._extend
    engine.session(1)._extend = lambda *args, **kwargs: seen.append(1) or extend(engine.session(1), *args, **kwargs)
    engine.generate([*prompt, *answer, 5, 6], max_new_tokens=4)
    assert seen


class Adapted(nn.Module):
    """A linear with adapters of which some are active, as adapter libraries put them in place."""

    def __init__(self, base):
        super().__init__()
        self.base, self.active, self.off = base, ["a"], False
        self.adapters = nn.ModuleDict({name: nn.Linear(32, base.out_features) for name in "ab"})

    def forward(self, x):
        result = self.base(x)
        return result if self.off else result + sum(self.adapters[name](x) for name in self.active) * 3


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.inner.generate(*args, **kwargs)


def adapted():
    torch.manual_seed(5)
    model = endless()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj).eval()
    return model


def test_adapters_are_switched_within_two_wrappers():
    torch.manual_seed(0)
    plain = Wrapper(Wrapper(adapted()))
    ours = accelerate(copy.deepcopy(plain), PLAIN, max_length=48)
    answers = []
    for state in (["a"], ["b"], ["a", "b"], None, ["a"]):
        for model in (ours, plain):
            for module in model.modules():
                if isinstance(module, Adapted):
                    module.active, module.off = state or ["a"], state is None
        assert both(ours, plain, inputs=ONE) is None
        answers.append(tuple(plain.generate(ONE, **OPTIONS)[0].tolist()))
    assert len(set(answers)) == 4
    assert answers[0] == answers[4]
    unaccelerate(ours)
    assert not any("accelerated" in vars(module) or "generate" in vars(module) for module in ours.modules())


def test_adapters_that_come_after_accelerate():
    ours, plain = models()
    both(ours, plain, inputs=ONE)
    for model in (ours, plain):
        torch.manual_seed(7)
        model.model.layers[0].self_attn.q_proj = Adapted(model.model.layers[0].self_attn.q_proj).eval()
    assert both(ours, plain, inputs=ONE) is None


# --- copies


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_copy_is_accelerated_on_its_own(duplicate, used):
    ours, plain = models()
    if used:
        both(ours, plain, inputs=ONE)
    twin = duplicate(ours)
    assert twin.accelerated is not ours.accelerated
    assert both(twin, plain, inputs=ONE) is None
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    assert both(ours, plain, inputs=ONE) is None
    assert not torch.equal(twin.generate(ONE, **OPTIONS), plain.generate(ONE, **OPTIONS))
    twin.accelerated.undo()
    assert "generate" not in vars(twin)
    assert "generate" in vars(ours)


def test_a_saved_folder_holds_the_model_alone(tmp_path):
    ours, plain = models()
    both(ours, plain, inputs=ONE)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert "accelerated" not in vars(loaded)
    assert torch.equal(loaded.generate(ONE, **OPTIONS), plain.generate(ONE, **OPTIONS))


def test_unaccelerate_leaves_everything_as_it_was():
    plain = endless()
    before = set(vars(plain))
    assert unaccelerate(accelerate(plain, PLAIN)) is plain
    assert set(vars(plain)) == before
    assert unaccelerate(plain) is plain
    own = plain.forward
    plain.forward = lambda *args, **kwargs: own(*args, **kwargs)  # as libraries do that move weights about
    patched = plain.forward
    unaccelerate(accelerate(plain, PLAIN))
    assert plain.forward is patched


# --- surroundings


def test_hooks_are_called():
    ours, plain = models()
    both(ours, plain, inputs=ONE)
    seen = {}
    for name, model in (("ours", ours), ("plain", plain)):
        model.model.layers[1].register_forward_hook(
            lambda module, args, result, name=name: seen.setdefault(name, []).append(1)
        )
    assert "hook" in both(ours, plain, inputs=ONE)
    assert seen["ours"] == seen["plain"]


def test_autocast_is_the_callers():
    ours, plain = models()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in both(ours, plain, inputs=ONE)
    assert both(ours, plain, inputs=ONE) is None


def test_inference_mode_and_then_none():
    ours, plain = models()
    with torch.inference_mode():
        assert both(ours, plain, inputs=ONE) is None
    assert both(ours, plain, inputs=ONE) is None
    with torch.inference_mode():
        assert both(ours, plain, inputs=ONE) is None


def test_a_model_in_training_drops_out():
    ours, plain = models("gpt2")
    both(ours, plain, inputs=ONE)
    results = []
    for model in (ours, plain):
        model.train()
        torch.manual_seed(4)
        results.append(model.generate(ONE, **OPTIONS))
    assert torch.equal(*results)
    assert "training mode" in ours.accelerated.declined


def test_an_engine_under_hooks_and_autocast_answers_as_the_model_does():
    model = endless()
    engine = InferEngine(model, max_length=48, config=PLAIN)
    want = model.generate(ONE, **OPTIONS)[0, 9:].tolist()
    calls = []
    handle = model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    assert engine.generate(ROWS[1], max_new_tokens=6).tokens == want
    assert len(calls) == 6
    assert "hook" in engine.stats()["eager"]["the model"]
    handle.remove()
    assert engine.generate(ROWS[1], max_new_tokens=6).tokens == want
    assert "the model" not in engine.stats()["eager"]
