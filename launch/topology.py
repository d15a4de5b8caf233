"""The machine we are on and the process we are: the only reader of the environment.

Counts devices without importing torch, because `shoal plan` must answer in a moment.
"""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import platform
import re
import socket
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from launch.accelerators import count_gpus, find_tpus, gpu_name, xla_on_cpu
from launch.devices import kind_of
from launch.errors import TopologyError
from launch.out_of_memory import limits_around
from launch.secret import is_secret_value
from launch.slurm_names import Job, Step, read_job, read_step
from launch.strategy import ZERO_STRATEGIES, Strategy, strategy_with_offload

Device = Literal["cpu", "cuda", "mps", "xla"]


@dataclass(frozen=True)
class Machine:
    """What this host offers."""

    host: str
    cores: int
    """CPU cores this process may use (its affinity, not the machine's total)."""
    gpus: int
    mps: bool = False
    gpu_name: str = ""
    """Make of the first GPU, such as NVIDIA H100 80GB HBM3; empty where the driver does not say."""
    gpu_memory_bytes: int = 0
    """Of each; 0 where it is not known."""
    cpu_has_bf16: bool = False
    """Whether the CPU multiplies matrices of bf16 in hardware (AMX), with twice the speed of fp32 and more."""
    memory_bytes: int = 0
    """Main memory, or what the limits of control groups leave of it."""
    tpus: int = 0
    """Devices of its TPU chips."""
    tpu_name: str = ""
    """Make of the chips, such as TPU v5e."""
    xla_on_cpu: int = 0
    """XLA devices that PJRT_DEVICE=CPU makes of the CPU; 0 where it is not set so."""
    torch_has_cuda: bool = False
    """Whether the torch that is installed was built for CUDA, as pip's is on Linux, with or without a GPU."""


@dataclass(frozen=True)
class World:
    """The process group a launcher has put this process in; one process alone where there is none."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False
    """Whether a launcher said so; False: no RANK and WORLD_SIZE in the environment."""
    strategy: Strategy | None = None
    """What `accelerate launch` was configured for, where that is more than plain data parallelism."""
    deepspeed_file: str | None = None
    """The DeepSpeed file that `accelerate launch` was given, absolute."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """How `accelerate launch` passes its configuration on."""
    step: Step | None = None
    """The place that SLURM has given this process, where srun is what started it."""
    to_be: bool = False
    """Whether it is only planned: what is decided now is decided for all its processes."""


def world_to_be(nodes: int, per_node: int) -> World:
    """The world that a launcher will make, for a plan that is made before it has."""
    return World(size=nodes * per_node, local_size=per_node, launched=True, to_be=True)


def read_machine() -> Machine:
    """Look at this host; takes about a millisecond."""
    mps = sys.platform == "darwin" and platform.machine() == "arm64"
    gpus = count_gpus(os.environ)
    name = gpu_name() if gpus else ""
    kind = kind_of(name)
    tpus, tpu_name = find_tpus(os.environ)
    return Machine(
        host=socket.gethostname(),
        cores=usable_cores(),
        gpus=gpus,
        mps=mps,
        gpu_name=name,
        gpu_memory_bytes=kind.memory_bytes if kind else 0,
        cpu_has_bf16=_cpu_has_bf16(),
        memory_bytes=_memory_bytes(),
        tpus=tpus,
        tpu_name=tpu_name,
        xla_on_cpu=xla_on_cpu(os.environ),
        torch_has_cuda=torch_has_cuda(),
    )


def usable_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_has_cuda() -> bool:
    """Whether the torch that is installed here was built for CUDA; it is not imported to see that."""
    spec = importlib.util.find_spec("torch")
    places = spec.submodule_search_locations if spec else None
    return any(Path(place, "lib", "libtorch_cuda.so").is_file() for place in places or ())


def _cpu_has_bf16(cpus: Path = Path("/proc/cpuinfo")) -> bool:
    """What Linux says of Intel's; it is not known of others."""
    if not cpus.is_file():
        return False
    with cpus.open(encoding="utf-8", errors="replace") as file:
        flags = next((line for line in file if line.startswith("flags")), "")
    return "amx_bf16" in flags.split()


def _memory_bytes(root: Path = Path("/")) -> int:
    """Of the machine, or what a control group leaves of it: a container's, a service's, that of a job of SLURM."""
    return min([psutil.virtual_memory().total, *(each.limit for each in limits_around(root))])


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """Read the variables that torchrun and `accelerate launch` set; where there are none, those of srun.

    Raises:
        TopologyError: one of them is there without the others, or is not a number; or there is a SLURM job of several
            tasks around us, and we are none of them.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    variables = {name: environ[name] for name in stray_variables(environ)}
    stated = {name: environ[name] for name in names if environ.get(name)}
    if "RANK" not in stated and "WORLD_SIZE" not in stated:
        # One process alone that `shoal run` has started, within a job of several tasks say, is no task.
        step = None if is_supervised(environ) and not roll_call(environ) else read_step(environ)
        if step is None or step.size == 1:
            return World(variables=variables)
        return World(
            step.rank,
            step.size,
            step.local_rank,
            step.local_size,
            launched=True,
            strategy=_configured_strategy(environ),
            deepspeed_file=_deepspeed_file(environ),
            variables=variables,
            step=step,
        )
    missing = [name for name in names if name not in stated]
    if missing:
        raise TopologyError(
            f"the environment sets {', '.join(stated)} but not {', '.join(missing)}; start the workers with "
            "`shoal run`, `accelerate launch`, `torchrun` or `srun`, which set all of them"
        )
    if environ.get("LOCAL_WORLD_SIZE"):
        stated["LOCAL_WORLD_SIZE"] = environ["LOCAL_WORLD_SIZE"]
    try:
        rank, size, local_rank = (int(stated[name]) for name in names)
        local_size = int(stated.get("LOCAL_WORLD_SIZE", size))
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            shown = " ".join(f"{name}={value}" for name, value in stated.items())
            raise TopologyError(f"the environment holds {shown}, which is no possible world")
    except ValueError:
        shown = " ".join(f"{name}={value}" for name, value in stated.items())
        raise TopologyError(f"the environment holds {shown}, which are not all whole numbers") from None
    return World(
        rank,
        size,
        local_rank,
        local_size,
        launched=True,
        strategy=_configured_strategy(environ),
        deepspeed_file=_deepspeed_file(environ),
        variables=variables,
    )


def _configured_strategy(environ: Mapping[str, str]) -> Strategy | None:
    """The strategy that `accelerate launch` passes on by its variables (accelerate 1.15, utils/launch.py)."""
    if _is_on("ACCELERATE_USE_FSDP", environ):
        version = environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise TopologyError(
                f"`accelerate launch` was configured for FSDP version {version}, which loses its optimizer state on "
                "resuming; use fsdp_version: 2, as in accelerate_configs/fsdp2.yaml"
            )
        return Strategy.FSDP2_OFFLOAD if _is_on("FSDP_OFFLOAD_PARAMS", environ) else Strategy.FSDP2
    if _is_on("ACCELERATE_USE_DEEPSPEED", environ):
        if _deepspeed_file(environ):
            return None  # the file says it
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        devices = [
            environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none").lower()
            for what in ("OPTIMIZER", "PARAM")
        ]
        strategy = strategy_with_offload(int(stage), *devices) if stage.isdecimal() else None
        if strategy is None:
            raise TopologyError(
                f"`accelerate launch` was configured for ZeRO stage {stage}, optimizer offloaded to {devices[0]}, "
                f"weights to {devices[1]}; there are {ZERO_STRATEGIES}, see accelerate_configs/"
            )
        return strategy
    return None


def _deepspeed_file(environ: Mapping[str, str]) -> str | None:
    stated = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if stated in ("", "none") or not _is_on("ACCELERATE_USE_DEEPSPEED", environ):
        return None
    return str(Path(stated).absolute())


def _is_on(name: str, environ: Mapping[str, str]) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes")


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where prepared data is kept between runs: `$SHOAL_CACHE`, else the user's cache folder."""
    stated = environ.get("SHOAL_CACHE")
    if stated:
        return Path(stated).expanduser().absolute()
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shoal"


def config_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where a user's settings for all runs are: `$XDG_CONFIG_HOME/shoal`, else `~/.config/shoal`."""
    base = environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "shoal"


def tracker_is_known(server: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether there is a key for a server of Weights & Biases (`host` or `host:port`); it is not looked at."""
    if environ.get("WANDB_API_KEY"):
        return True
    # wandb takes the key of its older server for the newer one too.
    names = {server, "api.wandb.ai"} if server.endswith(".coreweave.com") else {server}
    try:
        known = netrc.netrc(environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(name) for name in names)


def hub_is_off(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the user switched the Hugging Face Hub off (HF_HUB_OFFLINE)."""
    return environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def evaluate_modules_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where `evaluate` keeps the code of metrics from the Hub, a folder for each."""
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    modules = environ.get("HF_MODULES_CACHE") or f"{home}/modules"
    return Path(modules).expanduser() / "evaluate_modules" / "metrics"


@contextlib.contextmanager
def tokenizers_without_threads(environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Processes started meanwhile run their tokenizers in one thread each, for good."""
    name = "TOKENIZERS_PARALLELISM"
    before = environ.get(name)
    environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del environ[name]
        else:
            environ[name] = before


def roll_call(environ: Mapping[str, str] = os.environ) -> str | None:
    """Where the launcher calls the roll of its ranks, as `launch.rollcall` announces it; None where none does."""
    return environ.get(ANNOUNCED)


ANNOUNCED = "SHOAL_ROLL_CALL"


def read_slurm_job(environ: Mapping[str, str] = os.environ) -> Job | None:
    """The SLURM job we are in; None outside of one."""
    return read_job(environ)


def enter_step(world: World, environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell torch which task of srun we are; also where they meet, and its threads, unless the user has said so."""
    if world.step is None:
        return
    environ.update(world_variables(world.rank, world.size, world.local_rank, world.local_size))
    environ.setdefault("MASTER_ADDR", world.step.address)
    environ.setdefault("MASTER_PORT", str(world.step.port))
    if world.step.cpus:
        environ.setdefault("OMP_NUM_THREADS", str(world.step.cpus))


def is_first(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher, if there is one, calls this process or thread its first."""
    return environ.get("RANK", "0") == "0"


def enter_device(changes: Mapping[str, str], environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell torch_xla and Accelerate which device there is, before they are imported; a launcher may have not."""
    environ.update(changes)


def world_variables(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    """What a rank must know of the world it is in; it has the names that torchrun uses."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
    }


def enter_world(
    world: World, address: str, port: int, interface: str | None, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Tell torch which rank we are and where the ranks meet, a store that is served there already.

    gloo would take the interface that the name of this host resolves to, which on Debian is the loopback: with an
    `interface` it takes that one, unless the user has chosen another.
    """
    environ.update(
        {
            **world_variables(world.rank, world.size, world.local_rank, world.local_size),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 connects too (torch, distributed/rendezvous.py)
        }
    )
    if interface:
        environ.setdefault("GLOO_SOCKET_IFNAME", interface)


_OF_THE_WORLD = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|WANDB_SERVICE)$"
    r"|(MASTER|ROLE|TORCHELASTIC|PET|PMI|PMIX|OMPI|MV2|SHOAL_ROLL|SHOAL_SUPERVISED)(_|$)"
)


def leave_world(environ: MutableMapping[str, str] = os.environ) -> None:
    """Forget whose rank started this process: it takes part in no exchange, and has a service of wandb of its own."""
    for name in [name for name in environ if _OF_THE_WORLD.match(name)]:
        del environ[name]


def is_supervised(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `shoal run` started this worker: it shows our stdout, keeps our stderr, and reports our failure."""
    return environ.get("SHOAL_SUPERVISED") == "1"


_LAUNCHERS_OWN = re.compile(r"(ACCELERATE|FSDP|DEEPSPEED|DS|PARALLELISM_CONFIG)_")


def stray_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Variables that would change how Accelerate or DeepSpeed train, behind the back of a plan."""
    return sorted(name for name in environ if _LAUNCHERS_OWN.match(name))


def worker_environment(changes: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """This process's environment without stray variables, and with a plan's `changes` laid over it."""
    stray = set(stray_variables(environ))
    return {**{name: value for name, value in environ.items() if name not in stray}, **changes}


_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|JWT|COOKIE)", re.IGNORECASE)
_RECORDED = re.compile(
    r"(CUDA|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|HF_HUB_OFFLINE|HF_HOME|HF_DATASETS|TOKENIZERS|TRANSFORMERS"
    r"|ACCELERATE|FSDP|DS_|SLURM|SHOAL|PJRT|XLA|RANK$|WORLD_SIZE$|LOCAL_RANK$|LOCAL_WORLD_SIZE$)"
)


def recorded_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that can change a run, for its record; never one whose name speaks of a secret."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if _RECORDED.match(name)
        and not is_secret_value(value)
        and (name == "TOKENIZERS_PARALLELISM" or not _SECRET_NAME.search(name))
    }


_OF_A_NOTEBOOK = re.compile(r"(COLAB|KAGGLE|TPU|PJRT)(_|$)")


def notebook_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables by which notebook services, and their TPUs, are known; none of them is a secret's."""
    return {
        name: value for name, value in environ.items() if _OF_A_NOTEBOOK.match(name) and not _SECRET_NAME.search(name)
    }


def child_of_notebook(changes: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for a process that a notebook's kernel starts; it draws no plots into the notebook."""
    return {**{name: value for name, value in environ.items() if name != "MPLBACKEND"}, **changes}
