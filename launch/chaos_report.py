"""What `shoal chaos` tells: a table of the interruptions, a verdict, and chaos.json with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch import __version__
from launch.chaos import INTERRUPTED, UNDISTURBED, Interruption, Strike
from launch.errors import PREEMPTED, RunFolderError
from launch.record import surroundings, write_json
from launch.sameness import Compared
from launch.sections import RunConfig

TITLES = ("", "what", "at update", "exit code", "went on from", "updates done again")
"""Of the columns of `rows`."""

SHOWN = 10
"""Differences that are printed; chaos.json has all."""


def rows(happened: list[Interruption]) -> list[list[str]]:
    """A line of the table each."""
    return [
        [
            str(number),
            str(each.strike.kind),
            str(each.update),
            "restarted itself" if each.exit_code is None else str(each.exit_code),
            f"step-{each.resumed:06d}" if each.resumed else "the beginning",
            str(each.again),
        ]
        for number, each in enumerate(happened, 1)
    ]


def verdict(compared: Compared, planned: int, happened: int) -> list[str]:
    """What was found, line by line."""
    times = f"{happened} interruption{'' if happened == 1 else 's'}"
    if compared.same:
        lines = [f"The same numbers, bit for bit, after {times}: {compared.words}."]
    else:
        lines = [f"DIFFERENT numbers after {times}, undisturbed → interrupted:", *compared.differences[:SHOWN]]
        more = len(compared.differences) - SHOWN
        lines += [f"and {more} more differences, see chaos.json"] if more > 0 else []
    if happened < planned:
        lines.append(
            f"The run was over before {planned - happened} of {planned} interruptions; for more of them make it longer "
            "(train.max_steps=…)."
        )
    return lines


def write_report(
    folder: Path,
    config: RunConfig,
    seed: int,
    strikes: list[Strike],
    happened: list[Interruption],
    compared: Compared | None,
) -> dict[str, Any]:
    """Write chaos.json and return what is in it; `compared` is None where it was stopped.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    report = {
        "shoal": __version__,
        "folder": str(folder),
        "data": str(folder / "chaos.json"),
        "runs": [str(folder / UNDISTURBED), str(folder / INTERRUPTED)],
        "complete": compared is not None,
        "same": compared.same if compared else None,
        "seed": seed,
        "planned": len(strikes),
        "interruptions": [as_json(each) for each in happened],
        "compared": {
            "updates": compared.records,
            "evaluations": compared.evaluations,
            "weight_tensors": compared.tensors,
        }
        if compared
        else None,
        "differences": list(compared.differences) if compared else None,
        "config": config.model_dump(mode="json"),
        **surroundings(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "chaos.json", report)
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return report


def as_json(each: Interruption) -> dict[str, Any]:
    """An interruption as plain data."""
    return {
        "what": str(each.strike.kind),
        "planned_update": each.strike.update,
        "update": each.update,
        "reached": each.reached,
        "clean": each.exit_code == PREEMPTED,
        "exit_code": each.exit_code,
        "resumed_from": each.resumed or None,
        "updates_done_again": each.again,
    }
