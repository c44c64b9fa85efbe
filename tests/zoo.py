"""Tiny models of many transformers architectures, with random weights; the same weights at each call."""

import torch
import transformers as hf

VOCABULARY = 64
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
_LLAMA_LIKE = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

DECODERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA_LIKE)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_LLAMA_LIKE)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA_LIKE, head_dim=8)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA_LIKE, sliding_window=4)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_LLAMA_LIKE, head_dim=8, sliding_window=8)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_SMALL, intermediate_size=48)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_LLAMA_LIKE, **_TOKENS)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SMALL, intermediate_size=48)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            vocab_size=VOCABULARY,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_LLAMA_LIKE, num_local_experts=4)),
}
ENCODERS = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_SMALL, intermediate_size=48)),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
        )
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0
        )
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=4)
    ),
}

# What the passes find is counted in these as well.
COUNTED = {
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_LLAMA_LIKE, head_dim=8)),
    "granite": lambda: hf.GraniteForCausalLM(
        hf.GraniteConfig(
            **_LLAMA_LIKE,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            attention_multiplier=0.3,
            logits_scaling=2.0,
        )
    ),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**_LLAMA_LIKE, **_TOKENS, no_rope_layers=[1, 0])),
    "glm": lambda: hf.GlmForCausalLM(hf.GlmConfig(**_LLAMA_LIKE, head_dim=8, pad_token_id=0, eos_token_id=2)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_LLAMA_LIKE, **_TOKENS)),
    "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**_LLAMA_LIKE)),
    "starcoder2": lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**_LLAMA_LIKE)),
    "distilbert": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=VOCABULARY)
    ),
}


def build(name: str) -> torch.nn.Module:
    """The model `name`, in eval mode."""
    torch.manual_seed(0)
    model = (DECODERS | ENCODERS | COUNTED)[name]().eval()
    with torch.no_grad():  # weights of one and biases of zero would hide a norm that forgets them
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def ids(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Token ids, [batch, length] int64; none is a padding token."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
