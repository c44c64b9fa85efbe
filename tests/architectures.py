"""Tiny configurations of the language models that transformers has: what each needs besides common sizes.

The same weights at each call, large enough that a forgotten token changes the next.
"""

import torch
import transformers as hf

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
_SCAN = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_DELTA = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

# By transformers' model type.
DETAILS = {
    "apertus": {},
    "arcee": {},
    "bamba": {**_SCAN, "attn_layer_indices": [1]},
    "bert": {"is_decoder": True},
    "biogpt": {},
    "bloom": {},
    "codegen": {**_OLD, "rotary_dim": 4},
    "cohere": {},
    "cohere2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "cpmant": {},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "exaone4": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "falcon": {},
    "falcon_h1": {**_SCAN, "mamba_d_ssm": 64, "head_dim": 8},
    "falcon_mamba": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "glm": {"head_dim": 8},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gptj": {**_OLD, "rotary_dim": 4},
    "granite": {},
    "granitemoehybrid": {
        **_SCAN,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 16,
    },
    "helium": {"head_dim": 8},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
        "mamba_d_state": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 2, "chunk_size": 8},
    "minicpm3": {k: v for k, v in _LATENT.items() if "lora" in k or "head" in k} | {"v_head_dim": 8},
    "minimax": {},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "use_cache": True},
    "nemotron": {},
    "olmo2": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, **_EXPERTS},
    "qwen3_next": {**_DELTA, "num_experts": 4, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
        "head_dim": 8,
    },
    "roberta": {"is_decoder": True},
    "rwkv": {"context_length": 64, "attention_hidden_size": 32},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "trocr": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "xlm-roberta": {},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "mamba_d_state": 4,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "use_mamba_kernels": False,
    },
}


def build(kind: str, **changes) -> torch.nn.Module:
    """A tiny model of this type with random weights, in evaluation mode."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](**{**COMMON, **DETAILS[kind], **changes})
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
