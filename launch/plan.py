"""RunConfig × Machine → Plan: everything that is decided before a run starts, without torch.

`decide` looks at the files and the machine; all below it is pure.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from launch import __version__
from launch.assets import code_root
from launch.cache import Cache
from launch.comparison import Comparison, compare
from launch.config import Loaded, load
from launch.deepspeed_file import bucket_of_deepspeed
from launch.errors import ConfigError, TopologyError
from launch.fitting import Fits, question, recall
from launch.memory import Setting
from launch.outside import agreed, read_outside, take_over
from launch.placement import Processes, check_abilities, place
from launch.recipe import MULTIPLE, Preview, RecipeContext
from launch.registry import Recipe, find_run_file, load_recipe
from launch.render import BUCKET, deepspeed_config
from launch.schedule import Schedule, check_stream, total_updates, updates_per_epoch, warmup_updates
from launch.sections import RunConfig
from launch.source import Layer
from launch.strategy import Dtypes, planned_dtypes
from launch.topology import Machine, World, cache_folder, read_machine
from launch.trackers import check_trackers
from launch.versions import TORCH_XLA


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


EVAL_BATCH_SIZE = 8
"""Samples a process evaluates at once where only an evaluation was asked for and no size is known."""


class BatchPlan(_Frozen):
    """global = micro × accumulation × world."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    candidates: tuple[int, ...]
    """Micro-batch sizes to try, smallest first, while it is not known which ones fit into memory; else none."""
    eval_batch_size: int
    tokens_per_update: int | None
    """Input tokens of a full update; None where samples differ in length."""


ByLength = Literal["off", "dealt", "cut"]
"""Whether the samples of an update are dealt out by length, and micro-batches cut where that saves padding besides."""


class Length(_Frozen):
    """How many updates there are, and the learning rates at the turning points."""

    samples: int | None
    """Training samples; None until the data was prepared once."""
    updates_per_epoch: int | None
    updates: int | None
    warmup: int | None
    peak_learning_rate: float
    first_learning_rate: float | None
    last_learning_rate: float | None


class Plan(_Frozen):
    """A run, decided. Written to plan.json; a worker started with it checks that its world is this one."""

    shoal: str
    config: RunConfig
    processes: Processes
    batch: BatchPlan
    by_length: ByLength = "off"
    """As far as the recipe tells lengths; plans of the first releases lack it."""
    padding_free: bool = False
    """Whether rows are laid end to end where the model's blocks can compute them so; earlier plans lack it."""
    length: Length
    dtypes: Dtypes
    """Number formats; the workers check that they are the real ones."""
    deepspeed: dict[str, JsonValue] | None
    """DeepSpeed's configuration, in full; None for other strategies."""
    memory: Comparison | None = None
    """What each strategy needs; None where the architecture of the model is not known, and of an evaluation."""
    run_folder: str
    command: tuple[str, ...]
    environment: dict[str, str]
    """What the launcher adds to the environment of the workers."""

    @property
    def rows(self) -> int:
        """Samples of a micro-batch, over all devices of a process."""
        return self.batch.micro_batch_size * self.processes.devices

    @property
    def eval_rows(self) -> int:
        """The same of an evaluation."""
        return self.batch.eval_batch_size * self.processes.devices

    @property
    def buckets(self) -> int | None:
        """How many widths batches may have; None: any number."""
        return self.config.parallel.xla_widths if self.processes.device == "xla" else None

    @property
    def multiple(self) -> int:
        """To a multiple of how many tokens batches are padded: a CPU computes as many as there are.

        Measured on two cores, of rows of 6 to 25 tokens: a sixth to a quarter less time without further padding.
        """
        return 1 if self.processes.device == "cpu" else MULTIPLE

    def schedule(self, samples: int | None) -> Schedule:
        """The learning rate of every update, once the number of training samples is known (of a stream it never is)."""
        return make_schedule(self.config, samples)


@dataclass(frozen=True)
class Decided:
    """A plan, with the configuration and the recipe it was made from."""

    plan: Plan
    loaded: Loaded
    recipe: Recipe


def decide(
    file: str,
    overrides: list[str],
    out: Path | None,
    world: World,
    machine: Machine | None = None,
    *,
    beneath: Layer | None = None,
    evaluates: bool = False,
) -> Decided:
    """From a run file (or the name of a shipped one) and overrides to a plan for this machine, or for another.

    What is stated `beneath` counts where neither says otherwise.

    A plan that only `evaluates` does not mind how the batches of updates divide over processes.

    Raises:
        LaunchError: the run cannot be; nothing was started or written.
    """
    loaded = load(find_run_file(file), overrides, beneath)
    recipe = load_recipe(loaded)
    loaded = loaded.with_recipe_args(recipe.args.model_dump(mode="json"))
    cache = Cache(cache_folder())
    preview = recipe.preview(RecipeContext(cache, loaded.config.train.seed))
    folder = out.absolute() if out else default_run_folder(loaded.config.recipe)
    _check_best_metric(loaded, preview)
    if preview.streams and not evaluates:
        check_stream(loaded.config, loaded.place)
    if not evaluates:
        check_trackers(loaded)
    outside = read_outside(loaded, world)
    loaded = take_over(loaded, outside)
    elsewhere = machine is not None
    machine = machine or read_machine()  # once all files are known to be right

    bucket = bucket_of_deepspeed(outside.deepspeed) if outside.deepspeed else None

    def planned(fits: Fits | None) -> Plan:
        plan = make_plan(loaded, machine, world, preview, folder, fits, evaluates=evaluates, bucket=bucket)
        return plan.model_copy(update={"deepspeed": agreed(plan, loaded, outside)})

    plan = planned(None)
    if plan.batch.candidates and (fits := recall(cache, question(plan))):
        plan = planned(fits)
    if plan.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        raise TopologyError(
            f"{loaded.place('parallel.strategy')}: parallel.strategy = {plan.processes.strategy}: the package "
            "deepspeed is not installed; pip install 'shoal[deepspeed]', or use parallel.strategy=fsdp2"
        )
    if plan.processes.device == "xla" and not elsewhere and importlib.util.find_spec("torch_xla") is None:
        raise TopologyError(
            f"{loaded.place('parallel.strategy')}: parallel.strategy = xla: the package torch_xla is not installed; "
            f"{TORCH_XLA}, or use parallel.device=cpu"
        )
    return Decided(plan, loaded, recipe)


def _check_best_metric(loaded: Loaded, preview: Preview) -> None:
    name, known = loaded.config.eval.best_metric, ("loss", *(preview.metrics or ()))
    if preview.metrics is not None and name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"{loaded.place('eval.best_metric')}: eval.best_metric = {name}: {loaded.config.recipe} has no such "
            f"metric; {hint}it has {', '.join(known)}"
        )


def default_run_folder(recipe: str) -> Path:
    """`runs/<recipe>-<time>`, in the folder we stand in; with a number behind it if that is taken."""
    base = Path("runs") / f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = (base.with_name(f"{base.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(folder for folder in candidates if not folder.exists()).absolute()


def make_plan(
    loaded: Loaded,
    machine: Machine,
    world: World,
    preview: Preview,
    run_folder: Path,
    fits: Fits | None = None,
    *,
    evaluates: bool = False,
    bucket: int | None = None,
) -> Plan:
    """Decide a run on this machine, or inside the `world` that a launcher has already started.

    `fits` is what is known of `train.micro_batch_size=auto`, `bucket` what a DeepSpeed file says of its buffers.

    Raises:
        TopologyError: the devices asked for are not there, or cannot compute as asked.
        ConfigError: the global batch size does not divide, or settings exclude each other.
    """
    config = loaded.config
    processes = place(loaded, machine, world)
    memory = None
    if evaluates:
        batch = _evaluation_batch(loaded, processes.replicas)
    else:
        batch = _batch(loaded, processes, preview, fits)
        memory = _memory(config, processes, batch, preview, bucket, cuda_build=machine.torch_has_cuda)
        if memory and config.parallel.strategy == "auto" and not world.strategy and (world.to_be or not world.launched):
            processes = processes.model_copy(update={"strategy": memory.choose()})
    check_abilities(loaded, processes)
    return Plan(
        shoal=__version__,
        config=config,
        processes=processes,
        batch=batch,
        by_length=_by_length(config, processes, preview),
        padding_free=not evaluates and _padding_free(config, processes, preview),
        length=_length(config, preview),
        dtypes=planned_dtypes(processes.strategy, config.train.precision),
        deepspeed=_deepspeed(config, processes, batch),
        memory=memory,
        run_folder=str(run_folder),
        command=_command(run_folder),
        environment=_environment(processes),
    )


def _memory(
    config: RunConfig,
    processes: Processes,
    batch: BatchPlan,
    preview: Preview,
    bucket: int | None,
    *,
    cuda_build: bool,
) -> Comparison | None:
    train = config.train
    if preview.model is None:
        return None
    setting = Setting(
        world_size=processes.replicas,
        micro_batch_size=batch.micro_batch_size,
        accumulation=batch.accumulation,
        numbers_low=train.precision != "fp32",
        on_cpu=processes.device == "cpu",
        optimizer=train.optimizer,
        momentum=train.sgd_momentum > 0,
        checkpointing=train.activation_checkpointing,
        bucket=bucket or BUCKET,
    )
    on_device = processes.gpu_memory_bytes if processes.device in ("cuda", "xla") else processes.memory_bytes
    return compare(preview.model, setting, processes.device, on_device or None, cuda_build=cuda_build)


def _batch(loaded: Loaded, processes: Processes, preview: Preview, fits: Fits | None) -> BatchPlan:
    train, world_size, noun = loaded.config.train, processes.replicas, processes.noun
    total = train.global_batch_size
    key = "train.global_batch_size"
    if total % world_size:
        near = ", ".join(str(n) for n in _multiples_around(total, world_size))
        raise ConfigError(
            f"{loaded.place(key)}: {key} = {total}: does not divide over {world_size} {noun}; "
            f"use {near}, or another number of {noun}"
        )
    share = total // world_size
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    micro, candidates = _micro_batch_size(loaded, divisors, fits)
    if micro not in divisors:
        closest = min(divisors, key=lambda n: abs(n - micro))
        place = loaded.place("train.micro_batch_size")
        raise ConfigError(
            f"{place}: train.micro_batch_size = {micro}: {key} = {total} is not {micro} × accumulation × "
            f"{world_size} {noun}; use train.micro_batch_size={closest}"
        )
    tokens = preview.tokens_per_sample
    return BatchPlan(
        global_batch_size=total,
        micro_batch_size=micro,
        accumulation=share // micro,
        candidates=candidates,
        eval_batch_size=loaded.config.eval.batch_size or micro,
        tokens_per_update=tokens * total if tokens else None,
    )


def _alike(preview: Preview) -> bool:
    """Whether all samples have one length."""
    return preview.tokens_per_sample is not None if preview.model is None else not preview.model.padded


def _padding_free(config: RunConfig, processes: Processes, preview: Preview) -> bool:
    # Elsewhere it is not measured: where each token lies would have to come to a GPU too, torch.compile would make a
    # program for each shape.
    measured = processes.device == "cpu" and not config.train.compile
    return measured and config.train.padding_free == "auto" and not _alike(preview)


def _by_length(config: RunConfig, processes: Processes, preview: Preview) -> ByLength:
    if config.train.group_by_length == "off" or _alike(preview):
        return "off"
    # One more pass costs little on a CPU alone: a GPU takes as long to be started as for thousands of tokens, sharded
    # weights are exchanged in each, and XLA and torch.compile make a program for each shape.
    cheap = processes.device == "cpu" and not processes.strategy.shards and not config.train.compile
    return "cut" if cheap else "dealt"


def _evaluation_batch(loaded: Loaded, world_size: int) -> BatchPlan:
    """What an evaluation takes at once; of updates, which it does not make, any that divides."""
    micro = loaded.config.train.micro_batch_size
    size = loaded.config.eval.batch_size or (micro if isinstance(micro, int) else EVAL_BATCH_SIZE)
    return BatchPlan(
        global_batch_size=size * world_size,
        micro_batch_size=size,
        accumulation=1,
        candidates=(),
        eval_batch_size=size,
        tokens_per_update=None,
    )


def _micro_batch_size(loaded: Loaded, divisors: list[int], fits: Fits | None) -> tuple[int, tuple[int, ...]]:
    """The size as stated, as known to fit, or the smallest; and, for the last, the sizes to try."""
    stated = loaded.config.train.micro_batch_size
    if stated is None:
        return divisors[-1], ()
    if stated != "auto":
        return stated, ()
    known = fits.largest_of(divisors) if fits else None
    return (known, ()) if known else (divisors[0], tuple(divisors))


def _deepspeed(config: RunConfig, processes: Processes, batch: BatchPlan) -> dict[str, Any] | None:
    if processes.strategy.kind != "zero":
        return None
    return deepspeed_config(
        processes.strategy,
        batch.micro_batch_size,
        batch.accumulation,
        processes.world_size,
        config.train.max_grad_norm,
        config.train.precision,
    )


def _multiples_around(value: int, step: int) -> list[int]:
    below = value // step * step
    return [n for n in (below, below + step) if n]


def make_schedule(config: RunConfig, samples: int | None) -> Schedule:
    """The schedule that `config` means for this many training samples; `train.max_steps` needs no number."""
    train = config.train
    total = total_updates(samples or 0, train.global_batch_size, train.epochs, train.max_steps)
    warmup = warmup_updates(total, train.warmup_ratio, train.warmup_steps)
    return Schedule(train.schedule, train.learning_rate, warmup, total)


def _length(config: RunConfig, preview: Preview) -> Length:
    train, samples = config.train, preview.samples
    known = bool(samples) or train.max_steps is not None  # none at all: the recipe says so when it prepares
    schedule = make_schedule(config, samples) if known else None
    return Length(
        samples=samples,
        updates_per_epoch=updates_per_epoch(samples, train.global_batch_size) if samples else None,
        updates=schedule.total if schedule else None,
        warmup=schedule.warmup if schedule else None,
        peak_learning_rate=train.learning_rate,
        first_learning_rate=schedule.learning_rate(1) if schedule else None,
        last_learning_rate=schedule.learning_rate(schedule.total) if schedule else None,
    )


def _command(run_folder: Path) -> tuple[str, ...]:
    """What starts a worker. Each rank is this process, started directly: no torchrun, no `accelerate launch`."""
    return (sys.executable, "-m", "launch.train", str(run_folder))


def _environment(processes: Processes) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(processes.threads or 1), **python_environment()}
    if processes.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed guesses, and says so on stdout, wherever it is imported
        if not processes.strategy.shards:
            environment["ACCELERATE_USE_CPU"] = "true"
    return environment | xla_environment(processes)


def xla_environment(processes: Processes) -> dict[str, str]:
    """Without it Accelerate would take XLA wherever torch_xla is installed, even with `Accelerator(cpu=True)`."""
    if processes.device != "xla":
        return {"USE_TORCH_XLA": "0"} if importlib.util.find_spec("torch_xla") else {}
    environment = {
        "USE_TORCH_XLA": "1",
        "PJRT_DEVICE": "TPU" if processes.device_name.startswith("TPU") else "CPU",
        # Else the numbers 0 and 1 are constants of a program, and a learning rate of 0 is compiled for (torch_xla 2.9).
        "XLA_NO_SPECIAL_SCALARS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",  # with each program there would be a notice that GSPMD will be replaced
    }
    if environment["PJRT_DEVICE"] == "CPU":
        environment["CPU_NUM_DEVICES"] = str(processes.devices)
    return environment


def python_environment() -> dict[str, str]:
    """Our packages are found wherever the user stands, and a folder `recipes/` there hides nothing."""
    return {"PYTHONPATH": str(code_root()), "PYTHONSAFEPATH": "1"}


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    return plan.model_dump(mode="json")
