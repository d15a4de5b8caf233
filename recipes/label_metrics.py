"""Metrics of predicted labels: chosen, computed by recipes/metrics, and broken down by label."""

from __future__ import annotations

from typing import Any

from launch.errors import ConfigError
from launch.recipe import Metrics
from recipes import metrics
from recipes.labels import Labels

AVERAGED = ("precision", "recall", "f1")
"""Metrics that are found for each label and then averaged in three ways."""

MEASURED = ("accuracy", *AVERAGED, "matthews_correlation", "confusion_matrix")
"""Metrics that are computed unless others are named."""

KEY = "recipe_args.metrics"


def choose(named: tuple[str, ...], several: bool) -> tuple[str, ...]:
    """The metrics to compute; `several`: a row has any number of labels (multi-label).

    Raises:
        ConfigError: one that is not defined for several labels per row, or that is not to be had.
    """
    if several and "matthews_correlation" in named:
        raise ConfigError(
            f"{KEY}: matthews_correlation is for one label per row, and here a row has any number of them; leave it out"
        )
    chosen = named or tuple(name for name in MEASURED if not several or name != "matthews_correlation")
    metrics.check(chosen, KEY)
    return chosen


def numbers_of(chosen: tuple[str, ...], labels: int | None) -> tuple[str, ...] | None:
    """Names of the numbers that metrics give; None where one of the user's or of the Hub decides them.

    With two labels only there is `f1`, that of the second, beside the averages. Where the number of labels is not yet
    known (None), such names are among these; a run refuses one that turns out not to be there.
    """
    names: list[str] = []
    for metric in chosen:
        if metric not in MEASURED:
            return None
        if metric in AVERAGED:
            names += [metric] if labels in (2, None) else []
            names += [f"{metric}_{average}" for average in ("macro", "micro", "weighted")]
        elif metric != "confusion_matrix":
            names.append(metric)
    return tuple(names)


def measure(pairs: list[Any], labels: Labels, chosen: tuple[str, ...]) -> Metrics:
    """Metrics of pairs, what was predicted and what is true: a number of a label each, or a list of them.

    Beside them `labels`, and `by_label`: precision, recall and F1 of each label, and how many rows have it.
    """
    from sklearn.metrics import precision_recall_fscore_support

    predicted, truth = map(list, zip(*pairs, strict=True))
    size = len(labels.names)
    if labels.several:
        predicted, truth = (
            [[int(number in row) for number in range(size)] for row in map(set, rows)] for rows in (predicted, truth)
        )
    counted = () if labels.several else (*AVERAGED, "confusion_matrix")
    options = {name: {"classes": size} for name in chosen if name in counted}
    found: Metrics = metrics.compute(chosen, predicted, truth, options, KEY)
    each = precision_recall_fscore_support(truth, predicted, labels=range(size), average=None, zero_division=0)
    found["labels"] = list(labels.names)  # in the order of the confusion matrix
    found["by_label"] = {
        name: dict(zip((*AVERAGED, "rows"), values, strict=True))
        for name, *values in zip(labels.names, *(part.tolist() for part in each), strict=True)
    }
    return found
