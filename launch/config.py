"""The run configuration: its sections, every key with the one sentence that documents it everywhere.

Read once, frozen, never mutated. The same descriptions feed `shoal run --help`, the JSON schema and the
messages. Knows nothing of machines, files of a run, or torch.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic_core import ErrorDetails

from launch.dotted import NOTHING, get
from launch.errors import ConfigError
from launch.secret import is_secret_key, is_secret_value
from launch.source import COMMAND_LINE, Layer, merge, read_overrides, read_run_file, write_yaml


class Section(BaseModel):
    """Frozen, strict (no `"20"` for 20), and closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    file: ClassVar[str] = "a run file"
    """What messages call a file of these keys."""


ABSENT: Any = None
"""The default of a key that may be left out, but not be null, where only the check of it matters."""


class TrainSection(Section):
    """How the weights are updated."""

    global_batch_size: int = Field(32, ge=1)
    """Samples in one update, over all processes together; the same for any number of processes."""
    micro_batch_size: Literal["auto"] | int | None = Field(None)
    """Samples one process handles at once; null: global_batch_size / processes; auto: as many as fit into memory."""
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


class TrackSection(Section):
    """What is recorded while training."""

    every_steps: int = Field(1, ge=1)
    """Write a line to metrics.jsonl after every so many updates."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Send the same numbers to Weights & Biases (needs the extra `shoal[wandb]`)."""
    project: str = Field("shoal", min_length=1)
    """Name of the project in Weights & Biases."""


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
    ] = "auto"
    """How weights, gradients and optimizer are spread over processes; auto: single for one, ddp for several."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device; auto: the GPUs of this machine, else its CPU."""
    devices: Literal["auto"] | int = Field("auto")
    """Devices per node, one process each; auto: all GPUs, or one process on CPU."""
    nodes: int = Field(1, ge=1)
    """Number of machines."""
    accelerate_config: str | None = None
    """Your own configuration of `accelerate launch`, checked and taken over; null: none is needed."""
    deepspeed_config: str | None = None
    """Your own DeepSpeed JSON, checked, completed from this run file and passed on; null: none is needed."""
    timeout_seconds: float = Field(1800.0, gt=0)
    """How long a process waits for the others to join in an exchange before it gives up."""
    max_restarts: int = Field(0, ge=0)
    """After a crash, start again from the newest checkpoint, at most so many times without a newer one in between."""
    data_workers: int = Field(0, ge=0)
    """Processes per rank and dataset that load and collate (each reads all of a stream); 0: the rank does it itself."""


class ClusterSection(Section):
    """What a SLURM cluster needs to know; no keys yet."""


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


DEFAULT = "default"
"""The place of a value that is stated nowhere."""


@dataclass(frozen=True)
class Loaded:
    """A valid configuration and the place each stated key came from."""

    config: RunConfig
    layer: Layer
    run_file: Path | None

    def place(self, key: str) -> str:
        """Where `key` was stated, or the nearest section above it; "default" where nowhere."""
        return place_of(self.layer, key)

    def origin(self, key: str) -> str:
        """Where the value of `key` comes from: "default" unless the key itself was stated."""
        return self.layer.places.get(key, DEFAULT)

    def with_parallel(self, name: str, value: Any, place: str) -> Loaded:
        """The same, with a value of the section `parallel` that another file states."""
        parallel = self.config.parallel.model_copy(update={name: value})
        layer = replace(self.layer, places={**self.layer.places, f"parallel.{name}": place})
        return replace(self, config=self.config.model_copy(update={"parallel": parallel}), layer=layer)

    def with_recipe_args(self, recipe_args: dict[str, JsonValue]) -> Loaded:
        """The same, with the arguments of the recipe resolved: defaults filled in, paths absolute."""
        return replace(self, config=self.config.model_copy(update={"recipe_args": recipe_args}))


def load(run_file: Path | None, overrides: list[str]) -> Loaded:
    """Read a run file, lay the overrides over it, validate.

    Raises:
        ConfigError: one line per problem, with place, key, value, rule and the nearest right key.
    """
    layer = read_run_file(run_file) if run_file else Layer()
    layer = merge(layer, read_overrides(overrides), EXCLUSIVE)
    refuse_unrecordable(layer)
    config = validate(RunConfig, _with_default_length(layer.values), layer)
    loaded = _with_absolute_paths(Loaded(config, layer, run_file))
    problems = list(_impossible_combinations(loaded))
    if problems:
        raise ConfigError("\n".join(problems))
    return loaded


def _with_absolute_paths(loaded: Loaded) -> Loaded:
    """Files named in a run file are looked for beside it, those named on the command line where the user stands."""

    def absolute(key: str, path: str) -> str:
        beside = loaded.run_file is not None and loaded.layer.places.get(key) != COMMAND_LINE
        return str(((loaded.run_file.parent if beside and loaded.run_file else Path()) / path).absolute())

    config, parallel = loaded.config, loaded.config.parallel
    files = {
        name: absolute(f"parallel.{name}", path)
        for name in ("accelerate_config", "deepspeed_config")
        if (path := getattr(parallel, name))
    }
    update: dict[str, Any] = {"parallel": parallel.model_copy(update=files)} if files else {}
    if config.recipe.endswith(".py"):
        update["recipe"] = absolute("recipe", config.recipe)
    return replace(loaded, config=config.model_copy(update=update))


def _with_default_length(values: dict[str, Any]) -> dict[str, Any]:
    """One epoch where the user states no length, so that the resolved configuration always states one."""
    train = values.get("train", {})
    if not isinstance(train, dict) or train.get("max_steps") is not None or train.get("epochs") is not None:
        return values
    return {**values, "train": {**train, "epochs": 1.0}}


def refuse_unrecordable(layer: Layer) -> None:
    """See that a record of this can be kept: no secrets, and nothing that JSON cannot hold.

    Raises:
        ConfigError: one line per value that cannot be.
    """
    refused = [*_secrets(layer.values, layer), *_unrecordable(layer.values, layer)]
    if refused:
        raise ConfigError("\n".join(refused))


def _secrets(values: Any, layer: Layer, keys: tuple[str, ...] = ()) -> Iterator[str]:
    """One line per value that looks like a secret; the value is never shown."""
    dotted = ".".join(keys)
    named = bool(keys) and is_secret_key(keys[-1]) and values not in (None, "", [], {})
    if named or (isinstance(values, str) and is_secret_value(values)):
        yield (
            f"{place_of(layer, dotted)}: {dotted}: looks like a secret (value not shown); a run file and a "
            "command line are recorded, so put it into the environment instead (HF_TOKEN, WANDB_API_KEY, …)"
        )
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _secrets(value, layer, (*keys, str(key)))
    elif isinstance(values, list):
        for value in values:
            yield from _secrets(value, layer, keys)


def _unrecordable(values: Any, layer: Layer, keys: tuple[str, ...] = ()) -> Iterator[str]:
    """One line per value that JSON and a log cannot hold."""
    key = ".".join(keys)
    head = f"{place_of(layer, key)}: {key} = {shown(values)}: "
    if isinstance(values, float) and not math.isfinite(values):
        yield head + "must be a finite number"
    elif isinstance(values, str) and not _is_unicode(values):
        yield head + "must be valid Unicode text; rename the file, if it is one"
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _unrecordable(value, layer, (*keys, name))
    elif isinstance(values, list):
        for value in values:
            yield from _unrecordable(value, layer, keys)


def _is_unicode(text: str) -> bool:
    """Python makes lone surrogates of bytes on the command line that are not UTF-8 (PEP 383)."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _impossible_combinations(loaded: Loaded) -> Iterator[str]:
    train, parallel = loaded.config.train, loaded.config.parallel
    for first, second in EXCLUSIVE:
        values = [getattr(train, key.removeprefix("train.")) for key in (first, second)]
        if None not in values:
            yield (
                f"{loaded.place(second)}: {second} = {shown(values[1])}: excludes {first} = "
                f"{shown(values[0])} ({loaded.place(first)}); state one of the two"
            )
    evaluation = loaded.config.eval
    if train.early_stopping_patience and not (evaluation.every_steps or evaluation.every_epochs):
        key = "train.early_stopping_patience"
        yield (
            f"{loaded.place(key)}: {key} = {train.early_stopping_patience}: "
            "needs evaluations while training; set eval.every_steps or eval.every_epochs"
        )
    if train.max_steps is not None and (train.warmup_steps or 0) > train.max_steps:
        key = "train.warmup_steps"
        yield (
            f"{loaded.place(key)}: {key} = {train.warmup_steps}: is more than train.max_steps = "
            f"{train.max_steps}; the peak learning rate would never be reached"
        )
    for key, value in (("parallel.devices", parallel.devices), ("train.micro_batch_size", train.micro_batch_size)):
        if isinstance(value, int) and value < 1:
            yield f'{loaded.place(key)}: {key} = {value}: must be at least 1, or "auto"'
    if train.sgd_momentum and train.optimizer != "sgd":
        key = "train.sgd_momentum"
        yield f"{loaded.place(key)}: {key} = {train.sgd_momentum}: needs train.optimizer=sgd, not {train.optimizer}"
    if parallel.strategy == "single" and (parallel.devices not in ("auto", 1) or parallel.nodes > 1):
        key = "parallel.strategy"
        yield (
            f"{loaded.place(key)}: {key} = single: is one process, but parallel.devices = {parallel.devices} "
            f"and parallel.nodes = {parallel.nodes}; use parallel.strategy=ddp, or one device"
        )


# --- validation and its messages -------------------------------------------------------------------------


Model = TypeVar("Model", bound=BaseModel)


def validate(
    model: type[Model], values: dict[str, Any], layer: Layer, prefix: str = "", root: type[Section] = RunConfig
) -> Model:
    """Build `model` from `values`; `prefix` is the dotted key under which they stand in a file of `root`.

    Raises:
        ConfigError: one line per problem.
    """
    try:
        # From JSON, because strict mode there still takes a list for a tuple.
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        start = tuple(prefix.split(".")) if prefix else ()
        # One line per key: a union of kinds reports each kind it is not.
        lines: dict[str, list[str]] = {}
        for details in error.errors():
            head, rule = _message(model, details, layer, start, root)
            if rule not in lines.setdefault(head, []):
                lines[head].append(rule)
        raise ConfigError("\n".join(head + " or ".join(rules) for head, rules in lines.items())) from None


_TYPE_NAMES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping of `key: value` entries",
    "model_type": "a mapping of `key: value` entries",
    "model_attributes_type": "a mapping of `key: value` entries",
    "finite_number": "a finite number",
}


def _message(
    model: type[BaseModel], details: ErrorDetails, layer: Layer, start: tuple[str, ...], root: type[Section]
) -> tuple[str, str]:
    """`("place: key = value: ", "the rule that it breaks")`."""
    location = _without_union_tags(model, details["loc"])
    keys = (*start, *location)
    dotted = ".".join(keys)
    if details["type"] == "missing":
        place = place_of(layer, dotted)
        return f"{layer.source if place == DEFAULT else place}: {dotted}: ", "must be set"
    stated = get(layer.values, dotted)  # as it was written: a check may have changed it before it failed
    head = f"{place_of(layer, dotted)}: {dotted} = {shown(details['input'] if stated is NOTHING else stated)}: "
    if details["type"] == "extra_forbidden":
        return head, _unknown_key(model, location, start, root)
    if details["type"] in _TYPE_NAMES:
        return head, f"must be {_TYPE_NAMES[details['type']]}" + _quoting_hint(details)
    text = details["msg"].removeprefix("Value error, ")
    text = re.sub(r"^Input should be ", "must be ", text)
    return head, text[:1].lower() + text[1:]


def _quoting_hint(details: ErrorDetails) -> str:
    got = details["input"]
    if details["type"] == "string_type" and isinstance(got, (int, float, bool)):
        return f"; quote it to keep it text: '\"{shown(got)}\"'"
    if isinstance(got, str) and details["type"] in ("int_type", "float_type", "bool_type"):
        return ", not text; remove the quotes" if re.fullmatch(r"[-+.\deE]+|true|false", got) else ", got text"
    return ""


def _without_union_tags(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Pydantic adds a member's name (`int`, `literal[…]`) behind a field that is a union: leave it out."""
    keys: list[str] = []
    for part in location:
        if keys and isinstance(part, str) and _UNION_TAG.match(part) and _field(model, keys) is None:
            continue
        keys.append(str(part))
    return tuple(keys)


_UNION_TAG = re.compile(r"(constrained-)?(literal|int|str|float|bool|list|dict|tuple|function-)")


def _field(model: type[BaseModel], keys: list[str]) -> type[BaseModel] | None:
    """The section that `keys` lead to, or None where they lead to a plain value."""
    current: type[BaseModel] | None = model
    for key in keys:
        if current is None or key not in current.model_fields:
            return None
        current = section_of(current.model_fields[key].annotation)
    return current


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key of this type is; one that may be null too is one."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    sections = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
    return sections[0] if sections else None


def _unknown_key(model: type[BaseModel], location: tuple[str, ...], start: tuple[str, ...], root: type[Section]) -> str:
    section = _field(model, list(location[:-1])) or model
    siblings = [".".join((*start, *location[:-1], name)) for name in section.model_fields]
    key = ".".join((*start, *location))
    right = nearest_key(key, siblings, _names(root))
    if right:
        return f"unknown key; did you mean {right}?"
    where = ".".join((*start, *location[:-1])) or root.file
    names = ", ".join(section.model_fields)
    return f"unknown key; {where} has {names}" if names else f"unknown key; {where} has no keys yet"


def nearest_key(key: str, siblings: list[str], everywhere: list[str]) -> str | None:
    """The key most likely meant: a similar one of the same section, else the same name elsewhere."""
    by_name = {sibling.rpartition(".")[2]: sibling for sibling in siblings}
    name = key.rpartition(".")[2]
    close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.7)
    if close:
        return by_name[close[0]]
    elsewhere = [other for other in everywhere if other.rpartition(".")[2] == name]
    if elsewhere:
        return elsewhere[0]
    as_deep = [other for other in everywhere if other.count(".") >= key.count(".")]
    close = difflib.get_close_matches(key, as_deep, n=1, cutoff=0.75)
    return close[0] if close else None


def place_of(layer: Layer, key: str) -> str:
    """Where a key is stated; else a key within it; else the nearest section around it; else "default"."""
    within = (place for other, place in layer.places.items() if other.startswith(f"{key}."))
    names = key.split(".")
    around = (layer.places.get(".".join(names[:length])) for length in range(len(names) - 1, 0, -1))
    return layer.places.get(key) or next(within, None) or next(filter(None, around), DEFAULT)


def shown(value: Any) -> str:
    """A value as it would be written in a run file, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "…"


# --- what the keys are -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One documented key."""

    name: str
    kind: str
    default: str
    description: str


def describe(model: type[BaseModel], prefix: str = "") -> list[Key]:
    """Every key of a model, depth first, in the order it is written in."""
    keys: list[Key] = []
    for name, info in model.model_fields.items():
        dotted = f"{prefix}{name}"
        section = section_of(info.annotation)
        if section:
            keys += describe(section, f"{dotted}.")
            continue
        default = "required" if info.is_required() else shown(info.get_default(call_default_factory=True))
        keys.append(Key(dotted, _kind(info.annotation), default, info.description or ""))
    return keys


def _kind(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    literal = re.sub(r"typing\.Literal\[([^\]]*)\]", lambda match: match[1].replace(", ", "|"), text)
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return f"list of {_kind(get_args(annotation)[0])}"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join("null" if member is NoneType else _kind(member) for member in get_args(annotation))
    plain = literal.replace("typing.", "").replace("'", "")
    plain = re.sub(r"dict(\[.*\])?", "mapping", plain)
    for python, word in (
        ("int", "whole number"),
        ("float", "number"),
        ("bool", "true|false"),
        ("str", "text"),
    ):
        plain = re.sub(rf"\b{python}\b", word, plain)
    return plain


def _names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of every section and key."""
    names: list[str] = []
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        names += [f"{prefix}{name}", *(_names(section, f"{prefix}{name}.") if section else ())]
    return names


def all_keys() -> list[str]:
    """Dotted names of every key a run file may hold outside `recipe_args`."""
    return [key.name for key in describe(RunConfig)]


def dump_yaml(config: RunConfig) -> str:
    """The resolved configuration as a run file."""
    return write_yaml(config.model_dump(mode="json"))
