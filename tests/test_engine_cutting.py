from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from launch.engine.cutting import PASS_TOKENS, PLACES, parts

longest_first = st.lists(st.integers(1, 600), min_size=1, max_size=9).map(lambda found: sorted(found, reverse=True))


def cost(lengths: list[int], sizes: list[int]) -> int:
    """Tokens computed in parts of so many rows, padding and the passes themselves included."""
    starts = [0, *itertools.accumulate(sizes)]
    assert starts[-1] == len(lengths)
    return sum(size * lengths[start] + PASS_TOKENS for start, size in zip(starts, sizes, strict=False))


def divisions(rows: int) -> list[list[int]]:
    """All ways to divide rows into parts that follow on each other."""
    cuts = itertools.product((False, True), repeat=rows - 1)
    return [[len(list(part)) for _, part in itertools.groupby(itertools.accumulate(each, initial=0))] for each in cuts]


@given(longest_first)
def test_no_division_takes_less_time(lengths: list[int]) -> None:
    found = parts(np.array(lengths))
    assert all(found)
    assert cost(lengths, found) == min(cost(lengths, each) for each in divisions(len(lengths)))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=400))
def test_many_rows_are_cut_at_few_places_and_never_to_a_loss(lengths: list[int]) -> None:
    lengths.sort(reverse=True)
    found = parts(np.array(lengths))
    assert cost(lengths, found) <= cost(lengths, [len(lengths)])
    assert len(found) <= PLACES
    assert all(size % -(-len(lengths) // PLACES) == 0 for size in found[:-1])


def test_rows_are_cut_only_where_it_pays() -> None:
    assert parts(np.array([40] * 64)) == [64]
    assert parts(np.array([40] * 32 + [36] * 32)) == [64]
    assert parts(np.array([40] * 32 + [35] * 32)) == [32, 32]
    assert parts(np.array([2000, 16, 16, 16])) == [1, 3]
    assert parts(np.array([16 + PASS_TOKENS, 16])) == [2]
    assert parts(np.array([17 + PASS_TOKENS, 16])) == [1, 1]
