"""Every op of PyTorch's own op database: recorded, replayed on the same and on fresh inputs, compared bit for bit."""

import contextlib
import itertools
import warnings

import pytest
import torch
from torch.utils import _pytree as pytree

from graph_capture import CaptureError, DataDependentError, record

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch.testing._internal.common_methods_invocations as invocations

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
SAMPLES = 3  # for each dtype

SKIPPED = {
    "broadcast_shapes": "takes and returns shapes: there is no tensor",
    "jiterator_unary": "CUDA only",
    "jiterator_binary": "CUDA only",
    "jiterator_4inputs_with_extra_args": "CUDA only",
    "jiterator_binary_return_by_ref": "CUDA only",
    "jiterator_2inputs_2outputs": "CUDA only",
    "norm_nuc": "torch.norm(p='nuc') takes another algorithm under any mode: equal up to rounding only",
}
UNINITIALISED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}


def copied(value):
    """`value` with its tensors copied, with the memory around views."""

    def copy(tensor):
        if not isinstance(tensor, torch.Tensor):
            return tensor
        tensor = tensor.detach()
        if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            return tensor.clone()
        memory = tensor.untyped_storage().clone()
        return torch.empty(0, dtype=tensor.dtype).set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())

    return pytree.tree_map(copy, value)


def other_values(value):
    """Inputs of the same signature with other values that stay in the domain of most ops: halved, or turned round."""

    def change(tensor):
        if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0 or tensor.layout != torch.strided:
            return tensor
        if tensor.is_floating_point() or tensor.is_complex():
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            whole.mul_(0.5)
        elif tensor.dtype is torch.bool:
            tensor.logical_not_()
        return tensor

    return pytree.tree_map(change, copied(value))


def assert_same_bits(got, want):
    got, want = pytree.tree_leaves(got), pytree.tree_leaves(want)
    assert len(got) == len(want)
    for left, right in zip(got, want, strict=True):
        if not isinstance(right, torch.Tensor):
            assert type(left) is type(right)
            continue
        assert (left.shape, left.dtype, left.layout) == (right.shape, right.dtype, right.layout)
        if left.layout == torch.strided:
            assert left.stride() == right.stride()
            assert torch.equal(bits(left), bits(right))
        else:
            assert_same_bits(left.to_dense(), right.to_dense())


def bits(tensor):
    return (
        tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    )


def eager(info, sample):
    torch.manual_seed(0)
    inputs = copied(sample)
    with torch.no_grad():
        return info.op(inputs[0], *inputs[1], **inputs[2]), inputs


def recorded(info, sample, **options):
    torch.manual_seed(0)
    inputs = copied(sample)
    with record(inputs, **options) as recording:
        recording.output(info.op(inputs[0], *inputs[1], **inputs[2]))
    return recording.graph, inputs


def samples_of(info):
    for dtype in DTYPES:
        if dtype in info.supported_dtypes("cpu"):
            for sample in itertools.islice(info.sample_inputs("cpu", dtype), SAMPLES):
                yield sample.input, tuple(sample.args), dict(sample.kwargs)


@pytest.fixture(autouse=True)
def unseeded(monkeypatch):
    """The database seeds the generator inside its random ops; a forward that does is refused (see test_footguns)."""
    monkeypatch.setattr(invocations, "wrapper_set_seed", lambda op, *args, **kwargs: op(*args, **kwargs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("info", invocations.op_db, ids=lambda info: info.formatted_name)
def test_replay_is_bit_equal(info):
    if info.formatted_name in SKIPPED:
        pytest.skip(SKIPPED[info.formatted_name])
    uninitialised = info.name in UNINITIALISED
    ran = 0
    for sample in samples_of(info):
        want, wanted_inputs = eager(info, sample)
        options = {"verify": not uninitialised}
        try:
            graph, _ = recorded(info, sample, **options)
        except DataDependentError:
            graph, _ = recorded(info, sample, data_dependent="guard", **options)
            assert graph.guarded
        ran += 1
        inputs = copied(sample)
        torch.manual_seed(0)
        got = graph.run(inputs)
        if uninitialised:
            assert [t.shape for t in pytree.tree_leaves(got)] == [t.shape for t in pytree.tree_leaves(want)]
            continue
        assert_same_bits(got, want)
        assert_same_bits(inputs, wanted_inputs)  # what the op wrote
        fresh = other_values(sample)
        with contextlib.suppress(DataDependentError) if graph.guarded else contextlib.nullcontext():
            try:
                want, _ = eager(info, fresh)
            except RuntimeError:  # the other values left the op's domain
                continue
            torch.manual_seed(0)
            assert_same_bits(graph.run(copied(fresh)), want)
    assert ran or not any(dtype in info.supported_dtypes("cpu") for dtype in DTYPES)


def test_the_skip_list_is_short_and_true():
    names = {info.formatted_name for info in invocations.op_db}
    assert set(SKIPPED) <= names
    assert len(SKIPPED) <= 0.05 * len(names)


def test_a_skipped_op_fails_loudly():
    info = next(info for info in invocations.op_db if info.name == "broadcast_shapes")
    with pytest.raises(CaptureError, match="no output"):
        recorded(info, next(samples_of(info)))


@pytest.mark.filterwarnings("ignore")
def test_the_nuclear_norm_replays_as_recorded_and_close_to_eager():
    info = next(info for info in invocations.op_db if info.formatted_name == "norm_nuc")
    sample = next(samples_of(info))
    graph, _ = recorded(info, sample)
    torch.testing.assert_close(graph.run(copied(sample)), eager(info, sample)[0])
