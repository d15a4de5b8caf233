"""The verbs for runs on a cluster: `shoal submit`, `status`, `logs` and `cancel`."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from launch import slurm
from launch.cli_arguments import AsJson, Out, Overrides, RunFolder
from launch.errors import ConfigError, RunFolderError
from launch.plan import as_json
from launch.printing import complain, print_table
from launch.sbatch import Submission
from launch.status import ASK_SECONDS, Status, everything, follow, last_job, log_of, runs_of, status
from launch.submit import Prepared, prepare, submit, test


def submit_command(
    file: Annotated[str, typer.Argument(metavar="FILE|RUN", help="A run file, or a run that is to go on.")],
    overrides: Overrides = None,
    out: Out = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, metavar="N", help="parallel.nodes")] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus-per-node", min=1, metavar="G", help="parallel.devices, with parallel.device=cuda"),
    ] = None,
    time_: Annotated[str | None, typer.Option("--time", metavar="TIME", help="cluster.time")] = None,
    partition: Annotated[str | None, typer.Option("--partition", metavar="NAME", help="cluster.partition")] = None,
    account: Annotated[str | None, typer.Option("--account", metavar="NAME", help="cluster.account")] = None,
    qos: Annotated[str | None, typer.Option("--qos", metavar="NAME", help="cluster.qos")] = None,
    after: Annotated[
        list[str] | None, typer.Option("--after", metavar="JOB", help="Begin once this job has ended well.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep", metavar="key=a,b,c", help="One run for each value, as an array of jobs; may be repeated."
        ),
    ] = None,
    array: Annotated[
        str | None, typer.Option("--array", metavar="0-3%2", help="With --sweep: which runs, and how many at once.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and do nothing.")] = False,
    test_only: Annotated[bool, typer.Option("--test-only", help="Ask the scheduler when it would begin.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show what the job says until it has ended.")] = False,
    json_: AsJson = False,
) -> None:
    """Plan a run, or a sweep, and submit it to SLURM as a job that goes on after time limits and preemption."""
    stated = [
        f"{key}={value}"
        for key, value in (
            ("parallel.nodes", nodes),
            ("parallel.devices", gpus),
            ("parallel.device", "cuda" if gpus else None),
            ("cluster.time", json.dumps(time_) if time_ else None),
            ("cluster.partition", json.dumps(partition) if partition else None),
            ("cluster.account", json.dumps(account) if account else None),
            ("cluster.qos", json.dumps(qos) if qos else None),
        )
        if value is not None
    ]
    if array and not sweep:
        raise ConfigError(f"command line: --array {array}: says which runs of a --sweep; state both")
    submission = Submission(after=tuple(after or ()), array=array)
    prepared = prepare(file, [*(overrides or []), *stated], out, sweep or [], submission)
    if dry_run:
        return _print_dry(prepared, json_)
    if test_only:
        print(test(prepared))
        return None
    job = submit(prepared)
    if json_:
        print(
            json.dumps({"job": job, "run_folder": str(prepared.folder), "script": str(prepared.folder / "job.sbatch")})
        )
    else:
        _print_submitted(prepared, job)
    if wait:
        raise typer.Exit(_wait(prepared, job, quiet=json_))
    return None


def _print_dry(prepared: Prepared, json_: bool) -> None:
    if json_:
        plans = [as_json(plan) for plan in prepared.plans]
        print(json.dumps({"script": prepared.text, "plans": plans}, indent=2))
    else:
        print(prepared.text, end="")


def _print_submitted(prepared: Prepared, job: str) -> None:
    folder = shlex.quote(str(prepared.folder))
    runs = f", {len(prepared.plans)} runs" if prepared.is_sweep else ""
    print(f"job {job}{runs}, run folder {prepared.folder}")
    print(f"log      {prepared.folder}/{'slurm-%A_%a.log' if prepared.is_sweep else f'slurm-{job}.log'}")
    print(f"status   shoal status {folder}")
    print(f"follow   shoal logs {folder}{'/000' if prepared.is_sweep else ''} -f")
    print(f"cancel   shoal cancel {folder}")


def _wait(prepared: Prepared, job: str, *, quiet: bool) -> int:
    """Follow a job until it has ended; 0 where all its runs have ended well."""
    ended = _has_ended(job)
    if not prepared.is_sweep and not quiet:
        _follow(lambda: log_of(prepared.folder, None), ended)
    while not ended():
        time.sleep(ASK_SECONDS)
    found = status(prepared.folder)
    if not quiet:
        _print_status(found)
    return 0 if all(each.state == "finished" for each in found) else 1


def _has_ended(job: str) -> Callable[[], bool]:
    return lambda: all(each.ended for each in slurm.look_up(job))


def status_command(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder, or that of a sweep.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="All runs in runs/, or in the folder given.")] = False,
    json_: AsJson = False,
) -> None:
    """Show what became of a run: waiting and why, running and how far, stopped, failed and why, finished."""
    if run is None and not all_:
        raise ConfigError("command line: name a run folder, or give --all")
    if all_:
        found = everything(run or Path("runs"))
    else:
        assert run is not None, "or --all"
        found = status(run)
    if json_:
        print(json.dumps([each.as_json() for each in found], indent=2))
    else:
        _print_status(found)


def _print_status(found: list[Status]) -> None:
    rows = [[each.run, each.job, each.state, each.progress, each.nodes, each.because] for each in found]
    print_table(("run", "job", "state", "progress", "nodes", "why"), rows)


def logs_command(
    run: RunFolder,
    rank: Annotated[int | None, typer.Option("--rank", min=0, metavar="N", help="What rank N has written.")] = None,
    follow_: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")] = False,
) -> None:
    """Print what a job, or one rank of it, has written."""
    run = runs_of(run)[0]
    if not follow_:
        print(log_of(run, rank).read_text(encoding="utf-8", errors="replace"), end="")
        return
    job = last_job(run)
    _follow(lambda: log_of(run, rank), _has_ended(job) if job else lambda: False)


def _follow(find: Callable[[], Path], ended: Callable[[], bool]) -> None:
    """Wait for a log, then show it until the job has ended; Ctrl-C ends the show, not the job."""
    try:
        while True:
            try:
                path = find()
                break
            except RunFolderError:
                if ended():
                    raise
                time.sleep(ASK_SECONDS)
        follow(path, ended, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        complain("the job goes on")
        sys.exit(130)


def cancel_command(run: RunFolder) -> None:
    """Cancel the job of a run, or of a sweep; what was saved stays, and `shoal submit RUN` goes on from it."""
    runs_of(run)
    job = last_job(run)
    if job is None:
        raise RunFolderError(
            f"{run}: no job was submitted for it; a run on this machine is stopped by Ctrl-C or SIGTERM"
        )
    if _has_ended(job)():
        raise RunFolderError(f"{run}: job {job} has ended already")
    slurm.cancel(job)
    print(f"job {job} is cancelled")
