"""Runs one recipe over strategies and numbers of processes on this machine, and compares what came out.

Each is a run like any other, in a folder of its own; the first is the one that the others are compared with.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from launch import local
from launch.errors import LaunchError, StoppedError
from launch.plan import decide
from launch.record import create_run_folder, held, read_plan
from launch.recorded import METRICS
from launch.strategy import Strategy
from launch.topology import World
from launch.words import roughly


@dataclass(frozen=True)
class Tolerances:
    """Largest differences that still count as the same."""

    loss: float
    weight: float | None
    """None: not judged. Of a gradient near zero the sign is rounding, and AdamW makes whole steps of it."""
    metric: float
    """Relative, of what an evaluation reports besides its loss; exp(loss) is off by as much as the loss itself."""


TOLERANCES = {
    "fp32": Tolerances(loss=1e-5, weight=1e-4, metric=1e-5),
    "fp16": Tolerances(loss=2e-3, weight=None, metric=2e-3),  # 11 bits of precision
    "bf16": Tolerances(loss=1e-2, weight=None, metric=1e-2),  # 8 bits
}
"""By train.precision. A proof is in fp32; in the others it is only seen that training is the same."""

NOTHING_TO_COMPARE_WITH = "not started: the reference failed, so there is nothing to compare with"


@dataclass(frozen=True)
class Outcome:
    """One run beside the first one; None where there is nothing to compare."""

    strategy: Strategy
    world_size: int
    problem: str = ""
    reference: bool = False
    loss: float | None = None
    """Largest difference of a training or validation loss."""
    weight: float | None = None
    """Largest difference of an exported weight."""
    same_tensors: bool = True
    """Whether weights of the same names and shapes were exported, or none by both."""
    same_rates: bool = True
    same_metrics: bool = True
    same_samples: bool = True
    losses: Mapping[int, float] = field(default_factory=dict)
    """Training loss by update."""
    differences: Mapping[int, float] = field(default_factory=dict)
    """Absolute difference of the training loss by update."""
    seconds: float = 0.0
    tolerances: Tolerances = TOLERANCES["fp32"]

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return folder_name(self.strategy, self.world_size)

    @property
    def equal(self) -> bool:
        """Whether this run is the first one, sharded differently. Without a loss in common it is not."""
        allowed = self.tolerances
        return (
            not self.problem
            and self.loss is not None
            and self.loss <= allowed.loss
            and (self.weight is None or self.weight <= (math.inf if allowed.weight is None else allowed.weight))
            and self.same_tensors
            and self.same_rates
            and self.same_metrics
            and self.same_samples
        )

    @property
    def verdict(self) -> Literal["reference", "same", "DIFFERENT", "failed"]:
        """The last column of the table."""
        if self.problem:
            return "failed"
        if self.reference:
            return "reference"
        return "same" if self.equal else "DIFFERENT"


def folder_name(strategy: Strategy, world_size: int) -> str:
    """What the folder of a run is called inside the one of the comparison."""
    return f"{strategy}-{world_size}"


def cases(strategies: list[Strategy], world_sizes: list[int]) -> list[tuple[Strategy, int]]:
    """One process, then every strategy at every number of processes above one that was asked for."""
    alone = [(Strategy.SINGLE, 1)] if 1 in world_sizes else []
    return alone + [(strategy, size) for size in world_sizes if size > 1 for strategy in strategies]


def compare(
    file: str,
    overrides: list[str],
    cases: list[tuple[Strategy, int]],
    folder: Path,
    said: Callable[[str], None],
) -> Iterator[Outcome]:
    """Run the cases one after the other; the first is the reference, and without it no other is started.

    Raises:
        StoppedError: the user or the system stopped it; what was yielded until then is complete.
    """
    outcomes: list[Outcome] = []
    for strategy, size in cases:
        if outcomes and outcomes[0].problem:
            yield Outcome(strategy, size, NOTHING_TO_COMPARE_WITH)
            continue
        said(_progress(strategy, size, len(cases), outcomes))
        started = time.monotonic()
        own = folder / folder_name(strategy, size)
        problem = _run(file, overrides, strategy, size, own)
        if problem:
            outcome = Outcome(strategy, size, problem)
        elif not outcomes:
            allowed = TOLERANCES[read_plan(own).config.train.precision]
            losses = _training_losses(_records(own))
            outcome = Outcome(strategy, size, reference=True, losses=losses, tolerances=allowed)
        else:
            outcome = _beside(strategy, size, own, folder / outcomes[0].folder, outcomes[0].tolerances)
        outcomes.append(replace(outcome, seconds=time.monotonic() - started))
        yield outcomes[-1]
    said(f"{len(outcomes)} cases in {roughly(sum(outcome.seconds for outcome in outcomes))}")


def _run(file: str, overrides: list[str], strategy: Strategy, size: int, folder: Path) -> str:
    """Do one run; what went wrong, or nothing."""
    stated = [*overrides, f"parallel.strategy={strategy}", f"parallel.devices={size}", "parallel.nodes=1"]
    stated += ["parallel.accelerate_config=null", "parallel.deepspeed_config=null"]  # which are for one strategy each
    try:
        plan = decide(file, stated, folder, World()).plan
        with held(create_run_folder(plan)):
            ending = local.run(plan, folder)
    except LaunchError as error:
        return str(error)
    if ending.stopped:
        raise StoppedError(ending.message, ending.exit_code)
    return ending.message if ending.exit_code else ""


def _progress(strategy: Strategy, size: int, total: int, before: list[Outcome]) -> str:
    """Which case starts, and how long those that are left will take if they take as long as those that ran."""
    head = f"{len(before) + 1}/{total}  {strategy} on {size} process{'es' if size > 1 else ''}"
    took = [outcome.seconds for outcome in before if not outcome.problem]
    if not took:
        return head
    each = sum(took) / len(took)
    return f"{head}  ({roughly(each)} a case, about {roughly(each * (total - len(before)))} left)"


def _beside(
    strategy: Strategy, size: int, own: Path, first: Path, tolerances: Tolerances = TOLERANCES["fp32"]
) -> Outcome:
    ours, theirs = _records(own), _records(first)
    pairs = [(ours[key], theirs[key]) for key in theirs if key in ours]
    losses, reference = _training_losses(ours), _training_losses(theirs)
    weight, same_tensors = _weight_difference(own, first)
    return Outcome(
        strategy,
        size,
        loss=_largest(abs(a["loss"] - b["loss"]) for a, b in pairs if "loss" in a and "loss" in b),
        weight=weight,
        same_tensors=same_tensors,
        same_rates=all(a.get("learning_rate") == b.get("learning_rate") for a, b in pairs),
        same_metrics=all(_same_metrics(a, b, tolerances.metric) for a, b in pairs if a["kind"] == "eval"),
        same_samples=[_cursor(record) for record in ours.values()] == [_cursor(record) for record in theirs.values()],
        losses=losses,
        differences={update: abs(losses[update] - loss) for update, loss in reference.items() if update in losses},
        tolerances=tolerances,
    )


def _records(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What a run recorded, by kind and update, in its order."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    return {(record["kind"], record["update"]): record for record in map(json.loads, lines)}


def _training_losses(records: Mapping[tuple[str, int], dict[str, Any]]) -> dict[int, float]:
    return {update: record["loss"] for (kind, update), record in records.items() if kind == "train"}


def _cursor(record: dict[str, Any]) -> list[Any]:
    """Which samples a record is about, and how many."""
    return [record.get(name) for name in ("kind", "update", "epoch", "consumed", "samples", "targets", "tokens")]


def _same_metrics(record: dict[str, Any], other: dict[str, Any], tolerance: float) -> bool:
    names = set(other) - {"kind", "update", "samples", "targets", "time", "loss", "best"}
    return all(name in record and abs(record[name] - other[name]) <= tolerance * abs(other[name]) for name in names)


def _weight_difference(own: Path, first: Path) -> tuple[float | None, bool]:
    """Over all exported weights, and whether they are the same tensors; None where there are none in common."""
    from safetensors.numpy import load_file

    names, other_names = ({path.name for path in (run / "export").glob("*.safetensors")} for run in (own, first))
    if names != other_names:
        return None, False
    differences: list[float] = []
    for name in sorted(names):
        ours, theirs = load_file(own / "export" / name), load_file(first / "export" / name)
        if {key: value.shape for key, value in ours.items()} != {key: value.shape for key, value in theirs.items()}:
            return None, False
        differences += [float(abs(ours[key] - theirs[key]).max()) for key in theirs if theirs[key].size]
    return _largest(differences), True


def _largest(differences: Iterable[float]) -> float | None:
    """Infinite where one is not a number: `max` would pass over it."""
    return max((math.inf if math.isnan(value) else value for value in differences), default=None)
