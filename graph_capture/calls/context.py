"""What is switched on around a call and decides what its ops do: a part of a recording's key, or a reason for none."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Context = tuple[Any, ...]
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia")
_LABELS: tuple[str, ...] = ("autocast", "the default dtype", "the default device", "the precision of float32 products")
_LABELS += ("deterministic algorithms", "the backends' flags", "gradients enabled", "inference mode")
_flags: list[Any] = []


def _backend_flags() -> list[Any]:
    """What reads the flags of torch's backends, as far as this build has them."""
    if not _flags:
        names: tuple[str, ...] = (
            "cudnn_enabled",
            "cudnn_benchmark",
            "cudnn_deterministic",
            "cudnn_allow_tf32",
            "mkldnn_enabled",
        )
        names += ("cublas_allow_fp16_reduced_precision_reduction", "cublas_allow_bf16_reduced_precision_reduction")
        names += ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled")
        # Not the order of attention's backends: torch changes it itself, at the first attention on a GPU.
        names += ("overrideable_sdp_enabled", "deterministic_fill_uninitialized_memory")
        found = (getattr(torch._C, f"_get_{name}", None) for name in names)
        _flags.extend(read for read in found if read is not None)
        _flags.append(torch._C.is_flush_denormal) if hasattr(torch._C, "is_flush_denormal") else None
    return _flags


def context() -> Context:
    """What a recording depends on besides the arguments and what the code reads. Cheap; compared at each call."""
    return (
        _autocast() if torch._C._is_any_autocast_enabled() else None,
        torch.get_default_dtype(),
        _default_device(),
        torch._C._get_float32_matmul_precision(),
        (torch._C._get_deterministic_algorithms(), torch._C._get_deterministic_algorithms_warn_only()),
        tuple([_plain(read()) for read in _flags or _backend_flags()]),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


def _plain(value: Any) -> Any:
    return tuple(value) if type(value) is list else value


def _autocast() -> tuple[Any, ...]:
    return tuple(
        [(device, torch.get_autocast_dtype(device)) for device in _DEVICES if torch.is_autocast_enabled(device)]
    )


def _default_device() -> str | None:
    if not torch._C._len_torch_function_stack():
        return None
    return next((str(mode.device) for mode in _function_modes() if isinstance(mode, DeviceContext)), None)


def _function_modes() -> list[Any]:
    return list(reversed(_get_current_function_mode_stack()))


def without_grad(found: Context) -> Context:
    """A context but for gradients and inference mode, between which recorded ops do not differ."""
    return found[:-2]


def difference(before: Context, now: Context) -> str | None:
    """What is switched in another way, as a sentence; None where nothing is."""
    for label, old, new in zip(_LABELS, before, now, strict=False):
        if old != new:
            return f"{label}: recorded under {old}, called under {new}"
    return None


def transformed() -> str | None:
    """Why a call is not one on plain tensors that run now: it is traced, transformed, or seen by a mode; else None."""
    if torch._C._len_torch_dispatch_stack():
        return f"a dispatch mode is active ({type(_get_current_dispatch_mode_stack()[-1]).__name__})"
    if torch._C._len_torch_function_stack():
        other = next((mode for mode in _function_modes() if not isinstance(mode, DeviceContext)), None)
        if other is not None:
            return f"a function mode is active ({type(other).__name__})"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch.compiler.is_compiling():
        return "torch.compile is active"
    if not torch._C._is_torch_function_enabled():
        return "torch functions are disabled (DisableTorchFunctionSubclass)"
    return None
