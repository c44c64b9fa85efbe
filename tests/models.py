"""Small models with random weights."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graph_capture import RecordedGraph, record


def tiny_llama(layers: int = 4, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama of hidden size 64 with grouped-query attention; the same weights at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    model = LlamaForCausalLM(config).eval().to(dtype)
    with torch.no_grad():  # weights of one everywhere would hide a norm that forgets its weight
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
    return model


def token_ids(length: int = 9, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Token ids, [batch, length] int64."""
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def forward(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits, without a cache."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def recorded(model: LlamaForCausalLM, ids: torch.Tensor) -> RecordedGraph:
    """The recording of `forward`, which takes ``input_ids``."""
    with record(input_ids=ids) as recording:
        recording.output(forward(model, ids))
    return recording.graph
