"""Prepared data kept between runs: built once, under a lock, published whole or not at all.

Locks are files, not collectives: ranks of one host (or of hosts that share the folder) wait for each other as
long as it takes, without a process group and its time-out.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from launch.disk import flush
from launch.errors import ConfigError, DataError

PATIENCE_SECONDS = 5.0
"""How long to wait for another process before saying so."""


@dataclass(frozen=True)
class Cache:
    """Folders named by what they were made from."""

    root: Path
    say: Callable[[str], None] = lambda text: None
    """Told what the user should know, such as what is being waited for."""
    folders: dict[Path, bool] = field(default_factory=dict, compare=False)
    """What this process has asked for, and whether it was this process that filled it."""

    def path(self, name: str, key: Any) -> Path:
        """The folder for `key` (anything JSON can write), whether it exists or not."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.root / f"{name}-{digest}"

    def folder(self, name: str, key: Any, build: Callable[[Path], None]) -> Path:
        """The folder for `key`, filled by `build(folder)` if it is not there yet.

        `build` works in a folder aside, flushed to the disk and renamed when it returns: a folder under its final
        name is whole. Of several processes one builds and the others wait; if it is killed, the next one starts
        afresh; if it fails, those that were waiting fail as it did.

        Raises:
            DataError: the cache cannot be written. Any other error of `build` is passed on as it is.
        """
        final = self.path(name, key)
        built = not final.is_dir() and self._build_or_wait(final, build)
        self.folders[final] = built or self.folders.get(final, False)
        return final

    def _build_or_wait(self, final: Path, build: Callable[[Path], None]) -> bool:
        """Fill a folder unless another process does; whether it was this one."""
        note = final.with_name(f"{final.name}.builder")
        with self._own_errors_told():
            self.root.mkdir(parents=True, exist_ok=True)
            before = _read_note(note)
            with self._locked(final, note):
                if final.is_dir():
                    return False
                left = _read_note(note)
                if left != before:  # it was written while we waited
                    _fail_alike(final, left)
                with _noted(note), self._own_errors_told():
                    _build(final, build)
        return True

    @contextlib.contextmanager
    def _locked(self, final: Path, note: Path) -> Iterator[None]:
        """Alone with a folder, however long the wait; the kernel frees the lock of a process that has died."""
        lock = FileLock(f"{final}.lock")
        try:
            lock.acquire(timeout=PATIENCE_SECONDS)
        except Timeout:
            builder = _read_note(note)
            who = f" (pid {builder['pid']}, {builder['host']})" if builder else ""
            self.say(f"waiting for another process{who} to prepare {final}")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _own_errors_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._is_to_blame(error):
                raise
            raise DataError(
                f"{self.root}: the cache for prepared data cannot be written: {error}; "
                "set SHOAL_CACHE to a folder that can"
            ) from error

    def _is_to_blame(self, error: OSError) -> bool:
        """Whether an error is about our folder, not about something that was read to fill it.

        A failed write names no file; of the errors without one, these are the ones a disk gives.
        """
        if error.filename is None:
            return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
        return Path(os.fsdecode(error.filename)).is_relative_to(self.root)


def _build(final: Path, build: Callable[[Path], None]) -> None:
    aside = final.with_name(f"{final.name}.building")
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
    aside.mkdir()
    try:
        build(aside)
        for path in [*aside.rglob("*"), aside]:
            flush(path)
        aside.rename(final)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(aside, ignore_errors=True)
        raise
    flush(final.parent)


# --- what the builder of a folder tells those that wait for it ----------------------------------------------


@contextlib.contextmanager
def _noted(note: Path) -> Iterator[None]:
    """While a folder is built, a note beside it says by whom, and afterwards how it failed, if it did."""
    builder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time_ns()}
    note.write_text(json.dumps(builder), encoding="utf-8")
    try:
        yield
    except Exception as error:
        kind = next((kind.__name__ for kind in (ConfigError, DataError) if isinstance(error, kind)), None)
        message = str(error) if kind else f"{type(error).__name__}: {error}"
        failure = {"kind": kind, "message": message, "traceback": traceback.format_exc()}
        with contextlib.suppress(OSError):  # such as a full disk, which may be what failed
            note.write_text(json.dumps({**builder, "failure": failure}), encoding="utf-8")
        raise
    note.unlink(missing_ok=True)


def _read_note(note: Path) -> dict[str, Any] | None:
    """None where there is none, or it is just being written."""
    try:
        content: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content


def _fail_alike(final: Path, left: dict[str, Any] | None) -> None:
    """If the process that was waited for has failed, fail as it did: it would take as long once more."""
    failure = left.get("failure") if left else None
    if not left or not failure:
        return
    for kind in (ConfigError, DataError):
        if failure["kind"] == kind.__name__:
            raise kind(failure["message"])
    error = RuntimeError(f"pid {left['pid']} on {left['host']} failed to prepare {final}: {failure['message']}")
    error.add_note(failure["traceback"])
    raise error


def file_identity(path: Path) -> list[Any]:
    """What changes when a file changes: its path, size in bytes and time of change in nanoseconds."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]
