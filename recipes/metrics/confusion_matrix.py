"""Confusion matrix: how many rows of each class were given which; by scikit-learn."""

from __future__ import annotations

from typing import Any

import evaluate

from recipes.metrics.labels import label_features, read_labels


class ConfusionMatrix(evaluate.Metric):
    """A list of rows, row = true class, column = predicted class; of multi-label, one such 2 × 2 list per label.

    `classes` is the number of classes of the task; without it, the largest label decides.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=__doc__, citation="", features=label_features())

    def _compute(
        self, predictions: list[Any], references: list[Any], classes: int | None = None
    ) -> dict[str, list[Any]]:
        from sklearn.metrics import confusion_matrix, multilabel_confusion_matrix

        truth, guess = read_labels(predictions, references, classes)
        if truth.ndim > 1:
            return {"confusion_matrix": multilabel_confusion_matrix(truth, guess).tolist()}
        labels = range(classes or max(truth.max(), guess.max()) + 1)
        return {"confusion_matrix": confusion_matrix(truth, guess, labels=list(labels)).tolist()}
