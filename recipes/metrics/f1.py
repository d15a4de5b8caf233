"""F1: the harmonic mean of precision and recall; by scikit-learn, where nothing was to be found it is 0."""

from __future__ import annotations

from typing import Any

import evaluate

from recipes.metrics.labels import averages, label_features


class F1(evaluate.Metric):
    """Macro, micro and weighted over classes or labels; of two classes, also that of class 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=__doc__, citation="", features=label_features())

    def _compute(self, predictions: list[Any], references: list[Any], classes: int | None = None) -> dict[str, float]:
        from sklearn.metrics import f1_score

        return averages("f1", f1_score, predictions, references, classes)
