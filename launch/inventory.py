"""What checkpoints a run has, which of them are good, and which may go. Knows files, no tensors."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launch.checkpoints import (
    MARK,
    by_update,
    checkpoints_folder,
    damage,
    listed,
    outer_damage,
    ranking,
    read_state,
    remove,
    update_of,
)
from launch.disk import size_in_words
from launch.errors import RunFolderError

State = Literal["good", "damaged", "set aside as damaged", "left half written", "left half removed"]

_LEFT: dict[str, State] = {
    "damaged": "set aside as damaged",
    "writing": "left half written",
    "removing": "left half removed",
}
"""Folders that are no checkpoint any more, or not yet, by the end of their name."""

_THREADS = 4
"""That hash at the same time: hashlib lets Python's lock go for more than 2047 bytes."""

_SHARD = re.compile(r"state-\d+-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class Entry:
    """One folder below checkpoints/."""

    folder: Path
    update: int
    state: State
    why: str
    """What is wrong with a damaged one."""
    bytes: int
    saved: float | None
    """When its last file was written, in seconds since 1970; None where there is none."""
    ranks: int | None
    """How many ranks wrote it."""
    loss: float | None = None
    """Validation loss after its update, where it is known."""
    rank: float | None = None
    """What ranks it among the best, the lower the better, where it is known."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def good(self) -> bool:
        """Whether a run can go on from it."""
        return self.state == "good"

    @property
    def verdict(self) -> str:
        """Its state, with the reason."""
        return f"{self.state}: {self.why}" if self.why else self.state

    @property
    def moment(self) -> str | None:
        """When it was saved, as one would say it."""
        return None if self.saved is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.saved))


# --- looking ---------------------------------------------------------------------------------------------


def inventory(run: Path, *, verify: bool) -> list[Entry]:
    """Everything below checkpoints/, the newest first; `verify` hashes every file, else only sizes are looked at."""
    folders = listed(run)
    problems = _damages(folders) if verify else {folder: outer_damage(folder) for folder in folders}
    # A run that goes on may have removed some while they were read.
    found = [_entry(folder, update_of(folder), problems[folder]) for folder in folders if folder.is_dir()]
    found += [_entry(path, update, None, _LEFT[kind]) for path, update, kind in _leftovers(run)]
    losses, ranks = _evaluations(reversed([entry.folder for entry in found if entry.good]))
    found = [
        replace(entry, loss=losses.get(entry.update), rank=ranks.get(entry.update)) if entry.good else entry
        for entry in found
    ]
    return sorted(found, key=lambda entry: (-entry.update, not entry.good, entry.name))


def newest(entries: Iterable[Entry]) -> Entry | None:
    """The one that `shoal resume` goes on from."""
    return max((entry for entry in entries if entry.good), key=lambda entry: entry.update, default=None)


def best_first(entries: Iterable[Entry]) -> list[Entry]:
    """The good ones that were evaluated, by what `eval.best_metric` says; of equals the first saved."""
    scored = [(entry.rank, entry.update, entry) for entry in entries if entry.good and entry.rank is not None]
    return [entry for *_, entry in sorted(scored, key=lambda item: item[:2])]


def _damages(folders: list[Path]) -> dict[Path, str | None]:
    """What is wrong with each, hashes included; files are read side by side."""
    parts = [(folder, share) for folder in folders for share in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda part: damage(part[0], part[1], _THREADS), parts))
    problems: dict[Path, str | None] = dict.fromkeys(folders)
    for (folder, _), problem in zip(parts, found, strict=True):
        problems[folder] = problems[folder] or problem
    return problems


def _leftovers(run: Path) -> list[tuple[Path, int, str]]:
    names = re.compile(rf"step-(\d+)\.({'|'.join(_LEFT)})")
    paths = checkpoints_folder(run).glob("step-*.*")
    return [(path, int(match[1]), match[2]) for path in paths if (match := names.fullmatch(path.name))]


def _entry(folder: Path, update: int, problem: str | None, state: State | None = None) -> Entry:
    files = []
    for path in folder.iterdir() if folder.is_dir() else []:
        with contextlib.suppress(OSError):  # a run that goes on may remove them at any moment
            files.append((path, path.stat()))
    last = next((stat.st_mtime for path, stat in files if path.name == MARK), None)
    worlds = {int(match[1]) for path, _ in files if (match := _SHARD.fullmatch(path.name))}
    return Entry(
        folder,
        update,
        state or ("damaged" if problem else "good"),
        problem or "",
        sum(stat.st_size for _, stat in files),
        last if last is not None else max((stat.st_mtime for _, stat in files), default=None),
        max(worlds, default=None),
    )


def _evaluations(folders: Iterable[Path]) -> tuple[dict[int, float], dict[int, float]]:
    """Validation losses and ranks by update; a later checkpoint knows those that came only after its own was saved."""
    losses: dict[int, float] = {}
    ranks: dict[int, float] = {}
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError):
            state = read_state(folder)
            losses |= by_update(state["losses"])
            ranks |= ranking(state)
    return losses, ranks


# --- pruning ---------------------------------------------------------------------------------------------


def superfluous(entries: list[Entry], keep_last: int | None, keep_best: int, every: int | None = None) -> list[Entry]:
    """What may go: leftovers, and good checkpoints beyond the newest `keep_last` and the `keep_best` best ones.

    Of those after each `every`-th update the newest stays too. Damaged ones count for nothing, and those with their
    name stay: `shoal resume` sets them aside, for a person to look at. Those set aside may go once there is a good one.
    """
    good = [entry for entry in entries if entry.good]
    to_go_back_to = [entry for entry in good if every and entry.update % every == 0][:1]
    kept = {entry.folder for entry in [*good[:keep_last], *best_first(good)[:keep_best], *to_go_back_to]}

    def may_go(entry: Entry) -> bool:
        if entry.state == "set aside as damaged":
            return bool(good)
        return entry.folder not in kept if entry.good else entry.state != "damaged"

    return [entry for entry in entries if may_go(entry)]


def discard(entries: Iterable[Entry]) -> list[Entry]:
    """Remove them; those that are gone.

    Raises:
        RunFolderError: one cannot be removed.
    """
    gone: list[Entry] = []
    for entry in entries:
        try:
            remove(entry.folder) if entry.good else shutil.rmtree(entry.folder)
        except OSError as error:
            raise RunFolderError(
                f"{entry.folder}: cannot be removed: {error.strerror or error}; removed until then: "
                f"{', '.join(each.name for each in gone) or 'nothing'}"
            ) from None
        gone.append(entry)
    return gone


# --- telling ---------------------------------------------------------------------------------------------

TITLES = ("name", "update", "saved", "size", "ranks", "validation loss", "state", "")
"""Of the columns of `rows`."""


def rows(entries: list[Entry]) -> list[list[str]]:
    """A line of the table each."""
    going_on, best = newest(entries), next(iter(best_first(entries)), None)
    return [
        [
            entry.name,
            str(entry.update),
            entry.moment or "",
            size_in_words(entry.bytes),
            "" if entry.ranks is None else str(entry.ranks),
            "" if entry.loss is None else f"{entry.loss:,.4f}",
            entry.verdict,
            ", ".join(word for word, which in (("resume", going_on), ("best", best)) if entry is which),
        ]
        for entry in entries
    ]


def as_json(run: Path, entries: list[Entry], removed: list[Entry], *, verified: bool) -> dict[str, Any]:
    """All of it as plain data."""
    best = best_first(entries)
    going_on = newest(entries)
    return {
        "run": str(run),
        "verified": verified,
        "checkpoints": [
            {
                "name": entry.name,
                "update": entry.update,
                "saved": entry.moment,
                "bytes": entry.bytes,
                "ranks": entry.ranks,
                "validation_loss": entry.loss,
                "state": entry.state,
                "why": entry.why or None,
            }
            for entry in entries
        ],
        "resume": going_on.name if going_on else None,
        "best": best[0].name if best else None,
        "removed": [{"name": entry.name, "bytes": entry.bytes} for entry in removed],
        "removed_bytes": sum(entry.bytes for entry in removed),
    }
