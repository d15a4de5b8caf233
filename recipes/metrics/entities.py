"""Entities in sequences of tags (IOB2 and the like), by seqeval: right are those whose type and both ends are right."""

from __future__ import annotations

import evaluate

from launch.errors import DataError


class Seqeval(evaluate.Metric):
    """Precision, recall and F1 over all entities, and the share of right tags; 0 to 1. A row is a list of tags."""

    def _info(self) -> evaluate.MetricInfo:
        from datasets import Features, List, Value

        tags = List(Value("string"))
        return evaluate.MetricInfo(
            description=__doc__, citation="", features=Features(predictions=tags, references=tags)
        )

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

        for number, (guess, truth) in enumerate(zip(predictions, references, strict=True)):
            if len(guess) != len(truth):
                raise DataError(
                    f"metrics: row {number}: {len(guess)} predicted tags but {len(truth)} references; leave out what "
                    "has no tag (padding, parts of words) on both sides"
                )
        if not any(references):
            raise DataError("metrics: seqeval: no row has a tag")
        scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
        values = {name: float(score(references, predictions, zero_division=0)) for name, score in scores.items()}
        return values | {"accuracy": float(accuracy_score(references, predictions))}
