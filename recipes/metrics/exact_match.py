"""Exact match: share of the texts, 0 to 1, that equal a reference of theirs but for white space around them."""

from __future__ import annotations

from typing import Any

import evaluate

from recipes.metrics.texts import reference_lists, text_features


class ExactMatch(evaluate.Metric):
    """One reference per row, or several."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=__doc__, citation="", features=text_features())

    def _compute(self, predictions: list[str], references: list[Any]) -> dict[str, float]:
        rows = zip(predictions, reference_lists(references), strict=True)
        equal = sum(text.strip() in [reference.strip() for reference in row] for text, row in rows)
        return {"exact_match": equal / len(references)}
