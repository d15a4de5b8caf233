"""What a run makes of its evaluations: which one is the best, and whether it has learned what it can."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Judgement:
    """What one evaluation means for the run."""

    best: bool
    """Whether no earlier one was as good: of equals the first stays the best."""
    stop: bool
    """Whether enough of them in a row were not better."""


class EarlyStopping:
    """Judges one validation loss after the other."""

    def __init__(self, patience: int | None, min_delta: float) -> None:
        self.best = math.inf
        """The lowest loss so far."""
        self._to_beat = math.inf
        self._patience = patience
        self._min_delta = min_delta
        self._without_better = 0

    def judge(self, loss: float) -> Judgement:
        """Take note of a loss; a better one is lower by more than `min_delta` than the last better one."""
        best = loss < self.best
        if best:
            self.best = loss
        if loss < self._to_beat - self._min_delta:
            self._to_beat = loss
            self._without_better = 0
        else:
            self._without_better += 1
        return Judgement(best, self._patience is not None and self._without_better >= self._patience)
