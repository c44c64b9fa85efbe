"""A sample of PyTorch's op database through `capture`, on views, strided and conjugated inputs, and under autocast."""

import warnings

import pytest

from tests.record.op_database import INFOS, whole

STEP = 12  # every so many ops: all of them take half an hour (python -m tests.record.op_database)
PARTS = 6


@pytest.mark.parametrize("part", range(PARTS))
def test_every_variant_is_equal_or_refused(part):
    wrong = []
    infos = INFOS[part * 2 :: STEP * PARTS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = whole(infos, 1, wrong.append)
    assert not wrong
    assert outcomes["equal"] > len(infos)


@pytest.mark.parametrize("name", ["nn.functional.bilinear", "linalg.pinv"])
def test_what_casts_inside_is_refused_under_autocast(name):
    (info,) = [info for info in INFOS if info.name == name and not info.variant_test_name]
    outcomes = whole([info], 1, pytest.fail)
    assert outcomes["refused"] >= 1
    assert outcomes["equal"] > 2
