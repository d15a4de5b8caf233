from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch
import torch.distributed as dist

from launch.engine import meters
from launch.engine.meters import PHASES, Clock, Meter, Reading
from tests.gloo import run_ranks


class Hands:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    found = Hands()
    monkeypatch.setattr(meters, "time", found)
    return found


def spent(reading: Reading) -> dict[str, float]:
    return {phase: seconds for phase, seconds in reading.seconds.items() if seconds}


def test_each_second_belongs_to_one_phase(hands: Hands) -> None:
    clock = Clock()
    meter = Meter(clock)
    hands.now += 1
    with clock.phase("compute"):
        hands.now += 2
        with clock.phase("sync"):
            hands.now += 4
        hands.now += 8
        with contextlib.suppress(KeyError), clock.phase("data"):
            hands.now += 16
            raise KeyError
        hands.now += 32
        assert spent(meter.read()) == {"other": 1, "compute": 42, "sync": 4, "data": 16}, "also in the midst of one"
        hands.now += 64
    hands.now += 128
    assert spent(meter.read()) == {"compute": 64, "other": 128}
    assert meter.totals() == {**dict.fromkeys(PHASES, 0), "other": 129, "compute": 106, "sync": 4, "data": 16}


def test_tokens_per_second_between_readings_without_saves_and_evaluations(hands: Hands) -> None:
    clock = Clock()
    meter = Meter(clock)
    hands.now += 2
    meter.add(300)
    meter.add(100)
    assert meter.read().tokens_per_second == 200
    hands.now += 1
    for phase in ("save", "evaluate"):
        with clock.phase(phase):
            hands.now += 1000
    hands.now += 1
    meter.add(50)
    assert meter.read().tokens_per_second == 25
    assert meter.tokens == 450


def test_a_resumed_run_counts_on(hands: Hands) -> None:
    meter = Meter(Clock())
    meter.resume(7000, {"compute": 30.0, "save": 2.0})
    hands.now += 5
    meter.add(50)
    assert meter.read().tokens_per_second == 10
    assert meter.tokens == 7050
    assert meter.totals() == {**dict.fromkeys(PHASES, 0), "compute": 30, "save": 2, "other": 5}


def busy(seconds: float) -> None:
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass


@pytest.mark.parametrize("forward", [False, True])
def test_only_outside_of_a_forward_pass_is_whatever_a_thread_is_blocked_in_waiting_for_others(forward: bool) -> None:
    clock = Clock("cpu", ranks=2)
    gone = threading.Event()
    with clock.forward(gathers=True) if forward else clock.computing():
        busy(0.2)
        gone.wait(0.3)
    spent = clock.read()
    assert spent["sync"] == pytest.approx(0.0 if forward else 0.3, abs=0.03)
    assert spent["compute"] >= 0.2, "also while the thread waits for a core"
    assert spent["compute"] - 0.3 * forward < 0.2 + 30 * 0.2, "and not much more"


def spent_in_exchanges(asynchronous: bool) -> dict[str, float]:
    """Of a forward pass with two exchanges, to which rank 1 comes late, and a second thread that waits for another."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    aside = dist.new_group()
    clock, tensor = Clock("cpu", ranks=2), torch.ones(2)
    dist.barrier()
    with clock.forward(gathers=True):
        other = threading.Thread(target=dist.all_reduce, args=(torch.ones(1),), kwargs={"group": aside})
        if rank == 0:
            other.start()
        for _ in range(2):
            time.sleep(0.3 * rank)
            work = dist.all_gather_into_tensor(torch.empty(4), tensor, async_op=asynchronous)
            if asynchronous:
                work.wait()
        if rank == 1:
            other.start()
        other.join()
    return clock.read()


@pytest.mark.dist
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_forward_pass_waits_for_others_in_its_exchanges_alone(asynchronous: bool) -> None:
    first, late = run_ranks(2, spent_in_exchanges, asynchronous)
    assert 0.5 < first["sync"] < 1.1, "once, though two of its threads wait"
    assert first["compute"] < 0.3
    assert late["compute"] >= 0.6, "sleeping is its own"
    assert late["sync"] < 0.3


def test_a_process_on_its_own_waits_for_nobody() -> None:
    clock = Clock()
    with clock.computing():
        threading.Event().wait(0.05)
    assert clock.read()["sync"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is where there is no GPU that waiting for one is an error")
def test_a_gpu_on_its_own_is_not_waited_for_where_others_would_be() -> None:
    clock = Clock("cuda", ranks=1)
    with clock.forward(gathers=False):
        pass
    with clock.exchange():
        threading.Event().wait(0.02)
    assert clock.read()["compute"] >= 0.02 and clock.own_compute() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_later_and_is_timed_by_itself() -> None:
    clock = Clock("cuda", ranks=2)
    matrix = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        with clock.forward(gathers=False):
            for _ in range(50):
                matrix @ matrix
        with clock.exchange():
            pass
    spent = clock.read()
    assert clock.own_compute() > 0.01
    assert spent["other"] + spent["compute"] >= 0.9 * clock.own_compute(), "it is waited for outside of the exchange"
    assert spent["sync"] < 0.01
