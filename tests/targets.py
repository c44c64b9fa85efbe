"""What runs a test of kernels once for each target of this machine."""

import pytest
import torch

from graph_capture import KernelCompiler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILERS = {
    target: KernelCompiler(target) for target in (["ninetoothed"] if DEVICE == "cuda" else ["c", "ninetoothed"])
}


@pytest.fixture(name="target", autouse=True, params=COMPILERS)
def each_target(request, monkeypatch):
    """Every test of a module that imports this, for both targets: its ``COMPILER``."""
    monkeypatch.setattr(request.module, "COMPILER", COMPILERS[request.param])
    return request.param
