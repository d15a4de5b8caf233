"""Plans a run for nodes that are elsewhere, writes its batch script into the run folder, and submits that to SLURM."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from launch import slurm
from launch.cluster import asked_for, profile, refuse_candidates
from launch.config import load
from launch.errors import ConfigError, LaunchError, RunFolderError
from launch.plan import Plan, decide, python_environment
from launch.record import (
    continue_run_folder,
    create_run_folder,
    held,
    is_finished,
    is_run_folder,
    read_json,
    refuse_results,
    write_json,
    write_text,
)
from launch.registry import find_run_file
from launch.sbatch import Submission, script
from launch.source import Layer
from launch.sweep import write_sweep

SCRIPT = "job.sbatch"
"""The batch script, in the run folder."""

SUBMITTED = "submitted.json"
"""The jobs that were submitted for a run or a sweep, in its folder."""


@dataclass(frozen=True)
class Prepared:
    """One or several runs that are planned and not yet submitted."""

    folder: Path
    plans: tuple[Plan, ...]
    changes: tuple[tuple[str, ...], ...]
    """Of each run of a sweep: the overrides that make it; of a run alone none."""
    text: str
    """The batch script."""

    @property
    def is_sweep(self) -> bool:
        """Whether it is an array of jobs."""
        return bool(self.changes)


# --- planning --------------------------------------------------------------------------------------------


def prepare(file: str, overrides: list[str], out: Path | None, sweep: list[str], submission: Submission) -> Prepared:
    """Plan what is to be submitted.

    Raises:
        LaunchError: it cannot be; nothing was written or submitted.
    """
    if is_run_folder(Path(file)):
        if sweep or out:
            raise ConfigError(f"{file}: a run that was begun goes on in its folder; --sweep and --out begin new ones")
        file, out = f"{file}/run.yaml", Path(file)
    beneath, changes = profile(), _changes(sweep)
    if not changes:
        plan = _plan(file, overrides, out, beneath)
        folder = Path(plan.run_folder)
        return Prepared(folder, (plan,), (), script(plan, folder, Path.cwd(), submission, python_environment()))
    folder = (out or Path("runs") / f"{find_run_file(file).stem}-sweep-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    refuse_results(folder)
    plans = tuple(
        _plan(file, [*overrides, *stated], folder / f"{index:03d}", beneath) for index, stated in enumerate(changes)
    )
    submission = replace(submission, array=_array(submission.array, len(plans)))
    texts = [script(plan, folder, Path.cwd(), submission, python_environment()) for plan in plans]
    for stated, text in zip(changes, texts, strict=True):
        if text != texts[0]:
            raise ConfigError(
                f"command line: --sweep {' '.join(stated)}: asks SLURM for something else than the first run of the "
                "sweep does; submit it alone"
            )
    return Prepared(folder, plans, changes, texts[0])


def _plan(file: str, overrides: list[str], out: Path | None, beneath: Layer | None) -> Plan:
    loaded = load(find_run_file(file), overrides, beneath)
    machine, world = asked_for(loaded)
    plan = decide(file, overrides, out, world, machine, beneath=beneath).plan
    refuse_candidates(plan)
    return plan


def _changes(sweep: list[str]) -> tuple[tuple[str, ...], ...]:
    """All combinations of `key=a,b,c`."""
    choices = []
    for item in sweep:
        key, equals, values = item.partition("=")
        if not equals or not key or not values:
            raise ConfigError(
                f"command line: --sweep {item}: write key=value,value, for example --sweep "
                "train.learning_rate=1e-4,3e-4"
            )
        choices.append([f"{key}={value}" for value in values.split(",")])
    return tuple(itertools.product(*choices)) if choices else ()


def _array(stated: str | None, runs: int) -> str:
    """SLURM's notation of all runs, or of those that are stated, and how many may be at work at once."""
    indices, percent, at_once = (stated or "").partition("%")
    if not re.fullmatch(r"[\d,:-]*", indices) or (percent and not at_once.isdecimal()):
        raise ConfigError(f"command line: --array {stated}: write which runs, how many at once, or both: 0-3,5%2")
    if any(int(number) >= runs for number in re.findall(r"\d+", indices.partition(":")[0])):
        raise ConfigError(f"command line: --array {stated}: the sweep has runs 0 to {runs - 1}")
    return (indices or f"0-{runs - 1}") + percent + at_once


# --- submitting ------------------------------------------------------------------------------------------


def submit(prepared: Prepared) -> str:
    """Write the run folders and the script, submit it, note the job; its number.

    Raises:
        LaunchError: a folder is in use, or the scheduler refuses; a folder that was made for it is gone then.
    """
    folder, new = prepared.folder, not is_run_folder(prepared.folder)
    if not new:
        _refuse_running(folder)
    try:
        _write(prepared)
        job = slurm.submit(folder / SCRIPT)
    except LaunchError:
        if new and folder.exists():
            shutil.rmtree(folder)
        raise
    before = read_json(folder / SUBMITTED) or []
    write_json(folder / SUBMITTED, [*before, {"job": job, "time": time.time()}])
    return job


def _write(prepared: Prepared) -> None:
    if prepared.is_sweep:
        for plan in prepared.plans:
            create_run_folder(plan)
        named = [Path(plan.run_folder).name for plan in prepared.plans]
        write_sweep(prepared.folder, dict(zip(named, prepared.changes, strict=True)))
    elif is_run_folder(prepared.folder):
        with held(prepared.folder):
            continue_run_folder(prepared.plans[0])
    else:
        create_run_folder(prepared.plans[0])
    write_text(prepared.folder / SCRIPT, prepared.text)


def _refuse_running(folder: Path) -> None:
    """See that no other job works on a run, or will.

    Raises:
        RunFolderError: one does, or the run is finished.
    """
    if is_finished(folder):
        raise RunFolderError(f"{folder}: this run is finished already")
    for submitted in read_json(folder / SUBMITTED) or []:
        for queued in slurm.look_up(submitted["job"]):
            if not queued.ended:
                raise RunFolderError(
                    f"{folder}: job {queued.id} is {queued.state} already; `shoal status {folder}` says more, "
                    f"`shoal cancel {folder}` ends it"
                )


def test(prepared: Prepared) -> str:
    """Ask the scheduler whether it would take the job, and when it would begin. Nothing is left.

    Raises:
        TopologyError: it would not.
    """
    descriptor, name = tempfile.mkstemp(suffix=".sbatch")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(prepared.text)
    try:
        return slurm.submit(Path(name), test=True)
    finally:
        Path(name).unlink()
