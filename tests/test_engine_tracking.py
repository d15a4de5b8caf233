"""Where numbers go: metrics.jsonl always, and TensorBoard, MLflow and Trackio as their own packages read them back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.engine.tracking import Tracker
from launch.record import write_json


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_record_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    before = time.time() - 1
    tracker = Tracker(tmp_path)
    tracker.write("eval", 0, loss=2.5, perplexity=12.1)
    tracker.write("train", 1, loss=2.0, learning_rate=1e-3)
    found = lines(tmp_path)  # not closed yet
    times = [record.pop("time") for record in found]
    assert before <= times[0] <= times[1] <= time.time() + 1
    assert found == [
        {"kind": "eval", "update": 0, "loss": 2.5, "perplexity": 12.1},
        {"kind": "train", "update": 1, "loss": 2.0, "learning_rate": 1e-3},
    ]
    tracker.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_tracker_goes_on_where_the_checkpoint_was_made(tmp_path: Path) -> None:
    first = Tracker(tmp_path)
    first.write("train", 1)
    state = first.state()
    first.write("train", 2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "tra')  # killed in the middle of a line
    second = Tracker(tmp_path, state)
    second.write("train", 2, again=True)
    second.close()
    assert [(record["update"], "again" in record) for record in lines(tmp_path)] == [(1, False), (2, True)]
    discarded = (tmp_path / "metrics-discarded.jsonl").read_text()
    assert json.loads(discarded.splitlines()[0])["update"] == 2
    assert discarded.endswith('{"kind": "tra')


def test_a_run_that_begins_anew_begins_its_records_anew(tmp_path: Path) -> None:
    for update in (1, 2):
        tracker = Tracker(tmp_path)
        tracker.write("train", update)
        tracker.close()
    assert [record["update"] for record in lines(tmp_path)] == [2]
    assert json.loads((tmp_path / "metrics-discarded.jsonl").read_text())["update"] == 1


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All that TensorBoard finds in a folder itself, not below it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: [(event.step, round(event.value, 4)) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }


@pytest.mark.slow
def test_tensorboard_shows_each_update_once_also_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a rank has around it must make the process that follows no rank.
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    config = {"train": {"max_steps": 4, "epochs": None}, "track": {"project": "sardines", "also": ["tensorboard"]}}
    (tmp_path / "plan.json").write_text(json.dumps({"plan": {"config": config}}))
    said: list[str] = []
    first = Tracker(tmp_path, {}, ["tensorboard"], said.append)
    first.write("eval", 0, loss=2.5)
    state = first.state()
    for update in (1, 2, 3):
        first.write("train", update, loss=9.0)
    first.close(60)
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(1, 9.0), (2, 9.0), (3, 9.0)]
    second = Tracker(tmp_path, state, ["tensorboard"], said.append)
    for update in (1, 2, 3, 4):
        second.write("train", update, loss=update / 4)
    second.close(60)
    found = scalars(tmp_path / "tensorboard")
    assert found == {"eval/loss": [(0, 2.5)], "train/loss": [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]}
    assert said == []
    (stored,) = (tmp_path / "tensorboard").glob("*/hparams.yml")
    assert "train.max_steps: 4" in stored.read_text()


READ_BY_ITSELF = {
    "mlflow": """
from mlflow.tracking import MlflowClient
client = MlflowClient()
(experiment,) = client.search_experiments(filter_string="name = 'sardines'")
runs = client.search_runs([experiment.experiment_id])
found = [[[each.step, each.value] for each in client.get_metric_history(run.info.run_id, key)] for run in runs]
settings = [run.data.params["train.max_steps"] for run in runs]
""",
    "trackio": """
from trackio import SQLiteStorage
runs = SQLiteStorage.get_runs("sardines")
found = [[[row["step"], row[key]] for row in SQLiteStorage.get_logs("sardines", run) if key in row] for run in runs]
settings = [str(SQLiteStorage.get_run_config("sardines", run)["train.max_steps"]) for run in runs]
""",
}
"""What the runs of a project hold of `key`, by the tracker's own library."""


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_BY_ITSELF)
def test_a_tracker_elsewhere_has_one_run_and_each_update_once_however_often_it_is_followed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "stored"))
    config = {"train": {"max_steps": 4, "epochs": None}, "track": {"project": "sardines", "also": [name]}}
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan.json").write_text(json.dumps({"plan": {"config": config}}))
    said: list[str] = []
    state: dict[str, Any] = {}
    for updates in ((1, 2), (3,), (4,)):
        tracker = Tracker(run, state, [name], said.append)
        for update in updates:
            tracker.write("train", update, loss=update / 4)
        state = tracker.state()
        if updates == (4,):
            write_json(run / "result.json", {})  # before, the newest row is kept back: more may come to it
        tracker.close(60)
    assert said == []
    program = f"import json\nkey = 'train/loss'\n{READ_BY_ITSELF[name]}\nprint(json.dumps([found, settings]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found, settings = json.loads(done.stdout.splitlines()[-1])
    assert found == [[[1, 0.25], [2, 0.5], [3, 0.75], [4, 1.0]]] and settings == ["4"]
