"""ROUGE, F-measures from 0 to 1, by rouge-score.

The exact mean over rows, not that of a bootstrap; of several references a row counts the best. rougeLsum takes each
line for a sentence.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import evaluate

from recipes.metrics.texts import reference_lists, text_features

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(evaluate.Metric):
    """Words are compared as they are, or by their stems (`use_stemmer`, for English)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=__doc__, citation="", features=text_features())

    def _compute(self, predictions: list[str], references: list[Any], use_stemmer: bool = False) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(TYPES, use_stemmer=use_stemmer)
        scores = [
            scorer.score_multi(row, text) for row, text in zip(reference_lists(references), predictions, strict=True)
        ]
        return {kind: fmean(float(score[kind].fmeasure) for score in scores) for kind in TYPES}
