"""Features of rows: made batch by batch, in several processes, and kept as Arrow files in the cache."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from launch.errors import DataError
from launch.recipe import RecipeContext
from launch.topology import read_machine, tokenizers_without_threads
from recipes.tables import StoredRows, TableWriter, in_batches, table

if TYPE_CHECKING:
    from recipes.rows import Splits

Columns = dict[str, list[Any]]
Encode = Callable[[Columns], Columns]

BATCH_OF_ROWS = 250
"""Rows encoded at once."""

MOST_PROCESSES = 8
FEW_ROWS = 10_000
"""Rows for which one process is enough unless more are asked for.

A fast tokenizer in one process uses all cores by threads, but makes its lists of numbers in one. Measured with GPT-2's
on 29,000 pairs of captions and two cores: 1.1 to 1.7 s in one process, 1.2 to 2.0 s in two. So processes are for more
cores and rows than that, and for functions in Python.
"""


def encode_rows(
    splits: Splits,
    context: RecipeContext,
    name: str,
    encode: Encode,
    identity: JsonValue,
    processes: int | None,
    validation_encode: Encode | None = None,
) -> Splits:
    """What `encode` makes of the rows, batch by batch, in their order; a row may become several samples or none.

    `encode` gets columns of a batch and returns columns of features; `identity` is all that it depends on. It may be
    a closure: processes are forked. The features of a stream are made as it is read.

    Raises:
        RuntimeError: a process was killed. What `encode` raises arrives as it is.
    """
    from recipes.rows import RowStream

    of_validation = validation_encode or encode
    parts = {"validation": (splits.validation, of_validation)}
    if not isinstance(splits.train, RowStream):
        parts = {"train": (splits.train, encode), **parts}

    def build(folder: Path) -> None:
        sizes = {}
        for split, (rows, function) in parts.items():
            context.progress.start(f"tokenising {split} rows", len(rows))
            writer = TableWriter(folder / f"{split}.arrow", name)
            # Closed at once whatever happens: processes must not outlive an error that somebody keeps.
            with contextlib.closing(_encoded(rows, function, name, _process_count(processes, len(rows)))) as batches:
                for count, features in batches:
                    writer.write(features)
                    context.progress.advance(count)
            writer.close()
            context.progress.finish()
            sizes[split] = writer.rows
        (folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")

    folder = context.cache.folder(name, encoded_key(splits.identity, identity), build)
    stream = splits.train
    return replace(
        splits,
        train=(
            RowStream(lambda: _encoded_stream(stream, encode))
            if isinstance(stream, RowStream)
            else StoredRows(folder / "train.arrow")
        ),
        validation=StoredRows(folder / "validation.arrow"),
        identity=encoded_key(splits.identity, identity),
    )


def encoded_samples(context: RecipeContext, name: str, rows_identity: JsonValue, identity: JsonValue) -> int | None:
    """Number of training samples if they are made already; for a `preview`."""
    sizes = context.cache.path(name, encoded_key(rows_identity, identity)) / "sizes.json"
    found: int | None = json.loads(sizes.read_text(encoding="utf-8")).get("train") if sizes.is_file() else None
    return found


def encoded_key(rows_identity: JsonValue, identity: JsonValue) -> dict[str, JsonValue]:
    """All that encoded rows are made from: what `encode_rows` gives them as their identity."""
    return {"version": 1, "rows": rows_identity, "encoded": identity}


def text_of(value: Any, where: str) -> str:
    """A value in the column of texts; empty where there is none.

    Raises:
        DataError: it is something else; `where` says of which rows it is.
    """
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where} hold {value!r:.60} where a text should be; set recipe_args.text_column")
    return value or ""


def _process_count(stated: int | None, rows: int) -> int:
    batches = -(-rows // BATCH_OF_ROWS)
    if stated is None:
        stated = min(read_machine().cores, MOST_PROCESSES) if rows > FEW_ROWS else 1
    return max(1, min(stated, batches))


def _encoded_stream(rows: Any, encode: Encode) -> Iterator[dict[str, Any]]:
    for batch in in_batches(rows, BATCH_OF_ROWS):
        features = encode({name: [row[name] for row in batch] for name in batch[0]})
        for values in zip(*features.values(), strict=True):
            yield dict(zip(features, values, strict=True))


def _encoded(rows: StoredRows, encode: Encode, name: str, processes: int) -> Generator[tuple[int, Any]]:
    """Number of rows and table of features of each batch, in order."""
    starts = range(0, len(rows), BATCH_OF_ROWS)

    def made(number: int) -> tuple[int, Any]:
        columns = rows[starts[number] : starts[number] + BATCH_OF_ROWS]
        return len(next(iter(columns.values()))), table(encode(columns), name)

    yield from map(made, range(len(starts))) if processes == 1 else _in_processes(made, len(starts), processes)


# --- several processes -------------------------------------------------------------------------------------


def _in_processes(made: Callable[[int], Any], count: int, processes: int) -> Generator[Any]:
    """`made(0)`, `made(1)` … in order; process k of n makes every n-th, from the k-th on.

    Each has a pipe of its own: one that is ahead waits until what it has made is taken, so that memory stays small,
    and one whose parent was killed finds its pipe closed and ends.
    """
    forking = multiprocessing.get_context("fork")
    ends: list[Connection] = []
    workers: list[Any] = []
    try:
        with tokenizers_without_threads():  # the processes use the cores, and threads may hang after a fork
            for first in range(processes):
                reading, writing = forking.Pipe(duplex=False)
                ends.append(reading)
                numbers = range(first, count, processes)
                workers.append(forking.Process(target=_work, args=(made, numbers, writing, tuple(ends)), daemon=True))
                _start(workers[-1], f"process {first + 1} of {processes}")
                writing.close()
        for number in range(count):
            yield _received(ends[number % processes], workers[number % processes])
    finally:
        started = [worker for worker in workers if worker.pid is not None]
        for worker in started:
            worker.kill()  # it holds nothing that could be left half done
        for worker in started:
            worker.join()
        for end in ends:
            end.close()


def _start(worker: Any, which: str) -> None:
    try:
        worker.start()
    except OSError as error:  # a fork asks for as much memory as this process has
        raise RuntimeError(
            f"cannot start {which} to prepare data: {error.strerror}; recipe_args.preparation_processes=1 needs the "
            "least memory"
        ) from None


def _received(end: Connection, worker: Any) -> Any:
    try:
        found = end.recv()
    except EOFError:
        worker.join()
        raise RuntimeError(
            f"a process that prepares data has ended with {worker.exitcode}, perhaps for want of memory; "
            "recipe_args.preparation_processes=1 needs the least"
        ) from None
    if isinstance(found, BaseException):
        raise found
    return found


def _work(made: Callable[[int], Any], numbers: range, writing: Connection, not_ours: tuple[Connection, ...]) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):  # may reach the whole group; it is our parent that ends us
        signal.signal(each, signal.SIG_IGN)
    for end in not_ours:
        end.close()  # or nobody would notice that the parent is gone
    try:
        for number in numbers:
            writing.send(made(number))
    except BrokenPipeError:
        return
    except Exception as error:
        writing.send(_portable(error))


def _portable(error: Exception) -> Exception:
    """An error that can be sent, with the traceback it had here."""
    text = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # its class may do anything
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(text)
    return error
