"""Mutants of saved graphs: 100 here, 3,000 in ``make fuzz-files``; and hostile ones made by hand."""

import copy
import random

import pytest
import torch

from graph_capture import CacheError, CaptureError, load
from graph_capture.ir.savable import is_savable
from tests.beside_eager import fused_of, on_the_cpu
from tests.fuzz.files import NAMES, attempt, example, mutant, parts_of, write

pytestmark = on_the_cpu


@pytest.fixture(scope="module", params=["rows", "attention"])
def sample(request, tmp_path_factory):
    torch.manual_seed(0)
    return example(tmp_path_factory.mktemp("files"), request.param)


def test_mutants_are_refused_or_replay(sample):
    path, arguments, _ = sample
    table, tensors = parts_of(path)
    chance, ends = random.Random(0), []
    for number in range(50):
        mutated = path.with_name(f"mutant_{number}.safetensors")
        write(mutated, mutant(table, chance), tensors)
        ends.append(attempt(mutated, arguments))
    assert ends.count("refused") > 10


def test_loading_runs_nothing_and_a_replay_is_right_on_another_machine(sample):
    path, arguments, want = sample
    table, tensors = parts_of(path)
    other = path.with_name("other.safetensors")
    write(other, {**table, "environment": "another"}, tensors)
    assert attempt(other, arguments) == "replayed"
    loaded = load(other)
    assert all("first replay" in region.decision.reason for region in loaded.regions)
    with torch.no_grad():
        got = loaded(*arguments)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not any("first replay" in region.decision.reason for region in loaded.regions)


def change(table, what):
    regions = [node for node in table["nodes"] if node[0].startswith("fused.")]
    if what == "a body of other ops":
        for node in table["nodes"]:
            if node[0] in ("relu", "mul.Scalar", "mul", "rms_norm", "scaled_dot_product_attention") and not node[5]:
                node[0] = {"relu": "abs"}.get(node[0], "neg")
                return
    elif what == "a region of no ops":
        regions[0][5] = []
    elif what == "a region that reads another value":
        regions[0][1] = regions[0][1][::-1] + ["nowhere"]
    elif what == "a region that is its own part":
        regions[0][5] = [table["nodes"].index(regions[0])]
    elif what == "two regions of one name":
        table["environment"] = "another"
        table["regions"] = table["regions"] + copy.deepcopy(table["regions"])
    elif what == "weights on meta":
        for entry in table["captured"].values():
            entry["meta"][3] = "meta"
        for graph in (table["recorded"], table["rewritten"]):
            for name in table["captured"]:
                graph["values"][name][3] = "meta"
        if not table["captured"]:
            table["format"] = 0
    elif what == "a storage that is too short":
        for name, entry in table["captured"].items():
            if "tensor" in entry:
                entry["storage"] = entry.pop("tensor")
            entry["meta"][4] = 2**40
            table["recorded"]["values"][name][4] = 2**40
        if not table["captured"]:
            table["format"] = 0
    elif what == "counts":
        table["structure"]["known"] = 2**62
    elif what == "an argument of another size":
        table["structure"]["metas"][0][0] = [2**31, 2**31]


HOSTILE = (
    "a region of no ops", "a region that reads another value", "a region that is its own part", "counts",
    "two regions of one name", "weights on meta", "a storage that is too short", "an argument of another size",
    "a body of other ops",
)  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused(sample, what):
    path, _, _ = sample
    table, tensors = parts_of(path)
    change(table, what)
    hostile = path.with_name("hostile.safetensors")
    write(hostile, table, tensors)
    with pytest.raises(CacheError):
        load(hostile)


def spelled_node(table):
    """A node that stands for ops that were recorded."""
    return next(node for node in table["nodes"] if node[5] and not node[0].startswith("fused."))


def change_spelling(table, what):
    node = spelled_node(table)
    if what == "another op of the same form":
        node[0] = {"rms_norm": "layer_norm", "gelu": "silu", "scaled_dot_product_attention": "capped_attention"}[
            node[0]
        ]
    elif what == "another number":
        numbers = [key for key, value in node[3].items() if isinstance(value, float)]
        node[3].update({numbers[0]: 0.25} if numbers else {"approximate": "tanh"})
    elif what == "other operands":
        node[1] = [node[1][0]] * len(node[1]) if len(node[1]) > 1 else [table["recorded"]["inputs"][-1]]
    elif what == "a recorded op that does another thing":
        inner = table["nodes"][node[5][-1]]
        inner[0] = {"mul": "sub", "matmul": "aten.bmm.default"}.get(inner[0], "neg")
    elif what == "one recorded op more":
        node[5] = [*node[5][:1], *node[5]]
    elif what == "one recorded op less":
        node[5] = node[5][1:]


@pytest.mark.parametrize("spelled", ["norm", "gelu", "attention"])
@pytest.mark.parametrize(
    "what",
    ["another op of the same form", "another number", "other operands", "one recorded op more", "one recorded op less"]
    + ["a recorded op that does another thing"],
)
def test_a_spelling_that_is_another_op_is_refused(tmp_path, spelled, what):
    functions = {
        "norm": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) + 1,
        "gelu": lambda x, w: 0.5 * x * (1 + torch.erf(x / 2**0.5)) * w,
        "attention": lambda x, w: torch.softmax(x @ x.mT * 0.5, -1) @ (x * w),
    }
    x, weight = torch.randn(2, 4, 8), torch.randn(8)
    fused, path = fused_of(functions[spelled], x, weight), tmp_path / "spelled.safetensors"
    fused.save(path)
    torch.testing.assert_close(load(path)(x, weight), functions[spelled](x, weight))
    table, tensors = parts_of(path)
    change_spelling(table, what)
    write(path, table, tensors)
    with pytest.raises(CacheError):
        load(path)


UNSAVABLE = {
    "an LSTM": (torch.nn.LSTM(4, 5), (3, 4), r"mkldnn_rnn_layer.* cannot be saved.*mkldnn\.flags"),
    "a bag of embeddings": (torch.nn.EmbeddingBag(9, 4), None, r"_embedding_bag.* cannot be saved.*F\.embedding"),
    "dropout": (torch.nn.Dropout(0.5), (3, 4), r"bernoulli.* cannot be saved: only ops of torch"),
}


@pytest.mark.parametrize("what", UNSAVABLE)
def test_what_cannot_be_saved_says_so_and_leaves_no_file(tmp_path, what):
    module, shape, message = UNSAVABLE[what]
    x = torch.tensor([[1, 2], [0, 8]]) if shape is None else torch.randn(shape)
    fused = fused_of(lambda x: module(x), x)
    with pytest.raises(CaptureError, match=message):
        fused.save(tmp_path / "unsavable.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_lstm_that_is_recorded_without_onednn_is_saved(tmp_path):
    lstm, x = torch.nn.LSTM(4, 5), torch.randn(3, 2, 4)
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        fused_of(lambda x: lstm(x)[0], x).save(tmp_path / "lstm.safetensors")
        torch.testing.assert_close(load(tmp_path / "lstm.safetensors")(x), lstm(x)[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("values", "shape", "fused.pointwise")])
def test_ops_with_effects_are_refused(sample, name):
    if is_savable(name):
        pytest.skip("it computes a tensor, or reads one")
    path, _, _ = sample
    table, tensors = parts_of(path)
    table["nodes"][0][0] = name
    hostile = path.with_name("op.safetensors")
    write(hostile, table, tensors)
    with pytest.raises(CacheError):
        load(hostile)
