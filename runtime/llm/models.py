"""Models by name: a local folder, a GGUF file, a built-in configuration with random weights, or a name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from graph_capture.errors import CaptureError
from graph_capture.runtime.llm.gguf import contents, gguf_file, load_gguf


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """What every architecture has; `theta` and `positions` are of its rotary embedding."""
    theta, positions = more.pop("theta", None), more.pop("positions", None)
    values: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }
    if theta:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    if positions:
        values["max_position_embeddings"] = positions
    return values | more


_LLAMA_3_2 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_TIED = {"tie_word_embeddings": True}
_EXPERTS = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
_GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512}

# The architectures as their authors publish them; `tiny` and `small` are for machines without a GPU.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tiny": ("Llama", _sizes(64, 176, 2, 4, 2, 256)),
    "llama-small": ("Llama", _sizes(256, 688, 4, 8, 2, 1024)),
    "llama-100m": ("Llama", _sizes(768, 2048, 12, 12, 4, 16384)),
    "llama-3.2-1b": (
        "Llama",
        _sizes(2048, 8192, 16, 32, 8, 128256, positions=131072, rms_norm_eps=1e-5, rope_parameters=_LLAMA_3_2, **_TIED),
    ),
    "llama-3-8b": ("Llama", _sizes(4096, 14336, 32, 32, 8, 128256, positions=8192, theta=5e5, rms_norm_eps=1e-5)),
    "mistral-7b": ("Mistral", _sizes(4096, 14336, 32, 32, 8, 32768, positions=32768, theta=1e6, sliding_window=None)),
    "qwen2-0.5b": ("Qwen2", _sizes(896, 4864, 24, 14, 2, 151936, positions=131072, theta=1e6, **_TIED)),
    "qwen3-0.6b": ("Qwen3", _sizes(1024, 3072, 28, 16, 8, 151936, positions=40960, theta=1e6, head_dim=128, **_TIED)),
    "gemma-3-1b": ("Gemma3Text", _sizes(1152, 6912, 26, 4, 1, 262144, positions=32768, **_GEMMA, **_TIED)),
    "qwen3-30b-a3b": (
        "Qwen3Moe",
        _sizes(2048, 6144, 48, 32, 4, 151936, positions=40960, theta=1e6, head_dim=128, **_EXPERTS),
    ),
}


def register_architecture(name: str, family: str, **values: Any) -> None:
    """Make a configuration known by name: to `InferEngine` (with random weights), ``graph-capture bench | kernels |
    inspect``.

    Args:
        name: what it is called from now on.
        family: what transformers calls the architecture: "Llama" for ``LlamaConfig`` and ``LlamaForCausalLM``.
        values: what its configuration is made of.

    Raises:
        CaptureError: the name is taken, transformers has no causal language model of that family, or the configuration
            does not take these values.
    """
    if name in CONFIGURATIONS:
        raise CaptureError(f"an architecture named {name!r} is registered already; choose another name")
    transformers = _transformers()
    if not hasattr(transformers, f"{family}Config") or not hasattr(transformers, f"{family}ForCausalLM"):
        raise CaptureError(f"there is no architecture {family!r}: transformers has no {family}ForCausalLM")
    try:
        getattr(transformers, f"{family}Config")(**values)
    except Exception as error:
        raise CaptureError(f"{family}Config does not take the values of {name!r}: {error}") from error
    CONFIGURATIONS[name] = (family, values)


def unregister_architecture(name: str) -> None:
    """Forget a configuration that `register_architecture` made known.

    Raises:
        CaptureError: there is none of that name.
    """
    if CONFIGURATIONS.pop(name, None) is None:
        raise CaptureError(f"there is no architecture named {name!r}; there are {', '.join(CONFIGURATIONS)}")


def load_config(name: str, layers: int | None = None) -> Any:
    """The transformers configuration of a model: from a folder, a GGUF file, from `CONFIGURATIONS`, or from the hub.

    Args:
        layers: only so many layers.

    Raises:
        CaptureError: there is no such model, or transformers is not installed.
    """
    transformers = _transformers()
    if name in CONFIGURATIONS and not Path(name).exists():
        family, values = CONFIGURATIONS[name]
        config = getattr(transformers, f"{family}Config")(**values)
    elif (file := gguf_file(name)) is not None:
        architecture = contents(file).strings.get("general.architecture")
        try:
            config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:  # what it makes of a file that says what does not fit together
            raise CaptureError(f"transformers has no model of {file} ({architecture}): {error}") from error
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            known = ", ".join(CONFIGURATIONS)
            raise CaptureError(f"{name!r} is no model folder, none of {known}, and not on the hub: {error}") from error
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def build_model(config: Any, *, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """A causal language model with random weights, in evaluation mode; on the device "meta" without any memory.

    Raises:
        CaptureError: transformers has no causal language model of this configuration, or is not installed.
    """
    transformers = _transformers()
    torch.manual_seed(seed)
    try:
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except ValueError as error:
        raise CaptureError(str(error)) from error


def load_model(name: str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
    """A causal language model with its weights, in evaluation mode: from a folder of safetensors, from a GGUF file
    (whose weights stay packed), or from the hub; with random weights where the name is one of `CONFIGURATIONS`.

    Args:
        dtype: of the weights (default: as they are stored; float32 for random ones), and of what packed ones are
            multiplied with (default: bfloat16).

    Raises:
        CaptureError: there is no such model, its files are damaged, transformers does not know its architecture, it
            does not fit into memory, or transformers is not installed.
    """
    transformers = _transformers()
    config = load_config(name)
    try:
        if name in CONFIGURATIONS and not Path(name).exists():
            return build_model(config, dtype=dtype or torch.float32, device=device)
        if (file := gguf_file(name)) is not None:
            return load_gguf(file, config, transformers, dtype=dtype or torch.bfloat16, device=device)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False
        )
        return model.eval().to(device)
    except torch.OutOfMemoryError as error:
        raise CaptureError(f"{name} does not fit into the memory of {device}: {error}") from error
    except CaptureError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, SafetensorError) as error:
        raise CaptureError(f"{name} cannot be loaded: {error}") from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model; None where there is none.

    Raises:
        CaptureError: that of a GGUF file is damaged, or of a kind that transformers does not know.
    """
    if name in CONFIGURATIONS and not Path(name).exists():
        return None
    if (file := gguf_file(name)) is not None:
        try:
            return _transformers().AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:  # what it makes of words that do not fit together
            raise CaptureError(f"transformers makes no tokenizer of {file}: {error}") from error
    try:
        return _transformers().AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CaptureError("transformers is not installed: pip install 'graph-capture[models]'") from error
    return transformers
