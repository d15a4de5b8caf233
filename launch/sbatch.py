"""Texts for SLURM from what a plan has decided: the script of a job, and the command that starts its ranks. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.errors import ConfigError
from launch.plan import Plan
from launch.render import TORCHRUN
from launch.sections import ClusterSection
from launch.strategy import Strategy

LOG = "slurm-%j.log"
"""What a job says, in its run folder; %j is its number."""


@dataclass(frozen=True)
class Submission:
    """How a job is to be submitted, beside what its plan says."""

    after: tuple[str, ...] = ()
    """Jobs that must have ended well before."""
    array: str | None = None
    """SLURM's notation of the runs of a sweep, such as 0-5%2."""


def script(plan: Plan, folder: Path, started_in: Path, submission: Submission, variables: dict[str, str]) -> str:
    """The batch script that carries a plan out: one job of all its nodes, which runs `launch.job` on the first.

    `folder` is the run folder, or that of a sweep; `variables` are what Python needs to find our packages.

    Raises:
        ConfigError: a name or path has a character that no script can hold.
    """
    cluster = plan.config.cluster
    lines = ["#!/bin/bash", *(_directive(option) for option in _options(plan, folder, submission))]
    lines += [_directive(option) for option in cluster.sbatch]
    lines += ["", f"cd {shlex.quote(str(started_in))}"]
    if cluster.modules:
        lines.append(f"module load {shlex.join(cluster.modules)}")
    if cluster.scratch:
        lines.append(f'export SHOAL_CACHE="{cluster.scratch}"')
    lines += [f"export {name}={shlex.quote(value)}" for name, value in {**variables, **cluster.environment}.items()]
    if cluster.setup:
        lines += cluster.setup.rstrip().splitlines()
    python = shlex.quote(cluster.python or plan.command[0])
    lines += [
        "",
        "# SLURM's signals reach this process itself: no shell stands between.",
        f"exec {python} -m launch.job {shlex.quote(str(folder))}",
    ]
    text = "\n".join(lines) + "\n"
    if "\0" in text or any("\n" in part or "\r" in part for part in (str(folder), str(started_in), *cluster.sbatch)):
        raise ConfigError(f"{folder}: a path with a line break cannot stand in a batch script; choose another --out")
    return text


def _directive(option: str) -> str:
    """A line that sbatch reads; it takes quotes around what has blanks, and no other marks."""
    name, equals, value = option.partition("=")
    if re.search(r"[\s#'\"\\]", value):
        value = '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return f"#SBATCH {name}{equals}{value}"


def _options(plan: Plan, folder: Path, submission: Submission) -> Iterator[str]:
    cluster, processes = plan.config.cluster, plan.processes
    yield f"--job-name=shoal-{Path(plan.config.recipe).stem}"
    for name, value in (
        ("partition", cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
        ("time", cluster.time),
        ("mem", cluster.memory),
    ):
        if value is not None:
            yield f"--{name}={value}"
    yield f"--nodes={processes.nodes}"
    yield f"--ntasks-per-node={processes.per_node}"
    yield f"--cpus-per-task={processes.threads}"
    if processes.device == "cuda":
        yield f"--gpus-per-node={_gpus(plan)}"
    log = LOG if submission.array is None else "slurm-%A_%a.log"
    yield f"--output={str(folder).replace('%', '%%')}/{log}"
    yield "--open-mode=append"
    yield f"--signal=B:USR1@{cluster.notice_seconds}"
    yield "--requeue" if cluster.requeue else "--no-requeue"
    if submission.after:
        yield f"--dependency=afterok:{':'.join(submission.after)}"
        yield "--kill-on-invalid-dep=yes"
    if submission.array is not None:
        yield f"--array={submission.array}"


def _gpus(plan: Plan) -> str:
    kind = plan.config.cluster.gpu_type
    return f"{kind}:{plan.processes.per_node}" if kind else str(plan.processes.per_node)


# --- the step --------------------------------------------------------------------------------------------


def launcher(cluster: ClusterSection, strategy: Strategy) -> str:
    """What starts the processes of a node.

    srun for every strategy: each is a task, bound to its CPUs by SLURM, which delivers signals to it directly. One
    process alone needs nothing else in any case.
    """
    if cluster.launcher == "auto" or strategy is Strategy.SINGLE:
        return "srun"
    return cluster.launcher


def step_command(plan: Plan, master: tuple[str, int]) -> list[str]:
    """The srun command that starts all ranks; `master` is where those of torchrun and Accelerate meet."""
    cluster, processes = plan.config.cluster, plan.processes
    by = launcher(cluster, processes.strategy)
    tasks, cpus = (
        (processes.per_node, processes.threads) if by == "srun" else (1, processes.threads * processes.per_node)
    )
    command = [
        "srun",
        f"--nodes={processes.nodes}",
        f"--ntasks={processes.nodes * tasks}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",  # since SLURM 22.05 no step takes it from its job
        "--distribution=block",  # rank 0 and its neighbours on the first node
        "--kill-on-bad-exit=1",
        "--input=none",
    ]
    if processes.device == "cuda":
        command += [
            f"--gpus-per-node={_gpus(plan)}",
            "--gpu-bind=none",
        ]  # each sees all of its node, as LOCAL_RANK says
    command += cluster.srun
    python = cluster.python or plan.command[0]
    worker = list(plan.command[1:])
    if by == "srun":
        return [*command, *cluster.container, python, *worker]
    host, port = master
    if by == "torchrun":
        start = [
            *("-m", "torch.distributed.run", f"--nnodes={processes.nodes}", f"--nproc-per-node={processes.per_node}"),
            *(f"--master-addr={host}", f"--master-port={port}"),
        ]
        rank = "--node-rank=$SLURM_NODEID"
    else:
        start = [
            *("-m", "accelerate.commands.launch", f"--config_file={plan.run_folder}/accelerate.yaml"),
            *(f"--main_process_ip={host}", f"--main_process_port={port}"),
        ]
        rank = "--machine_rank=$SLURM_NODEID"
    # The number of a node is known on that node alone.
    inner = f"exec {shlex.join([*cluster.container, python, *start])} {rank} {shlex.join(worker)}"
    return [*command, "bash", "-c", inner]


def step_environment(plan: Plan) -> dict[str, str]:
    """What the ranks need in their environment, beside what the launcher tells them."""
    interface = plan.config.cluster.network_interface
    variables = {**plan.environment, "SHOAL_SUPERVISED": "1"}
    if launcher(plan.config.cluster, plan.processes.strategy) != "srun":
        variables |= TORCHRUN
    if interface:
        variables |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    return variables
