"""Prepared data kept between runs: built once, under a lock, published whole or not at all.

Locks are files, not collectives: ranks of one host (or of hosts that share the folder) wait for each other as
long as it takes, without a process group and its time-out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from launch.errors import DataError


@dataclass(frozen=True)
class Cache:
    """Folders named by what they were made from."""

    root: Path

    def path(self, name: str, key: Any) -> Path:
        """The folder for `key` (anything JSON can write), whether it exists or not."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.root / f"{name}-{digest}"

    def folder(self, name: str, key: Any, build: Callable[[Path], None]) -> Path:
        """The folder for `key`, filled by `build(folder)` if it is not there yet.

        `build` works in a folder aside, renamed when it returns: a folder under its final name is whole. Of
        several processes one builds and the others wait; if it dies, the next one starts afresh.

        Raises:
            DataError: the cache cannot be written. Any other error of `build` is passed on as it is.
        """
        final = self.path(name, key)
        if final.is_dir():
            return final
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{final}.lock"):
                if not final.is_dir():
                    aside = final.with_name(f"{final.name}.building")
                    shutil.rmtree(aside, ignore_errors=True)  # left by a process that died
                    aside.mkdir()
                    build(aside)
                    for path in aside.rglob("*"):
                        if path.is_file():
                            _flush_to_disk(path)
                    aside.rename(final)
        except OSError as error:
            if not self._is_to_blame(error):
                raise
            raise DataError(
                f"{self.root}: the cache for prepared data cannot be written: {error}; "
                "set SHOAL_CACHE to a folder that can"
            ) from error
        return final

    def _is_to_blame(self, error: OSError) -> bool:
        """Whether an error is about our folder, not about something that was read to fill it.

        A failed write names no file; of the errors without one, these are the ones a disk gives.
        """
        if error.filename is None:
            return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
        return Path(os.fsdecode(error.filename)).is_relative_to(self.root)


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def file_identity(path: Path) -> list[Any]:
    """What changes when a file changes: its path, size in bytes and time of change in nanoseconds."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]
