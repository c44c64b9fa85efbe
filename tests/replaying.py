"""Recording and replaying small functions, for tests."""

import os
import subprocess
import sys
import types

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graph_capture import FusionConfig, fuse, record

UNFUSED = FusionConfig(enable_fusion=False)


def graph_of(function, *args, **kwargs):
    with record(*args, **kwargs) as recording:
        recording.output(function(*args, **kwargs))
    return recording.graph


def assert_replays(function, make, *, seed=None):
    """Record on one set of inputs, interpret and replay on it and on another: the results and the inputs afterwards are
    eager's."""
    graph = graph_of(function, *make(0))
    planned = fuse(graph, UNFUSED)
    for run, number in ((graph.run, 0), (graph.run, 1), (planned, 0), (planned, 1), (planned, 2)):
        ours, theirs = make(number), make(number)
        if seed is not None:
            torch.manual_seed(seed)
        with torch.no_grad():
            want = function(*theirs)
        if seed is not None:
            torch.manual_seed(seed)
        got = run(*ours)
        for left, right in zip(pytree.tree_leaves((got, ours)), pytree.tree_leaves((want, theirs)), strict=True):
            if isinstance(right, torch.Tensor):
                assert torch.equal(left, right)
                assert left.stride() == right.stride()
            else:
                assert left == right
    return graph


def printed_by_processes(program):
    """What `program` prints in processes that order sets of strings differently."""
    return {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }


def noise(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


class Gated(nn.Module):
    """Weights, a submodule without any, plain attributes, and a tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)
        self.scale, self.step = 1.0, 0
        self.weights, self.config, self.more = [2.0, 3.0], types.SimpleNamespace(offset=1.0), nn.ModuleList()
        self.table = noise(4)

    def forward(self, x):
        y = self.down(self.act(self.up(x))) * self.scale * self.weights[0] + self.table + self.config.offset
        for layer in self.more:
            y = layer(y)
        return y
