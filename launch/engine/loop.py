"""The one training loop. Sees no files, no environment, no recipe names and no configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from launch.engine.agree import NONE, Requests, summed
from launch.engine.batching import MicroBatch, Window
from launch.engine.devices import Devices
from launch.engine.loss import Counts, count_batch, count_over_ranks, weigh
from launch.engine.meters import Clock
from launch.engine.stragglers import Pace
from launch.engine.updating import Updates
from launch.engine.watch import Incident, LossWatch, Seen
from launch.recipe import Batch


@dataclass(frozen=True)
class StepResult:
    """What one update did, the same on every rank."""

    loss: float
    """Mean over all targets of the update."""
    gradient_norm: float
    """Global L2 norm before clipping; NaN where nobody asked for it."""
    counts: Counts
    overflows: int = 0
    """How often the update was repeated because a gradient overflowed in fp16."""
    requests: Requests = NONE
    """How many ranks wanted what when the update began."""
    incident: Incident | None = None
    """What was wrong with it."""
    applied: bool = True
    """Whether the weights have changed."""
    told: tuple[int, ...] = ()
    """What all ranks together have told of their pace."""


@dataclass(frozen=True)
class Step:
    """Everything one update needs, besides its data."""

    accelerator: Accelerator
    model: torch.nn.Module
    updates: Updates
    loss: Callable[[torch.nn.Module, Batch], torch.Tensor]
    count: Callable[[Batch], int]
    requests: Callable[[], Requests] = Requests
    """What this rank wants at the moment."""
    watch: LossWatch = field(default_factory=LossWatch)
    clock: Clock = field(default_factory=Clock)
    pace: Pace = field(default_factory=Pace)
    devices: Devices = field(default_factory=Devices)
    laid: Callable[[Batch], AbstractContextManager[object]] = nullcontext
    """How the rows of a micro-batch lie while it is computed."""

    def __call__(self, window: Window, batches: list[dict[str, torch.Tensor]]) -> StepResult:
        """Make one update from this rank's micro-batches, or leave it out as the watch says. Every rank must call this.

        An update whose gradient overflows in fp16 is repeated with half the loss scale rather than skipped: no sample
        is lost, and the learning rate stays the one of its update.

        Raises:
            NonFiniteError: on all ranks, before the weights are touched.
        """
        pairs = list(zip(window.micro_batches, batches, strict=True))
        local = [count_batch(*pair, self.count) for pair in pairs]
        wishes = astuple(self.requests())
        tells = self.pace.tell(window.update)
        with self.clock.exchange():
            counts, others = count_over_ranks(self.accelerator, sum(local, Counts()), *wishes, *tells)
        wanted, told = Requests(*others[: len(wishes)]), tuple(others[len(wishes) :])
        rank, overflows, incident, norm = self.accelerator.process_index, 0, None, math.nan
        while True:
            sums, total = self._forward_and_backward(pairs, counts)
            loss = total / max(counts.targets, 1)
            seen = Seen(window, sums, [each.targets for each in local], loss, counts.targets, rank)
            incident = self.watch.judge(seen)
            if incident and incident.action != "warn":
                self.updates.discard()
                break
            with self.clock.computing():
                norm = self.updates.apply()
            if math.isfinite(norm) or not self.updates.may_repeat():
                incident = self.watch.judge_norm(seen, norm) or incident
                break
            overflows += 1
        applied = incident is None or incident.action == "warn"
        if applied:
            self.watch.made(seen)
        return StepResult(loss, norm, counts, overflows, wanted, incident, applied, told)

    def _forward_and_backward(
        self, pairs: list[tuple[MicroBatch, dict[str, torch.Tensor]]], counts: Counts
    ) -> tuple[list[float], float]:
        """Add up gradients; the summed loss of each of this rank's micro-batches, and of all of all ranks."""
        sums = []
        for position, (micro_batch, batch) in enumerate(pairs):
            with self.laid(batch), self.updates.micro_batch(last=position == len(pairs) - 1):
                with self.clock.forward(gathers=self.updates.gathers):
                    loss = self.loss(self.model, self.devices.place(self.accelerator, batch))
                    if micro_batch.filler:
                        loss = loss * 0.0
                with self.clock.computing():
                    self.updates.backward(weigh(loss, counts, self.accelerator.num_processes))
            sums.append(loss.detach())
        local = self.devices.precise(sums)
        with self.clock.exchange():
            total = float(summed(self.accelerator, local.sum()))  # host sync
        return local.tolist(), total


def fit(
    step: Step,
    work: Iterable[tuple[Window, list[dict[str, torch.Tensor]]]],
    learning_rate: Callable[[int], float],
    after_update: Callable[[Window, StepResult], bool],
) -> None:
    """Train on windows and this rank's batches of each, until they end or `after_update` returns True.

    Every rank must call this.
    """
    step.model.train()
    windows = iter(work)
    while True:
        with step.clock.phase("data"):
            given = next(windows, None)
        if given is None:
            return
        window, batches = given
        set_learning_rate(step.updates.optimizer, learning_rate(window.update))
        with step.clock.phase("compute"):
            result = step(window, batches)
        if after_update(window, result):
            return


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of all parameter groups."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    for group in groups:
        group["lr"] = value


def settle_buckets(step: Step, batch: Batch) -> None:
    """Let DDP put its gradients into the groups it will keep. Every rank must call this.

    It regroups them after the first backward pass (torch 2.13, reducer.cpp, `rebuild_buckets`), and three ranks or
    more add up in another order in other groups: an update after a resumption would differ in its last bits.
    """
    step.model.train()
    (step.loss(step.model, send_to_device(batch, step.accelerator.device)) * 0.0).backward()  # type: ignore[no-untyped-call]
    step.updates.discard()
