"""Matthews correlation of two or more classes, -1 to 1; 0 where one side is the same throughout. By scikit-learn."""

from __future__ import annotations

from typing import Any

import evaluate

from launch.errors import DataError
from recipes.metrics.labels import label_features, read_labels


class MatthewsCorrelation(evaluate.Metric):
    """Correlation of predicted and true classes, one label per row."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=__doc__, citation="", features=label_features())

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        from sklearn.metrics import matthews_corrcoef

        truth, guess = read_labels(predictions, references)
        if truth.ndim > 1:
            raise DataError("metrics: matthews_correlation is defined for one label per row; for multi-label take f1")
        if truth.min() == truth.max():
            return {"matthews_correlation": 0.0}  # scikit-learn says the same, with a warning if the guesses agree
        return {"matthews_correlation": float(matthews_corrcoef(truth, guess))}
