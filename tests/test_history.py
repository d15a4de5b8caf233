"""Records as rows: one for each update, each once, complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.history import History, Row, tables


def add(path: Path, kind: str, update: int, **values: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"kind": kind, "update": update, **values, "time": 1.5}) + "\n")


def test_a_row_is_given_once_a_later_update_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    assert (list(history.rows()), history.newest()) == ([], None), "nothing is recorded yet"
    add(path, "eval", 0, loss=2.5, best=True)
    add(path, "train", 1, loss=2.0, seconds={"data": 0.5, "compute": 1}, message="text is no number")
    assert list(history.rows()) == [Row(0, {"eval/loss": 2.5, "eval/best": 1}, evaluated=True)]
    add(path, "eval", 1, loss=1.5)
    assert list(history.rows()) == []
    whole = {"train/loss": 2.0, "train/seconds.data": 0.5, "train/seconds.compute": 1, "eval/loss": 1.5}
    assert history.newest() == Row(1, whole, evaluated=True)
    add(path, "train", 2, loss=1.0)
    assert list(history.rows()) == [Row(1, whole, evaluated=True)]
    assert list(history.rows()) == []


def test_what_becomes_known_late_stands_where_it_does(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for update in (1, 2, 3):
        add(path, "train", update, loss=update)
    add(path, "save", 2, seconds=0.25)
    add(path, "train", 4, loss=4)
    rows = list(History(path).rows())
    assert [row.update for row in rows] == [1, 2, 3]
    assert rows[2].numbers == {"train/loss": 3, "save/seconds": 0.25}


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    add(path, "train", 1, loss=1.0)
    with path.open("a") as file:
        file.write('{"kind": "train", "upd')
        file.flush()
        assert list(history.rows()) == []
        file.write('ate": 2, "loss": 2.0}\n')
    assert [row.update for row in history.rows()] == [1]
    assert history.newest() == Row(2, {"train/loss": 2.0})


def test_updates_that_are_there_already_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for update in range(5):
        add(path, "train", update)
    history = History(path, first=2)
    assert [row.update for row in history.rows()] == [2, 3]
    done = History(path, first=5)
    assert (list(done.rows()), done.newest()) == ([], None)


def test_lists_of_mappings_in_the_details_are_tables(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    details = {"loss": 1.0, "examples": [{"source": "a", "prediction": "b"}], "confusion": [[1, 2], [3, 4]], "none": []}
    (tmp_path / "eval/step-000007.json").write_text(json.dumps(details))
    assert tables(tmp_path, 7) == {"examples": [{"source": "a", "prediction": "b"}]}
    assert tables(tmp_path, 8) == {}
