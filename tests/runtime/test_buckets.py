"""Padded calls: few recordings, the results of the call as it is, and an error where padding changes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graph_capture import Bucket, CaptureError, FusionConfig, capture
from tests.models import tiny_llama, token_ids

UNFUSED = FusionConfig(enable_fusion=False)
SEQUENCE = Bucket((16, 8), {"input_ids": 1}, outputs={"logits": 1})  # causal: what follows changes nothing before it


def model_call(function, ids):
    with torch.no_grad():
        return function(input_ids=ids, use_cache=False).logits


def test_all_lengths_up_to_a_size_share_its_recording():
    model = tiny_llama(layers=1)
    fast = capture(model, UNFUSED, buckets={"sequence": SEQUENCE})
    for length in (5, 3, 7, 8, 6, 12, 16, 9):
        ids = token_ids(length, seed=length)
        result = model_call(fast, ids)
        assert result.shape[1] == length
        torch.testing.assert_close(result, model_call(model, ids), rtol=1e-4, atol=1e-5)
    assert len(fast.graphs) == 2
    ids = token_ids(17)
    assert torch.equal(model_call(fast, ids), model_call(model, ids))
    assert len(fast.graphs) == 3


def test_positional_arguments_defaults_and_other_fill():
    def run(x, mask=None, *, bias=1.0, **more):
        y = torch.where(mask, x, 0.0) if mask is not None else x
        return (y + bias).cumsum(-1), [more["extra"] * 2]

    rows = Bucket((4,), {"x": -1, "mask": 0, "extra": 1}, {"0": -1, "1.0": 1}, fill={"extra": -1})
    fast = capture(run, UNFUSED, buckets={"columns": rows})
    x, mask, extra = torch.randn(2, 3), torch.tensor([True, False, True]), torch.ones(1, 3)
    for _ in range(2):
        result, expected = fast(x, mask, extra=extra), run(x, mask, extra=extra)
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1][0], expected[1][0])
    assert len(fast.graphs) == 1
    assert fast.graphs[0].recorded.signature.metas[0].shape == (2, 4)


def test_two_dimensions():
    linear = nn.Linear(4, 4)
    batch = Bucket((2, 4), {"x": 0}, {"": 0})
    sequence = Bucket((8,), {"x": 1}, {"": 1})
    fast = capture(lambda x: linear(x).relu(), UNFUSED, buckets={"batch": batch, "sequence": sequence})
    with torch.no_grad():
        for shape in ((1, 5), (2, 8), (3, 1), (4, 7)):
            x = torch.randn(*shape, 4)
            torch.testing.assert_close(fast(x), linear(x).relu())
    assert {graph.recorded.signature.metas[0].shape for graph in fast.graphs} == {(2, 8, 4), (4, 8, 4)}


def test_padding_that_changes_the_result_is_refused():
    fast = capture(lambda x: x - x.mean(-1, keepdim=True), UNFUSED, buckets={"c": Bucket((4,), {"x": 1}, {"": 1})})
    with pytest.raises(CaptureError, match="padding changes the result: the model needs a mask"):
        fast(torch.ones(2, 3) + torch.arange(3.0))
    assert fast.graphs == ()


def test_a_result_that_is_not_cut_back_is_refused():
    fast = capture(F.relu, UNFUSED, buckets={"c": Bucket((4,), {"input": 1})})
    with pytest.raises(CaptureError, match=r"with padding, the result is \[2, 4\], without \[2, 3\]"):
        fast(torch.ones(2, 3))


def test_a_call_that_writes_is_refused():
    fast = capture(lambda x, cache: cache.add_(x.sum()) + x, UNFUSED, buckets={"c": Bucket((4,), {"x": 0}, {"": 0})})
    with pytest.raises(CaptureError, match="that writes into its arguments"):
        fast(torch.ones(3), torch.zeros(1))


@pytest.mark.parametrize(
    ("bucket", "arguments", "match"),
    [
        (Bucket((4,), {"x": 1}, {"": 0}), (torch.ones(3), torch.ones(3)), "x has no dimension 1"),
        (Bucket((4,), {"x": 0}, {"": 0}), (3, torch.ones(3)), "x has no dimension 0.*a int"),
        (Bucket((4,), {"x": 0, "y": 0}, {"": 0}), (torch.ones(3), torch.ones(1)), "differ in 'c': x has 3, y has 1"),
        (Bucket((4,), {"x": 0, "y": 0}, {"logits": 0}), (torch.ones(3), torch.ones(3)), "no tensor 'logits'.*has ''"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(bucket, arguments, match):
    fast = capture(lambda x, y: y + x, UNFUSED, buckets={"c": bucket})
    with pytest.raises(CaptureError, match=match):
        fast(*arguments)


def test_buckets_that_make_no_sense_are_refused():
    for sizes, arguments in (((), {"x": 0}), ((0, 4), {"x": 0}), ((4,), {})):
        with pytest.raises(ValueError, match="at least 1"):
            Bucket(sizes, arguments)
    with pytest.raises(ValueError, match="fill names y"):
        Bucket((4,), {"x": 0}, fill={"y": 1})
    with pytest.raises(ValueError, match="has no argument z"):
        capture(lambda x: x, buckets={"c": Bucket((4,), {"z": 0})})
