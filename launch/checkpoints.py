"""Checkpoints as files: written aside, verified by size and hash, found, judged and pruned. Knows no tensors.

    step-000100/
        state-00000-of-00002.safetensors    what rank 0 of 2 holds: weights, optimizer, random states
        state.json                          what all ranks have in common: update, position in the data, best score …
        config.json, tokenizer.json …       what makes a Hugging Face folder of it
        manifest.json                       size and SHA-256 of each file above
        COMPLETE                            SHA-256 of the manifest; written last

A checkpoint is written to `step-000100.writing`, flushed to the disk file by file, renamed, and then marked. So a
process may be killed at any moment, and the disk may fill up: under its name and with its mark a checkpoint is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from launch.disk import flush

FORMAT = 1
"""Counted up when an older release could no longer read what is written."""

MANIFEST = "manifest.json"
MARK = "COMPLETE"
STATE = "state.json"

_CHUNK_BYTES = 1 << 24

_NAME = re.compile(r"step-(\d{6,})")


class FileRecord(BaseModel):
    """What a file of a checkpoint must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The files of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    update: int
    files: dict[str, FileRecord]


class DamagedError(Exception):
    """A checkpoint that cannot be used; the message says why."""


# --- names -----------------------------------------------------------------------------------------------


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def checkpoint_folder(run: Path, update: int) -> Path:
    """`checkpoints/step-000100`."""
    return checkpoints_folder(run) / f"step-{update:06d}"


def aside_folder(run: Path, update: int) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return checkpoints_folder(run) / f"step-{update:06d}.writing"


def shard_name(rank: int, world_size: int) -> str:
    """The file of one rank."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def update_of(folder: Path) -> int:
    """The update after which a checkpoint was made, from its name."""
    match = _NAME.fullmatch(folder.name)
    assert match, f"{folder} is no checkpoint"
    return int(match[1])


def listed(run: Path) -> list[Path]:
    """All folders with the name of a checkpoint, whole or not, the newest first."""
    folder = checkpoints_folder(run)
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=update_of, reverse=True)


def newest_complete(run: Path) -> Path | None:
    """The newest checkpoint that is whole as far as sizes tell; hashes are not looked at."""
    return next((folder for folder in listed(run) if outer_damage(folder) is None), None)


# --- writing ---------------------------------------------------------------------------------------------


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file and flush it to the disk; what it must be from now on.

    The hash is that of the bytes as they leave memory: no later reading could tell a write that went wrong.

    Raises:
        OSError: the disk is full, gone or broken.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), _CHUNK_BYTES):
                chunk = view[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                size += len(chunk)
                while chunk:  # a write may be short, as it is when the disk fills up
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return FileRecord(bytes=size, sha256=digest.hexdigest())


def publish(aside: Path, update: int, files: dict[str, FileRecord]) -> Path:
    """Give a checkpoint, all files of which have been written aside, its manifest, its name and its mark.

    Raises:
        OSError: the disk is full, gone or broken.
    """
    final = aside.with_name(f"step-{update:06d}")
    manifest = Manifest(format=FORMAT, update=update, files=dict(sorted(files.items())))
    record = write_file(aside / MANIFEST, [(manifest.model_dump_json(indent=1) + "\n").encode()])
    flush(aside)
    if final.exists():  # one that was found damaged, else nobody would write it again
        remove(final)
    aside.rename(final)
    flush(final.parent)
    write_file(final / MARK, [record.sha256.encode()])
    flush(final)
    return final


def remove(folder: Path) -> None:
    """Remove a checkpoint; it loses its name first, lest half of one keep it."""
    doomed = folder.with_name(f"{folder.name}.removing")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def disown(folder: Path) -> None:
    """Take the name from a damaged checkpoint, so that nothing counts it; it stays there, for a person to look at."""
    aside = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def clean(run: Path) -> None:
    """Remove what killed processes have left half written or half removed."""
    folder = checkpoints_folder(run)
    for path in [*folder.glob("step-*.writing"), *folder.glob("step-*.removing")]:
        shutil.rmtree(path, ignore_errors=True)


# --- judging ---------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, once its mark has shown that it is the one that was written.

    Raises:
        DamagedError: it is not, or a newer release has written it.
    """
    try:
        mark = (folder / MARK).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise DamagedError(f"its save was cut off (no {MARK})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{MARK} cannot be read ({error})") from None
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    if hashlib.sha256(text).hexdigest() != mark:
        raise DamagedError(f"{MANIFEST} is not the one that {MARK} speaks of")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError:
        written = json.loads(text).get("format")
        raise DamagedError(f"its format {written} is not one of this release (up to {FORMAT})") from None
    if manifest.format > FORMAT:
        raise DamagedError(f"its format {manifest.format} is of a newer release; this one knows {FORMAT}")
    return manifest


def outer_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint as far as mark, manifest and sizes tell, which is a matter of milliseconds."""
    try:
        manifest = read_manifest(folder)
    except DamagedError as error:
        return str(error)
    for name, record in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != record.bytes:
            return f"{name} has {size:,} bytes instead of {record.bytes:,}"
    return None


def damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, hashes included; None where it is as it was written.

    With several `shares`, only every so many-th file is read, so that ranks divide the work.
    """
    if found := outer_damage(folder):
        return found
    for name, record in list(read_manifest(folder).files.items())[share::shares]:
        try:
            digest = _hash(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if digest != record.sha256:
            return f"the content of {name} has changed (SHA-256)"
    return None


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def by_update(values: dict[str, float]) -> dict[int, float]:
    """Values by update, of a state: JSON has text for keys."""
    return {int(update): value for update, value in values.items()}


def ranking(state: dict[str, Any]) -> dict[int, float]:
    """By update, what ranks the evaluations that a checkpoint knows of, the lower the better."""
    return by_update(state.get("ranking", state["losses"]))  # in the first releases the loss did


def read_state(folder: Path) -> dict[str, Any]:
    """What all ranks had in common when a checkpoint was made."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


# --- pruning ---------------------------------------------------------------------------------------------


def prune(run: Path, keep_last: int | None, best: Iterable[int]) -> None:
    """Remove whole checkpoints older than the newest `keep_last` whole ones, and not of an update in `best`.

    Damaged ones count for nothing, so that of the good ones there are never fewer than before. What cannot be removed
    stays.
    """
    if keep_last is None:
        return
    whole = [folder for folder in listed(run) if outer_damage(folder) is None]
    kept = set(best)
    for folder in whole[keep_last:]:
        if update_of(folder) not in kept:
            with contextlib.suppress(OSError):
                remove(folder)


def free_bytes(run: Path) -> int:
    """Free space where a run keeps its checkpoints."""
    return shutil.disk_usage(run).free
