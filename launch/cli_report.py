"""The verbs that look at runs: `shoal report` and `shoal runs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.cli_arguments import AsJson
from launch.differences import Difference, differences
from launch.errors import ConfigError, RunFolderError
from launch.printing import print_table
from launch.record import is_run_folder
from launch.report.page import REPORT, write_page
from launch.status import Status, everything, status
from launch.words import NOTHING, figure

RUNS = Path("runs")
"""Where runs are kept unless --out says otherwise."""


def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN …", help="Run folders, or folders of sweeps.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The page [RUN/report.html; of several ./report.html]."),
    ] = None,
) -> None:
    """Write a page about a run, or about several side by side: curves, evaluations, time, memory, what went wrong.

    It is one file, which needs no network to be looked at.
    """
    found = {Path(each.run).resolve(): each for run in runs for each in status(run)}
    begun = [each for each in found.values() if is_run_folder(Path(each.run))]
    if not begun:
        raise RunFolderError(f"{runs[0]}: none of its runs was begun (yet)")
    path = out or (Path(begun[0].run) / REPORT if len(begun) == 1 else Path(REPORT))
    write_page(begun, path)
    print(path)


def runs_command(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]", help="A folder of runs, or a sweep [runs].")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show what the runs named differ in: settings, and what came out.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """List runs with their state and their best evaluation; with --compare RUN RUN …, what they differ in."""
    if compare:
        return _compare(folders or [], json_)
    if folders and len(folders) > 1:
        raise ConfigError(f"command line: {len(folders)} folders; give one, or compare runs with --compare")
    found = _runs_within(folders[0] if folders else RUNS)
    if json_:
        print(json.dumps([each.as_json() for each in found], indent=2))
    else:
        print_table(("run", "state", "update", "metric", "best", "at update", "why"), list(map(_row, found)))
    return None


def _runs_within(folder: Path) -> list[Status]:
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such folder; name the one that holds your runs")
    try:
        return status(folder)  # one run, or a sweep
    except RunFolderError:
        return everything(folder)


def _row(found: Status) -> list[str]:
    best = found.best
    told = [best.metric, figure(best.value), f"{best.update:,}"] if best else [NOTHING] * 3
    update = f"{found.update:,}" + (f" of {found.updates:,}" if found.updates else "")
    return [found.run, found.state, update, *told, found.because]


def _compare(folders: list[Path], json_: bool) -> None:
    found = differences(folders)
    if len(found.runs) < 2:
        raise ConfigError("command line: --compare needs two runs or more, or the folder of a sweep")
    if json_:
        print(json.dumps(found.as_json(), indent=2))
        return
    for title, every in (("settings", found.settings), ("results", found.results)):
        if every:
            changes = ["change"] if len(found.runs) == 2 else []
            print_table((title, *found.runs, *changes), [_difference(each) for each in every])
        else:
            print(f"{title}: no difference")


def _difference(each: Difference) -> list[str]:
    changes = [] if len(each.values) != 2 else [f"{each.change:+,.6g}" if each.change is not None else ""]
    return [each.what, *map(_shown, each.values), *changes]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else NOTHING if value is None else json.dumps(value, ensure_ascii=False)
