"""``graph-capture doctor``: the ways to run a model side by side."""

from __future__ import annotations

import torch

from graph_capture.runtime.doctor import Diagnosis, doctor
from graph_capture.runtime.llm.models import build_model, load_config


def examine(name: str, dtype: torch.dtype, device: str, prompt: int, layers: int | None, compare: bool) -> Diagnosis:
    """A model with random weights on a prompt of random tokens.

    Raises:
        CaptureError: there is no such model, or it fails.
    """
    model = build_model(load_config(name, layers), dtype=dtype, device=device)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    return doctor(_Logits(model).eval(), (ids,), backends=None if compare else {})


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits
