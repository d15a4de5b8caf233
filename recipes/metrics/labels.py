"""What the metrics of labels share: one label per row, or one 0 or 1 per row and label (multi-label)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from launch.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Labels = NDArray[np.int64]
    """(rows,), or (rows, labels) of 0 and 1."""


def label_features() -> Any:
    """Both forms of rows, as numbers that may be broken: as integers, a logit of 0.7 would be taken for label 0."""
    from datasets import Features, List, Value

    number = Value("float64")
    return [
        Features(predictions=number, references=number),
        Features(predictions=List(number), references=List(number)),
    ]


def read_labels(predictions: list[Any], references: list[Any], classes: int | None = None) -> tuple[Labels, Labels]:
    """References first, as scikit-learn takes them, then predictions.

    Raises:
        DataError: a row that is no label or not as long as the others.
    """
    truth = _as_array("references", references, classes)
    guess = _as_array("predictions", predictions, classes)
    if truth.shape != guess.shape:
        raise DataError(
            f"metrics: references have {truth.shape[-1]} labels per row, predictions {guess.shape[-1]}; "
            "let both have one 0 or 1 for each label"
        )
    return truth, guess


def _as_array(side: str, rows: list[Any], classes: int | None) -> Labels:
    import numpy as np

    if isinstance(rows[0], list):
        for number, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise DataError(
                    f"metrics: {side}, row {number}: has {len(row)} labels, row 0 has {len(rows[0])}; "
                    "let each row have one 0 or 1 for each label"
                )
        allowed, largest = "0 or 1 for each label", 1.0
    else:
        allowed = f"0 to {classes - 1}" if classes else "a whole number from 0"
        largest = classes - 1 if classes else np.inf
    values = np.array(rows, dtype=np.float64)
    is_label = (values >= 0) & (values <= largest) & (values == np.floor(values))
    if not is_label.all():
        where = tuple(np.argwhere(~is_label)[0])
        raise DataError(
            f"metrics: {side}, row {where[0]}: {values[where]:g} is no label; allowed is {allowed}; turn scores into "
            "labels first (argmax, or a threshold for multi-label), and leave out rows without a label"
        )
    return values.astype(np.int64)


def averages(
    name: str,
    score: Callable[..., Any],
    predictions: list[Any],
    references: list[Any],
    classes: int | None,
) -> dict[str, float]:
    """A score of scikit-learn over classes that occur: macro, micro, weighted.

    A task of two classes, 0 and 1, has the score of class 1 too, under the plain name. Without `classes`, the number
    of classes of the task, a task is one of two classes if nothing larger occurs.
    """
    truth, guess = read_labels(predictions, references, classes)
    values = {}
    if truth.ndim == 1 and (classes or max(truth.max(), guess.max(), 1) + 1) == 2:
        values[name] = float(score(truth, guess, labels=[1], average=None, zero_division=0)[0])
    for average in ("macro", "micro", "weighted"):
        values[f"{name}_{average}"] = float(score(truth, guess, average=average, zero_division=0))
    return values
