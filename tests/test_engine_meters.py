from __future__ import annotations

import contextlib

import pytest

from launch.engine import meters
from launch.engine.meters import Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_tokens_per_second_between_readings_without_the_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    meter = Throughput()
    clock.now += 2
    meter.add(300)
    meter.add(100)
    assert meter.read() == 200
    clock.now += 1
    with meter.paused():
        clock.now += 1000
    clock.now += 1
    meter.add(50)
    assert meter.read() == 25
    assert meter.tokens == 450
    meter.add(5)
    clock.now += 1
    with contextlib.suppress(KeyError), meter.paused():
        clock.now += 1000
        raise KeyError
    assert meter.read() == 5
