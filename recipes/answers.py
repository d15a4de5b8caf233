"""Answers to questions from what the windows of each have named, and how good they are by the measures of SQuAD."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launch.recipe import Metrics
from recipes import metrics
from recipes.question_windows import Span, answers_of

if TYPE_CHECKING:
    from recipes.tables import StoredRows

EXAMPLES = 20
"""Questions whose answers are kept to be looked at."""

EXAMPLE_SPANS = 5


@dataclass
class Found:
    """What the windows of one question have named, joined."""

    null: float = float("inf")
    """The lowest score of having no answer: a window where the answer is not says nothing of the others."""
    scores: dict[Span, float] = field(default_factory=dict)
    """Spans of characters; of one that several windows name the best score."""

    def ranked(self) -> list[tuple[Span, float]]:
        """Spans from the best to the worst; of equal ones the first in the text comes first."""
        return sorted(self.scores.items(), key=lambda found: (-found[1], found[0]))


def join(predictions: Iterable[list[Any]]) -> dict[int, Found]:
    """By question, in the order of the questions, whatever the order of the windows."""
    joined: dict[int, Found] = {}
    for question, null, spans in predictions:
        found = joined.setdefault(question, Found())
        found.null = min(found.null, null)
        for start, end, score in spans:
            found.scores[start, end] = max(score, found.scores.get((start, end), score))
    return dict(sorted(joined.items()))


@dataclass(frozen=True)
class Answer:
    """What is answered to a question, if anything is."""

    row: dict[str, Any]
    best: str
    doubt: float
    """By how much the score of having no answer is better than that of `best`."""
    spans: list[tuple[str, float]]

    @property
    def right(self) -> list[str]:
        """All right answers; none: there is none."""
        return [text for text, _ in answers_of(self.row)]


@dataclass(frozen=True)
class Answers:
    """Measures the answers to validation questions."""

    rows: StoredRows
    unanswerable: bool
    null_threshold: float

    def measure(self, predictions: list[list[Any]]) -> Metrics:
        """Exact match and F1, 0 to 100, of what `best_spans` gave for all windows; and examples."""
        answers = [self._answer(number, found) for number, found in join(predictions).items()]
        texts = ["" if self._is_left(answer) else answer.best for answer in answers]
        version = "2.0" if self.unanswerable else "1.1"
        found = metrics.compute(["squad"], texts, [answer.right for answer in answers], {"squad": {"version": version}})
        examples = [
            {
                **{name: answer.row[name] for name in ("id", "question")},
                "answers": answer.right,
                "answered": text,
                "no_answer_is_better_by": answer.doubt,
                "n_best": [{"text": span, "score": score} for span, score in answer.spans[:EXAMPLE_SPANS]],
            }
            for answer, text in zip(answers[:EXAMPLES], texts, strict=False)
        ]
        if not self.unanswerable:
            return {**found, "examples": examples}
        best = best_thresholds(answers)
        found |= {f"best_{name}": each.value for name, each in best.items()}
        # No metrics: they are known as exactly as the scores of a model are.
        thresholds = {name: each.threshold for name, each in best.items()}
        return {**found, "null_threshold_of_best": thresholds, "examples": examples}

    def _answer(self, number: int, found: Found) -> Answer:
        row = self.rows[number]
        ranked = found.ranked()
        spans = [(row["context"][start:end].strip(), score) for (start, end), score in ranked]
        best, score = spans[0] if spans else ("", found.null)
        return Answer(row, best, found.null - score, spans)

    def _is_left(self, answer: Answer) -> bool:
        return self.unanswerable and answer.doubt > self.null_threshold


@dataclass(frozen=True)
class Best:
    """The best that any null_threshold gives, and where it lies."""

    value: float
    threshold: float


def best_thresholds(answers: list[Answer]) -> dict[str, Best]:
    """The best exact match and F1, 0 to 100, found on the very same questions."""
    from recipes.metrics.squad import score

    in_order = sorted(answers, key=lambda answer: answer.doubt)
    given = [score(answer.best, answer.right, second=True) for answer in in_order]
    left = [score("", answer.right, second=True) for answer in in_order]
    doubts = [answer.doubt for answer in in_order]
    found = {}
    for place, name in enumerate(("exact_match", "f1")):
        # With a threshold below all doubts nothing is answered; each that is raised over adds an answer.
        total = sum(values[place] for values in left)
        best, threshold = total, doubts[0] - 1
        for doubt, behind, answered, unanswered in zip(doubts, [*doubts[1:], doubts[-1] + 2], given, left, strict=True):
            total += answered[place] - unanswered[place]
            # Sums of fractions in another order differ by less than this, and no threshold parts equal doubts.
            if behind > doubt and total > best + 1e-9:
                best, threshold = total, (doubt + behind) / 2
        found[name] = Best(100 * best / len(in_order), threshold)
    return found
