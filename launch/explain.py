"""A plan for people: each number with its derivation. Pure."""

from __future__ import annotations

from launch.comparison import TAKEN_BY_AUTO
from launch.disk import size_in_words
from launch.needs import LENGTH, SAVING, Line, disk_lines, work_lines
from launch.plan import Length, Plan
from launch.sections import RunConfig, SaveSection, TrackSection, TrainSection
from launch.trackers import SPOKEN, trackers

DEVICES = ("parallel.device", "parallel.devices", "parallel.nodes")
EXTRAS = ("parallel.strategy", "train.optimizer", "train.activation_checkpointing", "train.compile")
BY_LENGTH = {
    "dealt": "as far as the recipe tells it; the result is the same, with less padding",
    "cut": "as far as the recipe tells it, micro-batches cut where that saves padding; the result is the same",
}
END_TO_END = "where the model's blocks can compute them so: no padding is, and the result is the same"
BATCH = ("train.global_batch_size", "train.micro_batch_size")
TRACKING = ("track.wandb", "track.also", "track.project", "track.entity", "track.artifacts")
RATES = ("train.learning_rate", "train.schedule", "train.warmup_ratio", "train.warmup_steps")


def consequences(plan: Plan, key: str) -> list[Line]:
    """The facts of a plan that follow from a key."""
    return [line for line in explain(plan) if key in line.keys]


def explain(plan: Plan) -> list[Line]:
    """The arithmetic of a plan, each number with its derivation."""
    processes, batch, length, train = plan.processes, plan.batch, plan.length, plan.config.train
    parts = [f"{processes.nodes} nodes × {processes.per_node}"] if processes.nodes > 1 else []
    parts += [processes.device_name] if processes.device_name else []
    parts += [f"{processes.threads} CPU thread{'s' if processes.threads > 1 else ''} each"] if processes.threads else []
    lines = [
        Line("recipe", plan.config.recipe, keys=("recipe",)),
        Line("processes", _processes_explained(plan), ", ".join(parts), DEVICES),
        Line("strategy", processes.strategy, _strategy_explained(plan), EXTRAS),
        Line("number formats", *_dtypes_explained(plan), ("train.precision", "parallel.strategy")),
        Line("global batch", f"{batch.global_batch_size} samples", _batch_explained(plan), (*BATCH, *DEVICES)),
    ]
    if batch.tokens_per_update:
        each = batch.tokens_per_update // batch.global_batch_size
        lines.append(
            Line(
                "tokens per update",
                f"{batch.tokens_per_update:,}",
                f"{batch.global_batch_size} samples × {each} tokens",
                BATCH[:1],
            )
        )
    if plan.by_length != "off":
        lines.append(
            Line("within an update", "samples by length", BY_LENGTH[plan.by_length], ("train.group_by_length",))
        )
    if plan.padding_free:
        lines.append(Line("rows of a batch", "laid end to end", END_TO_END, ("train.padding_free",)))
    lines.append(
        Line("training samples", "known after preparation" if length.samples is None else f"{length.samples:,}")
    )
    lines.append(Line("updates", *_updates_explained(length, train.epochs), LENGTH))
    if length.samples and (last := length.samples % batch.global_batch_size):
        why = f"of {batch.global_batch_size}; the mean is over these, none is dropped or repeated"
        lines.append(Line("last of an epoch", f"{last} samples", why, ("train.global_batch_size",)))
    lines.append(Line("learning rate", *_rates_explained(length, plan.config), (*RATES, *LENGTH)))
    lines += work_lines(plan)
    lines.append(Line("checkpoints", *_saving_explained(plan.config.save), SAVING))
    lines += disk_lines(plan)
    if names := trackers(plan.config.track):
        lines.append(Line("shown in", *_trackers_explained(plan.config.track, names), TRACKING))
    lines.append(Line("run folder", plan.run_folder))
    return lines


def _trackers_explained(track: TrackSection, names: list[str]) -> tuple[str, str]:
    spoken = [f"{SPOKEN[name]} ({track.wandb})" if name == "wandb" else SPOKEN[name] for name in names]
    project = f"project {track.project}" if names != ["tensorboard"] else "files in the run folder"
    if "wandb" in names:
        project += f" of {track.entity}" if track.entity else ""
        project += f"; sent too: {' and '.join(track.artifacts)}" if track.artifacts else ""
    return ", ".join(spoken), project


def _processes_explained(plan: Plan) -> str:
    processes = plan.processes
    of = f", {processes.devices} devices" if processes.device == "xla" else ""
    return f"{processes.world_size} on {processes.device}{of}"


def _batch_explained(plan: Plan) -> str:
    batch, parts = plan.batch, f"{plan.processes.replicas} {plan.processes.noun}"
    if batch.candidates:
        return f"micro-batch: the largest of {', '.join(map(str, batch.candidates))} that fits, found at the start"
    return f"micro-batch {batch.micro_batch_size} × accumulation {batch.accumulation} × {parts}"


def _dtypes_explained(plan: Plan) -> tuple[str, str]:
    dtypes = plan.dtypes
    rest = {"gradients summed": dtypes.reduction, "weights": dtypes.master, "optimizer": dtypes.optimizer}
    if len({dtypes.forward, *rest.values()}) == 1:
        quick = plan.processes.quick_format
        return dtypes.forward, "throughout" + (f"; train.precision={quick} multiplies faster here" if quick else "")
    scaled = ", loss scaled" if dtypes.forward == "float16" else ""
    return f"{dtypes.forward} in forward and backward{scaled}", ", ".join(f"{k} {v}" for k, v in rest.items())


def _strategy_explained(plan: Plan) -> str:
    memory, chosen = plan.memory, plan.processes.strategy
    extras = _extras_explained(plan.config.train)
    if plan.config.parallel.strategy != "auto" or memory is None or plan.processes.world_size == 1:
        return extras
    if memory.capacity is None:
        return f"the plainest, for the memory of a process is not known; {extras}"
    if not memory.fits(chosen):
        return f"none fits, and this one needs least; {extras}"
    plainer = [each for each in list(memory.needs)[: list(memory.needs).index(chosen)] if each in TAKEN_BY_AUTO]
    if not plainer:
        return f"the plainest, and it fits; {extras}"
    needed = size_in_words(memory.bytes(plainer[-1]))
    return f"the plainest that fits: {plainer[-1]} needs {needed} of {size_in_words(memory.capacity)}; {extras}"


def _extras_explained(train: TrainSection) -> str:
    extras = {"activation checkpointing": train.activation_checkpointing, "torch.compile": train.compile}
    return ", ".join([train.optimizer, *(name for name, on in extras.items() if on)])


def _saving_explained(save: SaveSection) -> tuple[str, str]:
    when = [
        *([f"every {save.every_steps:,} updates"] if save.every_steps else []),
        *([f"every {save.every_minutes:g} minutes"] if save.every_minutes else []),
        *(["when validation is better than ever"] if save.keep_best else []),
        "when a signal stops the run",
    ]
    kept = "all are kept" if save.keep_last is None else f"the newest {save.keep_last} are kept"
    best = f", and the best {save.keep_best}" if save.keep_best else ""
    return ", ".join(when), kept + best + (", written while training goes on" if save.asynchronous else "")


def _updates_explained(length: Length, epochs: float | None) -> tuple[str, str]:
    if epochs is None:
        if length.updates_per_epoch and length.updates:
            return (
                f"{length.updates:,}",
                f"train.max_steps, {length.updates / length.updates_per_epoch:.2f} epochs",
            )
        return f"{length.updates:,}", "train.max_steps"
    if length.updates is None:
        return "known after preparation", f"{epochs:g} epochs × samples / global batch"
    return f"{length.updates:,}", f"{epochs:g} epochs × {length.updates_per_epoch} updates"


def _rates_explained(length: Length, config: RunConfig) -> tuple[str, str]:
    train = config.train
    if length.updates is None or length.warmup is None:
        warmup = (
            f"{train.warmup_ratio:g} of the updates" if train.warmup_ratio else f"{train.warmup_steps or 0} updates"
        )
        return f"peak {train.learning_rate:g}", f"{train.schedule}, warm-up {warmup}"
    turns = {
        1: length.first_learning_rate,
        max(length.warmup, 1): length.peak_learning_rate,
        length.updates: length.last_learning_rate,
    }
    *most, last = map(str, turns)
    at = f"updates {', '.join(most)} and {last}" if most else f"update {last}"
    warmup = f"warm-up {length.warmup} updates" if length.warmup else "no warm-up"
    return " → ".join(f"{rate:.3g}" for rate in turns.values()), f"at {at}; {train.schedule}, {warmup}"
