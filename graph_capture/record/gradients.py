"""What would require a gradient, had the recording not switched them off; and results that refuse a backward pass."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graph_capture.errors import CaptureError
from graph_capture.ir.graph import SubGraph


class _Refused(torch.autograd.Function):
    """Gives tensors that require a gradient which nobody computes."""

    @staticmethod
    def forward(ctx: Any, needs: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Raises: CaptureError: always."""
        raise CaptureError(
            "a result of a replay is part of a loss: replays compute no gradients. Call the captured function under "
            "torch.no_grad(), or leave the part that is trained uncaptured"
        )


_GRAD_MODE = os.path.join("torch", "autograd", "grad_mode.py")


class GradMode:
    """Whether gradients are enabled as far as the recorded code knows: a recording itself runs without.

    Attributes:
        enabled: whether they are, at this point of the code.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._before: dict[int, tuple[Any, bool]] = {}  # what was before each context that is open

    def set(self, mode: bool) -> None:
        """The code calls ``torch._C._set_grad_enabled(mode)``, by itself or through a context manager of torch's."""
        frame, found = sys._getframe(1), None
        while frame is not None and (found is None or frame.f_code.co_filename.endswith(_GRAD_MODE)):
            if frame.f_code.co_filename.endswith(_GRAD_MODE):
                found = frame
            frame = frame.f_back  # type: ignore[assignment]
        manager = found.f_locals.get("self") if found is not None else None
        if found is not None and found.f_code.co_name in ("__exit__", "__call__"):
            self.enabled = self._before.pop(id(manager), (None, mode))[1]
            return
        if manager is not None:
            self._before.setdefault(id(manager), (manager, self.enabled))
        self.enabled = mode


def requiring(graph: SubGraph, tensors: Mapping[str, torch.Tensor]) -> tuple[bool, ...]:
    """Which of a graph's outputs would require a gradient, computed with gradients enabled.

    Args:
        graph: recorded ops.
        tensors: inputs of the graph that count, by name.
    """
    found = {name for name, tensor in tensors.items() if tensor.requires_grad}
    for node in graph.nodes if found else ():
        if node.op_type != "aten.detach.default" and not found.isdisjoint(node.inputs):
            found.update(
                n for n in node.outputs if graph.values[n].dtype.is_floating_point or graph.values[n].dtype.is_complex
            )
    return tuple(name in found and name not in graph.input_names for name in graph.output_names)


def tied(results: Sequence[torch.Tensor], wanted: Sequence[bool]) -> list[Any]:
    """The results, those that are `wanted` as tensors whose backward pass raises."""
    needs = torch.empty(0, requires_grad=True)
    pairs = zip(results, wanted, strict=True)
    return [_Refused.apply(needs, tensor) if want and not tensor.requires_grad else tensor for tensor, want in pairs]
