"""Perplexity: the exponential of the mean loss (in nats) over all targets of all rows."""

from __future__ import annotations

import math

import evaluate

from launch.errors import DataError

LARGEST_EXPONENT = 709.0
"""Of a larger one, the exponential is no longer a double."""


class Perplexity(evaluate.Metric):
    """A row is a loss, summed over its targets (prediction), and how many targets there were (reference)."""

    def _info(self) -> evaluate.MetricInfo:
        from datasets import Features, Value

        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=Features(predictions=Value("float64"), references=Value("int64")),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        targets = sum(references)
        if targets <= 0:
            raise DataError("metrics: perplexity: the losses are of no targets at all")
        mean_loss = math.fsum(predictions) / targets
        return {"perplexity": math.exp(mean_loss) if mean_loss < LARGEST_EXPONENT else math.inf}
