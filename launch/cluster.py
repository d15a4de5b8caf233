"""What can be known of a cluster without seeing its nodes: the user's own settings, and what a run asks for."""

from __future__ import annotations

from launch.config import Loaded
from launch.devices import kind_of
from launch.errors import ConfigError, TopologyError
from launch.plan import Plan
from launch.sections import RunConfig
from launch.source import Layer, read_run_file
from launch.topology import Machine, World, config_folder, torch_has_cuda, world_to_be


def profile() -> Layer | None:
    """What the user has stated of this cluster for all runs, in ~/.config/shoal/cluster.yaml.

    Raises:
        ConfigError: the file cannot be read, or is written as a run file.
    """
    path = config_folder() / "cluster.yaml"
    if not path.is_file():
        return None
    layer = read_run_file(path)
    for name in layer.values:
        if name in RunConfig.model_fields:
            said = (
                "its keys stand in this file without their section; write them at the top"
                if name == "cluster"
                else "this file holds keys of the section cluster only; the rest goes into a run file"
            )
            raise ConfigError(f"{layer.places[name]}: {name}: {said}")
    return Layer({"cluster": layer.values}, {f"cluster.{key}": place for key, place in layer.places.items()}, str(path))


def asked_for(loaded: Loaded) -> tuple[Machine, World]:
    """A node as the job asks for it, and the world that SLURM will make.

    Raises:
        TopologyError: it is not said what devices the nodes have.
    """
    parallel, cluster = loaded.config.parallel, loaded.config.cluster
    if parallel.device == "mps":
        raise TopologyError(f"{loaded.place('parallel.device')}: parallel.device = mps: no cluster node has that")
    if parallel.device == "auto" or (parallel.device == "cuda" and parallel.devices == "auto"):
        raise TopologyError(
            f"{loaded.place('parallel.devices')}: parallel.device = {parallel.device}, parallel.devices = "
            f"{parallel.devices}: the nodes of a job cannot be looked at from here; say --gpus-per-node N, or "
            "parallel.device=cpu parallel.devices=N"
        )
    per_node = parallel.devices if isinstance(parallel.devices, int) else 1
    cpus = cluster.cpus_per_process or 1 + parallel.data_workers
    gpus = per_node if parallel.device == "cuda" else 0
    kind = kind_of(cluster.gpu_type or "") if gpus else None
    machine = Machine(
        "each node",
        cpus * per_node,
        gpus,
        gpu_name=kind.name if kind else "",
        gpu_memory_bytes=kind.memory_bytes if kind else 0,
        memory_bytes=_bytes(cluster.memory),
        torch_has_cuda=torch_has_cuda(),
    )
    return machine, world_to_be(parallel.nodes, per_node)


def _bytes(memory: str | None) -> int:
    """SLURM counts in MiB where no unit is given; 0 where it is not known."""
    if not memory:
        return 0
    unit = memory[-1] if memory[-1] in "KMGT" else "M"
    return int(memory.rstrip("KMGT")) << {"K": 10, "M": 20, "G": 30, "T": 40}[unit]


def refuse_candidates(plan: Plan) -> None:
    """See that the micro-batch size is known.

    Raises:
        ConfigError: it would have to be tried first.
    """
    if plan.batch.candidates:
        raise ConfigError(
            "train.micro_batch_size = auto: no size is known yet for this model, length and device; run it once on one "
            "such machine with `shoal run`, or state a number"
        )
