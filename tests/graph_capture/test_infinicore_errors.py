"""What a recording of InfiniCore's calls refuses, and that it leaves no trace."""

import threading

import numpy
import pytest
import torch

from graph_capture import CaptureError, FusionConfig, SignatureMismatchError, fuse, record
from graph_capture.frontends.infinicore.frontend import to_torch
from tests.infinicore_models import ops, options, recorded, tensors, zeros
from tests.replaying import noise

ALWAYS = FusionConfig(profile="always")
X, Y = noise(3, 8, seed=1), noise(3, 8, seed=2)


# --- errors


def a_cube(ic):
    return tensors(ic, noise(2, 3, 8))[0]


BAD = {
    "shapes": (lambda ic, a: ic.add(a, tensors(ic, noise(3, 7))[0]), r"infinicore\.add.*\[3, 8\].*\[3, 7\].*differ"),
    "dtypes": (lambda ic, a: ic.mul(a, tensors(ic, X.half())[0]), r"infinicore\.mul.*dtypes.*differ"),
    "ranks": (lambda ic, a: ic.matmul(a_cube(ic), tensors(ic, noise(8, 3))[0]), "cannot be multiplied"),
    "inner sizes": (lambda ic, a: ic.matmul(a, a), "cannot be multiplied"),
    "linear": (lambda ic, a: ic.nn.functional.linear(a, tensors(ic, noise(5, 7))[0]), "do not go together"),
    "out": (lambda ic, a: ic.add(a, a, out=tensors(ic, noise(8, 3))[0]), "does not fit into"),
    "view": (lambda ic, a: a.view((5, 5)), r"Tensor\.view"),
    "narrow": (lambda ic, a: a.narrow(1, 4, 9), r"Tensor\.narrow"),
    "squeeze": (lambda ic, a: a.squeeze(0), r"Tensor\.squeeze.*not of size 1"),
    "squeeze range": (lambda ic, a: a.squeeze(7), r"Tensor\.squeeze"),
    "as_strided": (lambda ic, a: a.as_strided((9, 9), (9, 1)), r"Tensor\.as_strided"),
    "copy_": (lambda ic, a: a.copy_(tensors(ic, noise(3, 7))[0]), r"copy_.*cannot go into"),
    "index": (
        lambda ic, a: ic.nn.functional.embedding(tensors(ic, torch.tensor([3]))[0], a),
        r"infinicore\.embedding",
    ),
    "strides": (lambda ic, a: ic.from_torch(noise(4, 4).t()), "ignores strides"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_infinicore_would_not_check_is_a_named_error(ic, what):
    call, message = BAD[what]
    with pytest.raises(CaptureError, match=message) as caught, record(*tensors(ic, X)) as recording:
        recording.output(call(ic, *tensors(ic, X)))
    if what != "strides":
        assert __file__ in str(caught.value)


def test_an_op_that_is_not_in_the_table(ic):
    extension = ic.lib._infinicore
    unknown = getattr(extension, "topk_of", None)
    if unknown is None:
        pytest.skip("the real library has no such op")
    with pytest.raises(CaptureError, match="topk_of is not in the recorder's table"), record(*tensors(ic, X)):
        extension.topk_of(tensors(ic, X)[0]._underlying, 2)
    assert extension.topk_of is unknown


def test_a_tensor_that_was_freed_meanwhile(ic):
    held = tensors(ic, Y)
    held[0] = ic.from_list(Y.tolist(), dtype=ic.float32)  # of InfiniCore's own memory
    with pytest.raises(CaptureError, match="replaced"), record(*tensors(ic, X)) as recording:
        recording.output(tensors(ic, X)[0] + held.pop())


def test_a_module_that_replaces_what_it_holds(ic):
    class Counting(ic.nn.Module):
        def __init__(self):
            super().__init__()
            self.state = zeros(ic, (3, 8), **options(ic))

        def forward(self, x):
            self.state = self.state + x
            return self.state * x

    module = Counting()
    with (
        pytest.raises(CaptureError, match=r"'state' .* was replaced by the code"),
        record(*tensors(ic, X)) as recording,
    ):
        recording.output(module(*tensors(ic, X)))


def test_memory_given_by_address_is_not_written(ic):
    numbers = numpy.zeros((3, 8), dtype=numpy.float32)

    def program(a):
        extension = ic.lib._infinicore
        handle = extension.from_blob(
            numbers.ctypes.data, [3, 8], dtype=ic.float32._underlying, device=ic.device("cpu")._underlying
        )
        ic.Tensor(handle).copy_(a)

    with pytest.raises(CaptureError, match="by its address"), record(*tensors(ic, X)) as recording:
        recording.output(program(*tensors(ic, X)))


def test_a_value_of_the_wrong_kind_is_refused_at_replay(ic):
    graph, _ = recorded(lambda a: a + a, *tensors(ic, X))
    with pytest.raises(SignatureMismatchError):
        graph.run(X)
    with pytest.raises(SignatureMismatchError, match=r"\[3, 8\].*\[4, 8\]"):
        graph.run(*tensors(ic, noise(4, 8)))


def test_saving_says_what_cannot_be_saved(ic, tmp_path):
    graph, _ = recorded(lambda a: a + a, *tensors(ic, X))
    with pytest.raises(CaptureError, match="Tensor of another library"):
        fuse(graph, ALWAYS).save(tmp_path / "graph")


# --- no trace


def surface(ic):
    extension = ic.lib._infinicore
    return {
        **{name: value for name, value in vars(extension).items() if callable(value)},
        **{f"Tensor.{name}": value for name, value in vars(extension.Tensor).items()},
        "call": vars(ic.nn.Module)["__call__"],
        "init": vars(ic.Tensor)["__init__"],
        "ntops": ic.use_ntops,
    }


def test_nothing_stays_wrapped(ic):
    before = surface(ic)
    recorded(lambda a: a + a, *tensors(ic, X))
    assert surface(ic) == before
    with pytest.raises(ZeroDivisionError), record(*tensors(ic, X)):
        assert surface(ic) != before
        raise ZeroDivisionError
    assert surface(ic) == before
    with record(*tensors(ic, X)) as recording:
        recording.output(tensors(ic, X)[0] + tensors(ic, X)[0])
        with pytest.raises(CaptureError, match="already active"), record(X):
            pass
        assert surface(ic) != before
    assert surface(ic) == before


def test_other_threads_are_not_recorded(ic):
    a, results = tensors(ic, X)[0], []

    def other():
        results.append(to_torch(a + a).clone())
        with record(a) as inner:
            inner.output(a * a)
        results.append(ops(inner.graph))

    with record(a) as recording:
        first = a + a
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        recording.output(first * a)  # the other recording's end has not unwrapped ours
    assert ops(recording.graph) == ["add", "mul"]
    assert results[1] == ["mul"]
    assert torch.equal(results[0], X + X)


def test_ntops_does_not_get_in_between(ic, monkeypatch):
    monkeypatch.setattr(ic, "use_ntops", True)
    graph, _ = recorded(ic.nn.functional.silu, *tensors(ic, X))
    assert ops(graph) == ["silu"]
    assert ic.use_ntops is True
