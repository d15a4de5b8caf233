"""Weights & Biases: its own package and service, offline and against a server of ours; nothing of it holds a run up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb

from launch.engine.tracking import Tracker
from launch.errors import ConfigError
from launch.explain import explain
from launch.plan import decide
from launch.processes import alive
from launch.record import create_run_folder, read_plan, write_json
from launch.source import shown
from launch.topology import World
from tests.commands import ROOT, shoal
from tests.processes import launched
from tests.test_full_disk import needs_mounts, private_mounts
from tests.wandb_server import WandbServer

RECIPE = str(Path(__file__).with_name("own_recipe.py"))
NAME = "Weights & Biases"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that wandb finds, and whose key it has."""
    server = WandbServer()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


@pytest.fixture
def said() -> list[str]:
    """What a user sees."""
    return []


def begin(folder: Path, *overrides: str) -> Path:
    """A run folder, in which nothing was recorded yet."""
    (folder / "run.yaml").write_text(f"recipe: {RECIPE}\ntrain: {{max_steps: 9, global_batch_size: 8}}\n")
    decided = decide(str(folder / "run.yaml"), ["track.project=sardines", *overrides], folder / "run", World())
    return create_run_folder(decided.plan)


def identity(run: Path) -> str:
    return str(json.loads((run / "wandb.json").read_text())["id"])


def offline(run: Path) -> list[dict[str, Any]]:
    """What the one run that lies there holds, as wandb's own command reads it."""
    (stored,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    inspect = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(stored)]
    shown = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in shown.splitlines()]


def rows(run: Path) -> list[dict[str, Any]]:
    history = [entry["history"]["item"] for entry in offline(run) if entry["type"] == "history"]
    assert all(row["_step"] == row["update"] for row in history)
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in history]


def services() -> list[psutil.Process]:
    """Of wandb, those that this process has brought about."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("wandb-core") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def followers() -> list[psutil.Process]:
    """Children of this process that follow a run; others may be there too, of other tests."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "launch.follow" in process.cmdline():
                found.append(process)
    return found


def until(what: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


# --- one run, whatever happens to those that follow it -----------------------------------------------------


@pytest.mark.slow
def test_it_holds_the_records_the_plan_and_the_examples(tmp_path: Path, said: list[str]) -> None:
    run = begin(tmp_path, "track.wandb=offline")
    tracker = Tracker(run, {}, ["wandb"], said.append)
    tracker.write("eval", 0, loss=2.5)
    tracker.keep_evaluation(0, {"loss": 2.5, "examples": [{"source": "x", "references": ["y"]}, {"source": "z"}]})
    tracker.write("train", 1, loss=2.25, learning_rate=1e-3, seconds={"data": 0.5})
    tracker.write("save", 1, folder="checkpoints/step-000001", seconds=0.5)
    tracker.close(60)
    first, second = rows(run)
    table = first.pop("eval/examples", None) or {name: first.pop(name) for name in list(first) if "examples" in name}
    assert "table-file" in json.dumps(table) and first == {"update": 0, "eval/loss": 2.5}
    assert second == {
        **{"update": 1, "train/loss": 2.25, "train/learning_rate": 1e-3},
        **{"train/seconds.data": 0.5, "save/seconds": 0.5},
    }
    (shown,) = (run / "wandb").glob("offline-run-*/files/media/table/eval/*.table.json")
    content = json.loads(shown.read_text())
    assert (content["columns"], content["data"]) == (["source", "references"], [["x", '["y"]'], ["z", None]])
    (kept,) = [entry["run"] for entry in offline(run) if entry["type"] == "run"]
    assert (kept["project"], kept["display_name"], kept["run_id"]) == ("sardines", "run", identity(run))
    config, plan = kept["config"]["update"], json.loads((run / "plan.json").read_text())
    assert config["train"] == plan["plan"]["config"]["train"] and config["plan"]["batch"] == plan["plan"]["batch"]
    assert {name: config[name] for name in ("git", "versions", "environment")} == {
        name: plan[name] for name in ("git", "versions", "environment")
    }
    assert said == [] and services() == []


def interrupted(run: Path, say: Callable[[str], None], *, killed: bool) -> None:
    """Nine updates in four attempts; after each but the last a checkpoint is older than what was recorded."""
    state: dict[str, Any] = {}
    for attempt, (first, last) in enumerate([(1, 4), (3, 6), (5, 8), (7, 9)]):
        tracker = Tracker(run, state, ["wandb"], say)
        if attempt:
            tracker.write("resume", first - 1, checkpoint="…")
        for update in range(first, last + 1):
            tracker.write("train", update, loss=update + attempt / 8)
            if update == first + 1:
                state = tracker.state()
        if attempt == 3:
            tracker.write("eval", last, loss=0.5)
            write_json(run / "result.json", {})
            tracker.close(60)
        elif killed and attempt == 1:
            for process in until(services) + followers():
                process.kill()
            tracker.close()
        else:
            tracker.close(60)


@pytest.mark.slow
def test_three_interruptions_offline_leave_one_run(tmp_path: Path, said: list[str]) -> None:
    run = begin(tmp_path, "track.wandb=offline")
    interrupted(run, said.append, killed=True)
    assert [row["update"] for row in rows(run)] == [*range(1, 10)]
    assert [row["train/loss"] for row in rows(run)] == [1, 2, 3.125, 4.125, 5.25, 6.25, 7.375, 8.375, 9.375]
    assert len(said) == 1 and said[0].endswith("(see logs/wandb.log); `shoal sync RUN` sends what is missing")


@pytest.mark.slow
def test_three_interruptions_online_leave_one_run(tmp_path: Path, said: list[str], server: WandbServer) -> None:
    run = begin(tmp_path, "track.wandb=online")
    interrupted(run, said.append, killed=True)
    assert list(server.lines) == [identity(run)]
    found = server.rows(identity(run))
    assert [(row["_step"], row["update"]) for row in found] == [(update, update) for update in range(1, 10)]
    assert found[-1]["eval/loss"] == 0.5, "what is recorded of the last update, in whichever attempt"
    assert server.exit_codes[-1] == 0 and list((run / "wandb").glob("run-*/*.wandb")) == []


@pytest.mark.slow
def test_the_last_update_of_an_attempt_may_still_be_evaluated_in_the_next(
    tmp_path: Path, said: list[str], server: WandbServer
) -> None:
    run = begin(tmp_path, "track.wandb=online", "track.artifacts=[export]")
    first = Tracker(run, {}, ["wandb"], said.append)
    for update in (1, 2):
        first.write("train", update, loss=update)
    first.close(60)
    assert [row["update"] for row in server.rows(identity(run))] == [1]
    shown = server.summaries[identity(run)]
    assert (shown["update"], shown["train/loss"]) == (2, 2), "its numbers are shown all the same"
    second = Tracker(run, first.state(), ["wandb"], said.append)
    second.write("eval", 2, loss=0.25)
    (run / "export").mkdir()
    (run / "export/config.json").write_text("{}")
    write_json(run / "result.json", {})
    assert server.artifacts == []
    second.close(60)
    last = server.rows(identity(run))[1]
    assert (last["update"], last["train/loss"], last["eval/loss"]) == (2, 2, 0.25) and said == []
    assert server.artifacts == [f"model/{identity(run)}-export"]


# --- what goes wrong ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["silent", "wrong key", "no key", "WANDB_MODE", "wandb offline"])
def test_without_a_server_the_run_goes_on_offline_with_one_line(
    trouble: str, tmp_path: Path, said: list[str], server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(tmp_path, "track.wandb=online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    url = server.url
    with contextlib.ExitStack() as stack:
        if trouble == "silent":
            url = stack.enter_context(black_hole())
        elif trouble in ("WANDB_MODE", "wandb offline"):
            told_to_stay(trouble, "offline", tmp_path, monkeypatch)
        elif trouble == "wrong key":
            server.key = "another"
        else:
            monkeypatch.delenv("WANDB_API_KEY")
        monkeypatch.setenv("WANDB_BASE_URL", url)
        tracker = Tracker(run, {}, ["wandb"], said.append)
        for update in range(1, 51):
            tracker.write("train", update, loss=update)
        tracker.close(60)
    expected = {
        "silent": f"cannot reach {url}: no answer",
        "wrong key": f"{url} refuses the key that it is given; try `wandb login`",
        "no key": "No API key configured",
        "WANDB_MODE": "offline by WANDB_MODE or `wandb offline`",
        "wandb offline": "offline by WANDB_MODE or `wandb offline`",
    }[trouble]
    (line,) = said
    assert line.startswith(f"{NAME}: {expected}")
    assert line.endswith("; the run goes on offline, and `shoal sync RUN` sends it later")
    assert [row["update"] for row in rows(run)] == [*range(1, 51)]
    assert server.lines == {} and services() == []


def told_to_stay(how: str, mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "WANDB_MODE":
        monkeypatch.setenv(how, mode)
    else:
        monkeypatch.chdir(folder)
        subprocess.run([str(Path(sys.executable).with_name("wandb")), mode], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["WANDB_MODE", "wandb disabled"])
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_where_it_is_disabled_nothing_is_kept_or_sent(
    how: str, mode: str, tmp_path: Path, said: list[str], server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(tmp_path, f"track.wandb={mode}")
    told_to_stay(how, "disabled", tmp_path, monkeypatch)
    tracker = Tracker(run, {}, ["wandb"], said.append)
    tracker.write("train", 1, loss=1)
    tracker.close(60)
    assert said == [f"{NAME}: disabled by WANDB_MODE or `wandb disabled`; `shoal sync RUN` sends what is missing"]
    assert server.asked == [] and not (run / "wandb").exists() and services() == []


def test_settings_that_it_does_not_take_are_told_in_a_line(tmp_path: Path) -> None:
    begin(tmp_path)
    done = shoal(tmp_path, "sync", "run", WANDB_MODE="onlin")
    assert done.returncode == 4
    assert done.stderr == (
        'shoal: wandb does not take its settings (WANDB_…, or its file): mode = "onlin": must be '
        "'online', 'offline', 'shared', 'disabled', 'dryrun' or 'run'\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stated", "told", "expected"),
    [
        (["track.entity=school"], "shoal", ["school"]),
        ([], "shoal", ["shoal"]),
        ([], "", [None, "fish"]),  # the key's owner, as the server says
    ],
)
def test_a_run_stays_with_the_team_under_which_it_was_begun(
    stated: list[str],
    told: str,
    expected: list[str | None],
    tmp_path: Path,
    said: list[str],
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = begin(tmp_path, "track.wandb=online", *stated)
    for entity in (told, "others"):
        monkeypatch.setenv("WANDB_ENTITY", entity)
        tracker = Tracker(run, {}, ["wandb"], said.append)
        tracker.write("train", 1, loss=1)
        tracker.close(60)
    assert [*dict.fromkeys(server.entities)] == expected
    assert said == []


@pytest.mark.slow
def test_a_killed_service_is_started_again_and_signals_are_for_ranks(tmp_path: Path, said: list[str]) -> None:
    run = begin(tmp_path, "track.wandb=offline")
    tracker = Tracker(run, {}, ["wandb"], said.append)
    for update in range(1, 4):
        tracker.write("train", update)
    (service,) = until(services)
    until(lambda: list((run / "wandb").glob("offline-run-*")))
    (follower,) = followers()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        follower.send_signal(number)
    service.kill()
    for update in range(4, 9):
        tracker.write("train", update)
    until(lambda: [each for each in services() if each != service])
    assert follower.is_running()
    tracker.close(60)
    assert [row["update"] for row in rows(run)] == [*range(1, 9)]
    assert len(said) == 1 and "it is started again" in said[0] and services() == []


@pytest.mark.slow
def test_a_server_that_stops_answering_is_left_behind_and_sync_sends_the_rest(
    tmp_path: Path, said: list[str], server: WandbServer
) -> None:
    run = begin(tmp_path, "track.wandb=online")
    tracker = Tracker(run, {}, ["wandb"], said.append)
    for update in range(1, 4):
        tracker.write("train", update)
    until(lambda: "UpsertBucket" in server.asked)
    server.answers.clear()  # before the rows are sent, which takes wandb some seconds
    for update in range(4, 9):
        tracker.write("train", update)
    tracker.close(1)
    assert len(said) == 1 and "had not sent all in time" in said[0] and "`shoal sync RUN`" in said[0]
    assert services() == followers() == []
    server.answers.set()
    write_json(run / "result.json", {})
    done = shoal(tmp_path, "sync", "run")
    assert done.returncode == 0, done.stderr
    assert [row["update"] for row in server.rows(identity(run))] == [*range(1, 9)]
    assert done.stdout.startswith("8 updates sent: http://")


@pytest.mark.slow
def test_a_killed_rank_leaves_nobody_behind_and_its_records_are_sent(tmp_path: Path) -> None:
    run = begin(tmp_path, "track.wandb=offline")
    program = (
        "import sys, time; from pathlib import Path; from launch.engine.tracking import Tracker\n"
        "tracker = Tracker(Path(sys.argv[1]), {}, ['wandb'])\n"
        "for update in range(5): tracker.write('train', update)\n"
        "time.sleep(300)"
    )
    rank = subprocess.Popen([sys.executable, "-c", program, str(run)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    family = until(lambda: services() and psutil.Process(rank.pid).children(recursive=True))
    rank.kill()
    rank.wait()
    until(lambda: not alive(family))
    assert [row["update"] for row in rows(run)] == [*range(5)]


FILLS_A_DISK = """
import json, os, sys, time
from pathlib import Path
from launch.engine.tracking import Tracker
from tests.wandb_server import WandbServer
server, run, said = WandbServer(), Path(sys.argv[1]) / "run", []
os.environ.update(server.environment)
(run / "logs").mkdir(parents=True)
track = {"wandb": "online", "project": "sardines", "artifacts": []}
(run / "plan.json").write_text(json.dumps({"plan": {"config": {"track": track}}}))
tracker = Tracker(run, {}, ["wandb"], said.append)
while "UpsertBucket" not in server.asked:
    time.sleep(0.05)
filler = run / "filler"
with filler.open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
os.truncate(filler, filler.stat().st_size - 100_000)
for update in range(1000):
    tracker.write("train", update, loss=update / 7, more=update / 9)
    time.sleep(0.002)
written = len((run / "metrics.jsonl").read_bytes().splitlines())
time.sleep(2)  # while it is full
filler.unlink()
(run / "result.json").write_text("{}")
tracker.close(60)
(sent,) = server.lines.values()
print(json.dumps({"written": written, "sent": [json.loads(line)["update"] for line in sent], "said": said}))
"""


@pytest.mark.slow
@needs_mounts
def test_a_full_disk_loses_no_update(tmp_path: Path) -> None:
    mounted = f'mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    done = subprocess.run(
        [*private_mounts(), "sh", "-c", mounted, FILLS_A_DISK],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["written"] < 1000, "the disk was full"
    assert found["sent"] == [*range(1000)] and found["said"] == []


@pytest.mark.slow
def test_sync_sends_a_run_that_was_offline_and_a_second_time_nothing(
    tmp_path: Path, said: list[str], server: WandbServer
) -> None:
    run = begin(tmp_path, "track.wandb=offline", "track.artifacts=[export, checkpoints]")
    (run / "export").mkdir()
    (run / "export/config.json").write_text("{}")
    tracker = Tracker(run, {}, ["wandb"], said.append)
    for update in range(1, 6):
        tracker.write("train", update, loss=update)
    write_json(run / "result.json", {})
    tracker.close(60)
    assert server.asked == []
    first = shoal(tmp_path, "sync", "run")
    assert first.stdout == f"5 updates sent: {server.url}/fish/sardines/runs/{identity(run)}\n", first.stderr
    sent = server.rows(identity(run))
    second = shoal(tmp_path, "sync", "run")
    assert second.stdout.startswith("nothing was missing: "), second.stderr
    assert server.rows(identity(run)) == sent
    assert [(row["_step"], row["train/loss"]) for row in sent] == [(update, update) for update in range(1, 6)]
    assert list(server.lines) == [identity(run)]
    (stored,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    assert stored.with_name(f"{stored.name}.synced").is_file(), "`wandb sync` leaves it out"


def test_sync_says_what_is_wrong(tmp_path: Path, server: WandbServer) -> None:
    run = begin(tmp_path)
    server.key = "another"
    refused = shoal(tmp_path, "sync", "run")
    told = f"shoal: {server.url} refuses the key that it is given; try `wandb login`\n"
    assert (refused.returncode, refused.stderr) == (4, told)
    with black_hole() as url:
        silent = shoal(tmp_path, "sync", "run", WANDB_BASE_URL=url)
    assert (silent.returncode, silent.stderr) == (4, f"shoal: cannot reach {url}: no answer\n")
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_that_are_stopped_and_resumed_without_a_network(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"recipe: {RECIPE}\nrecipe_args: {{seconds_per_batch: 0.3}}\nparallel: {{devices: 2}}\n"
        "train: {max_steps: 24, global_batch_size: 8}\nsave: {every_steps: 5, export: false}\n"
        "eval: {every_steps: 10}\ntrack: {wandb: online}\n"
    )
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "OMP_NUM_THREADS": "1"}
    run = tmp_path / "run"
    with launched(tmp_path, "launch", "run", "run.yaml", "--out", "run", **environment) as launcher:
        launcher.until(lambda: f"{NAME}: " in launcher.said() and '"update": 7' in (run / "metrics.jsonl").read_text())
        launcher.signal(signal.SIGTERM, "all processes")  # wandb's service too
        assert launcher.end() == 75, launcher.said()
        told = [line for line in launcher.said().splitlines() if line.startswith(f"{NAME}: ")]
        assert told == [
            f"{NAME}: cannot reach http://127.0.0.1:9: Connection refused; the run goes on offline, and "
            "`shoal sync RUN` sends it later"
        ]
    first = identity(run)
    done = shoal(tmp_path, "resume", "run", "track.wandb=offline", **environment)
    assert done.returncode == 0, done.stderr
    assert f"{NAME}: " not in done.stdout + done.stderr and identity(run) == first
    assert [row["update"] for row in rows(run)] == [*range(25)]
    assert [row["update"] for row in rows(run) if "eval/loss" in row] == [0, 10, 20, 24]
    assert len(list((run / "logs").glob("wandb*.log"))) == 1, "one process, beside rank 0"


# --- before anything starts --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["school/sardines", "a:b", "x" * 129])
def test_a_project_that_it_would_not_take_is_told_when_the_run_is_planned(name: str, tmp_path: Path) -> None:
    with pytest.raises(wandb.errors.UsageError):
        wandb.Settings(project=name)
    with pytest.raises(ConfigError) as caught:
        begin(tmp_path, f"track.project='{name}'", "track.wandb=offline")
    assert str(caught.value) == (
        f"command line: track.project = {shown(name)}: for Weights & Biases it has at most 128 characters, none of "
        "them / \\ # ? % or :; a team is stated by track.entity"
    )
    begin(tmp_path, f"track.project='{name}'", "track.also=[tensorboard]")


def test_the_plan_says_where_a_run_is_shown(tmp_path: Path) -> None:
    run = begin(
        tmp_path, "track.wandb=online", "track.also=[tensorboard]", "track.entity=school", "track.artifacts=[export]"
    )
    (line,) = [line for line in explain(read_plan(run)) if line.name == "shown in"]
    assert (line.value, line.because) == (
        "Weights & Biases (online), TensorBoard",
        "project sardines of school; sent too: export",
    )
    (tmp_path / "other").mkdir()
    alone = begin(tmp_path / "other", "track.also=[tensorboard]")
    (line,) = [line for line in explain(read_plan(alone)) if line.name == "shown in"]
    assert (line.value, line.because) == ("TensorBoard", "files in the run folder")


def test_a_package_that_is_missing_is_told_when_the_run_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)  # Python's own way to make an import fail
    with pytest.raises(ConfigError) as caught:
        begin(tmp_path, "track.wandb=offline", "track.also=[tensorboard, mlflow]")
    assert str(caught.value).splitlines() == [
        "command line: track.wandb = offline: the package wandb is not installed; pip install 'shoal[wandb]', or "
        "track.wandb=off",
        "command line: track.also = mlflow: the package mlflow is not installed; pip install 'shoal[mlflow]', or "
        "leave it out",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
