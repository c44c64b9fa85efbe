"""What is switched on around a call, what a call is given, what it leaves behind, and what comes back."""

import collections
import copy
import dataclasses
import enum
import functools
import itertools
import pickle
import types

import numpy
import pytest
import torch
from torch import nn

from graph_capture import CaptureError, SignatureMismatchError, capture
from tests.capturing import UNFUSED, X, Y, agrees, module, put, same
from tests.replaying import graph_of, noise

Z = torch.tensor([1 + 2j, 3 - 1j])


def warm(function, *arguments):
    fast = capture(function, UNFUSED)
    with torch.no_grad():
        for _ in range(3):
            fast(*arguments)
    return fast


# --- views whose meaning lies in a bit

VIEWS = {
    "fft": lambda z: torch.fft.hfftn(z.reshape(1, 2)),
    "both bits": lambda z: (z.conj().imag.neg(), z.conj(), z.conj().imag),
    "resolved": lambda z: torch.view_as_real(z.conj().resolve_conj()) * 2,
    "adjoint": lambda z: z[None].mH @ z[None],
}


@pytest.mark.parametrize("function", VIEWS.values(), ids=VIEWS)
def test_views_whose_meaning_lies_in_a_bit(function):
    agrees(function, (Z,), (Z * 3,), (Z.conj(),))
    fast = capture(function)
    for z in (Z, Z * 2, Z * 3, Z.conj(), Z.conj() * 2):
        same(fast(z), function(z))


# --- what is switched on around a call


def test_modes_around_a_call_have_recordings_of_their_own():
    model, x = nn.Linear(3, 3), noise(2, 3)
    fast = capture(model, UNFUSED)
    with torch.no_grad():
        for dtype in (None, torch.bfloat16, torch.float16, None, torch.bfloat16):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                for _ in range(3):
                    same(fast(x), model(x))
    assert len(fast.graphs) == 3
    assert "autocast: recorded under" in fast.misses[1]


def test_a_cast_that_autocast_has_kept_is_no_weight():
    model, x = nn.Linear(3, 3), noise(2, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
        fast = warm(model, x)
    with torch.no_grad():
        model.weight.mul_(3)
        with torch.autocast("cpu", torch.bfloat16):
            same(fast(x), model(x))


def test_defaults_and_flags_around_a_call():
    fast = warm(lambda x: torch.ones(2) * 2.5, X)
    torch.set_default_dtype(torch.float64)
    try:
        assert fast(X).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert fast(X).is_meta
    assert fast(X).dtype == torch.float32
    asks = warm(lambda x: x * (2 if torch.are_deterministic_algorithms_enabled() else 3), X)
    torch.use_deterministic_algorithms(True)
    try:
        same(asks(X), X * 2)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_bare_graph_refuses_another_mode():
    graph = graph_of(nn.Linear(3, 3), X)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(SignatureMismatchError, match="autocast"):
        graph.run(X)
    with torch.device("cpu"), pytest.raises(SignatureMismatchError, match="default device"):
        graph.run(X)


class Doubled(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.exp.default else result


def exponential(x):
    return (x * 2).exp() + 1


def dual(function):
    with torch.autograd.forward_ad.dual_level():
        given = torch.autograd.forward_ad.make_dual(X, Y)
        return torch.autograd.forward_ad.unpack_dual(function(given)).tangent


def under_mode(function):
    with Doubled():
        return function(X)


TRANSFORMS = {
    "vmap": lambda f: torch.vmap(f)(torch.stack([X, Y])),
    "jvp": lambda f: torch.func.jvp(f, (X,), (Y,)),
    "functionalize": lambda f: torch.func.functionalize(f)(X),
    "forward mode": dual,
    "dispatch mode": under_mode,
    "meta": lambda f: f(X.to("meta")).shape,
}


@pytest.mark.parametrize("use", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transformed_call_runs_as_it_is(use):
    fast = warm(exponential, X)
    torch.testing.assert_close(use(fast), use(exponential))


# --- gradients


def test_gradients_are_never_lost_in_silence():
    ours, theirs = nn.Linear(3, 3), nn.Linear(3, 3)
    theirs.load_state_dict(ours.state_dict())
    fast = capture(ours, UNFUSED)
    for _ in range(3):
        result = fast(X)
        assert result.requires_grad
        with pytest.raises(CaptureError, match="replays compute no gradients"):
            (result.sum() + ours.weight.sum()).backward()
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    (fast(x) + 3 * x).sum().backward()
    (theirs(y) + 3 * y).sum().backward()
    same(x.grad, y.grad)
    assert "requires a gradient" in fast.misses[-1]


def test_what_needs_no_gradient_is_left_alone():
    weight = X.clone().requires_grad_()

    def inside(x):
        with torch.no_grad():
            return x * weight

    for function in (inside, lambda x: (x * weight).detach(), lambda x: x * 2):
        fast = capture(function, UNFUSED)
        assert not any(fast(X).requires_grad for _ in range(3))
    with pytest.raises(CaptureError, match="asks whether gradients are enabled"):
        capture(lambda x: x * (2 if torch.is_grad_enabled() else 3))(X)


# --- arguments and what was captured


def test_an_argument_that_is_a_captured_tensor_or_shares_its_memory():
    model, x = nn.Linear(4, 4), noise(2, 4)
    with torch.no_grad():
        for given in (lambda: model.bias, lambda: model.bias[:]):
            fast = warm(lambda x, b: model(x) + b, x, given())
            for seed in range(3):
                other = noise(4, seed=seed)
                same(fast(x, other), model(x) + other)
            same(fast(x, given()), model(x) + model.bias)


def test_an_argument_that_lies_over_what_is_written():
    def run(buffer):
        def step(x):
            before = x.exp()
            buffer.add_(1)
            return before + x * 2

        return step

    ours, theirs = torch.zeros(6), torch.zeros(6)
    fast, plain = warm(run(ours), X), run(theirs)
    theirs += 3
    for _ in range(2):
        same(fast(ours[1:4]), plain(theirs[1:4]))
        same(fast(X), plain(X))
    same(ours, theirs)


def test_arguments_that_overlap_without_sharing_a_storage():
    def run(a, b):
        before = b.exp()
        a.add_(1)
        return before + b * 2

    fast = warm(run, noise(8), noise(8, seed=1))
    array = numpy.ones(12, "float32")
    with pytest.raises(CaptureError):
        fast(torch.from_numpy(array)[:8], torch.from_numpy(array[4:]))


@dataclasses.dataclass
class Scale:
    gain: float

    def __call__(self, x):
        return x * self.gain


class Always:
    def __init__(self, gain):
        self.gain = gain

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1


class Number(enum.IntEnum):
    ONE = 1


ARGUMENTS = {
    "callables": (lambda x, f: f(x), [Scale(2.0), Scale(5.0)]),
    "partials": (lambda x, f: f(x), [functools.partial(torch.mul, other=n) for n in (2.0, 5.0)]),
    "namespaces": (lambda x, n: x * n.gain, [types.SimpleNamespace(gain=n) for n in (2.0, 5.0)]),
    "slices": (lambda x, s: x[s] * 2, [slice(0, 1), slice(1, 3), slice(0, 1)]),
    "an equality that hides": (lambda x, a: x * a.gain, [Always(2.0), Always(5.0)]),
    "keys that are equal": (lambda x, d: x * (2 if next(iter(d)) is True else 3), [{1: 0}, {True: 0}, {1.0: 0}]),
    "members and numbers": (lambda x, n: x * (2 if isinstance(n, enum.Enum) else 3), [1, Number.ONE, True, 1.0]),
    "zeros": (lambda x, z: x.copysign(torch.full((3,), float(z))), [0.0, -0.0, numpy.float32(0), numpy.float32(-0.0)]),
    "buffers": (lambda x, b: x * b[0], [bytearray(b"\2"), bytearray(b"\5")]),
    "attributes": (lambda x, w: x * getattr(w, "gain", 1.0), [X, torch.ones(3), X.clone()]),
}


@pytest.mark.parametrize(("function", "values"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_count_by_what_they_hold(function, values):
    if function is ARGUMENTS["attributes"][0]:
        values[2].gain = 5.0
    fast = capture(function, UNFUSED)
    for value in values * 2:
        for _ in range(2):
            same(fast(X, value), function(X, value))


CONSUMED = {
    "a generator": lambda: (n for n in (2.0, 3.0, 4.0)),
    "a counter": lambda: itertools.count(2.0),
    "an iterator": lambda: iter([2.0, 3.0, 4.0]),
}


@pytest.mark.parametrize("make", CONSUMED.values(), ids=CONSUMED)
def test_what_a_call_uses_up_is_refused(make):
    fast, given = capture(lambda x, numbers: x * next(numbers), UNFUSED), make()
    next(given)
    with pytest.raises(CaptureError, match=r"generator that was there before|changes the position"):
        for _ in range(2):
            fast(X, given)


def test_properties_of_tensors_that_the_code_asks_for():
    base = torch.arange(20.0)
    agrees(lambda x: x * x.storage_offset(), (base[:3],), (base[5:8],))
    agrees(lambda x: x * (2 if isinstance(x, nn.Parameter) else 3), (X,), (nn.Parameter(X),))
    agrees(lambda x: x * x.untyped_storage().nbytes(), (X,), (base[:3],))
    asks = warm(lambda x: x * (2 if x.grad is None else 3), X.clone())
    x = X.clone().requires_grad_()
    x.grad = Y.clone()
    with torch.no_grad():
        same(asks(x), x * 3)
        same(asks(X), X * 2)


# --- numbers and values that ops give to Python


def test_values_that_are_read_below_the_ops():
    x = torch.arange(6.0)
    agrees(lambda x, n: x[:n] * 2, (x, torch.tensor(2)), (x, torch.tensor(4)))
    agrees(lambda x, n: list(torch.tensor_split(x, n)), (x, torch.tensor([1, 3])), (x, torch.tensor([2, 5])))
    agrees(lambda x: nn.functional.one_hot(x), (torch.arange(3),), (torch.arange(3) + 2,))
    agrees(lambda x, n: x * n.untyped_storage()[3], (x, torch.ones(1)), (x, -torch.ones(1)))
    pack = nn.utils.rnn.pack_padded_sequence
    lengths = (torch.tensor([2, 1, 1]), torch.tensor([1, 1, 2]))
    agrees(
        lambda x, n: pack(x, n, batch_first=True, enforce_sorted=False).data * 2,
        *((x.reshape(3, 2), n) for n in lengths),
    )


def test_numbers_that_ops_give():
    with torch.library._scoped_library("capturing", "DEF") as library:
        library.define("count(Tensor x) -> int")
        library.impl("count", lambda x: int((x > 0).sum()), "CPU")
        library.define("both(Tensor x) -> (Tensor, float)")
        library.impl("both", lambda x: (x * 2, float(x.sum())), "CPU")
        agrees(lambda x: x * torch.ops.capturing.count(x), (X,), (X + 9,))
        with pytest.raises(CaptureError, match=r"capturing\.both.* gives Python numbers beside tensors"):
            capture(lambda x: torch.ops.capturing.both(x)[0])(X)
    quantized = [torch.quantize_per_tensor(X, 0.1, zero, torch.quint8) for zero in (3, 5)]
    agrees(lambda q: q.int_repr() + q.q_zero_point(), *((q,) for q in quantized))


def test_a_mask_is_asked_for_in_one_line_and_a_restless_value_is_given_up(caplog):
    def masked(x, mask):
        return x * 2 if mask.all() else torch.where(mask, x, -x)

    fast = capture(masked, UNFUSED)
    for mask in (X > -9, X > 0, X > -9, X > 0, X > 0):
        same(fast(X, mask), masked(X, mask))
    assert len(fast.graphs) == 2
    reads = capture(lambda x: x * x.sum().item(), UNFUSED)
    for number in range(20):
        same(reads(X + number), (X + number) * (X + number).sum())
    assert len(reads.misses) <= 10
    assert caplog.text.count("runs such calls as they are") == 1


# --- what is left behind


def counted():
    def forward(s, x):
        s.calls += 1
        s.last = x * 2
        return x + 1

    return module(forward, calls=0, last=None)


def test_a_replay_assigns_what_the_code_assigns():
    ours, theirs = counted(), counted()
    fast = capture(ours, UNFUSED)
    for number in range(5):
        same(fast(X + number), theirs(X + number))
        same(ours.last, theirs.last)
        assert ours.calls == theirs.calls
    assert len(fast.misses) == 1


def closing():
    n, last = 0, None

    def step(x):
        nonlocal n, last
        n = (n + 1) % 2
        result = x * (n + 1) if last is None else x + last
        last = x * 2
        return result

    return step


def test_variables_of_a_closure_are_assigned():
    ours, theirs = capture(closing(), UNFUSED), closing()
    for number in range(8):
        same(ours(X + number), theirs(X + number))
    assert len(ours.misses) <= 4


CHANGES = {
    "a number that is looked at": lambda s, x: (put(s, n=s.n + 1), x * s.n)[1],
    "a flag": lambda s, x: (put(s, n=not s.n), x * 2)[1],
    "a dict": lambda s, x: (s.table.update(n=len(s.table)), s.table.update({str(len(s.table)): 1}), x * 2)[2],
    "a list": lambda s, x: (s.items.append(1), x * len(s.items))[1],
    "an attribute of a class": lambda s, x: (put(type(s), m=getattr(type(s), "m", 0) + 1), x * 2)[1],
    "a buffer by registering it": lambda s, x: (s.register_buffer("b", x * 2), x * s.b)[1],
}


@pytest.mark.parametrize("forward", CHANGES.values(), ids=CHANGES)
def test_other_state_that_the_code_changes_is_refused_by_name(forward):
    fast = capture(module(forward, n=0, table={}, items=[]), UNFUSED)
    with pytest.raises(CaptureError, match=r"the code changes .* at each call, which a replay would not"):
        for _ in range(3):
            fast(X)


# --- results


class Named(dict):
    pass


class Listed(list):
    pass


class Pair:
    __slots__ = ("__b", "a")

    def __init__(self, t):
        self.a, self.__b = t, t * 2

    def both(self):
        return self.a, self.__b


def named(x):
    made = Named(k=x * 2)
    made.note = x * 3
    return made


def twice(x):
    held = [x * 2]
    return {"a": held, "b": held}


def in_order(x):
    made = collections.OrderedDict(a=x, b=x * 2)
    made.move_to_end("a")
    return made


def test_containers_come_back_as_they_were():
    fast = warm(named, X)
    same((fast(Y)["k"], fast(Y).note), (Y * 2, Y * 3))
    assert type(fast(Y)) is Named
    made = warm(twice, X)(Y)
    assert made["a"] is made["b"]
    made = warm(in_order, X)(Y)
    assert list(made) == ["b", "a"]
    made.move_to_end("b")
    assert warm(lambda x: collections.deque([x, x * 2, x * 3], maxlen=2), X)(Y).maxlen == 2
    assert warm(lambda x: collections.defaultdict(list, k=x * 2), X)(Y)["new"] == []
    assert warm(lambda x: (x * 2, collections.Counter("aab")), X)(Y)[1]["z"] == 0
    same(warm(lambda x: Pair(x + 1), X)(Y).both(), Pair(Y + 1).both())
    same(warm(lambda x: functools.partial(torch.add, x * 2), X)(Y)(Y), Y * 3)
    assert list(warm(lambda x: {torch.float32: x * 2, (1, "a"): x, 1.5: x}, X)(Y)) == [torch.float32, (1, "a"), 1.5]


@pytest.mark.parametrize("make", [lambda t: {t}, lambda t: frozenset([t]), lambda t: iter([t]), lambda t: {t: 1}])
def test_containers_that_a_replay_cannot_make_are_refused(make):
    with pytest.raises(CaptureError, match="a replay could not renew"):
        capture(lambda x: make(x * 2))(X)


# --- standing for a module


def test_a_captured_module_stands_for_the_module():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    fast = capture(model, UNFUSED)
    assert fast.eval() is fast
    assert not model.training
    same(fast(X), model(X))
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert next(fast.parameters()) is model[0].weight
    fast.note = 3
    assert model.note == 3
    fast.to(torch.float64)
    same(fast(X.double()), model(X.double()))
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert twin.graphs == ()
        same(twin(X.double()), model(X.double()))
        assert twin[0].weight is not model[0].weight if hasattr(twin, "__getitem__") else True
    with pytest.raises(AttributeError, match="nothing"):
        fast.nothing


def test_lazy_modules_and_nested_tensors_run_as_they_are_first():
    fast = capture(nn.LazyLinear(3), UNFUSED)
    x = noise(2, 4)
    first = fast(x)
    for _ in range(3):
        same(fast(x), first)
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)])
    fast = capture(lambda n: torch.nested.to_padded_tensor(n * 2, 0.0), UNFUSED)
    same(fast(nested), torch.nested.to_padded_tensor(nested * 2, 0.0))


def test_higher_order_operators_are_refused_by_name():
    def choose(x):
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    def repeat(x):
        loop = torch._higher_order_ops.while_loop
        return loop(lambda i, x: i < 3, lambda i, x: (i + 1, x * 2), (torch.tensor(0), x))

    for function in (choose, repeat):
        with pytest.raises(CaptureError, match=r"(cond|while_loop) was called at .*test_around_and_after\.py"):
            capture(function)(X)
