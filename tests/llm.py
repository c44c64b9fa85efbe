"""Tiny language models with a tokenizer, as a folder holds them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests import zoo

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, then <pad> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def folder(path, **changes):
    """A Llama of random weights and its tokenizer, saved into `path`."""
    made = tokenizer()
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(made),
        max_position_embeddings=128,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
        **changes,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    made.save_pretrained(path)
    return path


def endless(name: str):
    """The model `name` of the zoo, which no token ends."""
    model = zoo.build(name)
    for config in (model.config, model.generation_config):
        config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def padded(rows):
    """Tokens and attention mask of prompts, [B, L] each, padded on the left as transformers wants them."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
