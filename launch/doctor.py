"""What is wrong with this machine for runs of ours, and the fix: each check looks at the real thing.

What needs torch is measured in processes of their own (`launch.probe`).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from launch import slurm
from launch.assets import code_root
from launch.disk import size_in_words
from launch.errors import TopologyError
from launch.plan import python_environment
from launch.rollcall import LOOPBACK, RollCall
from launch.topology import (
    ANNOUNCED,
    cache_folder,
    read_machine,
    read_slurm_job,
    stray_variables,
    tracker_is_known,
    worker_environment,
    world_variables,
)
from launch.versions import TORCH_XLA
from launch.weights_and_biases import end_service, user_settings

State = Literal["good", "warning", "bad", "skipped"]

PATIENCE_SECONDS = 180.0
"""How long a probe may take."""

LOW_DISK = 5 * 10**9
"""Bytes of which less is told: a small model's checkpoints need as much."""

EXCHANGED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Finding:
    """What a check has found."""

    name: str
    state: State
    found: str
    fix: str = ""
    host: str = ""
    """On which machine; empty: this one, or all together."""


def examine(ranks: int | None, folder: Path) -> Iterator[Finding]:
    """All checks, each as soon as it is done.

    `ranks` processes exchange something, by default as many as there are GPUs, or two; 0: none do. `folder` is where
    runs will be.
    """
    yield from packages()
    yield from names()
    yield environment()
    yield from devices(ranks)
    yield host_name()
    yield from disks(folder)
    yield scheduler()
    yield tracker()


# --- software --------------------------------------------------------------------------------------------


def packages(requires: list[str] | None = None) -> Iterator[Finding]:
    """Whether what is installed is what this version needs."""
    yield Finding("python", *_python(sys.version_info[:3]))
    stated = requires if requires is not None else (metadata.requires("shoal") or [])
    for text in stated:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        yield _package(requirement)
    for name in ("deepspeed", "peft", "wandb"):
        there = importlib.util.find_spec(name) is not None
        found = metadata.version(name) if there else "not installed"
        yield Finding(name, "good" if there else "skipped", found, "" if there else _extra(name))
    yield _torch_xla(read_machine().tpus)


def _torch_xla(tpus: int) -> Finding:
    """Whether it is there where there are TPUs, and of the release that belongs to its torch, which it links to."""
    needed = f"{tpus} TPU devices are here" if tpus else ""
    if importlib.util.find_spec("torch_xla") is None:
        fix = f"{TORCH_XLA}, where TPUs are wanted"
        return Finding("torch_xla", "warning" if tpus else "skipped", needed or "not installed", fix)
    version, torch = metadata.version("torch_xla"), metadata.version("torch")
    if version.split(".")[:2] != torch.split("+")[0].split(".")[:2]:
        fix = f"pip install 'torch=={'.'.join(version.split('.')[:2])}.*', or uninstall torch_xla"
        return Finding("torch_xla", "bad", f"{version} beside torch {torch}", fix)
    return Finding("torch_xla", "good", f"{version} beside torch {torch}{needed and ', ' + needed}")


def _python(version: tuple[int, ...]) -> tuple[State, str, str]:
    shown = ".".join(map(str, version))
    if version < (3, 11):
        return "bad", shown, "use Python 3.11 or newer"
    return "good", shown, ""


def _package(requirement: Requirement) -> Finding:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, "bad", "not installed", f"pip install '{requirement}'")
    if requirement.specifier and not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, "bad", version, f"pip install '{requirement}'")
    return Finding(requirement.name, "good", version)


def _extra(name: str) -> str:
    extra = {"peft": "lora"}.get(name, name)
    return f"pip install 'shoal[{extra}]', where it is wanted"


def names() -> Iterator[Finding]:
    """Whether `launch` and `recipes` are ours: other packages use such names too."""
    for name in ("launch", "recipes"):
        spec = importlib.util.find_spec(name)
        folders = [Path(each).resolve() for each in (spec.submodule_search_locations or [])] if spec else []
        expected = (code_root() / name).resolve()
        if expected in folders:
            yield Finding(f"package {name}", "good", str(expected))
        else:
            where = folders[0] if folders else "nowhere"
            fix = "uninstall the other one, or start from a folder without it (torchtune has one)"
            yield Finding(f"package {name}", "bad", f"{where} hides {expected}", fix)


def environment() -> Finding:
    """Whether variables are set that other launchers read."""
    stray = stray_variables()
    if not stray:
        return Finding("environment", "good", "nothing that changes how Accelerate or DeepSpeed train")
    fix = "unset them: a run file decides this, and they are not passed on"
    return Finding("environment", "warning", ", ".join(stray), fix)


# --- devices ---------------------------------------------------------------------------------------------


def devices(ranks: int | None) -> Iterator[Finding]:
    """What torch sees, and an exchange between processes."""
    machine = read_machine()
    seen = _probe(1)
    if isinstance(seen, str):
        yield Finding("torch", "bad", seen, "see whether `python -c 'import torch'` works")
        return
    torch = seen[0]
    built = f"torch {torch['torch']} (CUDA {torch['cuda'] or 'none'})"
    driver = f"{machine.gpus} GPUs by the driver, {torch['gpus']} by {built}"
    if machine.gpus and torch["gpus"] < machine.gpus:
        fix = "install a torch that is built for this driver's CUDA (`nvidia-smi` shows the newest it can do)"
        yield Finding("devices", "bad", driver, fix)
    else:
        yield Finding("devices", "good", driver if machine.gpus else f"CPU, {machine.cores} cores; {built}")
    if ranks == 0:
        return
    size = ranks or max(2, machine.gpus)
    answers = _probe(size)
    if isinstance(answers, str):
        yield Finding("exchange", "bad", answers, "no run over several processes can work until this does")
        return
    slowest = min(answer["gigabytes_per_second"] for answer in answers)
    what = f"{size} processes ({answers[0]['backend']}) add up {size_in_words(EXCHANGED_BYTES)} each"
    if not all(answer["right"] for answer in answers):
        yield Finding("exchange", "bad", f"{what}: the sum is wrong", "a device or link is broken: do not train on it")
    else:
        yield Finding("exchange", "good", f"{what}, {slowest:.2f} GB/s, the sum is right")


def _probe(size: int) -> list[dict[str, Any]] | str:
    """What so many processes on this machine answer; or what went wrong."""
    if size == 1:
        return probe(1, "", 0, 1)
    roll = RollCall(size, [LOOPBACK])
    try:
        return probe(size, roll.announcement, 0, size, roll.look)
    finally:
        roll.close()


def probe(
    size: int, announcement: str, first_rank: int, per_node: int, look: Callable[[], None] = lambda: None
) -> list[dict[str, Any]] | str:
    """What `launch.probe` answers in each of this machine's processes, of `size` in all; or what went wrong."""
    with tempfile.TemporaryFile("w+") as log:
        processes = []
        for local_rank in range(per_node):
            variables = {**python_environment(), "OMP_NUM_THREADS": "1"}
            if announcement:
                variables[ANNOUNCED] = announcement
                variables |= world_variables(first_rank + local_rank, size, local_rank, per_node)
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "launch.probe", str(EXCHANGED_BYTES)],
                    env=worker_environment(variables),
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            )
        try:
            _wait(processes, look)
        finally:
            for process in processes:
                process.kill()
        if any(process.wait() for process in processes):
            log.seek(0)
            lines = [line.strip() for line in log.read().splitlines() if line.strip()]
            return lines[-1] if lines else "the processes did not answer in time"
        return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]


def _wait(processes: list[subprocess.Popen[str]], look: Callable[[], None]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        if any(process.returncode for process in processes):
            return
        look()
        time.sleep(0.05)


# --- places ----------------------------------------------------------------------------------------------


def host_name() -> Finding:
    """Whether the name of this host leads to it."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        fix = "no harm to shoal's own launcher; torchrun and MPI need it in /etc/hosts"
        return Finding("host name", "warning", f"{name}: {error.strerror or error}", fix)
    if address.startswith("127."):
        fix = "no harm to shoal's own launcher; for torchrun on several hosts give the real address in /etc/hosts"
        return Finding("host name", "warning", f"{name} is {address}, which other hosts cannot reach", fix)
    return Finding("host name", "good", f"{name} is {address}")


def disks(folder: Path) -> Iterator[Finding]:
    """Whether runs and prepared data can be written, and how much room there is."""
    for what, place in (("runs", folder), ("cache", cache_folder())):
        there = next(each for each in (place.absolute(), *place.absolute().parents) if each.exists())
        try:
            with tempfile.NamedTemporaryFile(dir=there):
                pass
        except OSError as error:
            fix = {"runs": "choose another folder, by --out", "cache": "set SHOAL_CACHE to a folder of yours"}[what]
            yield Finding(f"disk of {what}", "bad", f"{there}: {error.strerror}", fix)
            continue
        free = shutil.disk_usage(there).free
        state: State = "good" if free >= LOW_DISK else "warning"
        fix = "" if free >= LOW_DISK else "checkpoints take three times the weights: make room, or choose another disk"
        yield Finding(f"disk of {what}", state, f"{there}: {size_in_words(free)} free", fix)


def scheduler() -> Finding:
    """Whether there is a SLURM to submit to, and whether we are in one of its jobs."""
    there = [command for command in ("sbatch", "srun", "scontrol", "squeue", "scancel") if slurm.is_there(command)]
    job = read_slurm_job()
    inside = f", in job {job.id} on {job.node}" if job else ""
    if not there:
        return Finding("SLURM", "skipped", f"no commands of SLURM here{inside}")
    if len(there) < 5:
        return Finding("SLURM", "warning", f"only {', '.join(there)}{inside}", "the others must be on the PATH of jobs")
    problem = slurm.is_answering()
    if problem:
        return Finding("SLURM", "warning", problem, "ask whether the controller is up, and whether SLURM_CONF is right")
    return Finding("SLURM", "good", f"its controller answers{inside}")


def tracker() -> Finding:
    """Whether Weights & Biases can be reached, and whether it knows us."""
    if importlib.util.find_spec("wandb") is None:
        return Finding("Weights & Biases", "skipped", "not installed")
    try:
        user = user_settings()
    except TopologyError as error:
        return Finding("Weights & Biases", "warning", str(error), "correct what is set, or unset it")
    end_service()
    if user.limit:
        return Finding("Weights & Biases", "skipped", user.limited)
    server = urlsplit(user.server)
    if not tracker_is_known(server.netloc):
        fix = "`wandb login`, where it is wanted"
        return Finding("Weights & Biases", "skipped", f"no key for {server.netloc} (WANDB_API_KEY or ~/.netrc)", fix)
    port = server.port or (80 if server.scheme == "http" else 443)
    try:
        socket.create_connection((str(server.hostname), port), timeout=3).close()
    except OSError as error:
        fix = "use track.wandb=offline, and `shoal sync RUN` later"
        return Finding("Weights & Biases", "warning", f"{server.netloc}: {error.strerror or error}", fix)
    return Finding("Weights & Biases", "good", f"a key is there, and {server.netloc} answers")
