"""The launcher and its workers: signals, restarts, what is left. Real processes; most workers only count updates."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import local
from launch.checkpoints import newest_complete
from launch.config import load
from launch.errors import RunFolderError
from launch.plan import make_plan
from launch.recipe import Preview
from launch.record import held
from launch.supervise import Place
from launch.topology import Machine, World
from tests.processes import Launcher, launched

RECIPE = str(Path(__file__).with_name("own_recipe.py"))


def run_own_recipe(folder: Path, *overrides: str) -> tuple[str, ...]:
    (folder / "run.yaml").write_text(f"recipe: {RECIPE}\ntrain: {{max_steps: 4, global_batch_size: 8}}\n")
    return ("launch", "run", "run.yaml", *overrides, "--out", "run")


def stopped(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "run/stopped.json").read_text())
    return content


# --- before there is anything to save --------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "number", "to"),
    [
        (1, signal.SIGTERM, "launcher"),
        (1, signal.SIGUSR1, "all processes"),
        (1, signal.SIGINT, "one rank"),
        (2, signal.SIGINT, "launcher"),
        (2, signal.SIGUSR2, "one rank"),
        (2, signal.SIGTERM, "all processes"),
        (2, signal.SIGHUP, "all processes"),
    ],
    ids=str,
)
def test_a_signal_during_preparation_ends_all_processes(
    ranks: int, number: signal.Signals, to: str, tmp_path: Path
) -> None:
    command = run_own_recipe(tmp_path, f"parallel.devices={ranks}", "recipe_args.seconds_to_prepare=60")
    with launched(tmp_path, *command) as launcher:
        launcher.until(lambda: "preparing" in launcher.said() and len(launcher.ranks()) == ranks)
        time.sleep(1 if ranks > 1 else 0)  # until the other one prepares as well
        launcher.signal(number, to)
        code = launcher.end(30)
    assert code == (130 if number == signal.SIGINT else 75), launcher.said()
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    last = launcher.said().splitlines()[-1]
    folder = tmp_path / "run"
    assert last == f"shoal: stopped by {name} before the first update; nothing was saved, the record is in {folder}"
    assert "Traceback" not in launcher.said()
    content = stopped(tmp_path)
    assert (content["signal"], content["update"], content["checkpoint"]) == (number.name, 0, None)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("when", ["at once", "with its ranks"])
def test_a_signal_while_processes_start_is_not_lost(ranks: int, when: str, tmp_path: Path) -> None:
    command = run_own_recipe(tmp_path, f"parallel.devices={ranks}", "recipe_args.seconds_to_prepare=60")
    with launched(tmp_path, *command) as launcher:
        log = tmp_path / "run/logs/launcher.log"
        launcher.until(lambda: log.exists() and len(launcher.ranks()) >= (ranks if when == "with its ranks" else 0))
        launcher.signal(signal.SIGUSR1)
        assert launcher.end(60) == 75, launcher.said()
    assert "stopped by SIGUSR1 before the first update" in launcher.said().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_worker_without_a_launcher_says_it_itself(number: signal.Signals, code: int, tmp_path: Path) -> None:
    run_own_recipe(tmp_path)
    with launched(tmp_path, "launch.train", "run.yaml", "recipe_args.seconds_to_prepare=60", "--out", "run") as worker:
        worker.until(lambda: "preparing" in worker.said())
        worker.signal(number)
        assert worker.end(30) == code
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert worker.said().splitlines()[-1] == f"shoal: stopped by {name} before the first update"
    assert not (tmp_path / "run").exists()


# --- workers that only count -----------------------------------------------------------------------------


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    """A launcher whose workers count already."""
    started: list[Launcher] = []

    def start(ranks: int, max_restarts: int = 0, **environment: str) -> Launcher:
        launcher = Launcher(tmp_path, "tests.stand_in", "run", str(ranks), str(max_restarts), **environment)
        started.append(launcher)
        launcher.until(lambda: len([*(tmp_path / "run").glob("working-*")]) == ranks)
        return launcher

    yield start
    for launcher in started:
        launcher.kill()


def assert_saved(launcher: Launcher, folder: Path, number: signal.Signals) -> None:
    content = stopped(folder)
    checkpoint = newest_complete(folder / "run")
    assert checkpoint is not None
    assert content["signal"] == number.name
    assert content["checkpoint"] == f"checkpoints/{checkpoint.name}" == f"checkpoints/step-{content['update']:06d}"
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert launcher.said().splitlines()[-1] == (
        f"stopped by {name} after update {content['update']}; checkpoint {content['checkpoint']}; "
        "go on with: shoal resume run"
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("to", ["launcher", "one rank", "all processes"])
def test_ranks_save_and_leave(
    number: signal.Signals, to: str, counting: Callable[..., Launcher], tmp_path: Path
) -> None:
    launcher = counting(2, SAVE_SECONDS="2")
    launcher.signal(number, to)
    assert launcher.end(30) == (130 if number == signal.SIGINT else 75), launcher.said()
    assert_saved(launcher, tmp_path, number)
    told = f"shoal: stopping: {number.name} received; the ranks save a checkpoint and leave"
    assert launcher.said().count(told) == (0 if to == "one rank" else 1)


@pytest.mark.slow
def test_a_signal_that_comes_many_times_changes_nothing(counting: Callable[..., Launcher], tmp_path: Path) -> None:
    launcher = counting(2, SAVE_SECONDS="12")
    for _ in range(4):  # and they need longer than the grace
        launcher.signal(signal.SIGTERM, "all processes")
        time.sleep(1)
    assert launcher.end(60) == 75, launcher.said()
    assert_saved(launcher, tmp_path, signal.SIGTERM)


@pytest.mark.slow
def test_a_ctrl_c_that_is_delivered_twice_is_one(counting: Callable[..., Launcher], tmp_path: Path) -> None:
    launcher = counting(1, SAVE_SECONDS="13")
    launcher.signal(signal.SIGINT)
    time.sleep(0.2)
    launcher.signal(signal.SIGINT)
    assert launcher.end(30) == 130
    assert_saved(launcher, tmp_path, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_ctrl_c_ends_all_without_saving(ranks: int, counting: Callable[..., Launcher], tmp_path: Path) -> None:
    launcher = counting(ranks, SAVE_SECONDS="300", CHILD="1")
    launcher.signal(signal.SIGINT)
    time.sleep(2)
    assert launcher.process.poll() is None, "it waits for the save"
    launcher.signal(signal.SIGINT)
    assert launcher.end(30) == 130, launcher.said()
    assert "stopped by Ctrl-C without saving; nothing was saved" in launcher.said().splitlines()[-1]
    assert newest_complete(tmp_path / "run") is None


@pytest.mark.slow
def test_ranks_save_when_the_launcher_is_killed(counting: Callable[..., Launcher], tmp_path: Path) -> None:
    launcher = counting(2, SAVE_SECONDS="1")
    launcher.process.kill()
    launcher.process.wait()
    until = time.monotonic() + 30
    while launcher.below() and time.monotonic() < until:
        time.sleep(0.1)
    assert launcher.below() == []
    assert stopped(tmp_path)["signal"] == "SIGTERM"
    assert newest_complete(tmp_path / "run") is not None


def test_what_goes_on_with_a_run_can_be_typed() -> None:
    assert Place([]).go_on(Path("runs/a {run}")) == "shoal resume 'runs/a {run}'"


def test_ranks_that_we_end_have_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even those that have to be killed, whenever it is looked at them."""
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.5)
    loaded = load(None, ["recipe=causal_lm", "parallel.devices=2"])
    plan = make_plan(loaded, Machine("here", 2, 0), World(), Preview(), tmp_path / "run")
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    plan = plan.model_copy(update={"command": (sys.executable, "-c", deaf)})
    (tmp_path / "run/logs").mkdir(parents=True)
    ranks = local.start(plan, tmp_path / "run", None, quiet=True)
    log, until = tmp_path / "run/logs/launcher.log", time.monotonic() + 30
    while log.stat().st_size < 2 and time.monotonic() < until:
        time.sleep(0.05)
    ranks.end()
    ranks.look()
    assert (ranks.left, ranks.ends) == (0, [])


# --- restarts --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_restarts_go_on_while_there_is_progress_and_each_says_why(
    counting: Callable[..., Launcher], tmp_path: Path
) -> None:
    """More crashes than allowed in a row, each after newer checkpoints; then a stop is no crash."""
    launcher = counting(2, 1, DYING_AFTER="2")
    launcher.until(lambda: launcher.said().count("; restart 1 of 1 from update ") == 3, 90)
    launcher.until(lambda: len(launcher.ranks()) == 2)
    launcher.signal(signal.SIGTERM)
    assert launcher.end(30) == 75, launcher.said()
    lines = [line for line in launcher.said().splitlines() if "; restart " in line]
    assert all(re.match(r"shoal: rank 1 \(.+\) was killed by SIGKILL.* in 1 s$", line) for line in lines)
    updates = [int(line.split("from update ")[1].split()[0]) for line in lines]
    assert updates == sorted(set(updates)) and updates[0] >= 2
    attempts = tmp_path / "run/attempts"
    assert sorted(path.name for path in attempts.iterdir()) == ["1", "2", "3"]
    assert all((attempts / name / "logs/launcher.log").exists() for name in "123")


@pytest.mark.dist
@pytest.mark.slow
def test_restarts_end_where_there_is_no_progress(tmp_path: Path) -> None:
    dying = ("recipe_args.dying_rank=1", "recipe_args.dying_after=1")
    command = run_own_recipe(tmp_path, "parallel.devices=2", "parallel.max_restarts=1", *dying)
    with launched(tmp_path, *command) as launcher:
        assert launcher.end(120) == 1
    lines = launcher.said().splitlines()
    assert lines[-1] == "shoal: crashed 2 times after update 0 without a newer checkpoint"
    assert re.match(r"shoal: rank 1 \(.+\) was killed by SIGKILL", lines[-2])
    (restart,) = (line for line in lines if "; restart " in line)
    assert restart.endswith("; restart 1 of 1 from update 0 in 1 s")
    assert [path.name for path in (tmp_path / "run/attempts").iterdir()] == ["1"]
    assert (tmp_path / "run/attempts/1/logs/rank-1.log").is_file()


@pytest.mark.slow
def test_a_signal_ends_the_wait_for_a_restart(counting: Callable[..., Launcher], tmp_path: Path) -> None:
    launcher = counting(1, 9, DYING_AFTER="1")
    launcher.until(lambda: "; restart 1 of 9" in launcher.said())
    launcher.signal(signal.SIGUSR1)
    assert launcher.end(10) == 75, launcher.said()
    assert "go on from update " in launcher.said().splitlines()[-1]
    assert not (tmp_path / "run/attempts").exists(), "nothing was started again"


@pytest.mark.dist
@pytest.mark.slow
def test_what_a_user_can_get_wrong_is_not_tried_again(tmp_path: Path) -> None:
    command = run_own_recipe(tmp_path, "parallel.max_restarts=3", "recipe_args.greedy_rank=0")
    with launched(tmp_path, *command) as launcher:
        assert launcher.end(60) == 9
    assert "restart" not in launcher.said()


# --- one launcher per run folder -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_launcher_is_refused_at_once(counting: Callable[..., Launcher], tmp_path: Path) -> None:
    first = counting(1)
    (tmp_path / "other").mkdir()
    with launched(tmp_path / "other", "tests.stand_in", str(tmp_path / "run"), "1", "0") as second:
        assert second.end(10) == 5
    run = tmp_path / "run"
    assert second.said().splitlines()[-1] == (
        f"{run}: another launcher works on it (and holds {run}/.lock); wait for its end, or stop it"
    )
    assert first.process.poll() is None
    first.signal(signal.SIGTERM)
    assert first.end() == 75


def test_the_folder_is_free_again_afterwards(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(RunFolderError, match="another launcher"), held(tmp_path):
        pass
    with held(tmp_path):
        pass
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(RunFolderError, match="cannot be written"), held(tmp_path / "none"):
            pass
