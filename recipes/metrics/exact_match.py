"""Exact match: share of the texts, 0 to 1, that equal their reference but for white space around them."""

from __future__ import annotations

import evaluate


class ExactMatch(evaluate.Metric):
    """One reference per row."""

    def _info(self) -> evaluate.MetricInfo:
        from datasets import Features, Value

        text = Value("string")
        return evaluate.MetricInfo(
            description=__doc__, citation="", features=Features(predictions=text, references=text)
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        equal = sum(text.strip() == reference.strip() for text, reference in zip(predictions, references, strict=True))
        return {"exact_match": equal / len(references)}
