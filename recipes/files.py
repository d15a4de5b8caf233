"""Rows from local files: which files a user means, what is in them, and their rows one after the other.

A row is a dict from column to value. Values of csv, tsv and plain text are text, whatever they look like, because
such files state no kinds; those of JSON and parquet keep theirs. Nothing here imports more than the standard library,
but pyarrow for parquet, so that `shoal plan` can look at files too.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import glob
import gzip
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from launch.errors import DataError

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
"""What a file is read as, by the end of its name; all but parquet may be compressed: .jsonl.gz."""

ABOUT = ("README", "LICENSE", "LICENCE", "CHANGELOG")
"""Names of files that describe a folder and are none of its data."""

ROWS_LOOKED_AT = 20
"""Rows at the beginning of a JSON file of which the columns are taken: not every row need have them all."""

Row = dict[str, Any]
Reader = Callable[[Path], Iterator[Row]]
Readers = Mapping[str, Reader]
"""A recipe's own readers by the end of a name, such as .json."""

NO_READERS: Readers = MappingProxyType({})


# --- which files -------------------------------------------------------------------------------------------


def suffix_of(path: Path) -> str:
    """The end of a name that tells what it holds, without the .gz of a compressed file."""
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix


def format_of(path: Path) -> str | None:
    """What a file is read as; None: its name does not tell."""
    found = FORMATS.get(suffix_of(path))
    return None if found == "parquet" and path.suffix == ".gz" else found


def find_files(
    names: Sequence[str], key: str, *, of_any_kind: bool = False, readers: Readers = NO_READERS
) -> tuple[Path, ...]:
    """The files meant by names of files, folders and globs, in the order given; those of one name in sorted order.

    Raises:
        DataError: a name that means no file, an empty file, or one of unknown kind.
    """
    kinds = ", ".join(dict.fromkeys((*FORMATS, *readers)))
    found = [path for name in names for path in _find(name, key, kinds, readers)]
    for path in found:
        if path.stat().st_size == 0:
            raise DataError(f"{key}: {path}: is empty")
        if not (of_any_kind or _is_known(path, readers)):
            raise DataError(
                f"{key}: {path}: cannot tell what it holds; a name ends in {kinds}, and all but .parquet may be "
                "compressed (.gz)"
            )
    return tuple(found)


def _is_known(path: Path, readers: Readers) -> bool:
    return suffix_of(path) in readers or format_of(path) is not None


def _find(name: str, key: str, kinds: str, readers: Readers) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        files = (each for each in sorted(path.rglob("*")) if each.is_file() and _is_known(each, readers))
        found = [each for each in files if not _is_about(each.relative_to(path))]
        if not found:
            raise DataError(f"{key}: {path}: holds no file whose name ends in {kinds}")
        return found
    if path.exists() or not glob.has_magic(name):
        if not path.exists():
            raise DataError(f"{key}: {path}: no such file")
        return [path]
    matches = [Path(each) for each in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207  (the pattern is absolute)
    found = [each for each in matches if each.is_file()]
    if not found:
        raise DataError(f"{key}: {name}: matches no file")
    return found


def _is_about(path: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return hidden or path.name.split(".")[0].upper() in ABOUT


# --- what is in them ---------------------------------------------------------------------------------------


def check_columns(
    paths: Sequence[Path],
    columns: Mapping[str, str],
    key: str,
    names: Sequence[str] | None = None,
    readers: Readers = NO_READERS,
) -> None:
    """See that each file can be read and has the columns; `columns`: the key that names a column -> the column.

    `names` are those of files without a header; None where a recipe has no key for that.

    Raises:
        DataError: names the file, the columns it has, the nearest one and the key to set.
    """
    for path in paths:
        try:
            found = columns_of(path, names or (), readers)
        except DataError as error:
            raise DataError(f"{key}: {error}") from None
        bare = names == () and format_of(path) in ("csv", "tsv") and suffix_of(path) not in readers
        hint = ", or recipe_args.column_names if that is a row and the file has no header" if bare else ""
        check_named(found, columns, f"{key}: {path}", hint)


def check_named(found: Sequence[str], columns: Mapping[str, str], where: str, hint: str = "") -> None:
    """See that columns are among those found; `hint` says what else may be the matter.

    Raises:
        DataError: one is not.
    """
    for key, column in columns.items():
        if column not in found:
            close = difflib.get_close_matches(column, found, n=1)
            meant = f", perhaps to {close[0]!r}" if close else ""
            raise DataError(
                f"{where}: has no column {column!r}; it has {', '.join(found) or 'none'}; "
                f"set recipe_args.{key}{meant}{hint}"
            )


def columns_of(path: Path, names: Sequence[str] = (), readers: Readers = NO_READERS) -> list[str]:
    """Names of a file's columns, from its beginning.

    Raises:
        DataError: it cannot be read.
    """
    if format_of(path) in ("csv", "tsv") and suffix_of(path) not in readers:
        with _told(path):
            return list(names) or next(_fields(path))[1]
    if format_of(path) == "parquet" and suffix_of(path) not in readers:
        from pyarrow import parquet

        with _told(path):
            return list(parquet.read_schema(path).names)
    rows = list(itertools.islice(read_rows(path, names, readers), ROWS_LOOKED_AT))
    if not rows:
        raise DataError(f"{path}: holds no row")
    return list(dict.fromkeys(column for row in rows for column in row))


# --- rows --------------------------------------------------------------------------------------------------


def read_rows(
    path: Path, names: Sequence[str] = (), readers: Readers = NO_READERS, columns: Sequence[str] | None = None
) -> Iterator[Row]:
    """The rows of a file. `names`: the columns of a csv or tsv file that has no header; `columns`: those wanted.

    Raises:
        DataError: names the file, and the line where it is known.
    """
    with _told(path):
        if reader := readers.get(suffix_of(path)):
            yield from reader(path)
            return
        match format_of(path):
            case "text":
                yield from ({"text": line.rstrip("\r\n")} for line in read_lines(path))
            case "csv" | "tsv":
                yield from _table_rows(path, names)
            case "json":
                yield from _json_rows(path)
            case _:
                yield from _parquet_rows(path, columns)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Makes of what goes wrong in reading a file a `DataError` with the file's name."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: {short(error)}") from None
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as {format_of(path) or 'text'}: {short(error)}") from None


def open_text(path: Path, newline: str | None = None) -> IO[str]:
    """A text file, compressed or not, without a byte order mark."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with their ends.

    Raises:
        DataError: it is not UTF-8 text.
    """
    with _told(path), open_text(path) as file:
        yield from file


def parallel_rows(sources: Sequence[Path], targets: Sequence[Path]) -> Iterator[Row]:
    """Rows `{"source": line, "target": line}` of files whose lines belong together, in pairs of files.

    Raises:
        DataError: other numbers of files or lines.
    """
    if len(sources) != len(targets):
        raise DataError(f"{len(sources)} files of source lines, but {len(targets)} of target lines; they go in pairs")
    for source, target in zip(sources, targets, strict=True):
        pairs = itertools.zip_longest(read_lines(source), read_lines(target))
        for number, (line, other) in enumerate(pairs, start=1):
            if line is None or other is None:
                short_file, long_file = (source, target) if line is None else (target, source)
                raise DataError(f"{short_file}: ends after line {number - 1}, but {long_file} goes on")
            yield {"source": line.rstrip("\r\n"), "target": other.rstrip("\r\n")}


def _table_rows(path: Path, names: Sequence[str]) -> Iterator[Row]:
    lines = _fields(path)
    header = list(names) or next(lines, (0, []))[1]
    for number, fields in lines:
        if len(fields) != len(header):
            says = "recipe_args.column_names" if names else "the first line"
            raise DataError(
                f"{path}:{number}: has {len(fields)} fields, but {says} names {len(header)}: {', '.join(header)}"
            )
        yield dict(zip(header, fields, strict=True))


def _fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row of a csv or tsv file, with the line it ends on; blank lines are none."""
    csv.field_size_limit(sys.maxsize)  # a field may be a whole document
    with open_text(path, newline="") as file:
        if format_of(path) == "tsv":
            # Many tsv files hold quotation marks that quote nothing, so that a quoted field never goes on over lines.
            rows = ((number, _tsv_fields(line.rstrip("\r\n"))) for number, line in enumerate(file, start=1))
            yield from ((number, fields) for number, fields in rows if fields != [""])
            return
        reader = csv.reader(file, strict=True)
        try:
            yield from ((reader.line_num, fields) for fields in reader if fields)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: cannot be read as csv: {short(error)}") from None


def _tsv_fields(line: str) -> list[str]:
    """A line's fields, unquoted where all that is quoted is quoted as in csv."""
    if '"' in line:
        try:
            return next(csv.reader([line], delimiter="\t", strict=True))
        except csv.Error:
            pass
    return line.split("\t")


def _json_rows(path: Path) -> Iterator[Row]:
    """Of objects line by line, else of one list of objects or of objects one after the other."""
    with open_text(path) as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        first = next(lines, None)
        if first is None:
            return
        if suffix_of(path) == ".jsonl" or _is_object(first[1]):
            for number, line in itertools.chain([first], lines):
                try:
                    yield _as_row(json.loads(line))
                except ValueError as error:
                    raise DataError(f"{path}:{number}: cannot be read as json: {short(error)}") from None
            return
    with open_text(path) as file:
        content = file.read().strip()
    decoder, position = json.JSONDecoder(), 0
    while position < len(content):
        value, position = decoder.raw_decode(content, position)
        yield from map(_as_row, value if isinstance(value, list) else [value])
        while content[position : position + 1].isspace():
            position += 1


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _as_row(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError('rows must be objects such as {"text": "…"}')
    return value


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(1000, columns=list(dict.fromkeys(columns)) if columns else None):
            yield from batch.to_pylist()


def short(error: BaseException) -> str:
    """The first line of an error, cut to a readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
