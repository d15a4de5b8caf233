"""What a worker does with the signals that ask it to stop, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.errors import EXIT_CODES
from launch.stop import SIGNALS, STOPPED, StopRequest, StopSignal, exit_code, ignore_signals, uncovered, write_stopped
from tests.commands import ROOT


def said_by(program: str) -> str:
    """What a fresh Python prints that has installed a request and then runs `program`."""
    head = """
import multiprocessing, os, signal, subprocess, sys, time
from launch.stop import *
stop = StopRequest()
stop.install()
"""
    done = subprocess.run(
        [sys.executable, "-c", head + program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_ends_a_preparation_and_later_ones_do_not_disturb_the_leaving(number: signal.Signals) -> None:
    program = f"""
try:
    try:
        os.kill(os.getpid(), {number})
        time.sleep(10)
    except Exception:
        print("kept by a recipe")
except StopSignal as stopped:
    for other in SIGNALS:
        os.kill(os.getpid(), other)
    time.sleep(0.1)
    print(stopped, stopped.number == stop.number == {number})
"""
    assert said_by(program) == f"{'Ctrl-C' if number == signal.SIGINT else number.name} True"


@pytest.mark.parametrize("wrapped", ["raise ImportError from stopped", "raise ImportError from None", "1 / 0"])
def test_a_signal_that_a_library_reports_as_an_error_of_its_own_is_still_that_signal(wrapped: str) -> None:
    program = f"""
try:
    with uncovered():
        try:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            except StopSignal as stopped:
                {wrapped}
        except Exception as error:
            raise ValueError("wrapped again") from error
except StopSignal as stopped:
    print(stopped, stopped.number == stop.number)
"""
    assert said_by(program) == "SIGTERM True"


LOSING = {
    "before a fork": "os.register_at_fork(before=arrives); child = os.fork()",
    "after a fork": "os.register_at_fork(after_in_parent=arrives); child = os.fork()",
    "a finalizer": "Fish = type('Fish', (), {'__del__': lambda fish: arrives()}); Fish()",
    "a weak reference": "fish = set(); watched = weakref.ref(fish, lambda gone: arrives()); del fish",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("where", LOSING)
def test_a_signal_that_arrives_where_nothing_can_be_raised_ends_a_preparation_all_the_same(
    where: str, number: signal.Signals
) -> None:
    program = f"""
import weakref
def arrives():
    os.kill(os.getpid(), {number})
    print("was not raised")
child = None
try:
    {LOSING[where]}
    if child == 0:
        os._exit(0)
    time.sleep(10)
except StopSignal as stopped:
    print(stopped.number == stop.number == {number})
"""
    assert said_by(program) == "True"


def test_whatever_else_could_not_be_raised_is_told_as_ever() -> None:
    program = """
told = []
sys.unraisablehook = told.append
StopRequest().install()
type('Fish', (), {'__del__': lambda fish: 1 / 0})()
print([type(each.exc_value).__name__ for each in told])
"""
    assert said_by(program) == "['ZeroDivisionError']"


def test_an_error_that_no_signal_is_behind_stays_as_it_is() -> None:
    first, second = ValueError("first"), KeyError("second")
    second.__cause__ = first
    with pytest.raises(KeyError) as raised, uncovered():
        raise second
    assert raised.value is second and second.__cause__ is first


def test_during_training_the_first_signal_is_remembered_and_nothing_else_happens() -> None:
    program = """
stop.immediate = False
assert stop.number is None and not stop.honoured
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    os.kill(os.getpid(), number)
time.sleep(0.1)
print(signal.Signals(stop.number).name)
"""
    assert said_by(program) == "SIGUSR1"


def test_a_child_of_a_preparation_is_ended_by_sigterm_and_by_no_other_signal() -> None:
    program = """
context = multiprocessing.get_context("fork")
for numbers in ([signal.SIGTERM], [signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP]):
    child = context.Process(target=time.sleep, args=(1,))
    child.start()
    time.sleep(0.5)  # Python forgets what arrives while it forks
    for number in numbers:
        os.kill(child.pid, number)
    child.join(10)
    print(child.exitcode, end=" ")
with context.Pool(2) as pool:
    print(pool.map(abs, [-1]), stop.number)
"""
    assert said_by(program) == "-15 0 [1] None"


def test_a_child_is_ended_that_has_hardly_been_forked() -> None:
    """As a pool does with its workers that is closed at once."""
    program = """
ended = []
for _ in range(50):
    child = os.fork()
    if not child:
        time.sleep(5)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print({*ended}, stop.number, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""
    assert said_by(program) == "{-15} None set()"


def test_a_data_worker_outlives_all_of_them() -> None:
    program = """
child = multiprocessing.get_context("fork").Process(target=lambda: (ignore_signals(0), time.sleep(1)))
child.start()
time.sleep(0.5)
for number in SIGNALS:
    os.kill(child.pid, number)
child.join(10)
print(child.exitcode)
"""
    assert said_by(program) == "0"


def test_nohup_is_respected() -> None:
    program = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
stop = StopRequest()
stop.install()
os.kill(os.getpid(), signal.SIGHUP)
print(stop.number)
"""
    assert said_by(program) == "None"


def test_what_is_written_down(tmp_path: Path) -> None:
    before = time.time()
    write_stopped(tmp_path, signal.SIGUSR2, 12, tmp_path / "checkpoints" / "step-000012")
    content = json.loads((tmp_path / STOPPED).read_text())
    assert before <= content.pop("time") <= time.time()
    assert content == {"signal": "SIGUSR2", "update": 12, "checkpoint": "checkpoints/step-000012"}
    write_stopped(tmp_path, signal.SIGINT, 0, None)
    assert json.loads((tmp_path / STOPPED).read_text())["checkpoint"] is None


def test_the_exit_codes_are_documented() -> None:
    codes = {number.name: exit_code(number) for number in SIGNALS}
    assert codes == {"SIGTERM": 75, "SIGINT": 130, "SIGUSR1": 75, "SIGUSR2": 75, "SIGHUP": 75}
    assert all(name in EXIT_CODES[75] for name in codes if name != "SIGINT")
    assert 143 not in EXIT_CODES


def test_the_signals_are_received_where_they_were_installed() -> None:
    """In this process, which also shows that the module needs no other one."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = StopRequest()
    try:
        stop.install()
        with pytest.raises(StopSignal) as raised:
            signal.raise_signal(signal.SIGUSR1)
        assert raised.value.number == signal.SIGUSR1
        ignore_signals()
        assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
