"""What becomes of an update whose loss is no number, or has leapt: decided alike on every rank, before the step."""

from __future__ import annotations

import math
import socket
import statistics
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Literal

from launch.engine.agree import gathered
from launch.engine.batching import Window
from launch.errors import NonFiniteError, SpikeError
from launch.sections import TrainSection

REMEMBERED = 64
"""Updates whose losses a new one is compared with."""

WANTED = 20
"""Fewer than these judge nothing."""

FLOOR = 0.01
"""Least standard deviation, as a share of the highest median: the less a loss varies, the more its trend matters."""

MOST_SKIPPED = 5
"""Updates in a row that may be skipped."""

MOST_REWINDS = 3
"""How often a run may go back to the same weights."""

SHOWN = 3
"""Micro-batches that are named."""


class Baseline:
    """The losses of the last updates, and how far above them a new one is."""

    def __init__(self) -> None:
        self._last: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)
        self._level = 0.0  # the highest that the median has been

    @property
    def median(self) -> float:
        """Of the losses that are remembered."""
        return statistics.median(loss for loss, _ in self._last)

    def deviations(self, loss: float, targets: int) -> float:
        """By how many robust standard deviations a loss, the mean of so many targets, is above the median.

        The standard deviation is 1.4826 times the median absolute one, which is the same of normally distributed values
        (Rousseeuw & Croux 1993, doi:10.1080/01621459.1993.10476408), and more for a mean of fewer targets than usual.
        It is never less than what one target does to the mean that is told no better than at the beginning: of losses
        near 0 some are a hundred times the median. 0 while too little is known.
        """
        if len(self._last) < WANTED:
            return 0.0
        median = self.median
        spread = 1.4826 * statistics.median(abs(other - median) for other, _ in self._last)
        usual = statistics.median(number for _, number in self._last)
        spread = max(spread, FLOOR * self._level) * math.sqrt(max(1.0, usual / max(targets, 1)))
        spread = max(spread, self._level / max(targets, 1))
        return (loss - median) / spread if spread else 0.0

    def add(self, loss: float, targets: int) -> None:
        """Take note of an update that was made."""
        if targets:  # without any, the loss is 0 whatever the weights are
            self._last.append((loss, targets))
        if len(self._last) >= WANTED:
            self._level = max(self._level, abs(self.median))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge alike."""
        return {"losses": [list(each) for each in self._last], "level": self._level}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._last = deque(((loss, targets) for loss, targets in state["losses"]), maxlen=REMEMBERED)
        self._level = state["level"]


@dataclass(frozen=True)
class Culprit:
    """A micro-batch that may be why."""

    rank: int
    host: str
    samples: tuple[int, ...]
    """Indices into the dataset; of a stream, positions in its epoch."""
    loss: float
    """Mean over its targets."""

    def __str__(self) -> str:
        loss = f": {self.loss:.4g}" if math.isfinite(self.loss) else ""
        return f"rank {self.rank} ({self.host}) samples {list(self.samples)}{loss}"


@dataclass(frozen=True)
class Incident:
    """An update with a loss or a gradient that is not as it should be."""

    action: Literal["warn", "skip", "rewind"]
    what: str
    """In words, without the update."""
    loss: float
    culprits: tuple[Culprit, ...]
    """The worst first."""
    baseline: float | None = None
    """Median of the losses before, of a spike."""
    deviations: float | None = None

    def record(self) -> dict[str, Any]:
        """As JSON can hold it, in which a number is finite."""
        facts = {"reason": self.what, "loss": self.loss, "baseline": self.baseline, "deviations": self.deviations}
        worst = [asdict(each) for each in self.culprits]
        for each in [facts, *worst]:
            each["loss"] = each["loss"] if math.isfinite(each["loss"]) else None
        return {**{name: value for name, value in facts.items() if value is not None}, "worst": worst}


@dataclass(frozen=True)
class Seen:
    """An update before it is made, as one rank sees it."""

    window: Window
    sums: list[float]
    """The summed loss of each of this rank's micro-batches."""
    targets: list[int]
    """How many targets each has."""
    loss: float
    """Mean over all targets of the update; the same on every rank, to the bit, as DDP's gradients are too."""
    all_targets: int
    """Of the update."""
    rank: int = 0


class LossWatch:
    """Hears of each update before it is made. Every rank must have one and let it hear each."""

    def __init__(self, train: TrainSection | None = None) -> None:
        self._train = train or TrainSection()
        self._baseline = Baseline()
        self.farthest = 0.0
        """The most deviations of an update so far."""
        self._skipped = 0
        self._spiked_at = 0
        self._rewinds = 0
        self._rewound_at = 0

    # --- judging ---------------------------------------------------------------------------------------------

    def judge(self, seen: Seen) -> Incident | None:
        """What is wrong with the loss of an update, if anything. Every rank must call this.

        Raises:
            NonFiniteError: it is not finite, and `train.on_nonfinite` is `stop`; or too many were skipped in a row.
            SpikeError: the same of a spike.
        """
        if not math.isfinite(seen.loss):
            culprits = self._culprits(seen, spoiled=True)
            return self._not_finite(seen, f"loss is {seen.loss}: {_shown(culprits) or _samples_of(seen)}", culprits)
        deviations = self._baseline.deviations(seen.loss, seen.all_targets)
        self.farthest = max(self.farthest, deviations)
        policy = self._train.on_spike
        if deviations <= self._train.spike_deviations or policy == "ignore":
            return None
        return self._spike(seen, deviations, self._culprits(seen, spoiled=False), policy)

    def judge_norm(self, seen: Seen, norm: float) -> Incident | None:
        """The same of the global norm of the gradient, which has left the weights alone if it is not finite.

        Raises:
            NonFiniteError: as above.
        """
        if math.isfinite(norm):
            return None
        return self._not_finite(
            seen, f"gradient norm is {norm} although the loss is finite: {_samples_of(seen)}", self._culprits(seen)
        )

    def made(self, seen: Seen) -> None:
        """Take note of an update that was made."""
        self._baseline.add(seen.loss, seen.all_targets)
        self._skipped = 0

    def _not_finite(self, seen: Seen, what: str, culprits: tuple[Culprit, ...]) -> Incident:
        hint = "try a lower train.learning_rate, a lower train.max_grad_norm or train.precision=fp32"
        if self._train.on_nonfinite == "stop":
            raise NonFiniteError(
                f"update {seen.window.update}: {what}; the weights are those of update {seen.window.update - 1}; "
                f"{hint}, or leave such updates out by train.on_nonfinite=skip"
            )
        self._count_skipped(seen, what, hint, NonFiniteError)
        return Incident("skip", what, seen.loss, culprits)

    def _spike(
        self,
        seen: Seen,
        deviations: float,
        culprits: tuple[Culprit, ...],
        policy: Literal["warn", "skip", "stop", "rewind"],
    ) -> Incident | None:
        median = self._baseline.median
        what = (
            f"loss {seen.loss:.4f} is {deviations:.0f} deviations above {median:.4f}, the median before it; "
            f"highest: {_shown(culprits)}"
        )
        if policy == "stop":
            raise SpikeError(
                f"update {seen.window.update}: {what}; the weights are those of update {seen.window.update - 1}; look "
                "at these samples, try a lower train.learning_rate, or go on with train.on_spike=skip, which leaves "
                "such updates out, or warn"
            )
        told, self._spiked_at = self._spiked_at == seen.window.update - 1, seen.window.update
        if policy == "warn" and told:  # a loss that stays high is told once
            return None
        if policy == "skip":
            self._count_skipped(seen, what, "try a lower train.learning_rate, or train.on_spike=rewind", SpikeError)
        return Incident(policy, what, seen.loss, culprits, median, deviations)

    def _count_skipped(self, seen: Seen, what: str, hint: str, kind: type[NonFiniteError]) -> None:
        if self._skipped == MOST_SKIPPED:
            raise kind(
                f"update {seen.window.update}: {what}; the {MOST_SKIPPED} updates before were skipped already, so the "
                f"samples are not why; the weights are those of update {seen.window.update - MOST_SKIPPED - 1}; {hint}"
            )
        self._skipped += 1

    def _culprits(self, seen: Seen, *, spoiled: bool = False) -> tuple[Culprit, ...]:
        """The micro-batches with the highest losses over all ranks; or those whose loss is not finite."""
        host = socket.gethostname()
        own = [
            Culprit(seen.rank, host, micro_batch.samples, total / max(targets, 1))
            for micro_batch, total, targets in zip(seen.window.micro_batches, seen.sums, seen.targets, strict=True)
            if not micro_batch.filler and not (spoiled and math.isfinite(total))
        ]
        found = [culprit for culprits in gathered([own]) for culprit in culprits]
        if spoiled:
            return tuple(found)
        return tuple(sorted(found, key=lambda culprit: -culprit.loss)[:SHOWN])

    # --- going back ------------------------------------------------------------------------------------------

    def count_rewind(self, window: Window, incident: Incident, checkpoint: int | None) -> None:
        """See that going back to this checkpoint is worth a try. Every rank must call this.

        Raises:
            SpikeError: there is none to go back to, or the run has gone back to these weights too often.
        """
        head = f"update {window.update}: {incident.what}; train.on_spike = rewind, but"
        if checkpoint is None:
            raise SpikeError(
                f"{head} there is no checkpoint yet to go back to; set a lower save.every_steps, or train.on_spike=skip"
            )
        # One that was saved right after a rewind holds the weights that the run had gone back to.
        self._rewinds = self._rewinds + 1 if checkpoint <= self._rewound_at else 1
        self._rewound_at = window.update
        if self._rewinds > MOST_REWINDS:
            raise SpikeError(
                f"{head} the run has gone back to the weights of checkpoint {checkpoint} {MOST_REWINDS} times already, "
                "so the samples are not why; try a lower train.learning_rate, a lower train.max_grad_norm or a higher "
                "train.spike_deviations"
            )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to decide alike."""
        return {
            **self._baseline.state(),
            "farthest": self.farthest,
            "skipped": self._skipped,
            "spiked_at": self._spiked_at,
            "rewinds": self._rewinds,
            "rewound_at": self._rewound_at,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.rewind(state)
        if state:
            self.farthest, self._spiked_at = state["farthest"], state["spiked_at"]
            self._rewinds, self._rewound_at = state["rewinds"], state["rewound_at"]

    def rewind(self, state: dict[str, Any]) -> None:
        """Go back to what was known then; but not in what was gone back to, and how often."""
        if state:  # which checkpoints of the first releases lack
            self._baseline.restore(state)
            self._skipped = state["skipped"]


def _shown(culprits: tuple[Culprit, ...]) -> str:
    return "; ".join(map(str, culprits))


def _samples_of(seen: Seen) -> str:
    return f"samples of epoch {seen.window.epoch} up to {seen.window.consumed}"
