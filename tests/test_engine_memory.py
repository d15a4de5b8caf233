"""What a rank tells of its share of the machine is what others see of it."""

from __future__ import annotations

import time

import psutil
import pytest
import torch

from launch.engine.memory import Load


def test_memory_is_what_psutil_says_of_the_process() -> None:
    load = Load(torch.device("cpu"))
    held = torch.ones(50_000_000)
    assert load.read()["memory_bytes"] == pytest.approx(psutil.Process().memory_info().rss, abs=20e6)
    assert held[-1] == 1
    del held


def test_cores_in_use_are_told_of_the_time_since_the_last_reading() -> None:
    load = Load(torch.device("cpu"))
    for busy in (0.1, 0.0):
        began, spent = time.monotonic(), time.process_time()
        while time.process_time() - spent < busy:
            pass
        time.sleep(0.3)
        told = load.read()["cpu_percent"]
        known = 100 * (time.process_time() - spent) / (time.monotonic() - began)
        assert told == pytest.approx(known, rel=0.1, abs=3)
    assert known < 15, "it slept"
