"""What became of runs: the state of their jobs and what their folders say, together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import slurm
from launch.errors import RunFolderError, TopologyError
from launch.plan import Plan
from launch.record import held, is_finished, is_run_folder, read_json, read_plan
from launch.recorded import METRICS, number, records, whole
from launch.root_cause import Cause, find_cause, read_cause
from launch.slurm import Queued
from launch.stop import STOPPED
from launch.submit import SUBMITTED
from launch.supervise import saved_updates
from launch.sweep import SWEEP, read_sweep
from launch.words import roughly

ASK_SECONDS = 5.0
"""How often the scheduler is asked whether a job has ended."""

RECENT = 20
"""Updates from which the time of the next ones is judged."""


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run, by the metric that it is judged by."""

    metric: str
    value: float
    update: int


@dataclass(frozen=True)
class Status:
    """A run at this moment."""

    run: str
    state: str
    """finished, running, queued, stopped, failed, cancelled or begun; unreadable, where its folder is not whole."""
    because: str
    """Why it waits or has ended, in one line."""
    job: str = ""
    nodes: str = ""
    update: int = 0
    updates: int | None = None
    """Of how many; None while that is not known."""
    loss: float | None = None
    seconds_left: float | None = None
    slow: str | None = None
    """Which rank keeps the others waiting, if one does."""
    best: Best | None = None

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @property
    def progress(self) -> str:
        """How far it is, for people."""
        parts = [f"update {self.update:,}" + (f" of {self.updates:,}" if self.updates else "")]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.seconds_left is not None:
            parts.append(f"about {roughly(self.seconds_left)} left")
        if self.slow:
            parts.append(self.slow)
        return ", ".join(parts)


def status(folder: Path) -> list[Status]:
    """The state of a run, or of each run of a sweep.

    Raises:
        RunFolderError: there is no run.
    """
    runs = runs_of(folder)
    jobs = _jobs(folder)
    return [_status(run, jobs.get(index if run != folder else None)) for index, run in enumerate(runs)]


def everything(parent: Path) -> list[Status]:
    """The state of all runs and sweeps within a folder."""
    folders = sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    return [each for folder in folders if _is_ours(folder) for each in _status_of_any(folder)]


def _status_of_any(folder: Path) -> list[Status]:
    """One that cannot be read hides no other."""
    try:
        return status(folder)
    except (RunFolderError, OSError, ValueError) as error:
        return [Status(str(folder), "unreadable", str(error))]


def by_folder(run: Path) -> Status:
    """The state of a run as far as its folder tells; no scheduler is asked."""
    return _status(run, None)


def runs_of(folder: Path) -> list[Path]:
    """The run folder itself, or those of a sweep.

    Raises:
        RunFolderError: it is neither.
    """
    if is_run_folder(folder):
        return [folder]
    runs = read_sweep(folder)
    if runs is None:
        raise RunFolderError(f"{folder}: is not a run folder (no plan.json in it), nor that of a sweep")
    return [folder / name for name in runs]


def _is_ours(folder: Path) -> bool:
    return is_run_folder(folder) or (folder / SWEEP).is_file()


def last_job(folder: Path) -> str | None:
    """The job that was submitted last for a run or a sweep."""
    submitted = read_json(folder / SUBMITTED)
    return submitted[-1]["job"] if submitted else None


def _jobs(folder: Path) -> dict[int | None, Queued]:
    """What the scheduler knows of the last job, by the place in its array; None: it is no array."""
    job = last_job(folder)
    if job is None:
        return {}
    try:
        found = slurm.look_up(job)
    except TopologyError:  # no scheduler here: the folder alone must do
        return {}
    jobs: dict[int | None, Queued] = {}
    for each in found:
        element = each.id.partition("_")[2]
        if element.isdecimal():
            jobs[int(element)] = each
        elif element:  # those that have not begun yet: 12_[3-5%2], or 12_3-5%2
            jobs |= dict.fromkeys(slurm.elements(element), each)
        else:
            jobs[None] = each
    return jobs


def _status(run: Path, job: Queued | None) -> Status:
    state, because = _state(run, job)
    facts = _progress(run) if is_run_folder(run) else {}
    if state != "running":
        facts = {name: value for name, value in facts.items() if name not in ("seconds_left", "slow")}
    return Status(str(run), state, because, job.id if job else "", job.nodes if job else "", **facts)


def _state(run: Path, job: Queued | None) -> tuple[str, str]:
    if is_finished(run):
        return "finished", _outcome(read_json(run / "result.json"))
    if job is not None and job.state == "PENDING":
        return "queued", _waiting(job)
    if job is not None and not job.ended:
        return "running", job.state.lower() if job.state != "RUNNING" else ""
    if job is None and _has_launcher(run):
        return "running", "on this machine"
    if job is not None and job.state == "CANCELLED":
        return "cancelled", _way_on(run)
    if cause := cause_of(run):
        return "failed", cause.message.splitlines()[0]
    if stopped := read_json(run / STOPPED):
        return "stopped", f"{stopped['signal']} after update {stopped['update']}; {_way_on(run)}"
    if job is not None:
        return "failed", f"{job.state}, exit code {job.exit_code}; {_way_on(run)}"
    return "begun", _way_on(run)


def _outcome(result: dict[str, Any]) -> str:
    """What came out, in a line; an evaluation alone has no summary."""
    if "summary" in result:
        return str(result["summary"]).partition("\n")[0]
    return ", ".join(f"{name}: {value:,.4f}" for name, value in result.get("metrics", {}).items())


def cause_of(run: Path) -> Cause | None:
    """Why a run has failed, also where no launcher was left to say so; None where it has not."""
    return read_cause(run) or (find_cause(run, (), ()) if any(run.glob("failure-*.json")) else None)


def _waiting(job: Queued) -> str:
    again = f"start {job.restarts + 1}, " if job.restarts else ""
    when = f", not before {job.start}" if job.start not in ("", "Unknown") else ""
    return f"{again}{job.reason or 'waits'}{when}"


def _way_on(run: Path) -> str:
    saved = saved_updates(run)
    return f"goes on from update {saved} when it is submitted or resumed" if saved else "nothing was saved"


def _has_launcher(run: Path) -> bool:
    try:
        with held(run):
            return False
    except RunFolderError:
        return True


# --- progress --------------------------------------------------------------------------------------------


def _progress(run: Path) -> dict[str, Any]:
    """How far a run is, by its own record."""
    plan = read_plan(run)
    updates: deque[dict[str, Any]] = deque(maxlen=RECENT)
    last: dict[str, Any] = {}  # of what tells of a slow rank; one that a start before has told of may be another host
    best: Best | None = None
    for record in records(run / METRICS):
        kind = record.get("kind")
        if kind == "train" and isinstance(record.get("update"), int):
            updates.append(record)
        elif kind in ("straggler", "resume"):
            last = record
        elif kind == "eval" and record.get("best"):
            best = _best(record, plan.config.eval.best_metric) or best
    found: dict[str, Any] = {"update": saved_updates(run), "updates": _total(plan, run), "best": best}
    if updates:
        found |= {"update": updates[-1]["update"], "loss": updates[-1].get("loss")}
    pace = _seconds_per_update(list(updates))
    if pace is not None and found["updates"]:
        found["seconds_left"] = max(0.0, pace * (found["updates"] - found["update"]))
    found["slow"] = last["message"] if last.get("rank") is not None else None
    return found


def _best(record: dict[str, Any], metric: str) -> Best | None:
    value, update = number(record.get(metric)), whole(record.get("update"))
    return None if value is None or update is None else Best(metric, value, update)


def _total(plan: Plan, run: Path) -> int | None:
    """Of how many updates, where the data are known by now."""
    if plan.length.updates is not None:
        return plan.length.updates
    data = read_json(run / "data.json")
    samples = data["splits"]["training"]["samples"] if data else None
    return plan.schedule(samples).total if samples else None


def _seconds_per_update(updates: list[dict[str, Any]]) -> float | None:
    times = [(record["update"], record["time"]) for record in updates if "time" in record]
    if len(times) < 2 or times[-1][0] <= times[0][0]:
        return None
    return float((times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0]))


# --- logs ------------------------------------------------------------------------------------------------


def log_of(run: Path, rank: int | None) -> Path:
    """Where a run's job, or one of its ranks, writes what it has to say.

    Raises:
        RunFolderError: there is no such log (yet).
    """
    if rank is not None:
        path = run / "logs" / f"rank-{rank}.log"
        if not path.is_file():
            there = ", ".join(sorted(each.name for each in (run / "logs").glob("*.log"))) or "none"
            raise RunFolderError(f"{path}: no such log (yet); there are: {there}")
        return path
    newest = sorted(run.glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)
    if not newest:
        raise RunFolderError(f"{run}: no job has written a log (yet); `shoal status {run}` says why")
    return newest[-1]


def follow(path: Path, ended: Callable[[], bool], write: Callable[[str], None]) -> None:
    """Write what comes to a file, until `ended()`; what is there already comes first."""
    asked = 0.0
    last = False
    with path.open(encoding="utf-8", errors="replace") as log:
        while True:
            if time.monotonic() - asked >= ASK_SECONDS:  # the scheduler serves others too
                asked, last = time.monotonic(), ended()
            while text := log.read():
                write(text)
            if last:
                return
            time.sleep(0.5)
