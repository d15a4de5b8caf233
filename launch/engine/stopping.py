"""What a run makes of its evaluations: which one is the best, and whether it has learned what it can."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Judgement:
    """What one evaluation means for the run."""

    best: bool
    """Whether no earlier one was as good: of equals the first stays the best."""
    stop: bool
    """Whether enough of them in a row were not better."""


class EarlyStopping:
    """Judges one value after the other; the lower the better, unless `highest`."""

    def __init__(self, patience: int | None, min_delta: float, *, highest: bool = False) -> None:
        self.best = math.inf
        """The best value so far; of values that are better the higher they are, its negative."""
        self._sign = -1.0 if highest else 1.0
        self._to_beat = math.inf
        self._patience = patience
        self._min_delta = min_delta
        self._without_better = 0

    def state(self) -> dict[str, Any]:
        """What a resumed run needs; JSON has no infinity, so None stands for it."""
        losses = {"best": self.best, "to_beat": self._to_beat}
        return {
            **{name: loss if math.isfinite(loss) else None for name, loss in losses.items()},
            "without_better": self._without_better,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        best, to_beat = state["best"], state["to_beat"]
        self.best = math.inf if best is None else best
        self._to_beat = math.inf if to_beat is None else to_beat
        self._without_better = state["without_better"]

    def judge(self, value: float) -> Judgement:
        """Take note of a value; a better one is so by more than `min_delta` than the last better one."""
        loss = self._sign * value
        best = loss < self.best
        if best:
            self.best = loss
        if loss < self._to_beat - self._min_delta:
            self._to_beat = loss
            self._without_better = 0
        else:
            self._without_better += 1
        return Judgement(best, self._patience is not None and self._without_better >= self._patience)
