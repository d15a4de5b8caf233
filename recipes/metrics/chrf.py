"""Character n-gram F-score (chrF) of a whole corpus, 0 to 100, by sacrebleu; its signature says how it was computed."""

from __future__ import annotations

from typing import Any

import evaluate

from recipes.metrics.texts import reference_streams, text_features


class Chrf(evaluate.Metric):
    """Options as in sacrebleu; with `word_order` 2 it is chrF++."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=__doc__, citation="", features=text_features())

    def _compute(
        self, predictions: list[str], references: list[Any], word_order: int = 0, lowercase: bool = False
    ) -> dict[str, float | str]:
        from sacrebleu.metrics import CHRF

        chrf = CHRF(word_order=word_order, lowercase=lowercase)
        score = chrf.corpus_score(predictions, reference_streams(references)).score
        return {"chrf": float(score), "chrf_signature": str(chrf.get_signature())}
