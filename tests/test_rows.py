from __future__ import annotations

import csv
import errno
import gzip
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet

from launch.cache import Cache
from launch.errors import DataError, LaunchError
from launch.recipe import Progress, RecipeContext
from launch.stop import StopRequest, StopSignal
from recipes.files import parallel_rows
from recipes.rows import (
    EmbeddedRows,
    RowArgs,
    RowStream,
    Splits,
    check_rows,
    encode_rows,
    encoded_samples,
    load_rows,
    rows_identity,
)
from recipes.tables import class_names

COLUMNS = {"text_column": "sentence", "label_column": "label"}
Rows = list[dict[str, Any]]


@pytest.fixture
def context(tmp_path: Path) -> RecipeContext:
    return RecipeContext(Cache(tmp_path / "cache"), seed=0)


def some_rows(count: int, seed: int = 0) -> Rows:
    """Texts with what separates fields in them, and labels of two kinds."""
    chance = random.Random(seed)
    texts = ['say "no", twice', "ünïcode", 'ends with "', "a, b"]
    return [{"sentence": f"{chance.choice(texts)} {number}", "label": number % 2} for number in range(count)]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(exist_ok=True)
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if kind in (".csv", ".tsv"):
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        elif kind == ".json":
            json.dump(rows, file, indent=1)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def loaded(context: RecipeContext, columns: dict[str, str] = COLUMNS, **values: Any) -> Splits:
    args = RowArgs(**values)
    check_rows(args, columns)
    return load_rows(args, context, columns, None)


def renamed(rows: Rows, kind: type = int) -> Rows:
    return [{"text": row["sentence"], "label": kind(row["label"])} for row in rows]


def both(splits: Splits) -> tuple[Rows, Rows]:
    return list(splits.train), list(splits.validation)


# --- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet", ".csv.gz", ".tsv.gz", ".json.gz", ".jsonl.gz"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, context: RecipeContext, suffix: str) -> None:
    train, validation = some_rows(1200), some_rows(5, seed=1)
    files = [str(write(tmp_path / f"{name}{suffix}", rows)) for name, rows in (("a", train), ("b", validation))]
    splits = loaded(context, train_files=files[0], validation_files=files[1])
    kind = str if suffix.startswith((".csv", ".tsv")) else int
    assert both(splits) == (renamed(train, kind), renamed(validation, kind))
    assert splits.facts["train"] == {"rows": 1200, "empty": {"text": 0, "label": 0}}


def test_lines_of_text_are_rows_and_empty_ones_are_counted(tmp_path: Path, context: RecipeContext) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\n  \nfour".encode("utf-8-sig"))
    path = str(tmp_path / "a.txt")
    splits = loaded(context, {"text_column": "text"}, train_files=path, validation_files=path)
    assert splits.train["text"] == ["one", "", "  ", "four"]
    assert splits.facts["train"] == {"rows": 4, "empty": {"text": 2}}


def test_a_tsv_without_header_and_with_stray_quotes(tmp_path: Path, context: RecipeContext) -> None:
    (tmp_path / "a.tsv").write_text('"Hello," he said\t0\n"quoted\tfield"\t1\nunclosed "\t1\n')
    path = str(tmp_path / "a.tsv")
    splits = loaded(context, train_files=path, validation_files=path, column_names=("sentence", "label"))
    assert splits.train["text"] == ['"Hello," he said', "quoted\tfield", 'unclosed "']


def test_kinds_grow_over_batches_of_rows(tmp_path: Path, context: RecipeContext) -> None:
    """Kinds of a column are those of all its values, wherever the first of them stands."""
    number = "sentence"
    rows = [{number: 1, "label": []} for _ in range(1500)] + [
        {number: 0.5, "label": ["a"]},
        {number: None, "label": []},
    ]
    path = str(write(tmp_path / "a.jsonl", rows))
    train, _ = both(loaded(context, train_files=path, validation_files=path))
    assert train == [{"text": row[number], "label": row["label"]} for row in rows]


def test_folders_and_globs_name_files_in_sorted_order(tmp_path: Path, context: RecipeContext) -> None:
    rows = some_rows(30)
    for number, name in enumerate(("c.jsonl", "a.jsonl", "b.jsonl")):
        write(tmp_path / name, rows[number * 10 : number * 10 + 10])
    (tmp_path / "README.md").write_text("about")
    validation = str(tmp_path / "c.jsonl")
    expected = renamed(rows[10:] + rows[:10])
    for given in (str(tmp_path), str(tmp_path / "*.jsonl"), tuple(str(tmp_path / f"{each}.jsonl") for each in "abc")):
        assert both(loaded(context, train_files=given, validation_files=validation)) == (expected, renamed(rows[:10]))


def test_aligned_lines_are_rows(tmp_path: Path) -> None:
    for name, text in (("en.gz", "one\ntwo\n"), ("de.gz", "eins\nzwei\n"), ("fr.gz", "un\n")):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    english, german, french = (tmp_path / f"{name}.gz" for name in ("en", "de", "fr"))
    pairs = [("one", "eins"), ("two", "zwei")]
    assert [*parallel_rows([english], [german])] == [{"source": one, "target": other} for one, other in pairs]
    with pytest.raises(DataError, match=r"fr\.gz: ends after line 1, but .*en\.gz goes on"):
        list(parallel_rows([english], [french]))


def test_a_recipe_reads_its_own_kind_of_file(tmp_path: Path, context: RecipeContext) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": some_rows(3)}))
    readers = {".json": lambda path: iter(json.loads(path.read_text())["data"])}
    args = RowArgs(train_files=(str(tmp_path / "a.json"),), validation_files=(str(tmp_path / "a.json"),))
    check_rows(args, COLUMNS, readers)
    assert both(load_rows(args, context, COLUMNS, None, readers))[0] == renamed(some_rows(3))


# --- datasets and splits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("stated", "found"), [(None, "dev"), ("extra", "extra")])
def test_a_dataset_is_split_as_it_says(tmp_path: Path, context: RecipeContext, stated: str | None, found: str) -> None:
    """Saved by `datasets`, which keeps the names of labels."""
    from datasets import ClassLabel, Dataset, DatasetDict

    splits = {"train": some_rows(9), "dev": some_rows(4, 1), "extra": some_rows(3, 2)}
    names = ClassLabel(names=["no", "yes"])
    made = {name: Dataset.from_list(rows).cast_column("label", names) for name, rows in splits.items()}
    DatasetDict(made).save_to_disk(tmp_path / "data")
    rows = loaded(context, dataset=str(tmp_path / "data"), validation_split=stated)
    assert both(rows) == (renamed(splits["train"]), renamed(splits[found]))
    assert class_names(rows.train.schema, "label") == ("no", "yes")
    with pytest.raises(DataError, match=r"has no split 'no'; it has train, dev, extra; set recipe_args\.train_split"):
        loaded(context, dataset=str(tmp_path / "data"), train_split="no")
    with pytest.raises(DataError, match=r"has no column 'labl'; .*recipe_args\.label_column, perhaps to 'label'"):
        loaded(context, {"label_column": "labl"}, dataset=str(tmp_path / "data"))


def test_messages_of_any_keys_are_the_same_from_files_and_from_a_dataset(
    tmp_path: Path, context: RecipeContext
) -> None:
    """Also those that a dataset keeps as JSON, for a key is a number here and a text there."""
    said = [
        [{"role": "user", "n": number if number % 2 else str(number)}, {"role": "tool", "call": {f"k{number}": None}}]
        for number in range(6)
    ]
    rows = [{"sentence": messages, "label": number} for number, messages in enumerate(said)]
    path = write(tmp_path / "data" / "train.jsonl", rows)
    of_files = loaded(context, train_files=str(path), validation_files=str(path))
    assert both(of_files) == (renamed(rows), renamed(rows))
    for more in ({}, {"validation_files": str(path)}, {"streaming": True}):
        of_dataset = loaded(context, dataset=str(path.parent), **more)
        found = [*of_dataset.train, *(() if more.get("validation_files") else of_dataset.validation)]
        assert sorted(found, key=lambda row: row["label"]) == renamed(rows)
        assert next(iter(of_dataset.validation)) in found


def test_validation_files_replace_what_a_dataset_or_a_recipe_would_be_evaluated_on(
    tmp_path: Path, context: RecipeContext
) -> None:
    """Nothing is held out then: all rows are trained on. What files say is of the kinds that a dataset states."""
    from datasets import ClassLabel, Dataset, DatasetDict

    splits = {"train": some_rows(40), "test": some_rows(4, 1)}
    names = ClassLabel(names=["no", "yes"])
    made = {name: Dataset.from_list(rows).cast_column("label", names) for name, rows in splits.items()}
    DatasetDict(made).save_to_disk(tmp_path / "data")
    given = some_rows(3, 5)
    path = str(write(tmp_path / "v.csv", given))  # its labels are text
    rows = loaded(context, dataset=str(tmp_path / "data"), validation_files=path)
    assert both(rows) == (renamed(splits["train"]), renamed(given))
    wrong = str(write(tmp_path / "w.jsonl", [{"sentence": "a", "label": "perhaps"}]))
    with pytest.raises(DataError, match=r"validation_files: .*perhaps.*, in the row \{'text': 'a'"):
        loaded(context, dataset=str(tmp_path / "data"), validation_files=wrong)
    embedded = EmbeddedRows("rows", {}, lambda: iter(renamed(splits["train"])))
    args = RowArgs(validation_files=(path,))
    check_rows(args, COLUMNS)
    everything = load_rows(args, context, COLUMNS, embedded)
    assert both(everything) == (renamed(splits["train"]), renamed(given, str))
    held_out = load_rows(RowArgs(), context, COLUMNS, embedded)
    assert len(held_out.train) + len(held_out.validation) == 40


def test_rows_held_out_depend_on_the_split_seed_alone(tmp_path: Path, context: RecipeContext) -> None:
    rows = some_rows(300) * 2  # each twice
    path = str(write(tmp_path / "a.jsonl", rows))
    train, validation = both(loaded(context, train_files=path, validation_fraction=0.2))
    texts = {row["text"] for row in validation}
    assert not texts & {row["text"] for row in train}, "equal rows are on the same side"
    assert sorted(map(str, train + validation)) == sorted(map(str, renamed(rows)))
    assert 0.1 < len(validation) / len(rows) < 0.3
    again = RecipeContext(Cache(tmp_path / "other"), seed=7)
    assert both(loaded(again, train_files=path, validation_fraction=0.2)) == (train, validation)
    assert both(loaded(again, train_files=path, validation_fraction=0.2, split_seed=1))[1] != validation


def test_of_a_few_rows_one_is_held_out(tmp_path: Path, context: RecipeContext) -> None:
    path = str(write(tmp_path / "a.jsonl", some_rows(4)))
    train, validation = both(loaded(context, train_files=path, validation_fraction=1e-9))
    assert (len(train), len(validation)) == (3, 1)


def test_a_limit_takes_rows_from_everywhere(tmp_path: Path, context: RecipeContext) -> None:
    path = str(write(tmp_path / "a.jsonl", some_rows(1000)))
    splits = loaded(context, train_files=path, validation_files=path, max_train_samples=50, max_validation_samples=7)
    numbers = [int(text.split()[-1]) for text in splits.train["text"]]
    assert len(set(numbers)) == 50
    assert numbers == sorted(numbers)
    assert numbers[0] < 200 < 800 < numbers[-1]
    assert (splits.facts["train"]["rows"], splits.facts["validation"]["rows"]) == (50, 7)


@pytest.mark.parametrize("validation", [True, False])
def test_a_stream_has_the_rows_in_their_order(tmp_path: Path, context: RecipeContext, validation: bool) -> None:
    files = {"train_files": str(write(tmp_path / "a.jsonl", some_rows(1000)))}
    if validation:
        files["validation_files"] = str(write(tmp_path / "b.csv", some_rows(5)))
    held, streamed = loaded(context, **files), loaded(context, **files, streaming=True)
    assert isinstance(streamed.train, RowStream)
    assert both(streamed) == both(held)
    features = [encode_rows(each, context, "upper", upper, None, 1) for each in (held, streamed)]
    assert both(features[1]) == both(features[0])
    assert list(features[1].train) == list(features[1].train), "from the first on each time"
    assert len(list(loaded(context, **files, streaming=True, max_train_samples=3).train)) == 3


# --- encoding --------------------------------------------------------------------------------------------


def upper(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """As many samples of a row as its number modulo 3."""
    pairs = [(text, each) for text in batch["text"] for each in range(int(text.split()[-1]) % 3)]
    return {"ids": [[each] * 3 for _, each in pairs], "text": [text.upper() for text, _ in pairs]}


def test_features_come_in_the_order_of_rows_however_many_processes(tmp_path: Path, context: RecipeContext) -> None:
    path = str(write(tmp_path / "a.jsonl", some_rows(1100)))
    splits = loaded(context, train_files=path, validation_files=path)
    expected = upper(splits.train[:])

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        (tmp_path / f"pid-{os.getpid()}").touch()
        return upper(batch)

    for count in (1, 2, 3):
        advanced: list[int] = []
        counting = RecipeContext(context.cache, 0, Progress(advance=advanced.append))
        features = encode_rows(splits, counting, f"with-{count}", encode, {"count": count}, count)
        assert features.train[:] == expected
        assert sum(advanced) == 2 * 1100
    assert len([*tmp_path.glob("pid-*")]) == 1 + 2 * (2 + 3)
    assert features.train.__getitems__([5, 2]) == [features.train[5], features.train[2]]


def test_everything_is_made_once_until_a_file_changes(tmp_path: Path, context: RecipeContext) -> None:
    path = write(tmp_path / "a.jsonl", some_rows(20))
    calls = []

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        calls.append(len(batch["text"]))
        return upper(batch)

    args = RowArgs(train_files=(str(path),))

    def samples() -> int | None:
        return encoded_samples(context, "upper", rows_identity(args, COLUMNS, None), 1)

    def made() -> Splits:
        return encode_rows(load_rows(args, context, COLUMNS, None), context, "upper", encode, 1, None)

    assert samples() is None
    first, folders = made(), sorted(context.cache.root.iterdir())
    assert samples() == len(first.train)
    assert both(made()) == both(first)
    assert sum(calls) == 20
    assert sorted(context.cache.root.iterdir()) == folders
    write(path, some_rows(21))
    assert samples() is None
    made()
    assert sum(calls) == 41


def test_a_separate_encoding_of_validation_rows(context: RecipeContext) -> None:
    embedded = EmbeddedRows("mine", {}, lambda: iter(renamed(some_rows(5))), lambda: iter(renamed(some_rows(2))))
    splits = load_rows(RowArgs(), context, COLUMNS, embedded)
    features = encode_rows(
        splits, context, "two", lambda batch: {"a": batch["label"]}, None, None, lambda batch: {"b": batch["text"]}
    )
    assert both(features) == ([{"a": n % 2} for n in range(5)], [{"b": r["text"]} for r in renamed(some_rows(2))])


@pytest.mark.parametrize("error", [DataError("row 3: is bad"), KeyError("a defect"), SystemError("killed")])
def test_what_goes_wrong_in_a_process_arrives_as_it_is(context: RecipeContext, error: Exception) -> None:
    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if batch["text"][0].endswith(" 500"):
            if isinstance(error, SystemError):
                os.kill(os.getpid(), signal.SIGKILL)
            raise error
        return upper(batch)

    splits = load_rows(RowArgs(), context, COLUMNS, embedded_rows(1000))
    expected = RuntimeError if isinstance(error, SystemError) else type(error)
    before = {*psutil.Process().children()}  # of other tests
    with pytest.raises(expected) as caught:
        encode_rows(splits, context, "bad", encode, None, 3)
    assert str(caught.value) == str(error) if expected is type(error) else "has ended with -9" in str(caught.value)
    left = {*psutil.Process().children()} - before
    assert not [each for each in left if each.status() != psutil.STATUS_ZOMBIE]


def test_a_process_that_cannot_be_started_is_told_and_those_before_it_are_ended(
    context: RecipeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load_rows(RowArgs(), context, COLUMNS, embedded_rows(1000))
    before, fork, forks = {*psutil.Process().children()}, os.fork, iter((True, False))

    def forked() -> int:
        if next(forks):
            return fork()
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "fork", forked)
    with pytest.raises(RuntimeError) as caught:
        encode_rows(splits, context, "slow", upper, None, 2)
    assert str(caught.value) == (
        "cannot start process 2 of 2 to prepare data: Cannot allocate memory; recipe_args.preparation_processes=1 "
        "needs the least memory"
    )
    left = {*psutil.Process().children()} - before
    assert not [each for each in left if each.status() != psutil.STATUS_ZOMBIE]


def embedded_rows(count: int) -> EmbeddedRows:
    rows = renamed(some_rows(count))
    return EmbeddedRows("mine", {"count": count}, lambda: iter(rows), lambda: iter(rows[:1]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_prepares(tmp_path: Path, context: RecipeContext, number: int) -> None:
    splits = load_rows(RowArgs(), context, COLUMNS, embedded_rows(20_000))

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        (tmp_path / f"pid-{os.getpid()}").touch()
        time.sleep(0.5)  # eighty batches in two processes: twenty seconds, unless the signal ends them
        return upper(batch)

    def prepare() -> None:
        StopRequest().install()
        try:
            encode_rows(splits, context, "slow", encode, None, 2)
        except StopSignal:
            os._exit(75)

    process = multiprocessing.get_context("fork").Process(target=prepare)
    process.start()
    assert process.pid
    wait_for(lambda: len([*tmp_path.glob("pid-*")]) == 2)
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == (-9 if number == signal.SIGKILL else 75)
    workers = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    wait_for(lambda: not any(psutil.pid_exists(each) and is_alive(each) for each in workers))


def is_alive(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- bad input -------------------------------------------------------------------------------------------


def test_of_rows_that_are_all_equal_it_is_said_where_they_went(tmp_path: Path, context: RecipeContext) -> None:
    path = str(write(tmp_path / "a.jsonl", some_rows(1) * 30))
    with pytest.raises(DataError, match=r"its train data, for all 30 are held out: .* recipe_args\.validation_files$"):
        loaded(context, train_files=path)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty.csv": (b"", ": is empty"),
    "blank.jsonl": (b"\n\n", ": holds no row"),
    "header.csv": (b"sentence,label\n", ": there is no row in its train"),
    "a.doc": (b"a", ": cannot tell what it holds; a name ends in .txt, "),
    "a.csv": (b"Sentence,label\na,1\n", "it has Sentence, label; set recipe_args.text_column, perhaps to 'Sentence'"),
    "a.txt": (b"a\n", ": has no column 'sentence'; it has text; set recipe_args.text_column"),
    "ragged.csv": (
        b'sentence,label\na,1\n"b\nc",1\na,b,1\n',
        ":5: has 3 fields, but the first line names 2: sentence, ",
    ),
    "ragged.tsv": (b"sentence\tlabel\na\n", ":2: has 1 fields, but the first line names 2: sentence, label"),
    "quote.csv": (b'sentence,label\na,1\n"b,1\n', ":3: cannot be read as csv: unexpected end of data"),
    "cut.jsonl": (b'{"sentence": "a", "label": 1}\n{"sent', ":2: cannot be read as json: "),
    "late.jsonl": (
        b'{"sentence": "a", "label": 1}\n' * 30 + b"[1]",
        ":31: cannot be read as json: rows must be objects",
    ),
    "data.json": (b'{"data": []}', ": has no column 'sentence'; it has data; set recipe_args.text_column"),
    "latin.csv": (b"sentence,label\n\xe9t\xe9,1\n", ": is not UTF-8 text: "),
    "cut.jsonl.gz": (gzip.compress(b'{"sentence": "a", "label": 1}')[:-9], ": cannot be read as json: "),
    "junk.parquet": (b"PAR1junk", ": cannot be read as parquet: "),
    "kinds.jsonl": (
        b"".join(b'{"sentence": "%d", "label": %s}\n' % (row, b'"x"' if row % 2 else b"1") for row in range(20)),
        "column 'label': holds values of kinds that do not go together",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used(tmp_path: Path, context: RecipeContext, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    error = failure(context, train_files=str(tmp_path / name))
    assert isinstance(error, DataError)
    assert message in str(error)
    assert name in str(error) or name in ("header.csv", "kinds.jsonl")
    assert "\n" not in str(error)


def failure(context: RecipeContext, **values: Any) -> LaunchError:
    with pytest.raises(LaunchError) as caught:
        loaded(context, **values)
    return caught.value


def test_files_of_one_split_have_the_same_columns(tmp_path: Path, context: RecipeContext) -> None:
    write(tmp_path / "a.jsonl", some_rows(3))
    write(tmp_path / "b.jsonl", [{"text": "a", "label": 1}])
    error = failure(context, train_files=str(tmp_path))
    assert str(error).startswith(
        f"recipe_args.train_files: {tmp_path}/b.jsonl: has no column 'sentence'; it has text, "
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_files": "no.csv"}, "no.csv: no such file"),
        ({"train_files": "no-*.csv"}, "no-*.csv: matches no file"),
        ({"train_files": "folder"}, "folder: holds no file whose name ends in .txt, "),
        ({"train_files": "a.jsonl", "column_names": ("a",)}, "is for csv and tsv files, and "),
        ({"train_files": "a.jsonl", "dataset": "x"}, "exclude each other"),
        ({"dataset": "./no"}, "no: no such folder"),
        ({}, "set recipe_args.train_files or recipe_args.dataset"),
    ],
)
def test_arguments_that_cannot_be(
    tmp_path: Path, context: RecipeContext, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write(tmp_path / "a.jsonl", some_rows(3))
    error = failure(context, **values)
    assert message in str(error)
