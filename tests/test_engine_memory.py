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
    began = time.process_time()
    while time.process_time() - began < 0.1:
        pass
    assert load.read()["cpu_percent"] > 20, "other processes may have the core for most of it"
    time.sleep(0.3)
    assert load.read()["cpu_percent"] < 50
