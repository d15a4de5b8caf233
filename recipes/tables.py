"""Arrow files of rows: written batch by batch, read by index from the disk without being loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import DataError
from recipes.files import short

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow as pa


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
        import pyarrow as pa

        batch = batch.replace_schema_metadata(None)
        if self._schema is None:
            self._open(batch.schema)
        elif batch.schema != self._schema:
            with kinds_told(self._where):
                self._widen(pa.unify_schemas([self._schema, batch.schema], promote_options="permissive"))
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


def _as(batch: pa.Table, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    return batch if batch.schema == schema else pa.Table.from_pylist(batch.to_pylist(), schema)


def table(columns: Mapping[str, Any], where: str, stated: pa.Schema | None = None) -> pa.Table:
    """Columns of values as a table, of the kinds stated or of those that the values have.

    Raises:
        DataError: a column whose values are of kinds that do not go together.
    """
    import pyarrow as pa

    arrays = {}
    for name, values in columns.items():
        with kinds_told(f"{where}: column {name!r}"):
            arrays[name] = pa.array(values, stated.field(name).type if stated is not None else None)
    return pa.table(arrays)


@contextlib.contextmanager
def kinds_told(where: str) -> Iterator[None]:
    """Makes of Arrow's complaints about kinds of values a `DataError`."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
        raise DataError(f"{where}: holds values of kinds that do not go together: {short(error)}") from None


def open_table(path: Path) -> datasets.Dataset:
    """The rows of a file, memory-mapped."""
    from datasets import Dataset

    opened = Dataset.from_file(str(path))
    return opened if opened.column_names else Dataset.from_dict({})


def list_lengths(
    rows: datasets.Dataset, columns: Sequence[str] = ("input_ids",)
) -> np.ndarray[Any, np.dtype[np.integer[Any]]]:
    """How many items the lists in these columns have, in each row together; shape `(rows,)`. No list is read."""
    import numpy as np
    import pyarrow.compute as pc

    found = np.zeros(len(rows), np.int32)
    if len(rows):  # else there are no columns
        lists = rows.select_columns(list(columns)).with_format("arrow")[:]
        for column in columns:
            found += pc.list_value_length(lists.column(column)).to_numpy().astype(np.int32)
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
