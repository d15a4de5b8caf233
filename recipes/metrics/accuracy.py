"""Accuracy: share of the rows that are right; of multi-label rows, all of whose labels are. By scikit-learn."""

from __future__ import annotations

from typing import Any

import evaluate

from recipes.metrics.labels import label_features, read_labels


class Accuracy(evaluate.Metric):
    """Share of right rows."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=__doc__, citation="", features=label_features())

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(*read_labels(predictions, references)))}
