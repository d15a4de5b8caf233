"""Preparation by real commands: each sample once, whoever waits, and never half a cache, whoever dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.plan import python_environment
from tests.commands import shoal
from tests.counting_recipe import SIZES

RECIPE = Path(__file__).with_name("counting_recipe.py")
ALL = {f"{split} {number}": 1 for split, size in SIZES.items() for number in range(size)}


class Place:
    """A folder with a run file, a cache, and notes of what was prepared."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache, self.notes = folder, folder / "cache", folder / "notes.txt"
        self.file = folder / "run.yaml"
        self.file.write_text(
            f"recipe: {RECIPE}\nrecipe_args: {{notes: {self.notes}}}\n"
            "train: {max_steps: 2, global_batch_size: 8}\nsave: {export: false}\n"
        )

    def prepared(self) -> dict[str, int]:
        """How often each sample was."""
        return dict(Counter(line.partition(" ")[2] for line in self.lines()))

    def lines(self) -> list[str]:
        return self.notes.read_text().splitlines() if self.notes.exists() else []

    def kept(self) -> list[str]:
        """What would be loaded, or was left lying about."""
        names = [path.name for path in self.cache.iterdir()] if self.cache.exists() else []
        return sorted(name.partition("-")[0] for name in names if not name.endswith((".lock", ".builder")))

    def shoal(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return shoal(self.folder, verb, str(self.file), *arguments)

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env={**os.environ, **python_environment(), "SHOAL_CACHE": str(self.cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.lines()
            time.sleep(0.01)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- shoal prepare ---------------------------------------------------------------------------------------


def test_preparing_needs_none_of_the_devices_and_is_done_once(place: Place) -> None:
    elsewhere = ["parallel.device=cuda", "parallel.devices=8", "parallel.nodes=4", "train.global_batch_size=7"]
    first = place.shoal("prepare", *elsewhere, "--json")
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    assert found["samples"] == SIZES
    assert found["cache"] == str(place.cache)
    assert found["prepared"] == found["folders"]
    assert sorted(Path(folder).name for folder in found["folders"]) == sorted(
        path.name for path in place.cache.iterdir() if path.suffix != ".lock"
    )
    assert "preparing " in first.stderr
    assert place.prepared() == ALL

    second = place.shoal("prepare", *elsewhere)
    assert second.returncode == 0, second.stderr
    train, validation, cache, prepared = second.stdout.splitlines()
    assert (train, validation) == ("training samples: 16", "validation samples: 4")
    assert cache == f"cache: {place.cache}"
    assert prepared == f"prepared: nothing, all was there: {', '.join(found['folders'])}"
    assert place.prepared() == ALL
    assert sorted(path.name for path in place.folder.iterdir()) == ["cache", "notes.txt", "run.yaml"], "no run folder"


def test_a_recipe_that_keeps_nothing_says_so_and_streams_have_no_size(tmp_path: Path) -> None:
    own = RECIPE.with_name("own_recipe.py")
    (tmp_path / "run.yaml").write_text(f"recipe: {own}\nrecipe_args: {{stream: true}}\ntrain: {{max_steps: 1}}\n")
    done = shoal(tmp_path, "prepare", "run.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "training samples: a stream\nvalidation samples: a stream\n"
        f"cache: {tmp_path}/cache\nprepared: nothing to keep: {own} uses no cache\n"
    )
    done = shoal(tmp_path, "prepare", "run.yaml", "--json")
    assert json.loads(done.stdout)["samples"] == {"train": None, "validation": None}


@pytest.mark.parametrize(
    ("stated", "exit_code", "last"),
    [
        (
            ["train.max_step=3"],
            2,
            "shoal: command line: train.max_step = 3: unknown key; did you mean train.max_steps?",
        ),
        (["recipe_args.width=0"], 2, "shoal: command line: recipe_args.width = 0: must be greater than or equal to 1"),
        (["recipe_args.breaks_at=1", "recipe_args.refused=true"], 3, "shoal: sample 1: is not to be had; leave it out"),
        (["recipe_args.breaks_at=1"], 1, "ValueError: sample 1 is odd"),
    ],
)
def test_what_goes_wrong_is_told_as_everywhere(place: Place, stated: list[str], exit_code: int, last: str) -> None:
    done = place.shoal("prepare", *stated)
    assert done.returncode == exit_code
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == last
    assert ("Traceback" in done.stderr) == (exit_code == 1)
    assert place.kept() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "number", "exit_code", "last"),
    [
        (9, signal.SIGINT, 130, "shoal: stopped by Ctrl-C; what was not finished is not kept"),
        (18, signal.SIGTERM, 75, "shoal: stopped by SIGTERM; what was not finished is not kept"),
        (9, signal.SIGKILL, -9, None),
    ],
    ids=["INT", "TERM", "KILL"],
)
def test_stopped_at_any_moment_no_half_cache_is_left_and_the_next_one_is_whole(
    place: Place, when: int, number: int, exit_code: int, last: str | None
) -> None:
    preparing = place.start("launch", "prepare", str(place.file), "recipe_args.seconds=4")
    place.wait_for(lambda: len(place.lines()) >= when)
    preparing.send_signal(number)
    _, stderr = preparing.communicate(timeout=30)
    assert preparing.returncode == exit_code
    whole = ["train"] if when > SIZES["train"] else []
    if last:
        assert stderr.splitlines()[-1] == last
        assert "Traceback" not in stderr
        assert place.kept() == whole
    else:
        assert [name for name in place.kept() if not list(place.cache.glob(f"{name}-*.building"))] == whole
    done = place.shoal("prepare", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == SIZES
    assert place.kept() == ["train", "validation"]


# --- ranks -----------------------------------------------------------------------------------------------

LONGER_THAN_THE_TIMEOUT = ["recipe_args.seconds=6", "parallel.timeout_seconds=2.5"]


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_prepare_each_sample_once_for_longer_than_an_exchange_may_take(place: Place) -> None:
    stated = [*LONGER_THAN_THE_TIMEOUT, "parallel.devices=2"]
    run = place.shoal("run", *stated, "--out", "one")
    assert run.returncode == 0, run.stderr
    assert place.prepared() == ALL
    run = place.shoal("run", *stated, "--out", "two")
    assert run.returncode == 0, run.stderr
    assert place.prepared() == ALL, "the second launch prepares nothing"


def two_nodes(place: Place, *stated: str) -> list[subprocess.Popen[str]]:
    """Two launchers on this machine, as on two nodes that share the cache, with two ranks each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-id=one"]
    launcher.append(f"--rdzv-endpoint=127.0.0.1:{port}")
    run = ["-m", "launch.train", str(place.file), "parallel.device=cpu", *stated, "--out", str(place.folder / "run")]
    return [place.start(*launcher, *run) for _ in range(2)]


@pytest.mark.dist
@pytest.mark.slow
def test_so_do_two_nodes_with_two_ranks_each(place: Place) -> None:
    nodes = two_nodes(place, *LONGER_THAN_THE_TIMEOUT)
    said = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert place.prepared() == ALL
    assert json.loads((place.folder / "run/plan.json").read_text())["plan"]["processes"]["nodes"] == 2
    assert len({line.split()[0] for line in place.lines()}) <= len(SIZES), "one process fills a folder"


def seconds_since_the_last_sample(place: Place) -> float:
    return time.time() - place.notes.stat().st_mtime


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("refused", [False, True])
def test_a_crash_reaches_all_ranks_in_five_seconds(place: Place, refused: bool) -> None:
    crash = ["recipe_args.seconds=4", "recipe_args.breaks_at=15", f"recipe_args.refused={str(refused).lower()}"]
    run = place.shoal("run", *crash, "parallel.devices=2", "--out", "run")
    assert seconds_since_the_last_sample(place) < 5
    if refused:
        assert run.returncode == 3, run.stderr
        assert run.stderr.splitlines()[-1] == "shoal: sample 15: is not to be had; leave it out"
        assert "Traceback" not in run.stderr
    else:
        assert run.returncode == 1
        assert 'counting_recipe.py", line ' in run.stderr
        assert "ValueError: sample 15 is odd" in "\n".join(run.stderr.splitlines()[-4:])
    assert set(place.prepared().values()) == {1}, "nobody tries again what took so long"
    assert place.kept() == []


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("refused", [False, True])
def test_a_crash_reaches_the_other_node_too(place: Place, refused: bool) -> None:
    crash = ["recipe_args.seconds=12", "recipe_args.breaks_at=15", f"recipe_args.refused={str(refused).lower()}"]
    nodes = two_nodes(place, *crash)
    place.wait_for(lambda: len(place.lines()) == 16, 120)
    began = time.monotonic()
    said = [node.communicate(timeout=60) for node in nodes]
    assert time.monotonic() - began < 5
    assert all(node.returncode for node in nodes)
    if refused:  # a message for the user is told by rank 0 alone
        assert [stderr.count("shoal: sample 15: is not to be had") for _, stderr in said].count(1) == 1
    else:
        for _, stderr in said:
            assert 'counting_recipe.py", line ' in stderr and "ValueError: sample 15 is odd" in stderr
    assert set(place.prepared().values()) == {1}
    assert place.kept() == []


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_goes_on_where_another_that_prepared_was_killed(place: Place) -> None:
    """A job that prepares is killed while a run waits for it: a rank takes over, and the others wait for that one."""
    preparing = place.start("launch", "prepare", str(place.file), "recipe_args.seconds=40")
    place.wait_for(lambda: len(place.lines()) >= 2)
    run = place.start("launch", "run", str(place.file), "parallel.devices=2", "--out", str(place.folder / "run"))
    said = ""
    assert run.stderr is not None
    while "waiting for another process" not in said:
        said = run.stderr.readline()
        assert said, "it ended without waiting"
    assert f"(pid {preparing.pid}, {socket.gethostname()}) to prepare {place.cache}/train-" in said
    preparing.kill()
    preparing.communicate()
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 0, stderr
    # By process, not by place in the file: the rank that takes over may note its first sample at once.
    written = [line.split(" ", 1) for line in place.lines()]
    assert Counter(sample for process, sample in written if process != str(preparing.pid)) == ALL
