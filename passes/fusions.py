"""The named fusions, as the PyTorch functions they are. They are tried in this order."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from graph_capture.passes.pattern import DEFAULT, pattern

from graph_capture.graph import SubGraph

_VECTOR = ({"weight": (8,)},)


@pattern("swiglu")
def swiglu(gate: Any, up: Any) -> Any:
    """Gated linear unit with SiLU (Shazeer, 2020)."""
    return F.silu(gate) * up


@pattern("geglu")
def geglu(gate: Any, up: Any) -> Any:
    """Gated linear unit with GELU (Shazeer, 2020)."""
    return F.gelu(gate) * up


@pattern("geglu_tanh")
def geglu_tanh(gate: Any, up: Any) -> Any:
    """Gated linear unit with GELU's tanh approximation."""
    return F.gelu(gate, approximate="tanh") * up


@pattern("add_rms_norm", outputs=("sum", "output"), shapes=_VECTOR)
def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float = 1e-6) -> Any:
    """Residual sum and the RMSNorm (Zhang and Sennrich, 2019) of it; both are results."""
    total = x + residual
    return total, F.rms_norm(total, (total.shape[-1],), weight, eps)


@pattern("rms_norm", shapes=_VECTOR)
def rms_norm(x: Any, weight: Any, eps: float = 1e-6) -> Any:
    """RMSNorm on its own."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def create_swiglu_pattern() -> SubGraph:
    """``silu(gate) * up``: inputs ``gate``, ``up``; output ``output``."""
    return DEFAULT["swiglu"].subgraph()


def create_geglu_pattern() -> SubGraph:
    """``gelu(gate) * up``: inputs ``gate``, ``up``; output ``output``."""
    return DEFAULT["geglu"].subgraph()


def create_add_rms_norm_pattern(eps: float = 1e-6) -> SubGraph:
    """``sum = x + residual; output = rms_norm(sum, weight, eps)``: inputs ``x``, ``residual``, ``weight``."""
    return DEFAULT["add_rms_norm"].subgraph(eps=eps)
