"""What a power cut, or a full disk, must not spoil."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def flush(path: Path) -> None:
    """Put on the disk a file with its content, or a folder with the names in it: a new name is there only then.

    Raises:
        OSError: the disk is full, gone or broken.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # of some mounts a folder cannot be
            raise
    finally:
        os.close(descriptor)


def size_in_words(size: float) -> str:
    """Bytes for people: `8.3 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
