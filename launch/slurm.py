"""SLURM's commands: submit, ask, queue again, cancel. What they answer, and their own words where they refuse."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.errors import TopologyError

PATIENCE_SECONDS = 60.0
"""How long a command of SLURM may take; a busy controller answers late."""


@dataclass(frozen=True)
class Queued:
    """A job as the scheduler knows it."""

    id: str
    """Of an element of an array: 12_3."""
    state: str
    """Such as PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, PREEMPTED, NODE_FAIL, CANCELLED."""
    reason: str
    """Why it waits; else empty."""
    nodes: str
    start: str
    """When it began, or is expected to."""
    exit_code: str
    restarts: int

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in (
            *("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED"),
            *("REQUEUED", "REQUEUE_HOLD", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"),
        )


def is_there(command: str) -> bool:
    """Whether a command of SLURM can be found."""
    return shutil.which(command) is not None


def is_answering() -> str | None:
    """None where the controller answers; else what is wrong."""
    try:
        said = _run("scontrol", "ping").stdout.strip()
    except TopologyError as error:
        return str(error)
    return None if " UP" in said else said


def submit(script: Path, *, test: bool = False) -> str:
    """Submit a batch script; the number of its job, or what the scheduler says of a test.

    Raises:
        TopologyError: the scheduler refuses it, or there is none here.
    """
    done = _run("sbatch", *(("--test-only",) if test else ("--parsable",)), str(script))
    return done.stderr.strip() if test else done.stdout.strip().partition(";")[0]


def requeue(job: str) -> str | None:
    """Put a job into the queue again; None, or why that was refused."""
    try:
        _run("scontrol", "requeue", job)
    except TopologyError as error:
        return str(error)
    return None


def cancel(job: str) -> None:
    """Cancel a job for good.

    Raises:
        TopologyError: the scheduler refuses to.
    """
    _run("scancel", job)


def end_steps(job: str) -> None:
    """End what srun has left of a job's steps, the batch script excepted."""
    done = _run("squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i")
    for step in done.stdout.split():
        if step.rpartition(".")[2].isdecimal():
            _run("scancel", "--signal=KILL", step)


def look_up(job: str) -> list[Queued]:
    """A job, or each element of an array; empty where the scheduler has forgotten it.

    Raises:
        TopologyError: there is no scheduler here, or it does not answer.
    """
    try:
        done = _run("scontrol", "--oneliner", "show", "job", job)
    except TopologyError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    return list(parse_jobs(done.stdout))


def parse_jobs(text: str) -> Iterator[Queued]:
    """What `scontrol --oneliner show job` prints, a line for each job."""
    for line in text.splitlines():
        fields = dict(part.partition("=")[::2] for part in line.split(" ") if "=" in part)
        if "JobId" not in fields:
            continue
        element = fields.get("ArrayTaskId")
        job = f"{fields['ArrayJobId']}_{element}" if element else fields["JobId"]
        reason = fields.get("Reason", "None")
        yield Queued(
            id=job,
            state=fields["JobState"],
            reason="" if reason == "None" else reason,
            nodes=fields.get("NodeList", "").replace("(null)", ""),
            start=fields.get("StartTime", ""),
            exit_code=fields.get("ExitCode", ""),
            restarts=int(fields.get("Restarts", "0")),
        )


def elements(text: str) -> list[int]:
    """The elements of an array that are written as one while they wait: `3-5,8%2`, with or without brackets."""
    found: list[int] = []
    for part in text.strip("[]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM.

    Raises:
        TopologyError: it is not there, does not answer, or refuses.
    """
    host = socket.gethostname()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    except FileNotFoundError:
        raise TopologyError(
            f"{host}: there is no `{command[0]}` here; SLURM's commands are on the login nodes and within jobs, not in "
            "most containers"
        ) from None
    except subprocess.TimeoutExpired:
        raise TopologyError(
            f"{host}: `{command[0]}` has not answered for {PATIENCE_SECONDS:.0f} s; is SLURM's controller up? "
            "(`scontrol ping` says)"
        ) from None
    if done.returncode:
        heads = (f"{command[0]}: ", "error: ")
        said = "; ".join(_without(line.strip(), heads) for line in done.stderr.splitlines() if line.strip())
        raise TopologyError(f"{host}: {command[0]} refuses: {said or f'exit code {done.returncode}'}")
    return done


def _without(line: str, heads: tuple[str, ...]) -> str:
    for head in heads:
        line = line.removeprefix(head)
    return line
