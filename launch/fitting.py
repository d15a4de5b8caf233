"""What is known of the micro-batch sizes that fit into memory, what it depends on, and what to do where none fits.

Pure but for `recall` and `remember`. Trials are carried out by `launch.trials`, on every rank by `engine.trials`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from launch.cache import Cache

if TYPE_CHECKING:
    from launch.plan import Plan


TRIALS = "trials.json"
"""In the folder of a trial: bytes at the peak by micro-batch size, after each that all ranks managed."""


@dataclass(frozen=True)
class Fits:
    """What trials have shown, for one model, length, strategy and device."""

    largest: int
    """The largest micro-batch size that fitted."""
    too_large: int | None
    """The smallest one that did not; None: all that were tried fitted."""

    def largest_of(self, sizes: list[int]) -> int | None:
        """The best of `sizes`, ascending; None where a larger one than was ever tried might fit, or none does."""
        if self.too_large is None and sizes[-1] > self.largest:
            return None
        return max((size for size in sizes if size <= self.largest), default=None)


def question(plan: Plan) -> dict[str, Any]:
    """All that decides how much memory a micro-batch of some size needs, and how much there is."""
    config, processes = plan.config, plan.processes
    train = config.train.model_dump(include={"precision", "optimizer", "activation_checkpointing", "compile"})
    return {
        "recipe": config.recipe,
        "recipe_args": config.recipe_args,
        "train": train,
        "strategy": processes.strategy,
        "zero_optimization": (plan.deepspeed or {}).get("zero_optimization"),  # buffers are among what a user may set
        # Where weights are sharded, each process holds less of them the more there are.
        "processes": processes.world_size if processes.strategy.shards else None,
        "device": [processes.device, processes.device_name, processes.memory_bytes],
    }


def recall(cache: Cache, asked: dict[str, Any]) -> Fits | None:
    """The remembered answer, if there is one that can be read."""
    try:
        return Fits(**json.loads(cache.path("micro-batch", asked).with_suffix(".json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remember(cache: Cache, asked: dict[str, Any], fits: Fits) -> None:
    """Keep an answer; where the cache cannot be written it is found again next time."""
    path = cache.path("micro-batch", asked).with_suffix(".json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        aside.write_text(json.dumps(asdict(fits)), encoding="utf-8")
        aside.replace(path)
    except OSError:
        return


def smaller(plan: Plan) -> int | None:
    """The next smaller micro-batch size that keeps the global batch; None below one sample."""
    share = plan.batch.micro_batch_size * plan.batch.accumulation
    return max((n for n in range(1, plan.batch.micro_batch_size) if share % n == 0), default=None)


def advice(plan: Plan) -> str:
    """What a user can change so that a run needs less memory, the cheapest change first."""
    train, processes = plan.config.train, plan.processes
    changes = []
    if size := smaller(plan):
        same = f"the global batch stays {plan.batch.global_batch_size}"
        changes.append(f"train.micro_batch_size={size} ({same})")
    if train.precision == "fp32" and processes.device != "cpu":
        changes.append("train.precision=bf16")
    if not train.activation_checkpointing:
        changes.append("train.activation_checkpointing=true")
    if processes.world_size > 1 and not processes.strategy.shards:
        changes.append("parallel.strategy=fsdp2")
    elif processes.strategy.shards and not processes.strategy.offload and processes.device == "cuda":
        changes.append("an offloading strategy such as parallel.strategy=fsdp2_offload")
    return f"use {' or '.join(changes)}" if changes else "use a smaller model, shorter samples or more devices"
