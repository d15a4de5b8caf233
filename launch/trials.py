"""Finds the largest micro-batch size that fits: starts the planned processes and lets them try, smallest first.

Processes of their own, because running out of memory on one rank leaves the others waiting in a collective: that
world ends, and what all its ranks had managed before is the answer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from launch import local
from launch.errors import EndedError, MemoryExhaustedError
from launch.fitting import TRIALS, Fits, advice
from launch.plan import Plan
from launch.record import create_run_folder, held, read_json


def find(plan: Plan, say: Callable[[str], None]) -> Fits:
    """Try the candidates of `plan`, with its model, strategy and processes.

    Raises:
        MemoryExhaustedError: not even the smallest fits.
        EndedError: the trials ended for another reason; their folder is kept.
        RunFolderError: a folder that is not of trials lies where theirs would be, or they are running.
    """
    folder = Path(f"{plan.run_folder}.trials")
    if (folder / "plan.json").is_file():  # of trials that failed; anything else of this name is not ours to remove
        with held(folder):
            shutil.rmtree(folder)
    command = (*(str(folder) if part == plan.run_folder else part for part in plan.command), "--trials")
    say(f"trying micro-batch sizes {', '.join(map(str, plan.batch.candidates))}")
    trial = plan.model_copy(update={"run_folder": str(folder), "command": command})
    with held(create_run_folder(trial)):
        ending = local.run(trial, folder, restarts=False)
    ended_by_memory = ending.exit_code == MemoryExhaustedError.exit_code or (ending.cause and ending.cause.killed)
    if ending.exit_code and not ended_by_memory:
        if ending.traceback:
            say(ending.traceback)
        raise EndedError(ending.message, ending.exit_code)
    peaks = {int(size): peak for size, peak in (read_json(folder / TRIALS) or {}).items()}
    shutil.rmtree(folder)
    if not peaks:
        raise MemoryExhaustedError(f"not even one sample per process fits into memory; {advice(plan)}")
    largest = max(peaks)
    larger = [size for size in plan.batch.candidates if size > largest]
    fits = Fits(largest, larger[0] if larger else None)
    shown = ", ".join(f"{size}: {peak / 2**30:.2f} GiB" for size, peak in peaks.items())
    say(f"micro-batch {largest} is the largest that fits (memory of a process at its peak: {shown})")
    return fits
