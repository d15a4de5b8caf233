"""What SLURM says to the processes of a job by environment variables: one table of names, and what follows. Pure.

Source: the sections "OUTPUT ENVIRONMENT VARIABLES" of sbatch(1) and srun(1), SLURM 22.05.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from launch.errors import TopologyError

NAMES = {
    "job": "SLURM_JOB_ID",
    "array": "SLURM_ARRAY_JOB_ID",
    "index": "SLURM_ARRAY_TASK_ID",
    "restarts": "SLURM_RESTART_COUNT",
    "nodes": "SLURM_JOB_NUM_NODES",
    "node_list": "SLURM_JOB_NODELIST",
    "node": "SLURMD_NODENAME",
    "tasks": "SLURM_NTASKS",
    "tasks_per_node": "SLURM_NTASKS_PER_NODE",
    "cpus_per_task": "SLURM_CPUS_PER_TASK",
    "gpus": "SLURM_GPUS_ON_NODE",
    "step": "SLURM_STEP_ID",
    "step_tasks": "SLURM_STEP_NUM_TASKS",
    "step_tasks_per_node": "SLURM_STEP_TASKS_PER_NODE",
    "step_node_list": "SLURM_STEP_NODELIST",
    "rank": "SLURM_PROCID",
    "local_rank": "SLURM_LOCALID",
}
"""Our names of them."""


@dataclass(frozen=True)
class Job:
    """The job that a process belongs to."""

    id: str
    restarts: int
    """How often it was queued again before."""
    nodes: int
    tasks_per_node: int | None
    """None where the job does not say."""
    cpus_per_task: int
    gpus: int
    """GPUs of the job on this node."""
    node: str
    names: tuple[str, ...]
    """Of all its nodes."""
    index: int | None
    """Its place in an array of jobs."""


@dataclass(frozen=True)
class Step:
    """The place of a task that srun has started."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    """The first node of the step, where rank 0 is."""
    port: int
    """Where the ranks meet, where nobody says otherwise: another one for each job and step."""
    cpus: int | None
    """CPUs of each task; None where the job does not say."""


def read_job(environ: Mapping[str, str]) -> Job | None:
    """The job we are in; None outside of SLURM."""
    job = environ.get(NAMES["job"])
    if not job:
        return None
    tasks = environ.get(NAMES["tasks_per_node"], "")
    return Job(
        id=job,
        restarts=_number("restarts", environ, 0),
        nodes=_number("nodes", environ, 1),
        tasks_per_node=int(tasks) if tasks.isdecimal() else None,
        cpus_per_task=_number("cpus_per_task", environ, 1),
        gpus=_number("gpus", environ, 0),
        node=environ.get(NAMES["node"], ""),
        names=tuple(node_names(environ.get(NAMES["node_list"], ""))),
        index=_number("index", environ, 0) if environ.get(NAMES["index"]) else None,
    )


def read_step(environ: Mapping[str, str]) -> Step | None:
    """Our place among the tasks of srun; None where srun has not started this process.

    Raises:
        TopologyError: the job has several tasks, and this process is none of them.
    """
    size = environ.get(NAMES["step_tasks"])
    if not environ.get(NAMES["step"]) or not size:
        tasks = environ.get(NAMES["tasks"], "1")
        if environ.get(NAMES["job"]) and tasks.isdecimal() and int(tasks) > 1:
            raise TopologyError(
                f"this process was started within SLURM job {environ[NAMES['job']]}, which has {tasks} tasks, but not "
                "by srun: it would be a world of its own; put `srun` in front of its command"
            )
        return None
    rank = _number("rank", environ, 0)
    per_node = tasks_per_node(environ.get(NAMES["step_tasks_per_node"], size))
    return Step(
        rank=rank,
        size=int(size),
        local_rank=_number("local_rank", environ, 0),
        local_size=per_node[_node_of(rank, per_node)],
        address=node_names(environ.get(NAMES["step_node_list"], "localhost"))[0],
        port=port_of(environ.get(NAMES["job"], "0"), environ[NAMES["step"]]),
        cpus=_number("cpus_per_task", environ, 0) or None,
    )


def _number(name: str, environ: Mapping[str, str], default: int) -> int:
    text = environ.get(NAMES[name], "")
    return int(text) if text.isdecimal() else default


def _node_of(rank: int, per_node: list[int]) -> int:
    """The node of a rank, where the first ranks are on the first node and so on."""
    for node, tasks in enumerate(per_node):
        if rank < tasks:
            return node
        rank -= tasks
    return len(per_node) - 1


def tasks_per_node(text: str) -> list[int]:
    """SLURM's `2(x3),1` as [2, 2, 2, 1]."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise TopologyError(f"{NAMES['step_tasks_per_node']} = {text}: is not what SLURM writes, such as 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def node_names(text: str) -> list[str]:
    """SLURM's `gpu[01-03,7],login` as names of hosts; what `scontrol show hostnames` says, without it."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            choices = [literal] if literal else [each for one in ranges.split(",") for each in _range(one)]
            expanded = [head + tail for head in expanded for tail in choices]
        names += expanded
    return names


def _range(text: str) -> list[str]:
    first, _, last = text.partition("-")
    if not last:
        return [first]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def port_of(job: str, step: str) -> int:
    """A port between 20000 and 29999, below those that the kernel gives out."""
    digits = [int(found) for found in (re.sub(r"\D", "", text) for text in (job, step)) if found]
    return 20000 + sum(weight * number for weight, number in zip((37, 1), digits, strict=False)) % 10000
