"""To how many tokens batches are padded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.recipe import Width, any_width


@pytest.mark.parametrize(
    ("width", "longest", "columns"),
    [
        (Width(), 5, 5),
        (Width(8), 5, 8),
        (Width(8), 8, 8),
        (Width(8, 12), 9, 12),  # no further than the model's positions
        (Width(8, 12), 14, 14),  # a longer sample stays whole
        (Width(8, None, 4), 9, 16),  # without a greatest width there are no others
        (Width(8, 64, 1), 3, 64),
        (Width(8, 64, 3), 3, 16),
        (Width(8, 64, 3), 16, 16),
        (Width(8, 64, 3), 17, 32),
        (Width(1, 7, 2), 4, 4),  # the half is rounded up
        (Width(8, 64, 3), 33, 64),
        (Width(8, 100, 3), 33, 56),
        (Width(8, 100, 3), 57, 100),
        (Width(8, 64, 3), 65, 65),
    ],
)
def test_a_width(width: Width, longest: int, columns: int) -> None:
    assert width(longest) == columns


@given(st.integers(1, 16), st.integers(1, 300), st.integers(1, 6))
def test_there_are_few_and_each_has_room(multiple: int, most: int, buckets: int) -> None:
    width = Width(multiple, most, buckets)
    found = {longest: width(longest) for longest in range(1, most + 1)}
    assert len(set(found.values())) <= buckets
    assert all(longest <= columns <= most for longest, columns in found.items())
    assert found[most] == most


def test_for_a_while_it_may_be_any() -> None:
    width = Width(8, 64, 2)
    with any_width():
        assert (width.few, width(9)) == (False, 16)
    assert (width.few, width(9)) == (True, 32)
