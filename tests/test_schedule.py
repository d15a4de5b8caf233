"""How many updates a run has and the learning rate of each, against closed forms computed another way."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launch.schedule import Schedule, total_updates, updates_per_epoch, warmup_updates

Kind = Literal["linear", "cosine", "constant"]
KINDS: tuple[Kind, ...] = ("linear", "cosine", "constant")

quick = settings(database=None, deadline=None, max_examples=100)


def rates(schedule: Schedule) -> list[float]:
    return [schedule.learning_rate(update) for update in range(1, schedule.total + 1)]


@st.composite
def schedules(draw: st.DrawFn, kinds: tuple[Kind, ...] = KINDS) -> Schedule:
    total = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, total))
    return Schedule(draw(st.sampled_from(kinds)), draw(st.floats(1e-8, 10.0)), warmup, total)


def by_hand(schedule: Schedule) -> list[float]:
    """The same rates, walked along the two straight lines (and the cosine) from the peak outwards."""
    start = max(schedule.warmup, 1)
    up = [Fraction(step, start) for step in range(1, start)]
    falling = schedule.total - start + 1
    left = [Fraction(falling - step, falling) for step in range(falling)]
    if schedule.kind == "constant":
        down = [1.0 for _ in left]
    elif schedule.kind == "linear":
        down = [float(share) for share in left]
    else:
        # cos²(x/2) = (1 + cos x) / 2
        down = [math.cos(math.pi / 2 * float(1 - share)) ** 2 for share in left]
    return [schedule.peak * float(share) for share in (*up, *down)]


@quick
@given(schedules())
def test_every_rate_is_the_one_computed_by_hand(schedule: Schedule) -> None:
    assert rates(schedule) == pytest.approx(by_hand(schedule), rel=1e-9, abs=schedule.peak * 1e-12)


@quick
@given(schedules())
def test_the_peak_is_reached_at_the_end_of_the_warm_up_and_nowhere_passed(schedule: Schedule) -> None:
    found = rates(schedule)
    assert schedule.learning_rate(max(schedule.warmup, 1)) == schedule.peak
    assert max(found) == schedule.peak
    assert min(found) > 0, "no update is spent at a rate of 0"


@quick
@given(schedules())
def test_up_to_the_peak_then_down_and_never_back(schedule: Schedule) -> None:
    found = rates(schedule)
    top = max(schedule.warmup, 1) - 1
    rising, falling = found[: top + 1], found[top:]
    assert all(one < next_ for one, next_ in itertools.pairwise(rising))
    if schedule.kind == "constant":
        assert set(falling) == {schedule.peak}
    else:
        assert all(one > next_ for one, next_ in itertools.pairwise(falling))


@quick
@given(schedules(kinds=("linear", "cosine")))
def test_zero_is_reached_one_update_after_the_last(schedule: Schedule) -> None:
    assert schedule.learning_rate(schedule.total + 1) == pytest.approx(0.0, abs=schedule.peak * 1e-12)


def test_three_small_schedules_in_full() -> None:
    assert rates(Schedule("linear", 1.0, 2, 5)) == [0.5, 1.0, 0.75, 0.5, 0.25]
    assert rates(Schedule("constant", 2.0, 4, 6)) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates(Schedule("cosine", 1.0, 0, 4)) == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_update_is_at_the_peak(kind: Kind) -> None:
    assert rates(Schedule(kind, 0.3, 0, 1)) == rates(Schedule(kind, 0.3, 1, 1)) == [0.3]


# --- how many updates ------------------------------------------------------------------------------------


@quick
@given(st.integers(0, 5000), st.integers(1, 300))
def test_updates_of_an_epoch_by_counting(samples: int, batch: int) -> None:
    assert updates_per_epoch(samples, batch) == len(range(0, samples, batch))


def test_max_steps_is_the_length_whatever_the_data() -> None:
    assert total_updates(0, 8, None, 20) == total_updates(10**9, 8, None, 20) == 20


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "updates"),
    [
        (100, 10, 1.0, 10),
        (101, 10, 1.0, 11),
        (101, 10, 2.0, 22),
        (100, 10, 0.5, 5),
        (100, 10, 0.51, 6),
        (100, 10, 0.001, 1),
        (100, 10, 2.5, 25),
        (3, 10, 1.0, 1),
        (3, 10, 4.0, 4),
    ],
)
def test_updates_of_epochs(samples: int, batch: int, epochs: float, updates: int) -> None:
    assert total_updates(samples, batch, epochs, None) == updates


@pytest.mark.parametrize("updates", [1, 7, 10, 100, 240, 1000])
def test_epochs_are_taken_as_the_decimal_that_is_written(updates: int) -> None:
    # 1.1 epochs of 100 updates are 110, though 1.1 * 100 is a little more in binary.
    wrong = {
        hundredths / 100: total_updates(updates * 8, 8, hundredths / 100, None)
        for hundredths in range(1, 500)
        if total_updates(updates * 8, 8, hundredths / 100, None) != math.ceil(Fraction(hundredths * updates, 100))
    }
    assert wrong == {}


@pytest.mark.parametrize("total", [1, 7, 10, 100, 240, 1000])
def test_a_warm_up_ratio_is_taken_as_the_decimal_that_is_written(total: int) -> None:
    # 0.29 of 100 updates are 29, though 0.29 * 100 is a little less in binary.
    wrong = {
        hundredths / 100: warmup_updates(total, hundredths / 100, None)
        for hundredths in range(100)
        if warmup_updates(total, hundredths / 100, None) != total * hundredths // 100
    }
    assert wrong == {}


@quick
@given(st.integers(1, 5000), st.floats(0, 1, exclude_max=True))
def test_a_warm_up_ratio_is_a_share_of_the_run(total: int, ratio: float) -> None:
    warmup = warmup_updates(total, ratio, None)
    assert 0 <= warmup <= total
    assert warmup == pytest.approx(ratio * total, abs=1.0)


@quick
@given(st.integers(1, 500), st.integers(0, 1000))
def test_warm_up_steps_are_at_most_the_run(total: int, steps: int) -> None:
    assert warmup_updates(total, None, steps) == sorted((steps, total))[0]


def test_no_warm_up_where_none_is_stated() -> None:
    assert warmup_updates(100, None, None) == warmup_updates(100, 0.0, None) == warmup_updates(100, None, 0) == 0


@quick
@given(schedules(), st.floats(1e-3, 1e3))
def test_rates_scale_with_the_peak(schedule: Schedule, factor: float) -> None:
    assume(schedule.peak * factor > 0)
    scaled = Schedule(schedule.kind, schedule.peak * factor, schedule.warmup, schedule.total)
    assert rates(scaled) == pytest.approx([rate * factor for rate in rates(schedule)], rel=1e-9)
