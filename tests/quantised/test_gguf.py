"""Models from GGUF files: their numbers beside transformers' own, and what damaged files get."""

import random
import shutil
import struct

import pytest
import torch
from transformers import AutoModelForCausalLM

from graph_capture import InferEngine
from graph_capture.errors import CaptureError
from graph_capture.ir.quantised import FORMATS, decoded
from graph_capture.runtime.llm.gguf import contents
from graph_capture.runtime.llm.models import load_config, load_model, load_tokenizer
from graph_capture.runtime.llm.packed import PackedEmbedding, PackedLinear
from tests.quantised.files import LAYERS, TEMPLATE, WORDS, write_llama

IDS = torch.arange(20).view(2, 10)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The bytes of a sound file."""
    return write_llama(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


@pytest.mark.parametrize("kind", [*FORMATS, "F16"])
def test_a_model_has_the_numbers_that_transformers_has_of_unpacked_weights(tmp_path, kind):
    path = write_llama(tmp_path / "model.gguf", kind, tied=kind != "Q8_0")
    model = load_model(str(path), dtype=torch.float32)
    weights = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(weights) == (7 * LAYERS + 1 if kind in FORMATS else 0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    for name, module in weights.items():
        assert torch.equal(decoded(module.packed, kind), theirs.get_submodule(name).weight), name
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_blocks_stay_in_the_file_and_a_tied_head_has_the_embedding_s(tmp_path):
    path = write_llama(tmp_path / "model.gguf", "Q4_1")
    model = load_model(str(tmp_path))  # the folder
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert head.packed is embedding.packed
    assert model.dtype is torch.bfloat16
    mapped = [m.packed for m in model.modules() if isinstance(m, (PackedLinear, PackedEmbedding))]
    file = embedding.packed.untyped_storage().data_ptr()
    assert embedding.packed.untyped_storage().nbytes() == path.stat().st_size
    copies = [p for p in mapped if p.untyped_storage().data_ptr() != file]
    assert len(copies) == 2 * LAYERS  # of queries and keys, whose rows transformers has in another order


def test_an_engine_answers_from_a_file_and_its_template(tmp_path):
    path = write_llama(tmp_path / "model.gguf", "Q4_K")
    assert load_config(str(path)).num_hidden_layers == LAYERS
    assert load_tokenizer(str(path)).chat_template == TEMPLATE
    engine = InferEngine(str(path))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.bfloat16).eval()
    answer = engine.chat([{"role": "user", "content": "abc"}], max_new_tokens=8, temperature=0.0)
    prompt = torch.tensor([engine.encode_messages([{"role": "user", "content": "abc"}])])
    want = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    assert answer.tokens == want[0, prompt.shape[1] :].tolist()[: len(answer.tokens)]
    assert answer.tokens


def test_what_is_not_supported_is_named(tmp_path, plain):
    path = tmp_path / "model.gguf"
    with pytest.raises(CaptureError, match=r"No such file"):
        load_model(str(path))
    path.write_bytes(plain.replace(b"llama", b"lemma"))
    with pytest.raises(CaptureError, match=r"transformers has no model of .* \(lemma\)"):
        load_model(str(path))
    where = contents_of(tmp_path, plain)["blk.0.ffn_up.weight"]
    name = b"blk.0.ffn_up.weight"
    at = plain.index(name) + len(name) + 4 + 16
    assert struct.unpack_from("<I", plain, at) == (2,)
    path.write_bytes(plain[:at] + struct.pack("<I", 20) + plain[at + 4 :])  # IQ4_NL is of the same size
    assert contents(path).tensors["blk.0.ffn_up.weight"] == type(where)(**{**vars(where), "kind": "IQ4_NL"})
    path.write_bytes(plain[:at] + struct.pack("<I", 39) + plain[at + 4 :])
    with pytest.raises(CaptureError, match=r"MXFP4, which is not supported; there are .*let transformers unpack"):
        load_model(str(path))
    shutil.copy(path, tmp_path / "other.gguf")
    with pytest.raises(CaptureError, match=r"name one of model.gguf, other.gguf"):
        load_model(str(tmp_path))


def contents_of(folder, data):
    (folder / "sound.gguf").write_bytes(data)
    found = contents(folder / "sound.gguf").tensors
    (folder / "sound.gguf").unlink()
    return found


def test_a_file_that_does_not_fit_its_configuration_is_refused(tmp_path, plain):
    path = tmp_path / "model.gguf"
    key = b"llama.block_count"
    at = plain.index(key) + len(key) + 4
    for count, reason in ((3, "has no model.layers.2"), (10**9, "layers"), (0, "")):
        path.write_bytes(plain[:at] + struct.pack("<I", count) + plain[at + 4 :])
        if reason:
            with pytest.raises(CaptureError, match=reason):
                load_model(str(path))
        else:
            assert load_model(str(path)).config.num_hidden_layers == 0
    key = b"llama.feed_forward_length"
    at = plain.index(key) + len(key) + 4
    path.write_bytes(plain[:at] + struct.pack("<I", 2**31) + plain[at + 4 :])
    with pytest.raises(CaptureError, match=r"is \[512, 256\], and \[2147483648, 256\]"):
        load_model(str(path))


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 24, 100, 0.2, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_refused(tmp_path, plain, kept):
    path = tmp_path / "model.gguf"
    path.write_bytes(plain[: kept if kept >= 1 or not kept else int(len(plain) * kept)])
    with pytest.raises(CaptureError, match=r"sound GGUF file|cannot be read"):
        load_model(str(path))


def test_overlapping_tensors_are_refused(tmp_path, plain):
    name = b"blk.1.ffn_up.weight"
    at = plain.index(name) + len(name) + 4 + 16 + 4
    path = tmp_path / "model.gguf"
    path.write_bytes(plain[:at] + struct.pack("<Q", 0) + plain[at + 8 :])
    with pytest.raises(CaptureError, match="overlap"):
        contents(path)


def test_mutants_are_refused_by_name_or_load(tmp_path, plain):
    """Bytes of the header replaced: by others, by large and by small numbers."""
    generator, path = random.Random(0), tmp_path / "model.gguf"
    end = contents_of(tmp_path, plain)["token_embd.weight"].offset
    refused = 0
    for _ in range(400):
        data = bytearray(plain)
        for _ in range(generator.choice((1, 1, 2, 4))):
            at, width = generator.randrange(end - 8), generator.choice((1, 4, 8))
            number = generator.choice((0, 1, 2**31, 2**63, 2**64 - 1, generator.getrandbits(64)))
            data[at : at + width] = struct.pack("<Q", number)[:width]
        path.write_bytes(data)
        try:
            contents(path)
        except CaptureError:
            refused += 1
    assert refused > 100
    assert len(WORDS) < 200  # nearly all of the header is structure, and little of it words
