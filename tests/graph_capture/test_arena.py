"""Placing buffers by lifetime, against a brute-force oracle."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.runtime.replay.arena import Lifetime, _greedy, live_peak, place


def lifetimes(most):
    life = st.tuples(st.integers(0, 1500), st.integers(0, 9), st.integers(0, 6))
    return st.lists(life.map(lambda item: Lifetime(item[0], item[1], item[1] + item[2])), max_size=most)


def overlaps(one, other, offsets):
    meet = one[1].first <= other[1].last and other[1].first <= one[1].last
    (i, a), (j, b) = one, other
    return meet and a.size and b.size and offsets[i] < offsets[j] + b.size and offsets[j] < offsets[i] + a.size


@settings(max_examples=200, deadline=None)
@given(lifetimes(30))
def test_no_two_live_buffers_share_a_byte(lives):
    placed = place(lives)
    numbered = list(enumerate(lives))
    assert not any(overlaps(one, other, placed.offsets) for one, other in itertools.combinations(numbered, 2))
    assert all(offset % 64 == 0 for offset in placed.offsets)
    assert all(offset + life.size <= placed.peak for offset, life in zip(placed.offsets, lives, strict=True))
    assert placed.peak >= live_peak(lives)
    assert place(lives) == placed


@settings(max_examples=100, deadline=None)
@given(lifetimes(6))
def test_the_peak_is_within_a_tenth_of_the_best_order(lives):
    rounded = [life._replace(size=-(-life.size // 64) * 64) for life in lives]
    best = min(_greedy(rounded, order).peak for order in itertools.permutations(range(len(lives))))
    assert place(lives).peak <= 1.1 * best


def test_nothing_to_place():
    assert place([]) == ((), 0)
    assert place([Lifetime(0, 0, 3)]) == ((0,), 0)


def test_a_chain_takes_the_space_of_two():
    chain = [Lifetime(640, step, step + 1) for step in range(50)]
    assert place(chain).peak == 2 * 640 == live_peak(chain)
