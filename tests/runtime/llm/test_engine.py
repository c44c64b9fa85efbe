"""The engine: the same tokens as transformers' own ``generate``, captured or not."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from graph_capture import CaptureError, FusionConfig, InferEngine, InferEnginePython
from graph_capture.runtime.llm.memory import bucket
from tests import llm, zoo

STATIC = FusionConfig(profile="static")  # kernels untimed: what is used does not depend on the machine's load
COUNT = 12
PROMPTS = [zoo.ids(6)[0].tolist(), zoo.ids(19, seed=3)[0].tolist(), zoo.ids(1, seed=5)[0].tolist()]


def engine(name="llama", **options):
    return InferEngine(llm.endless(name), max_length=48, config=STATIC, **options)


def tokens(completions):
    return [completion.tokens for completion in completions]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return llm.folder(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("rows", [PROMPTS[:1], PROMPTS], ids=["one", "three, padded"])
def test_greedy_tokens_are_those_of_transformers(name, rows):
    ours = engine(name)
    ids, mask = llm.padded(rows)
    want = ours.model.generate(ids, attention_mask=mask, max_new_tokens=COUNT, do_sample=False)[:, ids.shape[1] :]
    for _ in range(2):  # recorded, then replayed
        assert tokens(ours.generate(rows, max_new_tokens=COUNT)) == want.tolist()
    stats = ours.stats()
    assert stats["eager"] == {}
    assert stats["captured"]["decode, greedy" if len(rows) == 1 else "decode, batch 3, greedy, padded"] >= 2 * COUNT - 3
    ours.enable_fusion = False
    assert tokens(ours.generate(rows, max_new_tokens=COUNT)) == want.tolist()
    assert sum(ours.stats()["captured"].values()) == sum(stats["captured"].values())  # it really ran as it is


def test_a_penalty_is_that_of_transformers():
    ours = engine()
    ids, mask = llm.padded(PROMPTS[:1])
    want = ours.model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, repetition_penalty=1.7)
    plain = ours.generate(PROMPTS[0], max_new_tokens=20).tokens
    got = ours.generate(PROMPTS[0], max_new_tokens=20, repetition_penalty=1.7).tokens
    assert got == want[0, ids.shape[1] :].tolist() != plain


def test_a_prompt_for_each_length_up_to_a_full_cache():
    ours = engine()
    for length in (1, 15, 16, 17, 30, 46, 47):
        prompt = zoo.ids(length, seed=length)[0].tolist()
        answer = ours.generate(prompt, max_new_tokens=100)
        assert answer.finish_reason == "length"
        assert len(answer.tokens) == 48 - length + 1  # the last one is never fed
        ids = torch.tensor([prompt])
        want = ours.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=49 - length, do_sample=False
        )
        assert answer.tokens == want[0, length:].tolist()


def test_buckets_are_few_and_large_enough():
    sizes = {bucket(length) for length in range(1, 1025)}
    assert sizes == {16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024}
    assert all(length <= bucket(length) < 2 * max(length, 9) for length in range(1, 3000))


def test_a_conversation_reads_only_what_is_new():
    ours = engine()
    first = ours.generate(PROMPTS[0], max_new_tokens=10)
    longer = [*PROMPTS[0], *first.tokens, 7, 8, 9]
    again = ours.generate(longer, max_new_tokens=8)
    assert any(name.startswith("continue") for name in ours.stats()["captured"])
    fresh = engine().generate(longer, max_new_tokens=8)
    assert again.tokens == fresh.tokens
    other = ours.generate(PROMPTS[1], max_new_tokens=8)  # nothing shared
    assert other.tokens == engine().generate(PROMPTS[1], max_new_tokens=8).tokens


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.9}, {"temperature": 1.3, "top_k": 5}, {"temperature": 0.8, "top_p": 0.7},
     {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}],
    ids=str,
)  # fmt: skip
def test_sampling_follows_its_seed(options):
    ours = engine()
    first, again, other = (
        tokens(ours.generate(PROMPTS, max_new_tokens=COUNT, seed=seed, **options)) for seed in (1, 1, 2)
    )
    assert first == again != other
    ours.enable_fusion = False
    assert tokens(ours.generate(PROMPTS, max_new_tokens=COUNT, seed=1, **options)) == first
    unseeded = [ours.generate(PROMPTS[0], max_new_tokens=COUNT, temperature=5.0).tokens for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_each_prompt_has_its_own_options_and_its_answer_is_its_own():
    ours = engine()
    options = {
        "temperature": [0.0, 1.2, 0.8],
        "top_k": [0, 8, 0],
        "top_p": [1.0, 1.0, 0.7],
        "presence_penalty": [0.0, 0.5, 0.0],
        "seed": [None, 11, 12],
        "max_new_tokens": [12, 5, 9],
    }
    together = ours.generate(PROMPTS, **options)
    assert [len(answer.tokens) for answer in together] == [12, 5, 9]
    for index, prompt in enumerate(PROMPTS):
        alone = ours.generate(prompt, **{name: values[index] for name, values in options.items()})
        assert together[index].tokens == alone.tokens
    beside = ours.generate([PROMPTS[1], zoo.ids(30, seed=8)[0].tolist()], temperature=[1.2, 0.0], top_k=[8, 0],
                           presence_penalty=[0.5, 0.0], seed=[11, 0], max_new_tokens=5)  # fmt: skip
    assert beside[0].tokens == together[1].tokens  # whatever its neighbour, and however long that is


def test_several_answers_to_a_prompt():
    ours = engine()
    options = {"temperature": 1.5, "seed": 3, "max_new_tokens": COUNT}
    three = ours.generate(PROMPTS[0], n=3, **options)
    assert len({tuple(answer.tokens) for answer in three}) == 3
    assert three[0].tokens == ours.generate(PROMPTS[0], **options).tokens
    assert three[2].tokens == ours.generate(PROMPTS[0], **{**options, "seed": 5}).tokens
    grouped = ours.generate(PROMPTS[:2], n=2, **options)
    assert [len(group) for group in grouped] == [2, 2]
    assert tokens(grouped[0]) == tokens(three[:2])
    assert [answer.prompt_tokens for answer in grouped[1]] == [19, 19]


def test_log_probabilities_are_those_of_the_model():
    ours = engine()
    answer = ours.generate(PROMPTS[0], max_new_tokens=6, logprobs=2, repetition_penalty=1.5)
    ids = torch.tensor([[*PROMPTS[0], *answer.tokens]])
    with torch.no_grad():
        wanted = ours.model(ids).logits[0].log_softmax(-1)
    assert len(answer.logprobs) == 6
    for step, (token, told) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        row = wanted[len(PROMPTS[0]) - 1 + step]
        assert told.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [best for best, _ in told.top] == row.topk(2).indices.tolist()
    assert ours.generate(PROMPTS[0], max_new_tokens=2).logprobs == []
    assert ours.generate(PROMPTS[0], max_new_tokens=2, logprobs=True).logprobs[0].top == ()


def test_the_models_own_defaults_hold():
    ours = engine()
    plain = ours.generate(PROMPTS[0], max_new_tokens=COUNT).tokens
    model = llm.endless("llama")
    for name, value in {"do_sample": True, "temperature": 2.5, "top_k": 30, "max_new_tokens": 9}.items():
        setattr(model.generation_config, name, value)
    theirs = InferEngine(model, max_length=48, config=STATIC)
    drawn = theirs.generate(PROMPTS[0], seed=4).tokens
    assert len(drawn) == 9
    assert drawn == ours.generate(PROMPTS[0], seed=4, temperature=2.5, top_k=30, max_new_tokens=9).tokens
    assert theirs.generate(PROMPTS[0], temperature=0.0, max_new_tokens=COUNT).tokens == plain


def test_a_prompt_is_answered_before_anything_is_recorded(monkeypatch):
    """A length, a batch size or a kind of sampling that is new costs the first token no recording."""
    ours = engine()
    seen = []
    monkeypatch.setattr(ours, "_progress", seen.append)
    for session_options in (
        {"prompts": PROMPTS[1]},
        {"prompts": zoo.ids(30, seed=2)[0].tolist()},
        {"prompts": PROMPTS[1], "temperature": 1.0},
        {"prompts": PROMPTS[:2]},
    ):
        prompts = session_options.pop("prompts")
        rows, _ = ours.prompts.rows(prompts)
        request = ours.prompts.request(rows, max_new_tokens=6, **session_options)
        from graph_capture.runtime.llm import Completion

        answering = ours._answer(request, [Completion() for _ in rows])
        seen.clear()
        next(answering)
        assert not [text for text in seen if "recording" in text]
        list(answering)
        for session in ours.sessions.values():
            assert not session.steps.wanted
    pieces = {"prefill of 16 tokens", "continue of 16 tokens"}  # a second length: what serves any
    assert {"prefill of 24 tokens", *pieces, "prefill of 24 tokens, batch 2, padded"} <= set(ours.stats()["captured"])
    ours.forget_prompts()
    before = dict(ours.stats()["captured"])
    ours.generate(PROMPTS[1], max_new_tokens=3)
    assert ours.stats()["captured"]["prefill of 24 tokens"] == before["prefill of 24 tokens"] + 1


def test_short_answers_are_followed_by_recording_only_where_they_are_many():
    ours = engine()
    ours.generate(PROMPTS[0], max_new_tokens=6)
    name = "prefill of 24 tokens"
    for seed in range(4):
        assert name not in ours.stats()["captured"]
        ours.generate(zoo.ids(20, seed=seed)[0].tolist(), max_new_tokens=1)
    assert name in ours.stats()["captured"]


def test_a_batch_is_proved_before_it_comes(monkeypatch):
    from graph_capture.runtime.llm import serving

    proofs = []
    prove = serving.prove
    monkeypatch.setattr(
        serving, "prove", lambda session, padded, total: proofs.append(session.batch) or prove(session, padded, total)
    )
    ours = engine()
    ours.generate(PROMPTS[0], max_new_tokens=6)
    assert proofs == [1, 2, 2]
    ours.generate(PROMPTS, max_new_tokens=6)
    ours.generate([PROMPTS[0]] * 2, max_new_tokens=6)
    assert proofs == [1, 2, 2]


def test_recording_after_an_answer_leaves_the_slots():
    ours = engine()
    first = ours.generate(PROMPTS[1], max_new_tokens=6)
    kept = [held.clone() for layer in ours.session(1).cache.layers for held in (layer.keys, layer.values)]
    longer = [*PROMPTS[1], *first.tokens, 4, 5, 6]
    ours.session(1).steps.wanted.clear()
    again = ours.generate(longer, max_new_tokens=6)  # goes on, and records how it went on
    filled = len(PROMPTS[1])
    now = [held for layer in ours.session(1).cache.layers for held in (layer.keys, layer.values)]
    for before, after in zip(kept, now, strict=True):
        assert torch.equal(before[:, :, :filled], after[:, :, :filled])
    assert again.tokens == engine().generate(longer, max_new_tokens=6).tokens
    assert ours.session(1).filled == len(longer) + 5


def test_one_recorded_step_serves_every_temperature():
    ours = engine()
    answers = [ours.generate(PROMPTS[0], max_new_tokens=20, seed=0, temperature=t).tokens for t in (1e-4, 1.0, 50.0)]
    assert answers[0] == ours.generate(PROMPTS[0], max_new_tokens=20).tokens != answers[1] != answers[2]
    assert sum(name.startswith("decode, sampled") for name in ours.stats()["captured"]) == 1


def test_a_replaced_weight_is_recorded_again():
    ours = engine()
    ours.generate(PROMPTS[0], max_new_tokens=4)
    ours.model.lm_head.weight = torch.nn.Parameter(ours.model.lm_head.weight.flip(0).clone())
    got = ours.generate(PROMPTS[1], max_new_tokens=COUNT)
    ours.enable_fusion = False
    assert got.tokens == ours.generate(PROMPTS[1], max_new_tokens=COUNT).tokens


def test_text_in_and_out(saved):
    ours = InferEngine(saved, device="cpu", config=STATIC)
    answer = ours.generate("hello", max_new_tokens=24)
    assert answer.text == ours.tokenizer.decode(answer.tokens, skip_special_tokens=True)
    pieces = list(ours.stream("hello", max_new_tokens=24))
    assert "".join(pieces) == answer.text == ours.last.text
    assert ours.last.prompt_tokens == 5
    assert 0 < ours.last.time_to_first_token <= ours.last.seconds
    assert ours.last.tokens_per_second > 0
    batch = ours.generate(["hello", "a longer prompt"], max_new_tokens=24)
    assert [completion.text for completion in batch] == [
        ours.generate(prompt, max_new_tokens=24).text for prompt in ("hello", "a longer prompt")
    ]


def test_a_chat_goes_through_the_template(saved):
    ours = InferEngine(saved, device="cpu", config=STATIC)
    messages = [{"role": "user", "content": "hi"}]
    by_hand = ours.generate("user: hi\nassistant: ", max_new_tokens=8)
    assert ours.chat(messages, max_new_tokens=8).tokens == by_hand.tokens
    assert "".join(ours.stream(messages, max_new_tokens=8)) == by_hand.text


def test_a_message_may_be_parts_or_nothing(saved):
    ours = InferEngine(saved, device="cpu", config=STATIC)
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, "i"]}, {"role": "assistant", "content": None}]
    plain = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]
    assert ours.encode_messages(parts) == ours.encode_messages(plain)


def test_an_end_token_ends_the_answer(saved):
    ours = InferEngine(saved, device="cpu", config=STATIC)
    free = ours.generate("hello", max_new_tokens=20)
    ours._ends = frozenset({free.tokens[5]})
    answer = ours.generate("hello", max_new_tokens=20)
    assert answer.tokens == free.tokens[: free.tokens.index(free.tokens[5])]
    assert answer.finish_reason == "stop"


def test_a_stop_string_ends_the_answer_and_is_not_shown(saved):
    ours = InferEngine(saved, device="cpu", config=STATIC)
    free = ours.generate("hello", max_new_tokens=40).text
    word = free[7:10]
    pieces = list(ours.stream("hello", max_new_tokens=40, stop=[word, "never"]))
    assert "".join(pieces) == ours.last.text == free[: free.index(word)]
    assert ours.last.finish_reason == "stop"


def test_the_config_can_turn_fusion_off(tmp_path):
    ours = InferEngine(llm.folder(tmp_path, enable_fusion=False), device="cpu")
    assert not ours.enable_fusion
    ours.generate("hello", max_new_tokens=3)
    assert ours.stats()["captured"] == {}


def test_a_dtype_is_loaded_as_asked(saved):
    assert InferEngine(saved, device="cpu").model.dtype == torch.float32
    ours = InferEngine(saved, device="cpu", dtype=torch.bfloat16, config=STATIC)
    assert ours.model.dtype == torch.bfloat16
    assert ours.agreement("hello", 20).ok


def test_forward_gives_the_logits_of_the_model(saved):
    ours = InferEngine(saved, device="cpu", config=STATIC)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(saved).double()(input_ids=ids).logits
        plain = ours.model(input_ids=ids).logits
    for _ in range(2):
        got = ours.forward(ids)
        assert (got - exact).norm() <= 1.5 * (plain - exact).norm() + 1e-12
    assert InferEngine is InferEnginePython


def test_greedy_tokens_agree_or_part_where_the_model_is_undecided():
    ours = engine()
    found = ours.agreement(PROMPTS[0], 20)
    assert (found.first, found.ok, found.tokens) == (None, True, 20)
    assert "all 20" in str(found)
    kernel = ours.session(1).phases[("decode", 1, ours_kind(), False, ())]
    kernel.fused = _Shifted(kernel.fused, ours.session(1))
    found = ours.agreement(PROMPTS[0], 20)
    assert found.first == 1
    assert found.margin > found.rounding
    assert not found.ok
    assert "MORE THAN ROUNDING" in str(found)


class _Shifted:
    """A replay that is off by one token."""

    def __init__(self, inner, session):
        self.inner, self.session = inner, session

    def __call__(self):
        right = self.inner()
        self.session.tokens.copy_((right[:, None] + 1) % zoo.VOCABULARY)
        return (right + 1) % zoo.VOCABULARY


def ours_kind():
    from graph_capture.runtime.llm import Sampling

    return Sampling().kind


def test_what_cannot_be_captured_runs_as_it_is_and_is_reported(caplog):
    ours = engine("opt")  # looks, in Python, how many tokens there are
    ids, mask = llm.padded(PROMPTS[:1])
    want = ours.model.generate(ids, attention_mask=mask, max_new_tokens=COUNT, do_sample=False)[:, ids.shape[1] :]
    assert ours.generate(PROMPTS[0], max_new_tokens=COUNT).tokens == want[0].tolist()
    assert "DataDependentError" in ours.stats()["eager"]["decode, greedy"]
    assert "runs as it is" in ours.explain()
    assert "uncaptured" in caplog.text


def test_warming_up_leaves_nothing_to_record():
    ours = engine()
    ours.warm_up([5, 20], temperature=1.0)
    before = set(ours.stats()["captured"])
    assert before == {"prefill of 16 tokens", "prefill of 24 tokens", "decode, sampled"}
    ours.generate(PROMPTS[1], max_new_tokens=5, temperature=0.7, seed=3)
    assert set(ours.stats()["captured"]) == before
    with pytest.raises(CaptureError, match="top_p must be"):
        ours.warm_up(top_p=2.0)


def test_linears_of_one_input_are_merged():
    """The engine holds no weight's memory besides the model: merging would be refused."""
    ours = engine()
    for _ in range(3):
        ours.generate(PROMPTS[0], max_new_tokens=COUNT)
    (decode,) = [phase for phase in ours.session(1).phases.values() if phase.name.startswith("decode")]
    merged = [region for region in decode.fused.regions if region.kind == "parallel_linear"]
    assert len(merged) == ours.model.config.num_hidden_layers
    assert all(region.decision.use for region in merged)
    query, key = (getattr(ours.model.model.layers[0].self_attn, name).weight for name in ("q_proj", "k_proj"))
    assert query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()


def test_two_threads_take_turns():
    ours = engine()
    want = {seed: ours.generate(zoo.ids(5, seed=seed)[0].tolist(), max_new_tokens=10).tokens for seed in range(4)}
    got = {}

    def answer(seed):
        got[seed] = ours.generate(zoo.ids(5, seed=seed)[0].tolist(), max_new_tokens=10).tokens

    threads = [threading.Thread(target=answer, args=(seed,)) for seed in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == want


def test_a_stream_that_is_left_does_not_block(saved):
    ours = InferEngine(saved, device="cpu", config=STATIC)
    stream = ours.stream("hello", max_new_tokens=20)
    next(stream)
    with pytest.raises(CaptureError, match="stream under way"):
        ours.generate("hello", max_new_tokens=2)
    stream.close()
    assert len(ours.generate("hello", max_new_tokens=2).tokens) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.generate(""), "a prompt is empty"),
        (lambda e: e.generate([]), "no prompt"),
        (lambda e: e.generate("x" * 128), "128 tokens, and the cache 128 slots.*larger max_length"),
        (lambda e: e.generate("a", max_new_tokens=0), "max_new_tokens must be at least 1"),
        (lambda e: e.generate("a", temperature=-1.0), "temperature must be 0 or more"),
        (lambda e: e.generate("a", temperature=float("nan")), "temperature must be"),
        (lambda e: e.generate("a", top_p=0.0), "top_p must be"),
        (lambda e: e.generate("a", top_k=-1), "top_k must be"),
        (lambda e: e.generate("a", repetition_penalty=0.0), "repetition_penalty must be"),
        (lambda e: e.generate("a", stop=[""]), "stop string is empty"),
        (lambda e: e.generate("caf\udce9"), "not valid text"),
        (lambda e: e.generate([1, 9999]), "token 9999 is not one"),
        (lambda e: e.stream(["a", "b"]), "one prompt"),
        (lambda e: e.stream("a", n=2), "stream\\(\\) gives one answer"),
        (lambda e: e.generate("a", n=0), "n must be at least 1"),
        (lambda e: e.generate("a", max_new_tokens="5"), "max_new_tokens must be a whole number, got '5'"),
        (lambda e: e.generate("a", temperature="hot"), "temperature must be a number"),
        (lambda e: e.generate("a", colour="red"), "there is no option 'colour'"),
        (lambda e: e.generate("a", stop=5), "stop must be a string or a list of strings"),
        (lambda e: e.generate("a", seed="x"), "seed must be a whole number"),
        (lambda e: e.generate("a", seed=2**70), "fit into 64 bits"),
        (lambda e: e.generate("a", logprobs=-3), "logprobs must be from 0 to 64"),
        (lambda e: e.generate("a", logprobs=1000), "logprobs must be from 0 to 64"),
        (lambda e: e.generate("a", logit_bias={99999: 1.0}), "token 99999"),
        (lambda e: e.generate(["a", "b"], temperature=[1.0]), "temperature has 1 entries for 2 prompts"),
        (lambda e: e.generate(None), "a prompt is text, tokens or a list of messages"),
        (lambda e: e.generate(5), "a prompt is text, tokens or a list of messages"),
        (lambda e: e.generate([1, "a"]), "tokens are whole numbers"),
        (lambda e: e.generate([None]), "a prompt of a batch is text, tokens or messages"),
        (lambda e: e.generate(torch.zeros(1, 2, 3)), "tokens are whole numbers"),
        (lambda e: e.generate(torch.zeros(3)), "tokens are whole numbers"),
        (lambda e: e.chat([{"content": "x"}]), "a message has a role"),
        (lambda e: e.chat([{"role": "user", "content": 5}]), "the content of a message is text"),
        (lambda e: e.chat([{"role": "user", "content": [{"type": "image"}]}]), "no text \\(image\\)"),
    ],
)
def test_errors_say_what_is_wrong(saved, call, message):
    with pytest.raises(CaptureError, match=message):
        call(InferEngine(saved, device="cpu", enable_fusion=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: InferEngine(path / "nothing"), "no model folder"),
        (lambda path: InferEngine(path, max_length=1), "at least 2"),
        (lambda path: InferEngine(torch.nn.Linear(2, 2)), "not a causal language model"),
        (lambda path: InferEngine(7), "a folder, a name or a module, not a int"),
        (lambda path: InferEngine(zoo.build("llama")).generate("text"), "no tokenizer"),
        (lambda path: InferEngine(zoo.build("llama")).generate([1], stop="a"), "need a tokenizer"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_had(saved, make, message):
    with pytest.raises(CaptureError, match=message):
        make(saved)


def test_a_damaged_file_is_an_error(tmp_path):
    llm.folder(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CaptureError, match="cannot be loaded"):
        InferEngine(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["cuda", "cpu"],
)
def test_a_cache_without_memory_names_a_way_out(monkeypatch, error):
    def exhausted(*args, **kwargs):
        raise error

    ours = engine()
    monkeypatch.setattr(torch, "zeros", exhausted)
    with pytest.raises(CaptureError, match="smaller max_length"):
        ours.session(1)


def test_other_errors_of_a_model_stay_what_they_are(monkeypatch):
    ours = engine()
    monkeypatch.setattr(ours.model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("odd")))
    with pytest.raises(RuntimeError, match="odd"):
        ours.session(1)
