"""The keys of a run file, by section, every key with the one sentence that documents it everywhere.

Frozen, never mutated. The same descriptions feed `shoal run --help`, the JSON schema and the messages.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class Section(BaseModel):
    """Frozen, strict (no `"20"` for 20), and closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        defer_build=True,  # what is never read costs nothing at the start
    )

    file: ClassVar[str] = "a run file"
    """What messages call a file of these keys."""


class Keys(Section):
    """A section of another program's file, which documents its keys itself: no source is searched for docstrings."""

    model_config = ConfigDict(use_attribute_docstrings=False)


ABSENT: Any = None
"""The default of a key that may be left out, but not be null, where only the check of it matters."""


class TrainSection(Section):
    """How the weights are updated."""

    global_batch_size: int = Field(32, ge=1)
    """Samples in one update, over all processes together; the same for any number of processes."""
    micro_batch_size: Literal["auto"] | int | None = Field(None)
    """Samples one process handles at once; null: global_batch_size / processes; auto: as many as fit into memory."""
    group_by_length: Literal["auto", "off"] = "auto"
    """Deal out the samples of an update, and of an evaluation, by length: less padding, the same result."""
    padding_free: Literal["auto", "off"] = "auto"
    """Lay the rows of a batch end to end for the model's blocks, on CPUs: no padding is computed, the same result."""
    max_steps: int | None = Field(None, ge=1)
    """Number of optimizer updates; excludes train.epochs."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data (1 where neither this nor train.max_steps is given)."""
    optimizer: Literal["adamw", "adafactor", "sgd"] = "adamw"
    """How gradients change the weights; adafactor needs whole matrices, which fsdp2 and zero do not keep."""
    learning_rate: float = Field(3e-4, ge=0)
    """Peak learning rate, reached at the end of the warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay (with sgd: an L2 penalty); not applied to biases and normalisation weights."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after the warm-up; linear and cosine fall towards 0."""
    warmup_ratio: float | None = Field(None, ge=0, lt=1)
    """Share of all updates spent warming up; excludes train.warmup_steps."""
    warmup_steps: int | None = Field(None, ge=0)
    """Number of updates spent warming up; excludes train.warmup_ratio."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global L2 norm; null: never."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the running mean of gradients."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's decay of the running mean of squared gradients."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW's term against division by zero."""
    sgd_momentum: float = Field(0.0, ge=0, lt=1)
    """SGD's decay of the running sum of gradients."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of forward and backward; weights, sums of gradients and optimizer stay in fp32."""
    activation_checkpointing: bool = False
    """Compute activations a second time in the backward pass instead of keeping them: less memory, more time."""
    compile: bool = False
    """Compile each block of the model with torch.compile; the first updates take longer."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the order of samples, of weights built from scratch and of dropout."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What becomes of an update whose loss or gradient is NaN or infinite; skip: the weights stay as they are."""
    on_spike: Literal["ignore", "warn", "skip", "stop", "rewind"] = "warn"
    """What becomes of an update whose loss leaps; rewind: back to the checkpoint before, without its samples."""
    spike_deviations: float = Field(10.0, gt=0)
    """A loss leaps where it is so many (robust) standard deviations above the median of the 64 updates before."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations in a row without a better eval.best_metric; null: never."""
    early_stopping_min_delta: float = Field(0.0, ge=0)
    """By how much eval.best_metric must be better to count as better here."""


class EvalSection(Section):
    """When and how the validation data is evaluated; always at the end of training too."""

    every_steps: int | None = Field(None, ge=1)
    """Evaluate after every so many updates; null: not by their number."""
    every_epochs: int | None = Field(None, ge=1)
    """Evaluate after every so many passes over the training data; null: not by their number."""
    best_metric: str = Field("loss", min_length=1)
    """What tells the best evaluation, for early stopping and save.keep_best: loss, or a metric of the recipe."""
    best_is: Literal["auto", "lowest", "highest"] = "auto"
    """Whether the lowest or the highest value is the best; auto: as is usual for this metric."""
    batch_size: int | None = Field(None, ge=1)
    """Samples one process evaluates at once; null: the micro-batch size; it never changes the result."""
    at_start: bool = True
    """Evaluate before the first update."""
    max_samples: int | None = Field(None, ge=1)
    """Evaluate only the first so many validation samples; null: all."""


class SaveSection(Section):
    """What is kept of the model, and of the run to go on from."""

    every_steps: int | None = Field(None, ge=1)
    """Save a checkpoint after every so many updates; null: not by their number."""
    every_minutes: float | None = Field(30.0, gt=0)
    """Save a checkpoint when so many minutes have passed since the last one; null: not by time."""
    keep_last: int | None = Field(2, ge=1)
    """Keep only the newest so many checkpoints; null: all."""
    keep_best: int = Field(0, ge=0)
    """Save whenever eval.best_metric is better than ever before, and keep so many of the best besides."""
    asynchronous: bool = False
    """Write checkpoints while training goes on; takes main memory for a copy of weights and optimizer."""
    export: bool = True
    """Write and check export/, a plain Hugging Face folder, at the end."""
    license: str | None = Field(None, min_length=1)
    """Licence of the exported model, for its card, as the Hub names it (apache-2.0); null: not stated."""


class TrackSection(Section):
    """What is recorded while training."""

    every_steps: int = Field(1, ge=1)
    """Write a line to metrics.jsonl after every so many updates."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Show the same numbers in Weights & Biases (needs the extra `shoal[wandb]`); without a network, offline."""
    project: str = Field("shoal", min_length=1)
    """Name of the project in Weights & Biases and other trackers."""
    entity: str | None = Field(None, min_length=1)
    """Team or user in Weights & Biases (a run stays where it was begun); null: that of WANDB_ENTITY, or your own."""
    artifacts: tuple[Literal["checkpoints", "export"], ...] = ()
    """What Weights & Biases gets as artifacts once the run is complete, or by `shoal sync`."""
    also: tuple[Literal["tensorboard", "mlflow", "trackio"], ...] = ()
    """Other trackers that show the same numbers; each needs its package."""
    profile: int = Field(0, ge=0)
    """Trace so many updates with torch's profiler, after the first three of each start, into `profile/`."""
    profile_ranks: list[int] = Field([0], min_length=1)
    """The ranks that are traced."""
    memory_snapshot: bool = False
    """On GPUs: remember who took memory, and write it to `profile/` where it runs out; costs a little time."""


class ParallelSection(Section):
    """Over which devices a run is spread."""

    strategy: Literal[
        "auto",
        "single",
        "ddp",
        "fsdp2",
        "fsdp2_offload",
        "zero1",
        "zero2",
        "zero3",
        "zero2_offload",
        "zero3_offload",
        "xla",
    ] = "auto"
    """How weights, gradients and optimizer are spread over processes; auto: the plainest that fits into memory."""
    device: Literal["auto", "cpu", "cuda", "mps", "xla"] = "auto"
    """Kind of device; auto: the GPUs or TPUs of this machine, else its CPU; xla: TPUs, by torch_xla."""
    devices: Literal["auto"] | int = Field("auto")
    """Devices per node, one process each (of TPUs one for all); auto: all GPUs or TPUs, or one process on CPU."""
    xla_widths: int = Field(4, ge=1)
    """On XLA devices: to how many lengths batches are padded, each of which is compiled for; half of the next each."""
    nodes: int = Field(1, ge=1)
    """Number of machines."""
    accelerate_config: str | None = None
    """Your own configuration of `accelerate launch`, checked and taken over; null: none is needed."""
    deepspeed_config: str | None = None
    """Your own DeepSpeed JSON, checked, completed from this run file and passed on; null: none is needed."""
    timeout_seconds: float = Field(1800.0, gt=0)
    """How long a process waits for others in an exchange (at most; after the first update, twice hang_seconds)."""
    hang_seconds: float | None = Field(300.0, gt=0)
    """How long all may stand still for one process (six times as long in the first update and while saving)."""
    max_restarts: int = Field(0, ge=0)
    """After a crash, start again from the newest checkpoint, at most so many times without a newer one in between."""
    data_workers: int = Field(0, ge=0)
    """Processes per rank and dataset that load and collate (each reads all of a stream); 0: the rank does it itself."""


class ClusterSection(Section):
    """What a SLURM job asks for, and what this cluster needs; ~/.config/shoal/cluster.yaml states it for all runs."""

    partition: str | None = Field(None, min_length=1)
    """Partition to submit to; null: the cluster's default."""
    account: str | None = Field(None, min_length=1)
    """Account that is charged; null: your default."""
    qos: str | None = Field(None, min_length=1)
    """Quality of service; null: the default."""
    time: str | None = Field(None, pattern=r"^(\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2})$")
    """Longest time of one job, as SLURM writes it ("04:00:00", "2-12:00:00"); null: the partition's."""
    cpus_per_process: int | None = Field(None, ge=1)
    """CPUs for each process; null: one, and one more for each of parallel.data_workers."""
    memory: str | None = Field(None, pattern=r"^\d+[KMGT]?$")
    """Memory on each node, such as 64G; "0": all of it; null: what the partition gives."""
    gpu_type: str | None = Field(None, pattern=r"^[\w.-]+$")
    """Kind of GPU, as this cluster names it; null: any."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, such as --constraint=ib."""
    srun: tuple[str, ...] = ()
    """More options of srun, such as --container-image=… (Pyxis)."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables to set for the job."""
    setup: str | None = None
    """Shell lines to run on the first node before the job begins."""
    container: tuple[str, ...] = ()
    """Command in front of each process, such as [apptainer, exec, --nv, image.sif]."""
    python: str | None = Field(None, min_length=1)
    """Python that runs the processes, in a container say; null: the one that submits."""
    scratch: str | None = Field(None, min_length=1)
    """Folder for prepared data; variables in it, such as $SCRATCH, are those of the job; null: your cache folder."""
    network_interface: str | None = Field(None, min_length=1)
    """Network interface by which processes reach each other, such as ib0; null: found out."""
    launcher: Literal["auto", "srun", "torchrun", "accelerate"] = "auto"
    """What starts the processes on each node; auto: srun, one task for each process."""
    notice_seconds: int = Field(180, ge=30)
    """How long before its time limit a job is told to save a checkpoint and leave."""
    requeue: bool = True
    """Whether a job that was preempted or has reached its time limit is queued again, and goes on."""
    max_fruitless_starts: int = Field(3, ge=1)
    """After so many starts of a job in a row without a newer checkpoint it is not queued again."""


class RunConfig(Section):
    """Everything that decides a run."""

    recipe: str = Field(min_length=1)
    """Name of a shipped recipe, or the path of a recipe module (./my_recipe.py)."""
    recipe_args: dict[str, JsonValue] = Field(default_factory=dict)
    """What the recipe lets you set (`shoal recipes show NAME` lists it)."""
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    save: SaveSection = SaveSection()
    track: TrackSection = TrackSection()
    parallel: ParallelSection = ParallelSection()
    cluster: ClusterSection = ClusterSection()


EXCLUSIVE = (("train.max_steps", "train.epochs"), ("train.warmup_ratio", "train.warmup_steps"))
"""Groups of keys of which the one stated later (run file, then command line) replaces the other."""
