"""Text from where a user has it: local text, csv, json or parquet files, or a dataset on the Hub.

Yields *pieces*: a text, and whether a document ends with it. Checks that need no heavy import come first, so that
`shoal plan` can make them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue

from launch.cache import file_identity
from launch.errors import DataError
from launch.hub import hub_trouble
from recipes.files import check_columns, check_named, find_files, format_of, read_lines, read_rows, short

Documents = Literal["auto", "row", "paragraph", "file"]

CHARACTERS = 32_000
"""Of a piece, about: lines are not tokenised one by one, for that takes more than twice as long as 32,000 characters at
once, and no tokens would reach over the end of a line, as they do in what pretrained models have read.
"""


@dataclass(frozen=True)
class Piece:
    """Some text, and whether a document ends with it."""

    text: str
    ends_document: bool


def check_files(names: tuple[str, ...], text_column: str, key: str) -> None:
    """See that files are there, not empty, of a known kind, and have the text column.

    Raises:
        DataError: names the file, what it holds and what is needed.
    """
    tables = [path for path in find_files(names, key) if format_of(path) != "text"]
    check_columns(tables, {"text_column": text_column}, key)


def read_files(paths: tuple[Path, ...], text_column: str, documents: Documents) -> Iterator[Piece]:
    """The pieces of local files, one after the other, in constant memory.

    Raises:
        DataError: a file turns out not to be what its name says.
    """
    for path in paths:
        is_text = format_of(path) == "text"
        unit = ("file" if is_text else "row") if documents == "auto" else documents
        rows = read_lines(path) if is_text else _texts(path, text_column)  # lines keep their ends
        yield from _as_documents(rows, unit)


def _texts(path: Path, text_column: str) -> Iterator[str]:
    for row in read_rows(path, columns=[text_column]):
        yield _as_text(row.get(text_column), path, text_column)


def _as_text(value: Any, where: Path | str, text_column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: column {text_column!r} holds {type(value).__name__} ({value!r:.40}), not text")
    return value


def _as_documents(rows: Iterator[str], unit: str) -> Iterator[Piece]:
    """Mark where documents end. Empty rows are no documents of their own; lines of one document are put together."""
    pending: list[str] = []
    size = 0
    for row in rows:
        if unit == "row":
            text = row.rstrip("\r\n")
            if text.strip():
                yield Piece(text, ends_document=True)
            continue
        ends_document = unit == "paragraph" and not row.strip()
        if pending and (ends_document or _may_part(pending[-1], row, size)):
            yield Piece("".join(pending), ends_document)
            pending, size = [], 0
        if not ends_document:
            pending.append(row)
            size += len(row)
    if pending:
        yield Piece("".join(pending), ends_document=True)


def _may_part(before: str, after: str, size: int) -> bool:
    """Whether a document of so many characters may go on in another piece between two of its rows.

    Lines part where both have text and nothing but the end of the line is between, for there the usual tokenizers have
    no token that reaches from one to the other. A text that has no such place is parted at the end of some line.
    """
    if not before.endswith("\n"):  # a row of a table, which goes with nothing
        return True
    if size < CHARACTERS:
        return False
    return bool(before[-2:-1].strip() and after[:1].strip()) or size >= 2 * CHARACTERS


def read_dataset(name: str, config: str | None, split: str, text_column: str, documents: Documents) -> Iterator[Piece]:
    """The pieces of one split of a dataset on the Hub (downloaded once, then read from the cache).

    Raises:
        DataError: it cannot be loaded, or has no such column.
    """
    rows = load_split(name, config, split)
    check_named(rows.column_names, {"text_column": text_column}, f"recipe_args.dataset = {name}")
    texts = (_as_text(row[text_column], name, text_column) for row in rows.select_columns([text_column]))
    yield from _as_documents(texts, "row" if documents == "auto" else documents)


def load_split(name: str, config: str | None, split: str, streaming: bool = False) -> Any:
    """One split of a dataset on the Hub or in a folder, as `datasets` has it.

    Raises:
        DataError: it cannot be loaded.
    """
    from datasets import load_dataset, load_from_disk

    try:
        if _is_saved(name):
            return load_from_disk(name)[split]
        return load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # the Hub, the network and the dataset's own files fail in many ways
        raise DataError(f"recipe_args.dataset = {name}: split {split!r} cannot be loaded: {short(error)}") from error


def dataset_splits(name: str, config: str | None) -> list[str]:
    """Names of a dataset's splits.

    Raises:
        DataError: they cannot be had.
    """
    from datasets import get_dataset_split_names, load_from_disk

    try:
        return list(load_from_disk(name) if _is_saved(name) else get_dataset_split_names(name, config))
    except Exception as error:
        raise DataError(f"recipe_args.dataset = {name}: cannot be loaded: {short(error)}") from error


def _is_saved(name: str) -> bool:
    """Whether a folder was written by `DatasetDict.save_to_disk`."""
    return (Path(name) / "dataset_dict.json").is_file()


def dataset_revision(name: str) -> JsonValue:
    """What changes when a dataset changes: the files of a folder, or the newest commit of a Hub dataset in the cache.

    None: it is not in the cache yet.
    """
    if Path(name).is_dir():
        return [file_identity(path) for path in sorted(Path(name).rglob("*")) if path.is_file()]
    snapshots = _snapshots(name, "dataset")
    return max(snapshots, key=lambda path: path.stat().st_mtime_ns).name if snapshots else None


def check_hub(key: str, name: str, kind: Literal["model", "dataset"]) -> None:
    """See, within about two seconds, that a name on the Hub is cached or can be reached.

    Raises:
        DataError: neither, with how to fetch it elsewhere or which local form to use.
    """
    if _snapshots(name, kind):
        return
    why = hub_trouble(f"/api/{kind}s/{name}")
    if not why:
        return
    local = (
        "recipe_args.train_files=<file>" if kind == "dataset" else f"{key}=<folder with config.json and tokenizer.json>"
    )
    flag = " --repo-type dataset" if kind == "dataset" else ""
    raise DataError(
        f"{key} = {name}: not a local folder, not in the cache, and {why}; fetch it where there is a network "
        f"(`hf download {name}{flag}`) and copy the cache, or use {local}"
    )


def _snapshots(name: str, kind: Literal["model", "dataset"]) -> list[Path]:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    return list(folder.iterdir()) if folder.is_dir() else []


def cached_file(name: str, file: str) -> Path | None:
    """A file of a model on the Hub, where it is in the cache."""
    found = (snapshot / file for snapshot in _snapshots(name, "model"))
    return next((path for path in found if path.is_file()), None)
