"""Mutants of saved graphs: 100 here, 3,000 in ``make fuzz-files``; and hostile ones made by hand."""

import copy
import random

import pytest
import torch

from graph_capture import CacheError, load
from graph_capture.ir.savable import is_savable
from tests.beside_eager import on_the_cpu
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
