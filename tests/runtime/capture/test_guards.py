"""Everything that a run reads outside its arguments is guarded: a change of it is noticed, whatever it is."""

import collections
import contextvars
import dataclasses
import functools
import math
import os
import sys
import types
import weakref

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

from graph_capture import SignatureMismatchError, capture
from tests.capturing import UNFUSED, X, follows, module, put, same
from tests.replaying import graph_of, noise

GAIN = 2.0
TABLE = {"gain": [2.0]}
OPTIONS = types.ModuleType("options")
HERE = sys.modules[__name__]
VARIABLE = contextvars.ContextVar("gain")


@pytest.fixture(autouse=True)
def _defaults(monkeypatch):
    monkeypatch.setitem(globals(), "GAIN", 2.0)
    monkeypatch.setitem(TABLE, "gain", [2.0])
    monkeypatch.setattr(OPTIONS, "gain", 2.0, raising=False)


@dataclasses.dataclass
class Config:
    gain: float = 2.0


class Slotted:
    __slots__ = ("__gain",)

    def __init__(self, gain):
        self.set(gain)

    def set(self, gain):
        self.__gain = gain

    def scaled(self, x):
        return x * self.__gain


class Owner:
    def __init__(self):
        self.gain = 2.0

    def scaled(self, x):
        return x * self.gain


# --- attributes of every kind

KINDS = {
    "a number of another type": (lambda s, x: x.int() * s.gain, {"gain": 2}, lambda m: put(m, gain=2.0)),
    "the sign of zero": (lambda s, x: x.copysign(torch.full((3,), s.z)), {"z": 0.0}, lambda m: put(m, z=-0.0)),
    "a number of numpy's": (lambda s, x: x * float(s.g), {"g": numpy.float32(2)}, lambda m: put(m, g=numpy.float32(5))),
    "a function in a list": (lambda s, x: s.f[0](x), {"f": [torch.relu]}, lambda m: m.f.__setitem__(0, torch.tanh)),
    "a dict in a dict": (lambda s, x: x * s.c["a"]["b"], {"c": {"a": {"b": 2}}}, lambda m: m.c["a"].update(b=5)),
    "a dict in a tuple": (lambda s, x: x * s.c[0]["b"], {"c": ({"b": 2},)}, lambda m: m.c[0].update(b=5)),
    "a set": (lambda s, x: x * (2 if "a" in s.names else 3), {"names": {"a"}}, lambda m: m.names.clear()),
    "a deque": (lambda s, x: x * s.q[-1], {"q": collections.deque([2.0])}, lambda m: m.q.append(5.0)),
    "a dataclass": (lambda s, x: x * s.c.gain, {"c": Config()}, lambda m: put(m.c, gain=5.0)),
    "private slots": (lambda s, x: s.c.scaled(x), {"c": Slotted(2.0)}, lambda m: m.c.set(5.0)),
    "a bytearray": (lambda s, x: x * s.b[0], {"b": bytearray(b"\2")}, lambda m: m.b.__setitem__(0, 5)),
    "a tensor in a dict": (lambda s, x: x * s.t["w"], {"t": {"w": X + 2}}, lambda m: m.t.update(w=X + 5)),
    "a bound method": (lambda s, x: s.f(x), {"f": Owner().scaled}, lambda m: put(m.f.__self__, gain=5.0)),
    "a partial of an object": (
        lambda s, x: s.f(x),
        {"f": functools.partial(lambda c, x: x * c.gain, Config())},
        lambda m: put(m.f.args[0], gain=5.0),
    ),
}


@pytest.mark.parametrize(("forward", "held", "change"), KINDS.values(), ids=KINDS)
def test_attributes_of_every_kind(forward, held, change):
    made = module(forward, **held)
    follows(made, lambda: change(made), X)


def test_an_object_behind_a_weak_reference():
    config = Config()
    follows(module(lambda s, x: x * s.c().gain, c=weakref.ref(config)), lambda: put(config, gain=5.0), X)


# --- what comes, goes, and shadows


def reorder(m):
    parts = list(m._modules.items())
    m._modules.clear()
    m._modules.update(reversed(parts))


def become(m):
    m[0].__class__ = type("Other", (nn.Linear,), {"forward": lambda s, x: x * 9})


COMES = {
    "hasattr": (module(lambda s, x: x * (s.more if hasattr(s, "more") else 2)), lambda m: put(m, more=5)),
    "a key": (module(lambda s, x: x * s.c.get("k", 2), c={}), lambda m: m.c.update(k=5)),
    "a module in a dict": (
        module(lambda s, x: sum(f(x) for f in s.d.values()), d=nn.ModuleDict({"a": nn.Linear(3, 3)})),
        lambda m: m.d.update({"b": nn.Linear(3, 3)}),
    ),
    "a parameter in a dict": (
        module(lambda s, x: x + sum(s.d.values()), d=nn.ParameterDict({"a": X + 1})),
        lambda m: m.d.update({"b": X + 2}),
    ),
    "a layer in between": (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), lambda m: m.insert(1, nn.Tanh())),
    "a layer less": (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), lambda m: m.__delitem__(1)),
    "another order": (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), reorder),
    "another class": (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), become),
}


@pytest.mark.parametrize(("made", "change"), COMES.values(), ids=COMES)
def test_what_comes_goes_and_shadows(made, change):
    follows(made, lambda: change(made), X)


def test_an_attribute_that_stops_to_shadow_its_class():
    made = module(lambda s, x: x * s.gain, gain=5.0)
    type(made).gain = 2.0
    follows(made, lambda: delattr(made, "gain"), X)


# --- modules that are not called


def test_modules_that_are_only_read():
    holder = module(w=nn.Parameter(noise(3)), gain=2.0, inner=nn.Dropout(0.0))
    table = {"m": holder}
    follows(lambda x: x * holder.w, lambda: put(holder, w=nn.Parameter(noise(3, seed=1))), X)
    follows(lambda x: x * table["m"].gain, lambda: put(holder, gain=5.0), X)
    follows(lambda x: x * (2 if holder.inner.training else 3), holder.inner.eval, X)
    follows(functools.partial(lambda m, x: x * m.gain, holder), lambda: put(holder, gain=7.0), X)
    follows(lambda x, m: x * m.gain, lambda: put(holder, gain=9.0), X, holder)


# --- hooks


def test_hooks():
    def model():
        return nn.Sequential(nn.Identity(), nn.ReLU())

    made = model()
    made[0].register_forward_hook(lambda m, i, o: o * 2)
    made[0].register_forward_hook(lambda m, i, o: o + 1)
    hooks = made[0]._forward_hooks
    follows(made, lambda: hooks.move_to_end(next(iter(hooks))), X)
    made = model()
    follows(made, lambda: made[0].register_forward_pre_hook(lambda m, i: (i[0] * 2,)), X)
    made, gains = model(), [2.0]
    made[0].register_forward_pre_hook(functools.partial(lambda g, m, i: (i[0] * g[0],), gains))
    follows(made, lambda: gains.__setitem__(0, 5.0), X)


def test_a_hook_on_all_modules():
    made, handles = nn.Sequential(nn.Identity(), nn.ReLU()), []
    register = nn.modules.module.register_module_forward_hook
    try:
        follows(made, lambda: handles.append(register(lambda m, i, o: o * 2)), X)
        follows(made, lambda: handles.append(register(lambda m, i, o: o * GAIN)), X)
    finally:
        for handle in handles:
            handle.remove()


# --- classes and globals


def helper(x):
    return x * GAIN


def test_classes_and_globals(monkeypatch):
    base = type("Base", (nn.Module,), {"gain": 2.0})
    made = type("Child", (base,), {"forward": lambda s, x: x * s.gain})()
    follows(made, lambda: put(base, gain=5.0), X)
    made = module(lambda s, x: s.scaled(x))
    type(made).scaled = lambda s, x: x * 2
    follows(made, lambda: put(type(made), scaled=lambda s, x: x * 5), X)
    follows(module(lambda s, x: helper(x)), lambda: monkeypatch.setitem(globals(), "GAIN", 5.0), X)
    follows(module(lambda s, x: x * TABLE["gain"][0]), lambda: TABLE["gain"].__setitem__(0, 5.0), X)
    follows(module(lambda s, x: x * OPTIONS.gain), lambda: put(OPTIONS, gain=5.0), X)
    meta = type("Meta", (type,), {"gain": 2.0})
    kind = meta("Kind", (), {})
    follows(lambda x: x * kind.gain, lambda: put(meta, gain=5.0), X)


def test_a_patched_function_and_a_patched_forward(monkeypatch):
    follows(nn.Sequential(nn.ReLU()), lambda: monkeypatch.setattr(nn.ReLU, "forward", lambda s, x: x * 7), X)
    follows(lambda x: torch.relu(x), lambda: monkeypatch.setattr(torch, "relu", torch.tanh), X)
    follows(lambda x: nn.functional.silu(x), lambda: monkeypatch.setattr(nn.functional, "silu", nn.functional.gelu), X)
    follows(lambda x: x * max(1.0, 2.0), lambda: monkeypatch.setattr(HERE, "max", min, raising=False), X)


# --- functions


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args) * GAIN

    return wrapper


def test_functions_that_are_called(monkeypatch):
    def scaled(x, gain=2.0, *, more=1.0):
        return x * gain * more

    def other(x, gain=2.0, *, more=1.0):
        return x * 9

    follows(lambda x: scaled(x), lambda: put(scaled, __defaults__=(5.0,)), X)
    follows(lambda x: scaled(x), lambda: put(scaled, __kwdefaults__={"more": 3.0}), X)
    follows(lambda x: scaled(x), lambda: put(scaled, __code__=other.__code__), X)
    scaled.gain = 2.0
    follows(lambda x: x * scaled.gain, lambda: put(scaled, gain=5.0), X)
    follows(decorated(lambda x: x + 1), lambda: monkeypatch.setitem(globals(), "GAIN", 5.0), X)


def test_names_found_in_other_ways(monkeypatch):
    class Outer:
        class Inner:
            gain = 2.0

    @functools.singledispatch
    def scaled(x):
        return x * 2

    def inside(x):
        import math

        return x * math.gain

    def aliased(x):
        options = OPTIONS
        return x * options.gain

    follows(lambda x: x * Outer.Inner.gain, lambda: put(Outer.Inner, gain=5.0), X)
    follows(lambda x: scaled(x), lambda: scaled.register(torch.Tensor, lambda x: x * 5), X)
    monkeypatch.setattr(math, "gain", 2.0, raising=False)
    follows(inside, lambda: put(math, gain=5.0), X)
    follows(aliased, lambda: put(OPTIONS, gain=5.0), X)
    follows(lambda x: x * getattr(OPTIONS, "gain"), lambda: put(OPTIONS, gain=7.0), X)  # noqa: B009
    follows(lambda x: x * globals()["GAIN"], lambda: monkeypatch.setitem(globals(), "GAIN", 5.0), X)
    follows(lambda x: eval("x * GAIN"), lambda: monkeypatch.setitem(globals(), "GAIN", 7.0), X)


# --- Python's surroundings


def test_settings_that_the_code_asks_for(monkeypatch, tmp_path):
    def contextual(x):
        try:
            return x * VARIABLE.get()
        except LookupError:
            return x * 7

    contextvars.copy_context().run(follows, contextual, lambda: VARIABLE.set(5.0), X)
    monkeypatch.setenv("GAIN", "2")
    follows(lambda x: x * float(os.getenv("GAIN", "1")), lambda: monkeypatch.delenv("GAIN"), X)
    follows(lambda x: x * len(os.getcwd()), lambda: monkeypatch.chdir(tmp_path), X)
    limit = sys.getrecursionlimit()
    try:
        follows(lambda x: x * sys.getrecursionlimit(), lambda: sys.setrecursionlimit(limit + 1), X)
    finally:
        sys.setrecursionlimit(limit)


# --- hidden weights


def test_weights_behind_parametrizations_and_scripts():
    made = weight_norm(nn.Linear(3, 3))
    held = made.parametrizations.weight
    follows(made, lambda: put(held, original0=nn.Parameter(held.original0 * 3)), X)
    made, double = nn.Linear(3, 3), module(lambda s, w: w * s.k, k=2.0)
    register_parametrization(made, "weight", double)
    follows(made, lambda: put(double, k=5.0), X)
    scripted = torch.jit.script(nn.Linear(3, 3))
    follows(scripted, lambda: put(scripted, weight=nn.Parameter(noise(3, 3))), X)


def test_weights_with_another_layout_or_attribute():
    made, x = nn.Linear(3, 3), noise(2, 3)
    follows(made, lambda: put(made.weight, data=made.weight.data.t()), x)
    w = torch.ones(3)
    w.gain = 2.0
    follows(lambda x: x * w * w.gain, lambda: put(w, gain=5.0), X)
    made = module(lambda s, x: x * (2 if s.w.requires_grad else 3), w=nn.Parameter(torch.ones(3)))
    follows(made, lambda: made.w.requires_grad_(False), X)


# --- what is told of them


def test_guards_print_and_misses_name_what_changed():
    made = module(lambda s, x: x * s.config.gain, config=Config())
    fast = follows(made, lambda: put(made.config, gain=5.0), X)
    assert "config.gain is 5.0" in fast.guards
    assert fast.misses[-1] == "config.gain was 2.0 and is now 5.0"
    graph = graph_of(made, X)
    made.config.gain = 6.0
    with pytest.raises(SignatureMismatchError, match=r"config\.gain was 5\.0 and is now 6\.0; record again"):
        graph.run(X)


def test_a_guard_that_was_touched_and_holds_costs_no_recording():
    made = module(lambda s, x: x * s.gain, gain=2.0)
    fast = capture(made, UNFUSED)
    for _ in range(5):
        same(fast(X), X * 2)
        made.gain = 3.0
        made.gain = 2.0
    assert len(fast.misses) == 1


def test_torch_compile_in_the_same_process_breaks_nothing():
    """It patches how torch's modules are made, at its first use."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()).eval()
    fast, x = capture(model, UNFUSED), torch.ones(2, 4)
    with torch.no_grad():
        for _ in range(3):
            fast(x)
        torch.compile(torch.nn.Linear(4, 4), backend="eager")(x)
        assert torch.equal(fast(x), model(x))
    assert len(fast.misses) == 1
