"""Text from where a user has it: local text, csv, json or parquet files, or a dataset on the Hub.

Yields *pieces*: a text, and whether a document ends with it. Checks that need no heavy import come first, so that
`shoal plan` can make them.
"""

from __future__ import annotations

import csv
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.errors import DataError
from launch.topology import hub_is_off

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
"""What a file is read as, by the end of its name."""

HUB_SECONDS = 2.0
"""How long to try to reach the Hub before saying that it cannot be reached."""

Documents = Literal["auto", "row", "paragraph", "file"]


@dataclass(frozen=True)
class Piece:
    """Some text, and whether a document ends with it."""

    text: str
    ends_document: bool


def check_files(paths: tuple[str, ...], text_column: str, key: str) -> None:
    """See that files are there, not empty, of a known kind, and have the text column.

    Raises:
        DataError: names the file, what it holds and what is needed.
    """
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise DataError(f"{key}: {path}: no such file")
        if not path.is_file():
            raise DataError(f"{key}: {path}: is not a file; name the files, for example {path}/part-0.txt")
        if path.stat().st_size == 0:
            raise DataError(f"{key}: {path}: is empty")
        if path.suffix not in FORMATS:
            raise DataError(f"{key}: {path}: cannot tell what it holds; a name ends in {', '.join(FORMATS)}")
        try:
            columns = _columns(path)
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{key}: {path}: cannot be read as {FORMATS[path.suffix]}: {short(error)}") from None
        if columns is not None and text_column not in columns:
            raise DataError(
                f"{key}: {path}: has no column {text_column!r}; it has {', '.join(columns) or 'none'}; "
                "set recipe_args.text_column"
            )


def _columns(path: Path) -> list[str] | None:
    """Column names from the beginning of a file; None for plain text."""
    kind = FORMATS[path.suffix]
    if kind == "text":
        return None
    if kind == "parquet":
        from pyarrow import parquet

        return list(parquet.read_schema(path).names)
    with path.open(encoding="utf-8-sig", newline="") as file:
        if kind == "csv":
            return next(csv.reader(file, delimiter=_delimiter(path)), [])
        if path.suffix == ".jsonl":
            first: Any = json.loads(next(line for line in file if line.strip()))
        else:
            first = _first_json_row(file.read())
    if not isinstance(first, dict):
        raise ValueError('rows must be objects such as {"text": "…"}')
    return list(first)


def _first_json_row(text: str) -> Any:
    """The first row of a JSON file: of a list of objects, or of objects one after the other."""
    content, _ = json.JSONDecoder().raw_decode(text.lstrip())
    return content[0] if isinstance(content, list) and content else content


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","


def read_files(paths: tuple[str, ...], text_column: str, documents: Documents) -> Iterator[Piece]:
    """The pieces of local files, one after the other, in constant memory.

    Raises:
        DataError: a file turns out not to be what its name says.
    """
    for name in paths:
        path = Path(name)
        unit = ("file" if FORMATS[path.suffix] == "text" else "row") if documents == "auto" else documents
        try:
            yield from _as_documents(_read_rows(path, text_column), unit)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 text: {short(error)}") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as {FORMATS[path.suffix]}: {short(error)}") from None


def _read_rows(path: Path, text_column: str) -> Iterator[str]:
    if FORMATS[path.suffix] == "text":
        with path.open(encoding="utf-8-sig") as file:
            yield from file  # lines, with their ends
        return
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind = FORMATS[path.suffix]
    options: dict[str, Any] = {"sep": _delimiter(path)} if kind == "csv" else {}
    try:
        rows = load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
        for row in rows.select_columns([text_column]):
            yield _as_text(row[text_column], path, text_column)
    except DatasetGenerationError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def _as_text(value: Any, where: Path | str, text_column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: column {text_column!r} holds {type(value).__name__} ({value!r:.40}), not text")
    return value


def _as_documents(rows: Iterator[str], unit: str) -> Iterator[Piece]:
    """Mark where documents end. Empty rows are no documents of their own."""
    pending: str | None = None
    for row in rows:
        if unit == "row":
            text = row.rstrip("\r\n")
            if text.strip():
                yield Piece(text, ends_document=True)
            continue
        if unit == "paragraph" and not row.strip():
            if pending is not None:
                yield Piece(pending, ends_document=True)
                pending = None
            continue
        if pending is not None:
            yield Piece(pending, ends_document=False)
        pending = row
    if pending is not None:
        yield Piece(pending, ends_document=True)


def read_dataset(name: str, config: str | None, split: str, text_column: str, documents: Documents) -> Iterator[Piece]:
    """The pieces of one split of a dataset on the Hub (downloaded once, then read from the cache).

    Raises:
        DataError: it cannot be loaded, or has no such column.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # the Hub, the network and the dataset's own files fail in many ways
        raise DataError(f"recipe_args.dataset = {name}: split {split!r} cannot be loaded: {short(error)}") from error
    if text_column not in rows.column_names:
        raise DataError(
            f"recipe_args.dataset = {name}: has no column {text_column!r}; it has {', '.join(rows.column_names)}; "
            "set recipe_args.text_column"
        )
    texts = (_as_text(row[text_column], name, text_column) for row in rows.select_columns([text_column]))
    yield from _as_documents(texts, "row" if documents == "auto" else documents)


def dataset_splits(name: str, config: str | None) -> list[str]:
    """Names of a hub dataset's splits.

    Raises:
        DataError: they cannot be had.
    """
    from datasets import get_dataset_split_names

    try:
        return list(get_dataset_split_names(name, config))
    except Exception as error:
        raise DataError(f"recipe_args.dataset = {name}: cannot be loaded: {short(error)}") from error


def check_hub(key: str, name: str, kind: Literal["model", "dataset"]) -> None:
    """See, within about two seconds, that a name on the Hub is cached or can be reached.

    Raises:
        DataError: neither, with how to fetch it elsewhere or which local form to use.
    """
    if _is_cached(name, kind):
        return
    if hub_is_off():
        why = "the Hub is switched off (HF_HUB_OFFLINE)"
    elif not hub_answers():
        why = f"the Hub did not answer within {HUB_SECONDS:g} s"
    else:
        return
    local = (
        "recipe_args.train_files=<file>" if kind == "dataset" else f"{key}=<folder with config.json and tokenizer.json>"
    )
    flag = " --repo-type dataset" if kind == "dataset" else ""
    raise DataError(
        f"{key} = {name}: not a local folder, not in the cache, and {why}; fetch it where there is a network "
        f"(`hf download {name}{flag}`) and copy the cache, or use {local}"
    )


def _is_cached(name: str, kind: Literal["model", "dataset"]) -> bool:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())


def hub_answers() -> bool:
    """Whether the Hub can be reached within HUB_SECONDS."""
    from urllib.parse import urlparse

    from huggingface_hub import constants

    address = urlparse(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=HUB_SECONDS):
            return True
    except OSError:
        return False


def short(error: BaseException) -> str:
    """The first line of an error, cut to a readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
