"""SQuAD: exact match and F1 of words, mean over questions, 0 to 100.

A row is the predicted text ("" is: no answer) and the list of right ones (an empty list: there is no answer). SQuAD 1.1
and 2.0 differ where nothing is left of an answer after normalising ("the"): in 1.1 it shares no word with another; in
2.0 such a right answer is passed over, and nothing equals nothing.

Source: the evaluation scripts of https://rajpurkar.github.io/SQuAD-explorer, whose names and numbers these are; without
their `no_answer_probability`, which the texts have settled already.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from statistics import fmean
from typing import Literal

import evaluate

from launch.errors import ConfigError, DataError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Squad(evaluate.Metric):
    """`version` is 1.1 or 2.0; auto: 2.0 if a question has no answer. Then both kinds are also reported apart."""

    def _info(self) -> evaluate.MetricInfo:
        from datasets import Features, List, Value

        text = Value("string")
        return evaluate.MetricInfo(
            description=__doc__, citation="", features=Features(predictions=text, references=List(text))
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], version: Literal["auto", "1.1", "2.0"] = "auto"
    ) -> dict[str, float]:
        if version not in ("auto", "1.1", "2.0"):
            raise ConfigError(f'metrics: squad: version = {version!r}: allowed: "auto", "1.1", "2.0"')
        unanswerable = [number for number, answers in enumerate(references) if not answers]
        if version == "1.1" and unanswerable:
            raise DataError(
                f"metrics: references, row {unanswerable[0]}: has no answer, which SQuAD 1.1 does not know; "
                'set version to "2.0", or leave the row out'
            )
        second = version == "2.0" or bool(unanswerable)
        rows = [score(text, answers, second) for text, answers in zip(predictions, references, strict=True)]
        values = _means(rows, ("exact_match", "f1"))
        if second:
            for kind, answerable in (("HasAns", True), ("NoAns", False)):
                part = [row for row, answers in zip(rows, references, strict=True) if bool(answers) is answerable]
                if part:
                    values |= _means(part, (f"{kind}_exact", f"{kind}_f1")) | {f"{kind}_total": len(part)}
        return values


def score(text: str, answers: list[str], second: bool) -> tuple[float, float]:
    """Exact match and F1, each 0 to 1, of the right answer that is nearest; `second`: by the rules of SQuAD 2.0."""
    words = normalized_words(text)
    right = [normalized_words(answer) for answer in answers]
    if second:
        right = [answer for answer in right if answer] or [[]]
    return (
        float(max(words == answer for answer in right)),
        max(_f1(words, answer, nothing=float(second and words == answer)) for answer in right),
    )


def normalized_words(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation (that of ASCII) and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(words: list[str], answer: list[str], nothing: float) -> float:
    if not words or not answer:
        return nothing
    shared = (Counter(words) & Counter(answer)).total()
    return 2 * shared / (len(words) + len(answer))


def _means(rows: list[tuple[float, float]], names: tuple[str, str]) -> dict[str, float]:
    return {name: 100 * fmean(row[place] for row in rows) for place, name in enumerate(names)}
