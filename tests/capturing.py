"""Comparing captured functions with the same code as it is, for tests."""

import copy

import torch
from torch import nn

from graph_capture import FusionConfig, capture

UNFUSED = FusionConfig(enable_fusion=False)
X, Y = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([3.0, -0.5, 1.0])


def module(forward=None, **held):
    """A module of a class of its own, with `forward` and with attributes."""
    made = type("Made", (nn.Module,), {"forward": forward} if forward else {})()
    for name, value in held.items():
        setattr(made, name, value)
    return made


def put(target, **values):
    """Set attributes."""
    for name, value in values.items():
        setattr(target, name, value)


def same(ours, theirs):
    """Compare two results."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


def follows(function, change, *arguments):
    """The captured function gives what the code gives, before and after a change of something that the code reads."""
    fast = capture(function, UNFUSED)
    with torch.no_grad():
        for step in range(2):
            for _ in range(3):
                same(fast(*arguments), function(*arguments))
            if step == 0:
                before = len(fast.misses)
                change()
    assert len(fast.misses) > before, "nothing was noticed"
    assert len(fast.misses) <= before + 2, fast.misses
    return fast


def agrees(function, *calls):
    """The captured function gives what the code gives on each of several lists of arguments, several times."""
    fast = capture(function, UNFUSED)
    with torch.no_grad():
        for arguments in calls:
            for _ in range(3):
                ours, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
                same(fast(*ours), function(*theirs))
    return fast
