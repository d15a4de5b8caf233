"""Signals in training: all ranks stop at the same update, with one whole checkpoint and no process left."""

from __future__ import annotations

import itertools
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoints import damage, listed
from launch.errors import INTERRUPTED, PREEMPTED
from tests.processes import Launcher, launched

RECIPE = str(Path(__file__).with_name("own_recipe.py"))
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


def command(folder: Path, *overrides: str) -> tuple[str, ...]:
    """A run that takes minutes if nobody stops it."""
    (folder / "run.yaml").write_text(
        f"recipe: {RECIPE}\nrecipe_args: {{seconds_per_batch: 0.2}}\ntrain: {{max_steps: 400, global_batch_size: 8}}\n"
    )
    return ("launch", "run", "run.yaml", *overrides, "--out", "run")


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "run/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def assert_stopped(launcher: Launcher, folder: Path, code: int, number: signal.Signals) -> int:
    """The update it has stopped after, which everything that is left agrees on."""
    assert code == (INTERRUPTED if number == signal.SIGINT else PREEMPTED), launcher.said()
    told = json.loads((folder / "run/stopped.json").read_text())
    newest, *_ = listed(folder / "run")
    assert damage(newest) is None
    assert told["checkpoint"] == f"checkpoints/{newest.name}" == f"checkpoints/step-{told['update']:06d}"
    assert records(folder, "train")[-1]["update"] == told["update"], "nothing is done after it, and nothing is lost"
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert launcher.said().splitlines()[-1] == (
        f"shoal: stopped by {name} after update {told['update']}; checkpoint {told['checkpoint']}; "
        f"go on with: shoal resume {folder / 'run'}"
    )
    assert "Traceback" not in launcher.said()
    assert not [*(folder / "run").glob("failure-*.json")] and not (folder / "run/result.json").exists()
    update: int = told["update"]
    return update


# Each signal, each kind of receiver, one and two processes, without trying all 30 combinations.
DURING_A_STEP = [
    (1 + number % 2, SIGNALS[number], ("launcher", "one rank", "all processes")[to])
    for number, to in itertools.product(range(5), range(3))
    if (number + to) % 2
]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "number", "to"), DURING_A_STEP, ids=str)
def test_during_a_step(ranks: int, number: signal.Signals, to: str, tmp_path: Path) -> None:
    with launched(tmp_path, *command(tmp_path, f"parallel.devices={ranks}")) as launcher:
        launcher.until(lambda: len(records(tmp_path, "train")) >= 2)
        launcher.signal(number, to)
        code = launcher.end()
    assert 2 <= assert_stopped(launcher, tmp_path, code, number) <= 10


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "all processes"])
def test_with_data_workers(to: str, tmp_path: Path) -> None:
    with launched(tmp_path, *command(tmp_path, "parallel.devices=2", "parallel.data_workers=1")) as launcher:
        launcher.until(lambda: len(records(tmp_path, "train")) >= 2)
        launcher.signal(signal.SIGTERM, to)
        code = launcher.end()
    assert_stopped(launcher, tmp_path, code, signal.SIGTERM)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "all processes"])
def test_during_the_first_batch(to: str, tmp_path: Path) -> None:
    """The first forward pass is under way: the update is done and saved."""
    slow = ("recipe_args.seconds_per_batch=4", "eval.at_start=false")
    with launched(tmp_path, *command(tmp_path, "parallel.devices=2", *slow)) as launcher:
        launcher.until(lambda: (tmp_path / "run/metrics.jsonl").exists() or "0/400" in launcher.said())
        time.sleep(1)
        launcher.signal(signal.SIGUSR1, to)
        code = launcher.end()
    assert assert_stopped(launcher, tmp_path, code, signal.SIGUSR1) <= 2


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("to", ["one rank", "all processes"])
def test_during_an_evaluation(to: str, tmp_path: Path) -> None:
    """Two passes of half a second each, after every update."""
    often = ("eval.every_steps=1", "eval.batch_size=1", "recipe_args.seconds_per_batch=0.5")
    with launched(tmp_path, *command(tmp_path, "parallel.devices=2", *often)) as launcher:
        launcher.until(lambda: len(records(tmp_path, "train")) == 1 + len(records(tmp_path, "eval")[1:]) == 2)
        launcher.signal(signal.SIGTERM, to)
        code = launcher.end()
    assert 2 <= assert_stopped(launcher, tmp_path, code, signal.SIGTERM) <= 3


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "switch"),
    [
        ("launcher", "save.asynchronous=true"),
        ("one rank", "save.asynchronous=false"),
        ("all processes", "save.asynchronous=true"),
    ],
)
def test_during_a_save(to: str, switch: str, tmp_path: Path) -> None:
    """A model of 100 MB and more that is saved after every update, so that it is being written most of the time."""
    saving = ("save.every_steps=1", "save.keep_last=2", "recipe_args.width=2048", "recipe_args.seconds_per_batch=0.01")
    with launched(tmp_path, *command(tmp_path, "parallel.devices=2", switch, *saving)) as launcher:
        launcher.until(lambda: listed(tmp_path / "run"), 120)
        launcher.until(lambda: [*(tmp_path / "run/checkpoints").glob("*.writing")])
        launcher.signal(signal.SIGTERM, to)
        code = launcher.end(180)
    assert_stopped(launcher, tmp_path, code, signal.SIGTERM)
    assert not [*(tmp_path / "run/checkpoints").glob("*.writing")]


@pytest.mark.dist
@pytest.mark.slow
def test_a_restart_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    """Each start dies after some updates; every one begins where the checkpoints end, and the run is completed."""
    dying = ("recipe_args.dying_rank=1", "recipe_args.dying_after=8", "recipe_args.seconds_per_batch=0")
    saving = ("save.every_steps=2", "train.max_steps=10", "eval.at_start=false", "parallel.max_restarts=1")
    with launched(tmp_path, *command(tmp_path, "parallel.devices=2", *dying, *saving)) as launcher:
        code = launcher.end(240)
    assert code == 0, launcher.said()
    assert "; restart 1 of 1 from update " in launcher.said()
    assert [record["update"] for record in records(tmp_path, "train")] == list(range(1, 11))


@pytest.mark.dist
@pytest.mark.slow
def test_a_crash_says_how_to_go_on(tmp_path: Path) -> None:
    dying = ("recipe_args.dying_rank=1", "recipe_args.dying_after=12", "recipe_args.seconds_per_batch=0")
    with launched(tmp_path, *command(tmp_path, "parallel.devices=2", "save.every_steps=2", *dying)) as launcher:
        assert launcher.end(120) == 1
    newest, *_ = listed(tmp_path / "run")
    update = int(newest.name.removeprefix("step-"))
    assert launcher.said().splitlines()[-1] == (
        f"shoal: go on from update {update} with: shoal resume {tmp_path / 'run'}"
    )
