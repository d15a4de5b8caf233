"""Where numbers go: metrics.jsonl always, and Weights & Biases as its own package reads it back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.engine.tracking import Tracker
from launch.errors import ConfigError


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_record_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    before = time.time() - 1
    tracker = Tracker(tmp_path, "off", "shoal", {})
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
    assert not (tmp_path / "wandb").exists()


def test_a_resumed_tracker_goes_on_where_the_checkpoint_was_made(tmp_path: Path) -> None:
    first = Tracker(tmp_path, "off", "shoal", {})
    first.write("train", 1)
    state = first.state()
    first.write("train", 2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "tra')  # killed in the middle of a line
    second = Tracker(tmp_path, "off", "shoal", {}, state)
    second.write("train", 2, again=True)
    second.close()
    assert [(record["update"], "again" in record) for record in lines(tmp_path)] == [(1, False), (2, True)]
    discarded = (tmp_path / "metrics-discarded.jsonl").read_text()
    assert json.loads(discarded.splitlines()[0])["update"] == 2
    assert discarded.endswith('{"kind": "tra')


def test_a_run_that_begins_anew_begins_its_records_anew(tmp_path: Path) -> None:
    for update in (1, 2):
        tracker = Tracker(tmp_path, "off", "shoal", {})
        tracker.write("train", update)
        tracker.close()
    assert [record["update"] for record in lines(tmp_path)] == [2]
    assert json.loads((tmp_path / "metrics-discarded.jsonl").read_text())["update"] == 1


@pytest.mark.slow
def test_weights_and_biases_holds_the_same_numbers(tmp_path: Path) -> None:
    config = {"recipe": "causal_lm", "train": {"max_steps": 2}}
    tracker = Tracker(tmp_path, "offline", "sardines", config)
    tracker.write("eval", 0, loss=2.5)
    tracker.write("train", 1, loss=2.25, learning_rate=1e-3)
    tracker.write("save", 1, folder="checkpoints/step-000001", seconds=0.5)
    tracker.close()
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    # wandb's own reader: one JSON object a line.
    inspect = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(stored)]
    shown = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    entries = [json.loads(line) for line in shown.splitlines()]
    history = [entry["history"]["item"] for entry in entries if entry["type"] == "history"]
    rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in history]
    assert rows == [
        {"update": 0, "eval/loss": 2.5},
        {"update": 1, "train/loss": 2.25, "train/learning_rate": 1e-3},
        {"update": 1, "save/seconds": 0.5},
    ]
    (run,) = [entry["run"] for entry in entries if entry["type"] == "run"]
    assert (run["project"], run["display_name"]) == ("sardines", tmp_path.name)
    recorded = {name: value for name, value in run["config"]["update"].items() if name != "_wandb"}
    assert recorded == config
    assert [record["update"] for record in lines(tmp_path)] == [0, 1, 1]


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # Python's own way to make an import fail
    with pytest.raises(ConfigError) as caught:
        Tracker(tmp_path, "offline", "shoal", {})
    assert str(caught.value) == (
        "track.wandb = offline: the package wandb is not installed; pip install 'shoal[wandb]', or track.wandb=off"
    )
