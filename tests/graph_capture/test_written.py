"""What the check of a recording copies of memory that is written: the parts that are, however ops overlap."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture import UnrecordedWriteError, capture, record
from graph_capture.ir import memory
from tests.replaying import noise

SLOTS = 4096


def step(x, cache, position):
    """One token of a decode step."""
    cache.index_copy_(1, position, x)
    position.add_(1)
    return cache.sum(1)


def arguments():
    return noise(8, 1, 64), torch.zeros(8, SLOTS, 64), torch.full((1,), 7, dtype=torch.int64)


def recorded(function, *args):
    with record(*args) as recording:
        recording.output(function(*args))
    return recording.graph


def test_of_a_cache_only_the_slots_that_are_written_are_copied():
    x, cache, position = arguments()
    graph = recorded(step, x, cache, position)
    assert graph.verification.bytes <= 4 * x.nbytes
    assert torch.equal(cache[:, 7:8], x)
    assert not cache[:, 8:].any()
    assert position.item() == 8


@pytest.mark.parametrize("slot", [6, 9])
def test_a_hidden_write_beside_what_is_copied_is_found(slot):
    def hidden(x, cache, position):
        result = step(x, cache, position)
        ctypes.c_float.from_address(cache.data_ptr() + 4 * 64 * slot).value = 3.0
        return result

    with pytest.raises(UnrecordedWriteError, match="'arg1'"):
        recorded(hidden, *arguments())


def test_views_are_copied_by_themselves():
    cache = torch.zeros(2, 1024, 1024)

    def prefill(x):
        cache[:, :16].copy_(x)
        cache[:, 4:8].mul_(2)
        cache[:, :16].add_(1)
        return cache[:, :16] + 1

    x = noise(2, 16, 1024)
    graph = recorded(prefill, x)
    want = x.clone()
    want[:, 4:8].mul_(2)
    assert torch.equal(cache[:, :16], want + 1)
    assert not cache[:, 16:].any()
    assert graph.verification.bytes < cache.nbytes / 4


def test_what_is_written_again_and_again_is_copied_whole_at_last():
    cache = torch.zeros(SLOTS, 256)

    def fill(x):
        for slot in range(0, SLOTS, 256):
            cache[slot : slot + 256].copy_(x)
        return cache.sum(0)

    graph = recorded(fill, noise(256, 256))
    assert torch.equal(cache.view(16, 256, 256), noise(256, 256).expand(16, 256, 256))
    assert graph.verification.bytes == 2 * cache.nbytes


writes = st.one_of(
    st.tuples(st.just("slice"), st.integers(0, 40), st.integers(1, 20), st.floats(-2, 2, width=16)),
    st.tuples(st.just("index"), st.integers(0, 50), st.integers(1, 10), st.floats(-2, 2, width=16)),
    st.tuples(st.just("column"), st.integers(0, 7), st.integers(1, 1), st.floats(-2, 2, width=16)),
    st.tuples(st.just("add"), st.integers(0, 40), st.integers(1, 20), st.floats(-2, 2, width=16)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(writes, max_size=8))
def test_whatever_is_written_is_as_the_code_left_it(sequence):
    def apply(table):
        for kind, start, count, value in sequence:
            if kind == "slice":
                table[start : start + count].fill_(value)
            elif kind == "add":
                table[start : start + count].add_(value)
            elif kind == "column":
                table[:, start].mul_(value)
            else:
                index = torch.arange(start, start + count)
                table.index_copy_(0, index, torch.full((count, 8), value))
        return table.sum(0)

    ours, theirs = noise(64, 8), noise(64, 8)
    before = memory.SMALL
    memory.SMALL = 0
    try:
        with record(ours) as recording:
            recording.output(apply(ours))
    finally:
        memory.SMALL = before
    result = apply(theirs)
    assert torch.equal(ours, theirs)
    again = noise(64, 8)
    assert torch.equal(recording.graph.run(again), result)
    assert torch.equal(again, theirs)


def test_a_second_recording_is_undone():
    def count(x, table):
        table[:4].add_(x)
        return table.sum(0)

    table, other = torch.zeros(2**16, 8), torch.ones(2**16, 8)
    fast = capture(count, check=(noise(4, 8, seed=1), other))
    fast(noise(4, 8), table)
    assert torch.equal(other, torch.ones(2**16, 8))
    assert torch.equal(table[:4], noise(4, 8))
