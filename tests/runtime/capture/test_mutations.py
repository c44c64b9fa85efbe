"""A random thing that a model reads is changed between calls: the next call gives what the code gives, or raises."""

import dataclasses
import os
import random
import types

import pytest
import torch
from torch import nn

from graph_capture import CaptureError, capture
from tests.capturing import UNFUSED, X, same
from tests.replaying import noise

COUNT = int(os.environ.get("GRAPH_CAPTURE_MUTATIONS", "2000"))
ACTIVATIONS = (torch.relu, torch.tanh, torch.sigmoid, torch.exp, lambda x: x * 0.5)

SOURCE = """
GAIN = 1.5
TABLE = {"shift": [0.5, 1.0]}

def helper(x, factor=2.0, *, power=1.0):
    return x * factor * power * GAIN + TABLE["shift"][0]

def closing():
    weight, state = 1.0, {"bias": 0.25}
    def inner(x):
        return x * weight + state["bias"]
    return inner
"""


@dataclasses.dataclass
class Settings:
    gain: float = 1.0
    names: tuple = ("a",)
    flag: bool = True


class Model(nn.Module):
    offset = 0.5

    def __init__(self, space, rng):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(rng.randint(1, 3))])
        self.act, self.settings, self.items = torch.relu, Settings(), [1.0, {"k": 2.0}]
        self.holder = nn.Module()
        self.holder.w = nn.Parameter(noise(3, seed=rng.randint(0, 99)))
        self.register_buffer("b", noise(3, seed=rng.randint(0, 99)))
        self.drop, self.space, self.inner = nn.Dropout(0.0), space, space.closing()

    def forward(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
        x = self.drop(x) * self.settings.gain + self.items[0] + self.items[1]["k"] + self.offset
        x = x * self.holder.w + self.b + getattr(self, "extra", 0.0)
        if self.settings.flag and "a" in self.settings.names and self.training:
            x = x - 1
        return self.inner(self.space.helper(x))


class World:
    """A model, and everything of it that can be changed."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.space = types.ModuleType("space")
        exec(SOURCE, vars(self.space))
        self.kind = type("Kind", (Model,), {})
        self.model = self.kind(self.space, self.rng)
        self.handles = []

    def number(self):
        return self.rng.choice([0.0, -0.0, 0.5, 1.0, 1, 2, True, -1.5, self.rng.random()])

    def tensor(self):
        return noise(3, seed=self.rng.randint(0, 10**6))

    def change(self):
        """Change something; returns what."""
        name = self.rng.choice([name for name in vars(World) if name.startswith("set_")])
        getattr(self, name)()
        return name

    def set_attributes(self):
        self.model.settings.gain = self.number()

    def set_settings(self):
        self.model.settings = Settings(self.number(), self.rng.choice([("a",), ("b",), ()]), self.rng.random() < 0.5)

    def set_items(self):
        self.model.items[0] = self.number()

    def set_nested_items(self):
        self.model.items[1]["k"] = self.number()

    def set_activation(self):
        self.model.act = self.rng.choice(ACTIVATIONS)

    def set_layer(self):
        self.model.layers[self.rng.randrange(len(self.model.layers))] = nn.Linear(3, 3)

    def set_layers(self):
        if len(self.model.layers) < 4 and self.rng.random() < 0.5:
            self.model.layers.append(nn.Linear(3, 3))
        elif len(self.model.layers) > 1:
            del self.model.layers[self.rng.randrange(len(self.model.layers))]

    def set_weight(self):
        layer = self.rng.choice(list(self.model.layers))
        layer.weight = nn.Parameter(noise(3, 3, seed=self.rng.randint(0, 99)))

    def set_weight_data(self):
        layer = self.rng.choice(list(self.model.layers))
        layer.weight.data = self.rng.choice([layer.weight.data.t(), layer.weight.data.clone()])

    def set_weight_in_place(self):
        with torch.no_grad():
            self.rng.choice(list(self.model.parameters())).mul_(self.rng.choice([0.5, 2.0]))

    def set_bias(self):
        self.rng.choice(list(self.model.layers)).bias = self.rng.choice([None, nn.Parameter(self.tensor())])

    def set_buffer(self):
        self.model.b = self.tensor()

    def set_holder(self):
        self.model.holder.w = nn.Parameter(self.tensor())

    def set_extra(self):
        if "extra" in vars(self.model) and self.rng.random() < 0.5:
            del self.model.extra
        else:
            self.model.extra = self.number()

    def set_class_attribute(self):
        self.kind.offset = self.number()

    def set_shadow(self):
        if "offset" in vars(self.model):
            del self.model.offset
        else:
            self.model.offset = self.number()

    def set_training(self):
        self.model.train(self.rng.random() < 0.5)

    def set_global(self):
        self.space.GAIN = self.number()

    def set_table(self):
        self.space.TABLE["shift"][0] = self.number()

    def set_defaults(self):
        self.space.helper.__defaults__ = (self.number(),)

    def set_keyword_defaults(self):
        self.space.helper.__kwdefaults__["power"] = self.number()

    def set_code(self):
        other = types.ModuleType("other")
        exec(SOURCE.replace("* power", self.rng.choice(["* power", "- power", "+ power"])), vars(other))
        self.space.helper.__code__ = other.helper.__code__

    def set_cell(self):
        self.model.inner.__closure__[1].cell_contents = self.number()

    def set_cell_content(self):
        self.model.inner.__closure__[0].cell_contents["bias"] = self.number()

    def set_inner(self):
        self.model.inner = self.space.closing()

    def set_hook(self):
        if self.handles and self.rng.random() < 0.6:
            self.handles.pop(self.rng.randrange(len(self.handles))).remove()
            return
        gain = self.number()
        place = self.rng.choice([self.model, self.model.drop, *self.model.layers])
        self.handles.append(place.register_forward_hook(lambda m, i, o: o * gain))

    def set_forward(self):
        layer = self.rng.choice(list(self.model.layers))
        if "forward" in vars(layer):
            del layer.forward
        else:
            gain = self.number()
            layer.forward = lambda x: x * gain

    def set_class(self):
        layer = self.rng.choice(list(self.model.layers))
        gain = self.number()
        layer.__class__ = self.rng.choice([nn.Linear, type("L", (nn.Linear,), {"forward": lambda s, x: x * gain})])

    def set_default_dtype(self):
        torch.set_default_dtype(self.rng.choice([torch.float32, torch.float64]))
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("seed", range(4))
def test_a_random_change_is_followed(seed):
    noticed = 0
    world = World(seed)
    fast = capture(world.model, UNFUSED)
    with torch.no_grad():
        for number in range(COUNT // 4):
            if number % 100 == 99:
                world = World(seed * 1000 + number)
                fast = capture(world.model, UNFUSED)
            same_or_refused(fast, world, "the first call")
            before = len(fast.misses)
            what = world.change()
            mode = world.rng.random() < 0.1
            with torch.autocast("cpu", torch.bfloat16, enabled=mode):
                same_or_refused(fast, world, what)
            noticed += len(fast.misses) > before or len(fast.misses) == fast.misses.maxlen
    assert noticed > COUNT // 8


def same_or_refused(fast, world, what):
    try:
        found = fast(X)
    except CaptureError:
        return
    expected = world.model(X)
    assert found.dtype == expected.dtype, what
    try:
        same(found, expected)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error
