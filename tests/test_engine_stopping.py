from __future__ import annotations

import math

import pytest

from launch.engine.stopping import EarlyStopping


def stopped_at(losses: list[float], patience: int | None, min_delta: float = 0.0) -> int | None:
    """Position, counted from 0, of the evaluation that stops the run; None: none does."""
    stopping = EarlyStopping(patience, min_delta)
    return next((position for position, loss in enumerate(losses) if stopping.judge(loss).stop), None)


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "expected"),
    [
        ([3, 2, 1], 1, 0.0, None),
        ([3, 3], 1, 0.0, 1),
        ([3, 4], 1, 0.0, 1),
        ([3, 4, 4, 4], 3, 0.0, 3),
        ([3, 4, 2, 4, 4], 2, 0.0, 4),
        ([3, 4, 3.5, 3.2], 3, 0.0, 3),  # better than the last, not than the best
        ([3, 2.95, 2.85], 2, 0.1, None),  # the third is better than the first by more than 0.1
        ([3, 2.95, 2.95], 2, 0.1, 2),
        ([3, 4, 4, 4, 4], None, 0.0, None),
        ([math.nan, math.nan], 2, 0.0, 1),
        ([3, math.nan, 2], 2, 0.0, None),
    ],
)
def test_where_it_stops(losses: list[float], patience: int | None, min_delta: float, expected: int | None) -> None:
    assert stopped_at(losses, patience, min_delta) == expected


def test_the_lowest_loss_is_the_best_however_little_lower_and_of_equals_the_first() -> None:
    stopping = EarlyStopping(None, 0.5)
    assert [stopping.judge(loss).best for loss in (3.0, 2.8, 2.8, math.nan, 2.4, 5.0)] == [
        *(True, True, False, False, True, False)
    ]
    assert stopping.best == 2.4


def test_the_highest_value_is_the_best_where_that_is_so() -> None:
    stopping = EarlyStopping(2, 0.0, highest=True)
    assert [stopping.judge(value).best for value in (0.3, 0.5, 0.5)] == [True, True, False]
    resumed = EarlyStopping(2, 0.0, highest=True)
    resumed.restore(stopping.state())
    judged = resumed.judge(0.4)
    assert (judged.best, judged.stop) == (False, True)
    assert resumed.judge(0.6).best
