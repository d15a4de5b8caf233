"""Arrow files of rows: written batch by batch, read by index from the disk without being loaded.

Values with dicts in them (messages, answers) are kept as JSON. Arrow's own kind for dicts would give all dicts of a
column the keys of any, and take no key that is a number here and a text there.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from launch.errors import DataError
from recipes.files import short

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    Numbers = np.ndarray[Any, np.dtype[np.integer[Any]]]

ROWS_AT_ONCE = 1000
"""Rows read together where one after the other is asked for."""


class TableWriter:
    """Writes batches of rows to one file, whose columns take the widest kind that any batch needs.

    A batch that needs a wider kind than those before it (a number with a point after whole ones, a list after empty
    ones) has the file written once more.
    """

    def __init__(self, path: Path, where: str, stated: pa.Schema | None = None) -> None:
        self._path, self._where = path, where
        self._metadata = stated.metadata if stated is not None else None
        self._schema: pa.Schema | None = None
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None
        self.rows = 0

    def write(self, batch: pa.Table) -> None:
        """Add rows.

        Raises:
            DataError: a column whose values are of kinds that do not go together.
        """
        batch = batch.replace_schema_metadata(None)
        if self._schema is None:
            self._open(batch.schema)
        elif batch.schema != self._schema:
            with kinds_told(self._where):
                self._widen(_unified(self._schema, batch.schema))
            batch = _as(batch, self._schema)
        assert self._writer is not None
        self._writer.write_table(batch.replace_schema_metadata(self._metadata))
        self.rows += len(batch)

    def close(self) -> None:
        """Finish the file; one without any row has no columns."""
        import pyarrow as pa

        if self._writer is None:
            self._open(pa.schema([]))
        assert self._writer is not None
        self._writer.close()

    def _open(self, schema: pa.Schema) -> None:
        import pyarrow as pa

        self._schema = schema
        self._writer = pa.ipc.new_stream(str(self._path), schema.with_metadata(self._metadata))

    def _widen(self, schema: pa.Schema) -> None:
        import pyarrow as pa

        if schema == self._schema:
            return
        assert self._writer is not None
        self._writer.close()
        before = self._path.with_suffix(".before")
        self._path.rename(before)
        self._open(schema)
        with pa.memory_map(str(before)) as source:
            for batch in pa.ipc.open_stream(source):
                wide = _as(pa.Table.from_batches([batch]), schema)
                self._writer.write_table(wide.replace_schema_metadata(self._metadata))
        before.unlink()


def _unified(one: pa.Schema, other: pa.Schema) -> pa.Schema:
    """All columns of both, each of the narrowest kind for the values of both."""
    import pyarrow as pa

    kept_as_json = {field.name for schema in (one, other) for field in schema if _is_json(field.type)}
    widest = [pa.schema([field for field in each if field.name not in kept_as_json]) for each in (one, other)]
    kinds = {field.name: field.type for field in pa.unify_schemas(widest, promote_options="permissive")}
    names = dict.fromkeys([*one.names, *other.names])
    return pa.schema([(name, kinds.get(name) or pa.json_()) for name in names])


def _as(batch: pa.Table, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    def column(name: str, kind: pa.DataType) -> Any:
        if name not in batch.column_names:
            return pa.nulls(len(batch), kind)
        found = batch.column(name)
        return found if found.type == kind else _array(_values(found), kind)

    return pa.table([column(field.name, field.type) for field in schema], schema=schema)


def table(columns: Mapping[str, Any], where: str, stated: pa.Schema | None = None) -> pa.Table:
    """Columns of values as a table, of the kinds stated or of those that the values have.

    Raises:
        DataError: a column whose values are of kinds that do not go together.
    """
    import pyarrow as pa

    arrays = {}
    for name, values in columns.items():
        with kinds_told(f"{where}: column {name!r}"):
            kind = pa.json_() if any(map(_holds_dicts, values)) else stated.field(name).type if stated else None
            arrays[name] = _array(values, kind)
    return pa.table(arrays)


def _array(values: Sequence[Any], kind: pa.DataType | None) -> pa.Array:
    import pyarrow as pa

    if kind is None or not _is_json(kind):
        return pa.array(values, kind)
    written = [None if each is None else json.dumps(each, ensure_ascii=False, default=_as_text) for each in values]
    return pa.JsonArray.from_storage(pa.json_(), pa.array(written, pa.string()))


def _as_text(value: Any) -> str:
    """What JSON has no form for, as `str` writes it: times and exact decimals of parquet files."""
    import pyarrow as pa

    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)):
        return str(value)
    raise pa.ArrowTypeError(f"{type(value).__name__} within a dict")


def _is_json(kind: pa.DataType) -> bool:
    """Whether it is JSON, or holds it: as `datasets` has dicts of different kinds."""
    return "arrow.json" in str(kind)


def _holds_dicts(value: Any) -> bool:
    """Whether it is a dict, or a list of them; the first item tells, for lists of numbers are long."""
    while isinstance(value, list):
        value = next((item for item in value if item is not None), None)
    return isinstance(value, dict)


@contextlib.contextmanager
def kinds_told(where: str) -> Iterator[None]:
    """Makes of Arrow's complaints about kinds of values a `DataError`."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
        raise DataError(f"{where}: holds values of kinds that do not go together: {short(error)}") from None


class StoredRows:
    """Rows of a file that a `TableWriter` wrote, memory-mapped: a list of dicts of Python values, read as it is asked.

    It answers as `datasets.Dataset` does: `rows[3]` is a row, `rows[2:5]` holds lists by column, `rows["text"]` is a
    column's. That one would have each rank import pandas and more than it needs: 60 MB and a third of a second.
    """

    def __init__(
        self,
        path: Path,
        names: Sequence[str] | None = None,
        chosen: Sequence[int] | None = None,
        added: Mapping[str, Any] | None = None,
    ) -> None:
        """Of the columns those with these names, of the rows those chosen, with columns added; None: all, all, none."""
        import numpy as np
        import pyarrow as pa

        self._how = (path, names, chosen, added)
        with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
            table = stream.read_all()
        for name, values in (added or {}).items():
            numbers = pa.py_buffer(np.ascontiguousarray(values, dtype=np.int64))
            # `pa.array` would import pandas to see whether they are of its kind.
            table = table.append_column(name, [pa.Array.from_buffers(pa.int64(), len(values), [None, numbers])])
        self._table: pa.Table = table if names is None else table.select(list(names))
        self._batches: list[pa.RecordBatch] = self._table.to_batches()
        self._starts = np.cumsum([0, *map(len, self._batches)], dtype=np.int64)
        self._chosen = None if chosen is None else np.asarray(chosen, dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, which maps the file itself."""
        return StoredRows, self._how

    @property
    def schema(self) -> pa.Schema:
        """Kinds of the columns as they are stored; those with dicts in them as JSON."""
        return self._table.schema

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, in their order."""
        return list(self._table.column_names)

    def __len__(self) -> int:
        """Number of rows."""
        return self._table.num_rows if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: slice) -> dict[str, list[Any]]: ...
    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    def __getitem__(self, key: int | slice | str) -> Any:
        """A row, some rows by column, or a column.

        Raises:
            IndexError: there is no such row.
            KeyError: there is no such column.
        """
        if isinstance(key, str):
            return _values(self.column(key))
        if isinstance(key, slice):
            return {name: _values(column) for name, column in self._taken(range(len(self))[key]).items()}
        return self.__getitems__([range(len(self))[key]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Many rows at once, which takes less than one after the other."""
        columns = {name: _values(column) for name, column in self._taken(indices).items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows from the first on."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self.__getitems__(range(len(self))[start : start + ROWS_AT_ONCE])

    def column(self, name: str) -> pa.ChunkedArray:
        """A column as it is stored."""
        column = self._table.column(name)
        return column if self._chosen is None else column.take(self._chosen)

    def numbers(self, name: str) -> Numbers:
        """The whole numbers in a column, or in its lists one after the other; int64."""
        import pyarrow as pa

        chunks = self.column(name).chunks if len(self) else []  # without rows there are no columns
        return _joined([chunk.flatten() if pa.types.is_list(chunk.type) else chunk for chunk in chunks])

    def select(self, chosen: Sequence[int]) -> StoredRows:
        """Some of the rows."""
        path, names, before, added = self._how
        return StoredRows(path, names, chosen if before is None else [before[index] for index in chosen], added)

    def select_columns(self, names: Sequence[str]) -> StoredRows:
        """Some of the columns."""
        path, _, chosen, added = self._how
        return StoredRows(path, names, chosen, added)

    def with_column(self, name: str, values: Any) -> StoredRows:
        """With one column more, of whole numbers, one for each row of the file; held in memory."""
        path, names, chosen, added = self._how
        assert chosen is None and names is None
        return StoredRows(path, None, None, {**(added or {}), name: values})

    def _taken(self, indices: Sequence[int]) -> dict[str, pa.ChunkedArray]:
        import numpy as np
        import pyarrow as pa

        if self._chosen is None and isinstance(indices, range) and indices.step == 1:
            taken = self._table.slice(indices.start, len(indices))
        else:  # `Table.take` would be ten times as slow
            places = np.asarray(indices, dtype=np.int64)
            places = places if self._chosen is None else self._chosen[places]
            numbers = np.searchsorted(self._starts, places, side="right") - 1
            pieces = [
                self._batches[number].slice(place, 1)
                for place, number in zip((places - self._starts[numbers]).tolist(), numbers.tolist(), strict=True)
            ]
            taken = pa.Table.from_batches(pieces, self.schema)
        return dict(zip(taken.column_names, taken.columns, strict=True))


def _values(column: pa.ChunkedArray) -> list[Any]:
    values: list[Any] = column.to_pylist()
    if _is_json(column.type):
        return [None if value is None else json.loads(value) for value in values]
    return values


def _joined(chunks: Sequence[pa.Array]) -> Numbers:
    """Arrays of numbers, none of them null; `to_numpy` would import pandas."""
    import numpy as np
    import pyarrow as pa

    numbers = [np.from_dlpack(chunk) for chunk in chunks if not pa.types.is_null(chunk.type)]
    return np.concatenate([np.zeros(0, np.int64), *numbers])


def class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """What a dataset calls the numbers in a column, or in its lists (`datasets.ClassLabel`); none where it does not."""
    stated = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    kind = stated.get("info", {}).get("features", {}).get(column, {})
    kind = kind["feature"] if kind.get("_type") in ("List", "LargeList", "Sequence") else kind
    return tuple(kind["names"]) if kind.get("_type") == "ClassLabel" else ()


def list_lengths(rows: Any, columns: Sequence[str] = ("input_ids",)) -> Numbers:
    """How many items the lists in these columns of `StoredRows` have, in each row together; shape `(rows,)`.

    No list is read.
    """
    import numpy as np
    import pyarrow.compute as pc

    found = np.zeros(len(rows), np.int32)
    if len(rows):  # else there are no columns
        for column in columns:
            found += _joined(pc.list_value_length(rows.column(column)).chunks).astype(np.int32)
    return found


def in_batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Rows in lists of `size`, the last one shorter."""
    batch: list[Any] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
