"""Durations as people say them."""

from __future__ import annotations

import math

import pytest

from launch.words import NOTHING, duration, roughly


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (9.6, "10 s"),
        (99.4, "99 s"),
        (240, "4 min"),
        (5900, "98 min"),
        (7500, "2 h 05 min"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_roughly(seconds: float, said: str) -> None:
    assert roughly(seconds) == said


def test_exactly_as_far_as_that_matters() -> None:
    assert [duration(seconds) for seconds in (0.1234, 59.4, 200, 7500)] == [
        "0.123 s",
        "59.4 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert duration(None) == duration(math.nan) == NOTHING
