"""Rows kept as Arrow files: what is read is what was written, and as `datasets` would read it."""

from __future__ import annotations

import datetime
import multiprocessing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from launch.errors import DataError
from recipes.tables import StoredRows, TableWriter, class_names, list_lengths, table

SIZES = (3, 0, 1, 250, 7)
"""Rows of the batches of a file."""


def write(path: Path, batches: list[list[dict[str, Any]]], stated: Any = None) -> StoredRows:
    writer = TableWriter(path, "here", stated)
    for batch in batches:
        names = batch[0] if batch else batches[0][0]
        writer.write(table({name: [row[name] for row in batch] for name in names}, "here", stated))
    writer.close()
    return StoredRows(path)


def some_batches() -> list[list[dict[str, Any]]]:
    numbers = iter(range(1000))
    return [
        [
            {"ids": list(range(number % 5)), "text": f"ünï {number}" if number % 7 else None, "number": number}
            for _, number in zip(range(size), numbers, strict=False)
        ]
        for size in SIZES
    ]


def test_rows_are_read_as_datasets_reads_them(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = write(tmp_path / "rows.arrow", some_batches())
    known = Dataset.from_file(str(tmp_path / "rows.arrow"))
    assert len(rows) == len(known) == sum(SIZES)
    assert rows.column_names == known.column_names
    assert list(rows) == list(known) == [row for batch in some_batches() for row in batch]
    for index in (0, 2, 3, 4, 253, 254, 260, -1, -261):
        assert rows[index] == known[index]
    for part in (slice(None), slice(2, 6), slice(250, 999), slice(9, 2), slice(None, None, 3), slice(-4, None)):
        assert rows[part] == known[part]
    assert rows["text"] == known["text"][:]
    several = [260, 3, 3, 0, 254]
    assert rows.__getitems__(several) == known.__getitems__(several)
    assert list_lengths(rows, ["ids"]).tolist() == [len(ids) for ids in known["ids"]]
    assert rows.numbers("number").tolist() == known["number"][:]
    assert rows.numbers("ids").tolist() == [number for ids in known["ids"] for number in ids]
    for beyond in (261, -262):
        with pytest.raises(IndexError):
            rows[beyond]
    with pytest.raises(KeyError):
        rows["nothing"]


def test_some_of_the_rows_and_columns_and_one_column_more(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = write(tmp_path / "rows.arrow", some_batches())
    known = Dataset.from_file(str(tmp_path / "rows.arrow"))
    chosen = [5, 0, 255, 4, 2]
    for mine, theirs in (
        (rows.select(chosen), known.select(chosen)),
        (rows.select(chosen).select([3, 1]), known.select(chosen).select([3, 1])),
        (rows.select_columns(["number"]), known.select_columns(["number"])),
        (rows.select(chosen).select_columns(["text", "ids"]), known.select(chosen).select_columns(["text", "ids"])),
        (
            rows.with_column("twice", [2 * n for n in known["number"]]),
            known.map(lambda row: {"twice": 2 * row["number"]}),
        ),
    ):
        assert list(mine) == list(theirs)
        assert mine[1:4] == theirs[1:4]
        assert mine[1] == theirs[1]
        assert mine.column_names == theirs.column_names
        assert mine[mine.column_names[-1]] == theirs[mine.column_names[-1]][:]
    assert rows.select(chosen).numbers("ids").tolist() == [0, 1, 2, 3, 0, 1]
    assert list_lengths(rows.select(chosen), ["ids", "ids"]).tolist() == [0, 0, 0, 8, 4]


def test_another_process_maps_the_file_itself(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.arrow", some_batches()).select_columns(["number"]).select([7, 2])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(list, (rows,)) == [{"number": 7}, {"number": 2}]


def test_a_file_without_rows_has_no_columns(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.arrow", [])
    assert (len(rows), list(rows), rows.column_names, rows[:]) == (0, [], [], {})
    assert list_lengths(rows).tolist() == []


def test_dicts_come_back_with_the_keys_they_had(tmp_path: Path) -> None:
    """Arrow's own kind for them would add `"b": None` to the first, and not take a key of two kinds at all."""
    values: list[Any] = [
        [{"role": "user", "arguments": {"a": 1}}, {"role": "tool"}],
        [{"role": "user", "arguments": {"b": "ü"}}],
        None,
        [],
        {"a": None, "deep": [{"x": 1}, {"x": "y"}]},
    ]
    rows = write(tmp_path / "rows.arrow", [[{"value": value} for value in values]])
    assert rows["value"] == values
    assert list(rows) == [{"value": value} for value in values]
    assert rows[1:3] == {"value": values[1:3]}


def test_times_within_dicts_become_text_and_bytes_are_refused(tmp_path: Path) -> None:
    noon = datetime.datetime(2026, 1, 2, 12)
    rows = write(tmp_path / "rows.arrow", [[{"value": {"at": noon, "on": noon.date(), "cost": Decimal("1.50")}}]])
    assert rows[0]["value"] == {"at": "2026-01-02 12:00:00", "on": "2026-01-02", "cost": "1.50"}
    with pytest.raises(DataError, match=r"here: column 'value': .* bytes within a dict"):
        write(tmp_path / "rows.arrow", [[{"value": {"image": b"x"}}]])


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_they_do_so_wherever_the_first_of_them_stands(tmp_path: Path, order: tuple[int, ...]) -> None:
    parts: list[list[Any]] = [[[], None], [[{"a": 1}], [{"b": "x"}]], [None, []]]
    batches = [[{"value": value, "number": place} for value in parts[place]] for place in order]
    rows = write(tmp_path / "rows.arrow", batches)
    assert list(rows) == [row for batch in batches for row in batch]


def test_kinds_that_do_not_go_together_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="here: column 'value': holds values of kinds that do not go together"):
        write(tmp_path / "rows.arrow", [[{"value": 1}, {"value": "x"}]])
    with pytest.raises(DataError, match="here: holds values of kinds that do not go together"):
        write(tmp_path / "rows.arrow", [[{"value": 1}], [{"value": "x"}]])


def test_names_of_labels_are_kept(tmp_path: Path) -> None:
    from datasets import ClassLabel, Features, List, Value

    kinds = Features(
        {
            "label": ClassLabel(names=["no", "yes"]),
            "labels": List(ClassLabel(names=["O", "B"])),
            "names": {"names": Value("string")},
            "text": Value("string"),
        }
    )
    row = {"label": 1, "labels": [0, 1], "names": {"names": "x"}, "text": "y"}
    rows = write(tmp_path / "rows.arrow", [[row]], kinds.arrow_schema)
    assert class_names(rows.schema, "label") == ("no", "yes")
    assert class_names(rows.schema, "labels") == ("O", "B")
    assert class_names(rows.schema, "names") == class_names(rows.schema, "text") == ()
    assert list(rows) == [row]
    assert class_names(write(tmp_path / "plain.arrow", [[row]]).schema, "label") == ()
