"""A run that hangs is ended, and the rank that keeps the others waiting is named, with its stack."""

from __future__ import annotations

import re
import socket
import sys
import time
from pathlib import Path

import pytest

from launch.hangs import Heard, find_hang
from launch.pulse import Beat, describe, look
from launch.root_cause import read_cause
from tests.processes import launched

HERE = socket.gethostname()


def heard(seconds: float = 20.0, *, time: float = 100.0, host: str = "n1", **facts: object) -> Heard:
    given = {"update": 5, "phase": "in the training step", "where": "loop.py:1 in step", "waits": False}
    beat = Beat(**{**given, "asked_by_recipe": False, "seconds": seconds, **facts})  # type: ignore[arg-type]
    return Heard(host, beat, time)


WAITS = heard(waits=True)


def test_who_does_not_wait_keeps_the_others_waiting() -> None:
    hang = find_hang({0: WAITS, 1: heard(phase="reading data"), 2: WAITS}, 3, 101.0, 10.0)
    assert hang is not None
    assert (hang.rank, hang.silent, hang.waiting) == (1, False, 2)
    assert str(hang) == (
        "rank 1 (n1) hangs: for 21 s it has been where it is, after update 5, reading data, loop.py:1 in step; "
        "2 others wait for it"
    )


def test_nobody_hangs_while_one_moves_or_nobody_waits() -> None:
    assert find_hang({0: WAITS, 1: heard(3.0)}, 2, 101.0, 10.0) is None, "rank 1 moves"
    assert find_hang({0: heard(), 1: heard()}, 2, 101.0, 10.0) is None, "both compute"
    assert find_hang({0: WAITS}, 2, 101.0, 10.0) is None, "rank 1 has not told anything yet"
    assert find_hang({}, 0, 101.0, 10.0) is None, "all have left"


@pytest.mark.parametrize("facts", [{"update": 0}, {"phase": "saving"}, {"phase": "exporting"}])
def test_what_may_take_long_is_given_time(facts: dict[str, object]) -> None:
    others = heard(50.0, waits=True, **({"update": 0} if "update" in facts else {}))
    assert find_hang({0: others, 1: heard(50.0, **facts)}, 2, 100.0, 10.0) is None
    assert find_hang({0: others, 1: heard(50.0, **facts)}, 2, 110.0, 10.0) is not None


def test_silence_is_told_as_such_and_needs_no_more_time() -> None:
    hang = find_hang({0: WAITS, 1: heard(1.0, time=88.0, phase="saving")}, 2, 100.0, 10.0)
    assert hang is not None and hang.silent
    assert str(hang) == (
        "rank 1 (n1) has told nothing for 13 s, and was last seen after update 5, saving, loop.py:1 in step; "
        "1 other waits for it"
    )
    assert find_hang({0: WAITS, 1: heard(1.0, time=93.0)}, 2, 100.0, 10.0) is None, "a few beats may be late"


def test_of_those_that_wait_the_odd_one_is_named() -> None:
    asked = heard(waits=True, asked_by_recipe=True, where="mine.py:7 in loss")
    hang = find_hang({0: WAITS, 1: WAITS, 2: asked}, 3, 101.0, 10.0)
    assert hang is not None and hang.rank == 2, "the recipe's own exchange is the odd one"
    assert str(hang).endswith(
        ", mine.py:7 in loss, and waits there itself; elsewhere rank 0 (n1) and 1 more: loop.py:1 in step"
    )
    hang = find_hang({0: asked, 1: WAITS, 2: asked}, 3, 101.0, 10.0)
    assert hang is not None and hang.rank == 1, "it has skipped what all others are in"
    hang = find_hang({0: WAITS, 1: asked}, 2, 101.0, 10.0)
    assert hang is not None and hang.rank == 1, "of two, one too many rather than one too few"
    hang = find_hang({0: WAITS, 1: heard(waits=True, update=6)}, 2, 101.0, 10.0)
    assert hang is not None and hang.rank == 1, "who has skipped one is ahead"


def test_what_a_stack_means() -> None:
    torch = "/venv/lib/python3.11/site-packages/torch"
    ours = ("/src/launch/train.py", 1, "main"), ("/src/launch/engine/loop.py", 80, "step")
    computing = describe((*ours, (f"{torch}/nn/modules.py", 7, "forward")), 3, 1.0)
    assert (computing.phase, computing.waits, computing.stack) == ("in the training step", False, ())
    assert computing.where == "launch/engine/loop.py:80 in step"
    backward = describe((*ours, (f"{torch}/autograd/graph.py", 7, "_engine_run_backward")), 3, 9.0)
    assert backward.waits and not backward.asked_by_recipe
    assert backward.stack[-1] == "torch/autograd/graph.py:7 in _engine_run_backward"
    barrier = (f"{torch}/distributed/distributed_c10d.py", 7, "barrier")
    own = describe((*ours, ("/home/me/my_recipe.py", 12, "loss"), barrier), 3, 9.0)
    assert own.waits and own.asked_by_recipe and own.where == "home/me/my_recipe.py:12 in loss"
    gathers = (f"{torch}/nn/modules.py", 7, "forward"), ("/src/launch/engine/meters.py", 3, "await_exchange")
    waits = describe((*ours, ("/home/me/my_recipe.py", 12, "loss"), *gathers), 3, 9.0)
    assert waits.waits and waits.where == own.where, "not where waiting is counted"
    saving = describe((*ours, ("/src/launch/engine/keeping.py", 5, "save"), barrier), 3, 9.0)
    assert (saving.phase, saving.asked_by_recipe) == ("saving", False)


def test_a_stack_is_looked_at() -> None:
    frames = look(sys._getframe())
    assert frames[-1][0] == __file__ and frames[-1][2] == "test_a_stack_is_looked_at"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told", "in_stack"),
    [
        ("asleep", r"hangs: for \d+ s .*, in the training step, \S+/own_recipe.py:\d+ in fail", "in fail"),
        ("data", r"hangs: for \d+ s .*, reading data, \S+/own_recipe.py:\d+ in __getitem__", "in __getitem__"),
        ("saving", r"hangs: for \d+ s .*, saving, \S+/own_recipe.py:\d+ in <lambda>", "in <lambda>"),
        ("barrier", r"hangs: for \d+ s .*, in the training step, \S+/own_recipe.py:\d+ in fail", "in barrier"),
        ("holding_the_lock", r"has told nothing for \d+ s, and was last seen ", "in fail"),
        ("stopped", r"has told nothing for \d+ s, and was last seen ", "in fail"),
    ],
)
def test_the_rank_that_hangs_is_named_with_its_stack(how: str, told: str, in_stack: str, tmp_path: Path) -> None:
    recipe = Path(__file__).with_name("own_recipe.py")
    (tmp_path / "run.yaml").write_text(
        f"recipe: {recipe}\nrecipe_args: {{failing_rank: 1, failing_by: {how}}}\n"
        "eval: {at_start: false}\nsave: {every_steps: 3}\ntrain: {max_steps: 12, global_batch_size: 8}\n"
        "parallel: {devices: 2, device: cpu, hang_seconds: 3, timeout_seconds: 120}\n"
    )
    began = time.monotonic()
    with launched(tmp_path, "launch", "run", "run.yaml", "--out", "run") as launcher:
        assert launcher.end(110) == 1, launcher.said()
    assert time.monotonic() - began < 110, "before the exchange itself gives up"
    last = launcher.said().splitlines()[-40:]
    (line,) = [line for line in last if line.startswith("shoal: rank ")]
    assert re.match(rf"shoal: rank 1 \({HERE}\) {told}", line), last
    there = r"and waits there itself; elsewhere rank 0 \(.+\): launch/engine/\S+ in \S+"
    others = f", {there}" if how == "barrier" else "; 1 other waits for it"
    assert re.search(rf"{others}; log: {tmp_path}/run/logs/rank-1\.log$", line), line
    cause = read_cause(tmp_path / "run")
    assert cause is not None and cause.rank == 1 and in_stack in cause.traceback, launcher.said()


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_that_skips_an_exchange_is_named(tmp_path: Path) -> None:
    """gloo aborts another rank, to which more bytes come than it awaits; the others say a connection was closed."""
    recipe = Path(__file__).with_name("own_recipe.py")
    (tmp_path / "run.yaml").write_text(
        f"recipe: {recipe}\nrecipe_args: {{failing_rank: 1, failing_by: skipping}}\n"
        "eval: {at_start: false}\nsave: {every_steps: 3}\ntrain: {max_steps: 12, global_batch_size: 12}\n"
        "parallel: {devices: 3, device: cpu, hang_seconds: 3, timeout_seconds: 120}\n"
    )
    with launched(tmp_path, "launch", "run", "run.yaml", "--out", "run") as launcher:
        assert launcher.end(110) == 1, launcher.said()
    (line,) = [line for line in launcher.said().splitlines()[-15:] if line.startswith("shoal: rank ")]
    told = r"was in another exchange than the others, in launch/engine/updating\.py:\d+ in backward; rank 0, 2 in"
    where = r"\S+own_recipe\.py:\d+ in loss; after update \d; log: \S+rank-1\.log"
    assert re.fullmatch(rf"shoal: rank 1 \({HERE}\) {told} {where}", line), line
