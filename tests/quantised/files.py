"""Small GGUF files to test with."""

from pathlib import Path

import gguf
import numpy
import torch

from graph_capture.ir.quantised import FORMATS
from tests.quantised.blocks import packed

HIDDEN, LAYERS, HEADS, KEYS = 256, 2, 4, 2
WORDS = [chr(code) for code in range(33, 127)] + ["ab", "Ġ", "Ċ", "<s>", "</s>"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_llama(path: Path, kind: str = "Q4_0", *, tied: bool = True, seed: int = 0, layers: int = LAYERS) -> Path:
    """A Llama of random weights, its matrices in the format `kind` ("F16" among them), with a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(512)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * (len(WORDS) - 2) + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(WORDS) - 2)
    writer.add_eos_token_id(len(WORDS) - 1)
    writer.add_chat_template(TEMPLATE)
    count = iter(range(seed, 10**6))

    def matrix(name: str, rows: int, inner: int = HIDDEN) -> None:
        if kind in FORMATS:
            blocks = packed(kind, rows, inner, next(count), 0.003)
            writer.add_tensor(name, blocks.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            generator = torch.Generator().manual_seed(next(count))
            writer.add_tensor(name, (torch.randn(rows, inner, generator=generator) * 0.05).half().numpy())

    def norm(name: str) -> None:
        generator = torch.Generator().manual_seed(next(count))
        writer.add_tensor(name, (1 + torch.randn(HIDDEN, generator=generator) * 0.1).numpy().astype(numpy.float32))

    matrix("token_embd.weight", len(WORDS))
    for layer in range(layers):
        for name, rows, inner in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", HIDDEN * KEYS // HEADS, HIDDEN),
            ("attn_v", HIDDEN * KEYS // HEADS, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", 512, HIDDEN),
            ("ffn_up", 512, HIDDEN),
            ("ffn_down", HIDDEN, 512),
        ):
            matrix(f"blk.{layer}.{name}.weight", rows, inner)
        norm(f"blk.{layer}.attn_norm.weight")
        norm(f"blk.{layer}.ffn_norm.weight")
    norm("output_norm.weight")
    if not tied:
        matrix("output.weight", len(WORDS))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
