"""BLEU of a whole corpus, 0 to 100, by sacrebleu; its signature says how it was computed."""

from __future__ import annotations

from typing import Any

import evaluate

from launch.errors import ConfigError
from recipes.metrics.texts import reference_streams, text_features


class Bleu(evaluate.Metric):
    """Options as in sacrebleu; `tokenize` None is its default, 13a."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=__doc__, citation="", features=text_features())

    def _compute(
        self, predictions: list[str], references: list[Any], tokenize: str | None = None, lowercase: bool = False
    ) -> dict[str, float | str]:
        from sacrebleu.metrics import BLEU

        if tokenize is not None and tokenize not in BLEU.TOKENIZERS:
            raise ConfigError(
                f"metrics: bleu: tokenize = {tokenize}: no such tokenizer; allowed: {', '.join(BLEU.TOKENIZERS)}"
            )
        bleu = BLEU(tokenize=tokenize, lowercase=lowercase)
        score = bleu.corpus_score(predictions, reference_streams(references)).score
        return {"bleu": float(score), "bleu_signature": str(bleu.get_signature())}
