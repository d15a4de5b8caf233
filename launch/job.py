"""Carries a plan out within a SLURM job: starts the ranks by srun, sees them through, and has the job queued again.

python -m launch.job RUN_FOLDER     what a batch script runs, on the first node of its job
python -m launch.job FILE [key=value …]     the same, with a plan made of the job's own nodes and tasks

When a job leaves: a signal from `sbatch --signal=B:` (its time is nearly up) is passed on to the ranks, which save and
leave. SIGTERM means that somebody wants the job to end (scancel, scontrol requeue): what SLURM does then is not ours.
Preemption tells the ranks alone, not the batch script: they save and leave, and we have the job queued again.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from launch import slurm
from launch.cluster import profile, refuse_candidates
from launch.errors import ConfigError, LaunchError, RunFolderError, TopologyError
from launch.out_of_memory import kills_on_host
from launch.plan import Plan, decide
from launch.printing import complain
from launch.record import (
    changed_settings,
    create_run_folder,
    held,
    is_finished,
    is_run_folder,
    read_json,
    read_plan,
    write_json,
)
from launch.registry import find_run_file
from launch.report.refresh import kept_reported
from launch.rollcall import RollCall, hosts_of_this_machine
from launch.root_cause import End
from launch.sbatch import step_command, step_environment
from launch.slurm_names import Job
from launch.supervise import POLL_SECONDS, Ending, Place, Signals, saved_updates, say, supervise
from launch.sweep import SWEEP, write_comparison
from launch.topology import ANNOUNCED, read_machine, read_slurm_job, worker_environment, world_to_be

GRACE_SECONDS = 10.0
"""How long tasks may take to leave before they are killed."""

AT_ONCE_SECONDS = 2.0
"""A task that was killed so soon after the first to fail was not killed for that: SLURM first asks, and waits."""

STARTS = "slurm.json"
"""The jobs of a run and their starts, in its folder."""


def main() -> None:
    """Carry out the run in a folder; end with its exit code, or with 0 once the job is queued again."""
    try:
        job = read_slurm_job()
        if job is None:
            raise TopologyError("this is no SLURM job; submit one with `shoal submit`, or with slurm/train.sbatch")
        sys.exit(carry_out(_folder(sys.argv[1:], job), job))
    except LaunchError as error:
        complain(str(error))
        sys.exit(error.exit_code)


def _folder(arguments: list[str], job: Job) -> Path:
    """The run folder: the one that is given, one of a sweep, or one made for this job and found again by its starts."""
    if not arguments:
        raise ConfigError("launch.job needs a run folder, or a run file with overrides")
    given = Path(arguments[0])
    if not given.is_dir():
        return _planned_here(arguments[0], arguments[1:], job)
    if len(arguments) > 1:
        raise ConfigError(f"{given}: a run folder is decided; overrides go with a run file")
    folder = given / f"{job.index:03d}" if job.index is not None and not is_run_folder(given) else given
    if not is_run_folder(folder):
        raise RunFolderError(f"{folder}: is not a run folder (no plan.json in it)")
    return folder


def _planned_here(file: str, overrides: list[str], job: Job) -> Path:
    """Plan a run file for the nodes and tasks of this job."""
    per_node = job.tasks_per_node or 1
    machine = replace(read_machine(), host=job.node, cores=job.cpus_per_task * per_node, gpus=job.gpus)
    stem = Path(find_run_file(file)).stem
    folder = Path("runs") / (f"{stem}-{job.id}" if job.index is None else f"{stem}-{job.id}-{job.index:03d}")
    plan = decide(file, overrides, folder, world_to_be(job.nodes, per_node), machine, beneath=profile()).plan
    refuse_candidates(plan)
    if plan.processes.device == "cuda" and job.gpus != per_node:
        raise TopologyError(
            f"{job.node}: job {job.id} has {job.gpus} GPUs on this node, but {per_node} tasks: each process is a task "
            f"of its own; submit it with --ntasks-per-node={job.gpus}"
        )
    if is_run_folder(folder):
        changed_settings(plan)
    else:
        create_run_folder(plan)
    return folder.absolute()


def carry_out(folder: Path, job: Job) -> int:
    """Start the ranks, wait, and decide what becomes of the job; the exit code of this process."""
    if is_finished(folder):
        complain(f"{folder}: this run is finished already")
        return 0
    with Signals() as signals:  # of the job's time, from its first moment to its last
        plan = read_plan(folder)
        with kept_reported(folder):  # the last time once the job is queued again, which must not wait for it
            ending = _see_through(plan, folder, job, signals)
            return _conclude(plan, folder, job, ending, signals.first)


def _see_through(plan: Plan, folder: Path, job: Job, signals: Signals) -> Ending:
    """Start the ranks and wait for their end.

    Raises:
        TopologyError: the job is not the one that was planned, or has brought nothing too often.
    """
    _check(plan, job)
    if not slurm.is_there("srun"):
        raise TopologyError(f"{job.node}: there is no `srun` on the PATH of this job: the ranks cannot be started")
    with held(folder):
        _refuse_fruitless(plan, folder, job)
        if not slurm.is_there("scontrol"):
            say(f"{job.node}: there is no `scontrol` on the PATH of this job: it cannot be queued again by itself")
        say(
            f"job {job.id}, start {job.restarts + 1}: {plan.processes.nodes} nodes × {plan.processes.per_node} "
            f"processes, strategy {plan.processes.strategy}"
        )
        hosts = hosts_of_this_machine(plan.config.cluster.network_interface)
        place = Place(hosts, [*job.names], command="shoal submit {run}")
        return supervise(plan, folder, StepRanks, place, signals=signals)


def _check(plan: Plan, job: Job) -> None:
    """See that the job is the one that was planned."""
    processes = plan.processes
    if job.nodes != processes.nodes or job.tasks_per_node not in (None, processes.per_node):
        raise TopologyError(
            f"{job.node}: job {job.id} has {job.nodes} nodes with {job.tasks_per_node} tasks each, but "
            f"{plan.run_folder}/plan.json was made for {processes.nodes} nodes with {processes.per_node}; submit it "
            "with `shoal submit`, which asks for what was planned"
        )
    if processes.device == "cuda" and job.gpus < processes.per_node:
        raise TopologyError(
            f"{job.node}: job {job.id} has {job.gpus} GPUs on this node, but {plan.run_folder}/plan.json was made for "
            f"{processes.per_node}"
        )


# --- starts and ends of the job --------------------------------------------------------------------------


def _refuse_fruitless(plan: Plan, folder: Path, job: Job) -> None:
    """Write down this start; refuse it where those before have brought nothing.

    Raises:
        TopologyError: as many in a row as are allowed have brought no newer checkpoint.
    """
    saved, limit = saved_updates(folder), plan.config.cluster.max_fruitless_starts
    starts = read_json(folder / STARTS) or []
    before = [start["saved"] for start in starts if start["job"] == job.id]
    if len(before) >= limit and set(before[-limit:]) == {saved}:
        raise TopologyError(
            f"job {job.id} has been started {limit} times in a row without a checkpoint newer than update {saved}: it "
            "is not started again; give it more cluster.time, or save more often (save.every_steps, save.every_minutes)"
        )
    start = {"job": job.id, "restarts": job.restarts, "saved": saved, "node": job.node, "time": time.time()}
    write_json(folder / STARTS, [*starts, start])


def _conclude(plan: Plan, folder: Path, job: Job, ending: Ending, told: int | None) -> int:
    """Say how it ended, and have the job queued again where it was stopped before its end; `told`: a signal to us."""
    if ending.exit_code == 0:
        print(read_json(folder / "result.json")["summary"], flush=True)
        if job.index is not None and (folder.parent / SWEEP).is_file():
            write_comparison(folder.parent)
        return 0
    if ending.traceback:
        print(ending.traceback, file=sys.stderr)
    complain(ending.message)
    interrupted = ending.stopped or (ending.cause is not None and ending.cause.unreachable)
    if not interrupted or told in (signal.SIGTERM, signal.SIGINT):
        return ending.exit_code
    if not plan.config.cluster.requeue:
        complain("cluster.requeue = false: the job is not queued again")
        return ending.exit_code
    if problem := slurm.requeue(job.id):
        complain(f"the job is not queued again: {problem}; submit it again with: shoal submit {folder}")
        return ending.exit_code
    complain(f"job {job.id} is queued again")
    return 0


# --- the ranks, as tasks of srun -------------------------------------------------------------------------


class StepRanks:
    """Ranks that srun has started, on all nodes of the job; srun stands for them all."""

    def __init__(self, plan: Plan, folder: Path, roll: RollCall | None) -> None:
        self.ends: list[End] = []
        self._told = False
        self._failed_at: float | None = None
        self._kills = kills_on_host()  # tasks have control groups of their own, which end with them
        self._log, self._read = folder / "logs" / "launcher.log", 0
        environment = step_environment(plan)
        if roll:
            environment[ANNOUNCED] = roll.announcement
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                step_command(plan, (socket.gethostname(), _free_port())),
                env=worker_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                stderr=log,
                start_new_session=True,
            )

    def look(self) -> None:
        """Notice that they have gone, or that one has failed."""
        code, now = self._process.poll(), time.monotonic()
        size = self._log.stat().st_size
        if size > self._read and (self._failed_at is None or now - self._failed_at < AT_ONCE_SECONDS):
            self._read = size  # it is looked at ten times a second, and may be on a slow file system
            self.ends = failures(self._log.read_text(encoding="utf-8", errors="replace"))
            kills, here = kills_on_host(), socket.gethostname()
            if kills is not None and self._kills is not None:
                known = kills - self._kills
                self.ends = [
                    replace(end, out_of_memory_kills=end.out_of_memory_kills or known) if end.host == here else end
                    for end in self.ends
                ]
        if code and not self.ends:
            self.ends = [End(code)]
        if self.ends and self._failed_at is None:
            self._failed_at = now

    @property
    def left(self) -> int:
        """Whether srun waits for any."""
        return int(self._process.poll() is None)

    def tell(self, number: int) -> None:  # noqa: ARG002
        """Ask every rank to stop, once.

        srun passes SIGUSR1 on to all tasks; of SIGTERM and SIGHUP it kills them at once, and SIGINT it keeps to itself
        (SLURM 22.05). To the ranks all of these mean the same.
        """
        if not self._told:
            self._told = True
            self._process.send_signal(signal.SIGUSR1)

    def ask_for_stack(self, rank: int) -> None:
        """Not to be had: srun tells all tasks or none."""

    def end(self) -> None:
        """See that nothing is left."""
        self.look()
        if self._process.poll() is None:
            self._process.terminate()
            until = time.monotonic() + GRACE_SECONDS
            while self._process.poll() is None and time.monotonic() < until:
                time.sleep(POLL_SECONDS)
            job = read_slurm_job()
            assert job is not None, "we are in a job"
            slurm.end_steps(job.id)
        self._process.wait()


_EXITED = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (?:Exited with exit code (\d+)|(\w[\w ]*))", re.MULTILINE)


_SIGNALS = {
    "Killed": signal.SIGKILL,
    "Out Of Memory": signal.SIGKILL,
    "Segmentation fault": signal.SIGSEGV,
    "Aborted": signal.SIGABRT,
    "Bus error": signal.SIGBUS,
    "Floating point exception": signal.SIGFPE,
    "Illegal instruction": signal.SIGILL,
}
"""How srun calls signals that have ended a task."""


def failures(said: str) -> list[End]:
    """The tasks that srun reports to have failed, in its order; of several at once the first."""
    ends = []
    for host, tasks, code, how in _EXITED.findall(said):
        number = int(code) if code else -_SIGNALS.get(how.strip(), signal.SIGTERM)
        kills = 1 if how.strip() == "Out Of Memory" else None
        ends.append(End(number, int(re.split(r"[,-]", tasks)[0]), host, kills))
    return ends


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
