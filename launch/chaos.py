"""Runs a recipe twice on this machine, undisturbed and interrupted at random, each time starting it again.

The launcher is a process of its own, started as a user would, since it is one of those that get killed.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from launch.errors import EndedError, ParityError, RunFolderError
from launch.plan import decide, python_environment
from launch.processes import alive, below, die_with_parent, gone, kill
from launch.record import held, is_finished, is_run_folder, read_json
from launch.recorded import METRICS, size_in_bytes
from launch.sections import RunConfig
from launch.topology import World, worker_environment

UNDISTURBED, INTERRUPTED = "undisturbed", "interrupted"
"""Names of the run folders."""

UPDATES = 40
"""Length of the runs unless it is stated."""

FEWEST_SAVES, SAVES = 4, 8
"""A run whose run file saves it less often than the first is saved as often as the second."""

TAIL_BYTES = 1 << 16
"""Of metrics.jsonl, enough to hold the newest records."""

LOCK_SECONDS = 10.0

GONE_SECONDS = 60.0
"""How long what a killed rank leaves behind may take to end."""

LONGEST_SILENCE_SECONDS = 300.0
"""Without a new record, at least so long, an attempt counts as hung; longer where the undisturbed run was slow."""

_POLL_SECONDS = 0.005


class Kind(StrEnum):
    """What happens to a run."""

    STOP = "SIGTERM to the launcher"
    RANK = "SIGKILL of one rank"
    TREE = "SIGKILL of all processes"


@dataclass(frozen=True)
class Strike:
    """An interruption that is planned."""

    kind: Kind
    update: int
    """It happens once this update is recorded …"""
    delay: float
    """… and so many times the duration of an update have passed."""
    choice: float
    """Which rank, as a share of them."""


@dataclass(frozen=True)
class Interruption:
    """One that happened."""

    strike: Strike
    update: int
    """The last update recorded when it happened."""
    reached: int
    """The last one recorded when all was over; a clean stop finishes one."""
    exit_code: int | None = None
    """Of the launcher; None where it started the workers again itself."""
    resumed: int = 0
    """Update of the checkpoint from which the run went on; 0: none, it began anew."""

    @property
    def again(self) -> int:
        """How many updates were done again."""
        return max(0, self.reached - self.resumed)


def draw(kills: int, updates: int, seed: int) -> list[Strike]:
    """Plan so many interruptions of a run of so many updates: all kinds in turn, in random order, at random moments.

    Not after the last update, where a run may be over before it is hit.
    """
    chosen = random.Random(seed)
    kinds: list[Kind] = []
    while len(kinds) < kills:
        kinds += chosen.sample(list(Kind), len(Kind))
    possible = range(1, max(2, updates))
    moments = chosen.sample(possible, kills) if kills <= len(possible) else chosen.choices(possible, k=kills)
    return [
        Strike(kind, update, chosen.uniform(0, 2), chosen.random())
        for kind, update in zip(kinds, sorted(moments), strict=False)
    ]


# --- settings --------------------------------------------------------------------------------------------


def settings(file: str, stated: list[str], folder: Path) -> tuple[list[str], RunConfig, list[str]]:
    """The overrides for both runs, the configuration they lead to, and what to tell of them.

    Raises:
        LaunchError: the run cannot be; nothing was started.
    """

    def is_stated(*keys: str) -> bool:
        return any(item.startswith(tuple(f"{key}=" for key in keys)) for item in stated)

    overrides, told = list(stated), []
    if not is_stated("train.max_steps", "train.epochs"):
        overrides.append(f"train.max_steps={UPDATES}")
    for key, value in (("track.every_steps", "1"), ("track.wandb", "off"), ("track.also", "[]")):
        overrides += [] if is_stated(key) else [f"{key}={value}"]
    plan = decide(file, overrides, folder / UNDISTURBED, World()).plan
    every, updates = plan.config.save.every_steps, plan.length.updates or UPDATES
    if not is_stated("save.every_steps") and (every is None or every * FEWEST_SAVES > updates):
        often = max(1, updates // SAVES)
        overrides.append(f"save.every_steps={often}")
        told.append(f"save.every_steps = {often} for both runs, since {every or 'null'} saves too rarely to go on from")
        plan = decide(file, overrides, folder / UNDISTURBED, World()).plan
    return overrides, plan.config, told


# --- the undisturbed run ---------------------------------------------------------------------------------


def run_undisturbed(arguments: list[str], folder: Path) -> float:
    """See the run that the other one is compared with through to its end; how long it took.

    Raises:
        EndedError: it did not end well.
    """
    started = time.monotonic()
    launcher = _Launcher(arguments, folder / UNDISTURBED)
    try:
        code = launcher.process.wait()
    finally:
        launcher.kill()
    if code:
        raise EndedError(f"the undisturbed run failed: {launcher.last_words()}", code)
    return time.monotonic() - started


def pace_of(folder: Path) -> tuple[int, float]:
    """How many updates the undisturbed run has made, and the median of the seconds each took."""
    run = folder / UNDISTURBED
    times = [record["time"] for record in _records(run) if record["kind"] == "train"]
    pauses = [after - before for before, after in itertools.pairwise(times)]
    return read_json(run / "result.json")["updates"], statistics.median(pauses) if pauses else 0.0


# --- the interrupted run ---------------------------------------------------------------------------------


def run_interrupted(
    arguments: list[str],
    folder: Path,
    strikes: list[Strike],
    seconds_per_update: float,
    undisturbed_seconds: float,
    said: Callable[[str], None],
) -> Iterator[Interruption]:
    """Start the run, interrupt it, start it again, until it ends; the interruptions as soon as it has gone on.

    Fewer than planned where the run was over too soon.

    Raises:
        ParityError: it hangs, or failed without having been interrupted since it was started.
    """
    run = _Interrupted(arguments, folder / INTERRUPTED, max(LONGEST_SILENCE_SECONDS, 3 * undisturbed_seconds))
    happened: Interruption | None = None
    try:
        run.start()
        for number, strike in enumerate(strikes, 1):
            if not run.wait_for(strike.update):
                break
            if happened:
                yield run.gone_on(happened)
            time.sleep(strike.delay * seconds_per_update)
            happened = run.strike(strike)
            if happened is None:
                break
            said(f"{number}/{len(strikes)}  {strike.kind} at update {happened.update}")
        run.see_through()
        if happened:
            yield run.gone_on(happened)
    finally:
        run.kill()


class _Interrupted:
    """The run, over all its attempts."""

    def __init__(self, arguments: list[str], folder: Path, patience: float) -> None:
        self._arguments, self._folder, self._patience = arguments, folder, patience
        self._launcher: _Launcher | None = None
        self._since = 0.0
        """When the newest attempt began; older records are of earlier ones."""
        self._excused = False
        """Whether the launcher was interrupted, so that it may fail."""
        self._ended_with: int | None = None
        """Exit code of the launcher after the last interruption, once it has one."""

    def start(self) -> None:
        _wait_for_lock(self._folder)
        self._since, self._excused = time.time(), False
        self._launcher = _Launcher(self._arguments, self._folder)

    @property
    def launcher(self) -> _Launcher:
        assert self._launcher, "started"
        return self._launcher

    def update(self) -> int:
        """The last one that this attempt has recorded."""
        return max(
            (
                record["update"]
                for record in _records(self._folder, TAIL_BYTES)
                if record["kind"] == "train" and record["time"] >= self._since
            ),
            default=0,
        )

    def wait_for(self, update: int) -> bool:
        """Wait until an attempt has recorded an update, or a later one; False where the run is over.

        Raises:
            ParityError: the run failed by itself, or hangs.
        """
        size, changed = -1, time.monotonic()
        while True:
            if not self._goes_on():
                return False
            now = size_in_bytes(self._folder)
            if now != size:
                size, changed = now, time.monotonic()
                if self.update() >= update:
                    return True
            elif time.monotonic() - changed > self._patience:
                raise ParityError(
                    f"{self._folder}: hangs: no new record for {self._patience:.0f} s; logs: {self._folder / 'logs'}"
                )
            time.sleep(_POLL_SECONDS)

    def see_through(self) -> None:
        """Wait for the end of the run."""
        while self.wait_for(sys.maxsize):
            pass

    def _goes_on(self) -> bool:
        """Start again where an interruption has ended the launcher; False where the run is over."""
        code = self.launcher.process.poll()
        if code is None:
            return True
        self.launcher.kill()
        if code == 0:
            return False
        if not self._excused:
            raise ParityError(
                f"the interrupted run failed, with exit code {code}, where the other did not: "
                f"{self.launcher.last_words()}"
            )
        self._ended_with = code
        self.start()
        return True

    def strike(self, strike: Strike) -> Interruption | None:
        """Interrupt the run, and wait until nothing of it is left but a launcher that starts again by itself.

        None where it was over already.
        """
        update = self.update()
        launcher = self.launcher.itself
        workers = below(launcher)
        ranks = _ranks(launcher)
        if not ranks:
            return None
        self._excused, self._ended_with = True, None
        if strike.kind is Kind.TREE:
            self.launcher.kill()
        elif strike.kind is Kind.STOP:
            self.launcher.process.terminate()
            gone([launcher], self._patience)
        else:
            ranks[int(strike.choice * len(ranks))].kill()
        if not gone(workers, GONE_SECONDS):
            left = ", ".join(str(process.pid) for process in alive(workers))
            raise ParityError(f"{self._folder}: hangs: processes {left} do not leave after {strike.kind}")
        reached = self.update()
        self._since = time.time()
        if self.launcher.process.poll() == 0 or is_finished(self._folder):
            return None
        return Interruption(strike, update, max(update, reached))

    def gone_on(self, interruption: Interruption) -> Interruption:
        """The same, with what is known once training goes on."""
        names = [
            record["checkpoint"]
            for record in _records(self._folder)
            if record["kind"] == "resume" and record["time"] >= self._since
        ]
        resumed = int(names[-1].rpartition("-")[2]) if names else 0
        return replace(interruption, exit_code=self._ended_with, resumed=resumed)

    def kill(self) -> None:
        """Leave nothing behind."""
        if self._launcher:
            self._launcher.kill()


class _Launcher:
    """`shoal run` in a process and a session of its own."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._log = folder.with_name(f"{folder.name}.log")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch", "run", *arguments, "--out", str(folder)],
                env=worker_environment(python_environment()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches it through us alone
                preexec_fn=die_with_parent,
            )
        self.itself = psutil.Process(self.process.pid)

    def kill(self) -> None:
        """End it and everything below it at once."""
        kill(self.itself)
        self.process.wait()

    def last_words(self) -> str:
        """Its last line, and where the others are."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"{lines[-1].removeprefix('shoal: ') if lines else 'without a word'} ({self._log})"


def _ranks(launcher: psutil.Process) -> list[psutil.Process]:
    """The workers, in the order of their ranks."""
    try:
        children = [child for child in launcher.children() if "launch.train" in child.cmdline()]
    except psutil.Error:
        return []
    return sorted(alive(children), key=lambda process: (process.create_time(), process.pid))


def _wait_for_lock(folder: Path) -> None:
    """The kernel frees the lock of a process that was killed, once it is gone."""
    until = time.monotonic() + LOCK_SECONDS
    while is_run_folder(folder):
        try:
            with held(folder):
                return
        except RunFolderError:
            if time.monotonic() > until:
                raise
            time.sleep(_POLL_SECONDS)


def _records(run: Path, tail_bytes: int = sys.maxsize) -> list[dict[str, Any]]:
    """All records, or those in the last so many bytes; a line that is cut off is left out."""
    try:
        with (run / METRICS).open("rb") as file:
            begin = max(0, file.seek(0, os.SEEK_END) - tail_bytes)
            file.seek(begin)
            lines = file.read().split(b"\n")
    except OSError:
        return []
    return [json.loads(line) for line in lines[bool(begin) : -1]]
