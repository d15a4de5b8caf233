"""When a run has learned what it can: early stopping on the validation loss."""

from __future__ import annotations

import math


class EarlyStopping:
    """Counts evaluations without a better validation loss. The loss is the same on all ranks, so is the answer."""

    def __init__(self, patience: int | None, min_delta: float) -> None:
        self.best = math.inf
        self._patience = patience
        self._min_delta = min_delta
        self._without_better = 0

    def enough(self, loss: float) -> bool:
        """Take note of a validation loss; True when `patience` of them in a row were not better."""
        if loss < self.best - self._min_delta:
            self.best = loss
            self._without_better = 0
        else:
            self._without_better += 1
        return self._patience is not None and self._without_better >= self._patience
