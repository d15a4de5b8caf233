"""The folder of a sweep: what its runs differ in, and what came out of them, side by side."""

from __future__ import annotations

from pathlib import Path

from launch.record import read_json, write_json, write_text

SWEEP = "sweep.json"
"""What the runs of a sweep differ in, in its folder."""

COMPARISON = "comparison.tsv"
"""A line for each run that has ended well, with what it was made of and its last scores."""


def write_sweep(folder: Path, runs: dict[str, tuple[str, ...]]) -> None:
    """Note the runs, by the names of their folders, with the overrides that make each."""
    write_json(folder / SWEEP, [{"run": name, "changes": list(changes)} for name, changes in runs.items()])


def read_sweep(folder: Path) -> dict[str, list[str]] | None:
    """The runs of a sweep and their overrides; None where the folder is none of a sweep."""
    runs = read_json(folder / SWEEP)
    return None if runs is None else {run["run"]: run["changes"] for run in runs}


def compare(folder: Path) -> list[list[str]]:
    """A row of titles, then one for each run that has ended well, in the order of the sweep."""
    runs = read_sweep(folder) or {}
    found = {
        name: result["validation"]["after"] for name in runs if (result := read_json(folder / name / "result.json"))
    }
    keys = [change.partition("=")[0] for change in next(iter(runs.values()), [])]
    metrics = list(dict.fromkeys(metric for scores in found.values() for metric in scores))
    rows = [["run", *keys, *metrics]]
    for name, scores in found.items():
        values = [change.partition("=")[2] for change in runs[name]]
        rows.append([name, *values, *(f"{scores[metric]:.6g}" if metric in scores else "" for metric in metrics)])
    return rows


def write_comparison(folder: Path) -> None:
    """Write down what is known by now; the last run to end writes the whole."""
    write_text(folder / COMPARISON, "".join("\t".join(row) + "\n" for row in compare(folder)))
