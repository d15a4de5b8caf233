"""Rows to train and evaluate on: found, checked, split, and kept as Arrow files in the cache.

What all recipes share whose samples come from rows with named columns. A recipe says which columns it needs and what
a row becomes (`encode_rows`); where rows come from is settled here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, JsonValue

from launch.cache import file_identity
from launch.errors import ConfigError, DataError
from launch.recipe import HubNameOrFolder, LocalPaths, RecipeArgs, RecipeContext
from recipes.encoding import encode_rows as encode_rows
from recipes.encoding import encoded_key as encoded_key
from recipes.encoding import encoded_samples as encoded_samples
from recipes.files import NO_READERS, Readers, Row, check_columns, check_named, find_files, format_of, read_rows, short
from recipes.tables import StoredRows, TableWriter, in_batches, table
from recipes.text import check_hub, dataset_revision, dataset_splits, load_split

if TYPE_CHECKING:
    import datasets

BATCH_OF_ROWS = 1000
"""Rows held in memory at once while they are written."""

VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")
"""What the split to evaluate on may be called, the first one first."""

SCALE = 2**64
"""Rows are held out by a hash below this number."""


class RowArgs(RecipeArgs):
    """The part of a recipe's arguments that says where its rows come from."""

    dataset: HubNameOrFolder | None = None
    """Dataset on the Hub or local folder of one; null with no train_files either: the recipe's embedded sample."""
    dataset_config: str | None = None
    """Configuration of the dataset, such as mrpc of glue."""
    train_files: LocalPaths = ()
    """Files to train on (csv, tsv, json, jsonl, parquet, txt, or .gz of these), globs or folders, not a dataset."""
    validation_files: LocalPaths = ()
    """Files, globs or folders to evaluate on, in place of a dataset's split too; none: training rows are held out."""
    column_names: tuple[str, ...] = ()
    """Names of the columns of csv and tsv files that have no header line."""
    train_split: str = "train"
    """Split of the dataset to train on."""
    validation_split: str | None = None
    """Split to evaluate on; null: validation, else dev or test where there is one, else training rows are held out."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training rows held out where there is no validation data; equal rows stay on the same side."""
    split_seed: int = 0
    """Chooses the rows that are held out, and those that max_train_samples and max_validation_samples leave."""
    max_train_samples: int | None = Field(None, ge=1)
    """Train on so many rows only, chosen at random; of a stream, the first ones."""
    max_validation_samples: int | None = Field(None, ge=1)
    """Evaluate on so many rows only, chosen at random; of a stream, the first ones held out."""
    streaming: bool = False
    """Read training rows in their order and never hold them: for data that does not fit; needs train.max_steps."""
    preparation_processes: int | None = Field(None, ge=1)
    """Processes that tokenise; null: the CPU cores, at most 8, and one where there are few rows."""


@dataclass(frozen=True)
class EmbeddedRows:
    """Rows that a recipe brings itself, or reads in its own way."""

    name: str
    key: dict[str, Any]
    """All that the rows are made from, as JSON."""
    make: Callable[[], Iterator[Row]]
    """The training rows, from the first on each time, with canonical column names."""
    validation: Callable[[], Iterator[Row]] | None = None
    """The rows to evaluate on; None: a part of the training rows."""


@dataclass(frozen=True)
class RowStream:
    """Rows read anew, in their order, each time they are iterated over: a `launch.recipe.Stream`."""

    make: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        """The rows from the first on."""
        return self.make()


@dataclass(frozen=True)
class Splits:
    """Rows by their canonical columns, or what they were encoded to."""

    train: StoredRows | RowStream
    validation: StoredRows
    identity: JsonValue
    """All that the rows are made from."""
    facts: dict[str, Any]
    """By split: `rows`, and `empty`: how many rows hold nothing in a column, by column. Of a stream, nothing."""


def canonical(columns: Mapping[str, str]) -> dict[str, str]:
    """From what a column is called by recipes (`text`) to what the user's data calls it."""
    return {key.removesuffix("_column"): column for key, column in columns.items()}


def check_rows(args: RowArgs, columns: Mapping[str, str], readers: Readers = NO_READERS) -> None:
    """See, without heavy imports, that the rows can be had and hold the columns: recipe_args key -> column name.

    Raises:
        ConfigError: arguments that exclude each other.
        DataError: a file that is not there or cannot be read, a column that is not there, the Hub out of reach.
    """
    check_source(args)
    for key in ("train_files", "validation_files"):
        files = find_files(getattr(args, key), f"recipe_args.{key}", readers=readers)
        if args.column_names and (other := [path for path in files if format_of(path) not in ("csv", "tsv")]):
            raise ConfigError(f"recipe_args.column_names is for csv and tsv files, and {other[0]} is none")
        check_columns(files, columns, f"recipe_args.{key}", args.column_names, readers)


def check_source(args: RowArgs) -> None:
    """See, without heavy imports, that there is one source of training data, and that a dataset can be had.

    Raises:
        ConfigError: arguments that exclude each other.
        DataError: no such folder, or the Hub is out of reach.
    """
    if args.dataset and args.train_files:
        raise ConfigError("recipe_args.dataset and recipe_args.train_files exclude each other; state one of the two")
    if not args.dataset:
        return
    if not Path(args.dataset).is_absolute():
        check_hub("recipe_args.dataset", args.dataset, "dataset")
    elif not Path(args.dataset).is_dir():
        raise DataError(f"recipe_args.dataset = {args.dataset}: no such folder")


def rows_identity(
    args: RowArgs, columns: Mapping[str, str], embedded: EmbeddedRows | None, readers: Readers = NO_READERS
) -> dict[str, JsonValue]:
    """All that the rows are made from; known without heavy imports."""
    files = [
        [file_identity(path) for path in find_files(getattr(args, key), f"recipe_args.{key}", readers=readers)]
        for key in ("train_files", "validation_files")
    ]
    source: list[Any] = [*files, list(args.column_names)]
    if args.dataset:
        source += [args.dataset, args.dataset_config, args.train_split, args.validation_split]
        source.append(dataset_revision(args.dataset))
    elif not args.train_files:
        source += [embedded.name, embedded.key] if embedded else []
    limits: list[JsonValue] = [args.max_train_samples, args.max_validation_samples]
    return {
        "version": 2,
        "source": source,
        "columns": dict(canonical(columns)) if args.dataset or any(files) else list(canonical(columns)),
        "held out": [args.validation_fraction, args.split_seed],
        "limits": limits,
        "streaming": args.streaming,
    }


def load_rows(
    args: RowArgs,
    context: RecipeContext,
    columns: Mapping[str, str],
    embedded: EmbeddedRows | None,
    readers: Readers = NO_READERS,
) -> Splits:
    """The rows, with exactly the named columns, renamed: the key without `_column`. Written to the cache once.

    Raises:
        ConfigError: neither a dataset nor files are named, and the recipe has no embedded rows.
        DataError: the rows cannot be read, or there is none to train or to evaluate on.
    """

    def source() -> _Source:
        return _source(args, columns, embedded, readers)

    identity = rows_identity(args, columns, embedded, readers)
    key = {name: part for name, part in identity.items() if args.streaming or name != "limits"}
    folder = context.cache.folder("rows", key, lambda aside: _write(args, source(), aside, context))
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    validation = _limited(StoredRows(folder / "validation.arrow"), args.max_validation_samples, args.split_seed)
    if args.streaming:
        limit = facts.pop("limit")
        found = source()
        stream = RowStream(lambda: itertools.islice(_training_rows(args, found, limit), args.max_train_samples))
        return Splits(stream, validation, dict(identity), facts)
    train = _limited(StoredRows(folder / "train.arrow"), args.max_train_samples, args.split_seed)
    facts["train"]["rows"], facts["validation"]["rows"] = len(train), len(validation)
    return Splits(train, validation, dict(identity), facts)


def _limited(rows: StoredRows, most: int | None, seed: int) -> StoredRows:
    if most is None or most >= len(rows):
        return rows
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), most)))


# --- where rows come from ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Rows with canonical columns, from the first on each time."""

    name: str
    train: Callable[[], Iterator[Row]]
    validation: Callable[[], Iterator[Row]] | None
    features: Callable[[], datasets.Features | None] = lambda: None
    """Kinds of the columns, such as the names of labels, where the data states them."""


def _source(args: RowArgs, columns: Mapping[str, str], embedded: EmbeddedRows | None, readers: Readers) -> _Source:
    if args.dataset:
        found = _dataset_source(args, columns)
    elif args.train_files:
        found = _Source("recipe_args.train_files", _file_rows(args, "train_files", columns, readers), None)
    elif embedded is None:
        raise ConfigError("this recipe has no rows of its own; set recipe_args.train_files or recipe_args.dataset")
    else:
        found = _Source(embedded.name, embedded.make, embedded.validation)
    if args.validation_files:
        return replace(found, validation=_file_rows(args, "validation_files", columns, readers))
    return found


def _file_rows(args: RowArgs, key: str, columns: Mapping[str, str], readers: Readers) -> Callable[[], Iterator[Row]]:
    names = canonical(columns)

    def rows() -> Iterator[Row]:
        for path in find_files(getattr(args, key), f"recipe_args.{key}", readers=readers):
            check_columns([path], columns, f"recipe_args.{key}", args.column_names, readers)
            for row in read_rows(path, args.column_names, readers, list(names.values())):
                yield {name: row.get(column) for name, column in names.items()}

    return rows


def _dataset_source(args: RowArgs, columns: Mapping[str, str]) -> _Source:
    name = args.dataset
    assert name is not None
    train, held = choose_splits(args, dataset_splits(name, args.dataset_config))
    names = canonical(columns)

    def opened(split: str, streaming: bool = args.streaming) -> Any:
        rows = load_split(name, args.dataset_config, split, streaming)
        if rows.column_names is not None:
            check_named(rows.column_names, columns, f"recipe_args.dataset = {name}")
        return rows.select_columns(list(dict.fromkeys(names.values())))

    def rows(split: str) -> Iterator[Row]:
        for row in opened(split):
            yield {key: row[column] for key, column in names.items()}

    def features() -> datasets.Features | None:
        from datasets import Features

        stated = opened(train).features
        return Features({key: stated[column] for key, column in names.items()}) if stated else None

    validation = (lambda: rows(held)) if held else None
    return _Source(f"recipe_args.dataset = {name}", lambda: rows(train), validation, features)


def choose_splits(args: RowArgs, found: Sequence[str]) -> tuple[str, str | None]:
    """The splits of a dataset to train and to evaluate on, of those found; None: training rows are held out.

    Raises:
        DataError: it has no such split.
    """
    for key in ("train_split", "validation_split"):
        if (split := getattr(args, key)) is not None and split.split("[")[0] not in found:
            raise DataError(
                f"recipe_args.dataset = {args.dataset}: has no split {split!r}; it has {', '.join(found)}; "
                f"set recipe_args.{key}"
            )
    held = args.validation_split or next((each for each in VALIDATION_NAMES if each in found), None)
    return args.train_split, None if held == args.train_split else held


# --- splitting and writing ---------------------------------------------------------------------------------


def _hash(row: Row, seed: int) -> int:
    content = json.dumps([seed, row], sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _write(args: RowArgs, source: _Source, folder: Path, context: RecipeContext) -> None:
    """Write train.arrow (but of a stream), validation.arrow and facts.json.

    Rows are held out by a hash of what they hold, so that equal rows are on the same side and a stream can be split
    as it is read. Where the share is of so few rows that none is hit, the row with the least hash is held out.
    """
    context.progress.start("reading rows", None)
    limit = 0 if source.validation else _limit(args, source)
    features = source.features()
    facts: dict[str, Any] = {"limit": limit} if args.streaming else {}
    rows: Iterator[Row]
    if not args.streaming:
        rows = _training_rows(args, source, limit)
        facts["train"] = _write_split(rows, folder / "train.arrow", features, source.name, context)
    if source.validation:
        rows = source.validation()
        if args.validation_files and features:
            rows = _of_kinds(rows, features)
    else:
        rows = (row for row in source.train() if _hash(row, args.split_seed) < limit)
    if args.streaming:
        rows = itertools.islice(rows, args.max_validation_samples)
    facts["validation"] = _write_split(rows, folder / "validation.arrow", features, source.name, context)
    for split, found in facts.items():
        if split != "limit" and not found["rows"]:
            held = 0 if source.validation or split != "train" else facts["validation"]["rows"]
            why = f", for all {held} are held out: equal rows stay on one side; state recipe_args.validation_files"
            raise DataError(f"{source.name}: there is no row in its {split} data{why if held else ''}")
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    context.progress.finish()


def _of_kinds(rows: Iterator[Row], features: datasets.Features) -> Iterator[Row]:
    """Rows of files as the dataset has its own: numbers for text that holds them, and for the names of labels."""
    for row in rows:
        try:
            yield features.decode_example(features.encode_example(row))
        except (ValueError, TypeError) as error:
            raise DataError(f"recipe_args.validation_files: {short(error)}, in the row {row!r:.80}") from None


def _limit(args: RowArgs, source: _Source) -> int:
    """Rows with a hash below this are held out."""
    stated, least = int(args.validation_fraction * SCALE), SCALE
    for row in source.train():
        least = min(least, _hash(row, args.split_seed))
        if least < stated:
            return stated
    return least + 1


def _write_split(
    rows: Iterator[Row], path: Path, features: datasets.Features | None, where: str, context: RecipeContext
) -> dict[str, Any]:
    writer = TableWriter(path, where, features.arrow_schema if features else None)
    empty: dict[str, int] = {}
    for batch in in_batches(rows, BATCH_OF_ROWS):
        columns = {name: [row[name] for row in batch] for name in batch[0]}
        for name, values in columns.items():
            empty[name] = empty.get(name, 0) + sum(map(_is_empty, values))
        writer.write(table(columns, where, features.arrow_schema if features else None))
        context.progress.advance(len(batch))
    writer.close()
    return {"rows": writer.rows, "empty": empty}


def _is_empty(value: Any) -> bool:
    return value is None or (not value.strip() if isinstance(value, str) else value in ([], {}))


def _training_rows(args: RowArgs, source: _Source, limit: int) -> Iterator[Row]:
    return source.train() if not limit else (row for row in source.train() if _hash(row, args.split_seed) >= limit)
