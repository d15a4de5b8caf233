"""Recall: share of the rows of a class that were given it; by scikit-learn, where nothing was to be found it is 0."""

from __future__ import annotations

from typing import Any

import evaluate

from recipes.metrics.labels import averages, label_features


class Recall(evaluate.Metric):
    """Macro, micro and weighted over classes or labels; of two classes, also that of class 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=__doc__, citation="", features=label_features())

    def _compute(self, predictions: list[Any], references: list[Any], classes: int | None = None) -> dict[str, float]:
        from sklearn.metrics import recall_score

        return averages("recall", recall_score, predictions, references, classes)
