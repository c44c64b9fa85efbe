"""Weights rounded here: errors, sizes, what is refused, and an engine over them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graph_capture import CaptureError, InferEngine, quantize
from graph_capture.ir.quantised import decoded
from graph_capture.runtime.llm.models import load_model
from graph_capture.runtime.llm.packed import PackedEmbedding, PackedLinear, packed_rows
from graph_capture.tiny import FOLDER

MOST = {"int8": 0.008, "int4": 0.11}  # of the RMS of normal weights, in groups of 64


@pytest.mark.parametrize("scheme", MOST)
def test_each_weight_becomes_the_nearest_that_there_is(scheme):
    weight = torch.randn(33, 192, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[4, :64] = -2.5
    weight[5] *= 1e-2
    rows, error = packed_rows(weight, f"{scheme}:64")
    result = decoded(rows, f"{scheme}:64")
    assert error < MOST[scheme]
    assert ((result - weight).square().sum() / weight.square().sum()).sqrt().item() == pytest.approx(error)
    groups = weight.unflatten(1, (-1, 64))
    levels = 127 if scheme == "int8" else 15
    spread = groups.abs().amax(-1) if scheme == "int8" else groups.amax(-1) - groups.amin(-1)
    reach = (result - weight).unflatten(1, (-1, 64)).abs().amax(-1)
    assert (reach <= 0.52 * spread / levels + groups.abs().amax(-1) * 2**-9 + 1e-7).all()
    assert not result[3].any()


@pytest.mark.parametrize("scheme", MOST)
def test_a_model_is_quantised_in_place_with_a_receipt(scheme):
    model = nn.Sequential(nn.Embedding(50, 128), nn.Linear(128, 192), nn.GELU(), nn.Linear(192, 128, bias=False))
    before = copy.deepcopy(model)
    receipts = quantize(model, scheme, group=64)
    assert isinstance(model[0], PackedEmbedding)
    assert [receipt.scheme for receipt in receipts] == ["int8:64", f"{scheme}:64", f"{scheme}:64"]
    assert all(receipt.error < MOST[scheme] for receipt in receipts)
    assert sum(r.after for r in receipts) < sum(r.before for r in receipts) * (0.27 if scheme == "int8" else 0.2)
    assert not any(type(module) in (nn.Linear, nn.Embedding) for module in model.modules())
    ids = torch.arange(10)
    table, first, last = (decoded(model[i].packed, model[i].scheme) for i in (0, 1, 3))
    want = F.linear(F.gelu(F.linear(table[ids], first, before[1].bias)), last)
    torch.testing.assert_close(model(ids), want)


def test_what_cannot_be_quantised_is_refused_and_left_as_it_was():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96), nn.Linear(96, 64))
    for arguments, reason in (
        (("int3",), "to int8 or int4, not to 'int3'"),
        (("int8",), "2 cannot be quantised: a row of 96 weights is not blocks of 64"),
    ):
        with pytest.raises(CaptureError, match=reason):
            quantize(model, *arguments)
    assert all(type(module) is nn.Linear for module in model)
    with pytest.raises(CaptureError, match="a group of 48"):
        quantize(model, "int8", group=48)
    with torch.no_grad():
        model[1].weight[3, 3] = float("nan")
    with pytest.raises(CaptureError, match="1 has a weight of magnitude nan"):
        quantize(model, "int4", group=32)
    with pytest.raises(CaptureError, match="no linears"):
        quantize(nn.GELU(), "int8")


def test_a_subclass_keeps_its_weight():
    class Own(nn.Linear):
        def forward(self, input):
            return F.linear(input, self.weight * 2)

    model = nn.Sequential(Own(64, 64), nn.Linear(64, 64))
    assert [receipt.name for receipt in quantize(model, "int8")] == ["1"]


def test_an_engine_answers_as_the_quantised_model_does():
    theirs = load_model(str(FOLDER), dtype=torch.float32)
    receipts = quantize(theirs, "int8")
    assert len({receipt.name for receipt in receipts}) == len(receipts)
    engine = InferEngine(str(FOLDER), dtype=torch.float32, quantize="int8")
    prompt = engine.encode_messages([{"role": "user", "content": "hello"}])
    answers = [engine.generate(prompt, max_new_tokens=12, temperature=0.0).tokens for _ in range(3)]
    ids = torch.tensor([prompt])
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    want = want[0, len(prompt) :].tolist()
    assert engine.declined is None
    assert any(isinstance(module, PackedLinear) for module in engine.model.modules())
    for answer in answers:
        assert answer == want[: len(answer)]
        assert answer
