"""How many processes a run has, where, and with what; what devices and strategies cannot do is refused. Pure."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from launch.config import Loaded
from launch.devices import kind_of
from launch.errors import ConfigError, TopologyError
from launch.strategy import Strategy
from launch.topology import Device, Machine, World

CPU_RANKS_PER_CORE = 4
"""More processes than this on one core only get in each other's way; a larger number is a slip."""


class Processes(BaseModel):
    """How many processes, where, and with what."""

    model_config = ConfigDict(frozen=True)

    strategy: Strategy
    device: Device
    nodes: int
    per_node: int
    world_size: int
    threads: int
    """CPU threads each process computes with; 0 where the cores of the machine are not known."""
    device_name: str
    """Make of the GPUs; empty where it is not known."""
    memory_bytes: int
    """Main memory for each process; 0 where it is not known."""
    gpu_memory_bytes: int = 0
    """Of the GPU of each process, or of each TPU device; 0 where there is none, or it is not known."""
    quick_format: str = ""
    """The `train.precision` in which the devices multiply faster than in fp32; empty where it is not known."""
    devices: int = 1
    """With how many devices each process computes: with all of its host's where they are TPUs."""

    @property
    def replicas(self) -> int:
        """Parts that a global batch is cut into at once."""
        return self.world_size * self.devices

    @property
    def noun(self) -> str:
        """What these parts are computed on."""
        return "devices" if self.device == "xla" else "processes"


def place(loaded: Loaded, machine: Machine, world: World) -> Processes:
    """The processes of a run on this machine, or inside the `world` that a launcher has started.

    Where `parallel.strategy=auto` leaves the strategy open it is the plainest; the plan of memory may take another.

    Raises:
        TopologyError: the devices asked for are not there, or the strategy is for another number of processes.
    """
    parallel = loaded.config.parallel
    device = _device(loaded, machine)
    if device == "xla":
        return _on_xla(loaded, machine, world)
    nodes, per_node = parallel.nodes, _devices_per_node(loaded, machine, device)
    if world.launched:
        nodes, per_node = _launched(loaded, machine, world)
    elif parallel.nodes > 1:
        raise TopologyError(
            f"{loaded.place('parallel.nodes')}: parallel.nodes = {parallel.nodes}: `shoal run` starts the processes "
            "of one machine; for several use `shoal submit` (SLURM), or start it on each with --rdzv host:port"
        )
    size = nodes * per_node
    strategy = _strategy(loaded, world, size)
    threads = max(1, machine.cores // per_node) if machine.cores else 0
    if world.step and world.step.cpus:  # each task may be bound to its own, and see no others
        threads = world.step.cpus
    return Processes(
        strategy=strategy,
        device=device,
        nodes=nodes,
        per_node=per_node,
        world_size=size,
        threads=threads,
        device_name=machine.gpu_name if device == "cuda" else "",
        memory_bytes=machine.memory_bytes // per_node,
        gpu_memory_bytes=machine.gpu_memory_bytes if device == "cuda" else 0,
        quick_format=_quick_format(machine, device),
    )


def _quick_format(machine: Machine, device: Device) -> str:
    if device == "cpu":
        return "bf16" if machine.cpu_has_bf16 else ""
    kind = kind_of(machine.tpu_name if device == "xla" else machine.gpu_name)
    return kind.low_format if kind else ""


def _on_xla(loaded: Loaded, machine: Machine, world: World) -> Processes:
    """One process for all XLA devices of this host.

    Raises:
        TopologyError: several processes, or another number of devices, are asked for.
    """
    parallel, there = loaded.config.parallel, machine.tpus or machine.xla_on_cpu
    if world.size > 1 or parallel.nodes > 1:
        asked = f"{world.size} processes were started" if world.size > 1 else f"parallel.nodes = {parallel.nodes}"
        raise TopologyError(
            f"{loaded.place('parallel.nodes')}: {asked}: with XLA shoal has one process on one host, which drives "
            "all of its devices; start one, with `shoal run` or accelerate_configs/tpu.yaml"
        )
    stated = there if parallel.devices == "auto" else parallel.devices
    kind = kind_of(machine.tpu_name)
    return Processes(
        strategy=Strategy.XLA,
        device="xla",
        nodes=1,
        per_node=1,
        world_size=1,
        threads=machine.cores,
        device_name=machine.tpu_name or "XLA on the CPU",
        memory_bytes=machine.memory_bytes,
        gpu_memory_bytes=kind.memory_bytes if kind else 0,
        quick_format=_quick_format(machine, "xla"),
        devices=stated,
    )


def _strategy(loaded: Loaded, world: World, size: int) -> Strategy:
    """The stated strategy, which a launcher's own must not contradict; else the launcher's; else by the number."""
    key, stated = "parallel.strategy", loaded.config.parallel.strategy
    if stated == "auto":
        return Strategy(world.strategy or ("ddp" if size > 1 else "single"))
    if stated == "single" and size > 1:
        raise TopologyError(
            f"{loaded.place(key)}: {key} = single, but there are {size} processes; use {key}=ddp, or parallel.devices=1"
        )
    if world.strategy and world.strategy != stated:
        raise TopologyError(
            f"{loaded.place(key)}: {key} = {stated}, but the launcher was configured for {world.strategy}; state the "
            f"same in both, or leave {key} out"
        )
    if Strategy(stated).kind in ("fsdp2", "zero") and size == 1:
        raise TopologyError(
            f"{loaded.place(key)}: {key} = {stated}: there is one process, and nothing to shard over; use "
            f"{key}=single, or parallel.devices=2 or more"
        )
    return Strategy(stated)


def check_abilities(loaded: Loaded, processes: Processes) -> None:
    """Refuse what a device or a strategy cannot do; nothing is ever replaced by something near it."""
    train, strategy = loaded.config.train, processes.strategy
    if train.precision == "fp16" and processes.device == "cpu":
        key = "train.precision"
        raise TopologyError(
            f"{loaded.place(key)}: {key} = fp16: needs a GPU, and this run is on the CPU; use {key}=bf16 or {key}=fp32"
        )
    if train.optimizer == "adafactor" and strategy.shards:
        key = "train.optimizer"
        raise ConfigError(
            f"{loaded.place(key)}: {key} = adafactor: looks at rows and columns of whole matrices, of which {strategy} "
            f"keeps pieces; use {key}=adamw, or parallel.strategy=ddp"
        )
    if strategy is Strategy.XLA:
        _check_xla(loaded)
    key = "track.memory_snapshot"
    if loaded.config.track.memory_snapshot and processes.device != "cuda":
        raise TopologyError(
            f"{loaded.place(key)}: {key} = true: is told by torch's allocator of GPUs, and this run is on "
            f"{processes.device}; leave it out: what held the memory is written without it"
        )
    key, size = "track.profile_ranks", processes.world_size
    none = [rank for rank in loaded.config.track.profile_ranks if not 0 <= rank < size]
    if loaded.config.track.profile and none:
        raise ConfigError(
            f"{loaded.place(key)}: {key} = {loaded.config.track.profile_ranks}: there is no rank {none[0]}; "
            f"{size} processes are the ranks 0 to {size - 1}"
        )


def _check_xla(loaded: Loaded) -> None:
    train, xla = loaded.config.train, "XLA devices"
    for key, wrong, why in (
        ("train.precision", train.precision == "fp16", f"{xla} have no fp16; use train.precision=bf16"),
        ("train.compile", train.compile, f"XLA compiles all there is; leave it out on {xla}"),
        ("train.activation_checkpointing", train.activation_checkpointing, f"was never run on {xla}; leave it out"),
        ("train.micro_batch_size", train.micro_batch_size == "auto", f"is not measured on {xla}; state a number"),
    ):
        if wrong:
            value = getattr(train, key.removeprefix("train."))
            raise TopologyError(f"{loaded.place(key)}: {key} = {str(value).lower()}: {why}")


def _launched(loaded: Loaded, machine: Machine, world: World) -> tuple[int, int]:
    """Nodes, and processes on each, as a launcher has started them; a configuration that says otherwise is wrong."""
    parallel = loaded.config.parallel
    nodes, uneven = divmod(world.size, world.local_size)
    if uneven:
        raise TopologyError(
            f"the launcher started {world.size} processes, {world.local_size} of them on {machine.host}; "
            "start the same number on every node"
        )
    stated = parallel.nodes * parallel.devices if isinstance(parallel.devices, int) else None
    for key, contradicted in (
        ("parallel.devices", stated is not None and stated != world.size),
        ("parallel.nodes", "parallel.nodes" in loaded.layer.places and parallel.nodes != nodes),
    ):
        if contradicted:
            value = getattr(parallel, key.removeprefix("parallel."))
            raise TopologyError(
                f"{loaded.place(key)}: {key} = {value}: the configuration means {parallel.devices} devices on each of "
                f"{parallel.nodes} nodes, but the launcher started {world.size} processes on {nodes} nodes; "
                f"state the same in both, or leave {key} out"
            )
    return nodes, world.local_size


def _device(loaded: Loaded, machine: Machine) -> Device:
    parallel = loaded.config.parallel
    device, wanted = parallel.device, parallel.strategy == "xla"
    if (wanted and device not in ("auto", "xla")) or (device == "xla" and parallel.strategy not in ("auto", "xla")):
        raise TopologyError(
            f"{loaded.place('parallel.strategy')}: parallel.strategy = {parallel.strategy}: excludes parallel.device = "
            f"{device} ({loaded.place('parallel.device')}); xla is for XLA devices, and they have no other strategy"
        )
    if wanted or device == "xla":
        return _xla(loaded, machine)
    if device == "auto":
        if machine.tpus and parallel.strategy == "auto":
            return _xla(loaded, machine)
        return "cuda" if machine.gpus else "mps" if machine.mps else "cpu"
    if (device == "cuda" and not machine.gpus) or (device == "mps" and not machine.mps):
        hidden = " (CUDA_VISIBLE_DEVICES counts too)" if device == "cuda" else ""
        raise TopologyError(
            f"{loaded.place('parallel.device')}: parallel.device = {device}: {machine.host} has none{hidden}; "
            f"use parallel.device={'cuda' if machine.gpus else 'cpu'}"
        )
    return device


def _xla(loaded: Loaded, machine: Machine) -> Device:
    key = "parallel.device" if loaded.config.parallel.device == "xla" else "parallel.strategy"
    if not (machine.tpus or machine.xla_on_cpu):
        raise TopologyError(
            f"{loaded.place(key)}: {key} = xla: {machine.host} has no TPU; set PJRT_DEVICE=CPU to "
            "try it on the CPU, or leave it out"
        )
    return "xla"


def _devices_per_node(loaded: Loaded, machine: Machine, device: Device) -> int:
    devices = loaded.config.parallel.devices
    if devices == "auto":
        return machine.gpus if device == "cuda" else 1
    limit = {"cuda": machine.gpus, "mps": 1, "cpu": machine.cores * CPU_RANKS_PER_CORE}[device]
    if devices > limit:
        there = {
            "cuda": f"{machine.host} has {limit} GPUs",
            "mps": f"{machine.host} has 1 MPS device",
            "cpu": f"{machine.host} has {'' if machine.gpus else 'no GPU and '}{machine.cores} CPU cores, good for at "
            f"most {limit} processes",
        }[device]
        raise TopologyError(
            f"{loaded.place('parallel.devices')}: parallel.devices = {devices}: {there}; "
            f"use parallel.devices={limit} or fewer"
        )
    return devices
