"""What batches of tokens have in common: padding, labels that are no targets, and the loss of those that are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch.recipe import IGNORED as IGNORED

if TYPE_CHECKING:
    import torch

    from launch.recipe import Batch


def padded(rows: Sequence[Sequence[int]], filler: int, width: Callable[[int], int]) -> torch.Tensor:
    """Rows padded on the right, to the `width` for the longest; int64 `(rows, width)`."""
    import torch

    columns = width(max(map(len, rows)))
    return torch.tensor([[*row, *[filler] * (columns - len(row))] for row in rows])


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Over all positions that are targets; a scalar in fp32.

    `logits` have shape `(…, classes)`, `labels` the same without the last dimension.
    """
    from torch.nn import functional

    # Targets have no fixed number, but the shape of what is computed has: no device waits, nothing is compiled anew.
    return functional.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def count_targets(batch: Batch) -> int:
    """Labels of a batch that are targets."""
    return int((batch["labels"] != IGNORED).sum())


def marks(rows: Sequence[Any], width: Callable[[int], int]) -> torch.Tensor:
    """The attention mask of such rows: 1 where they are, 0 where they are padded."""
    return padded([[1] * len(row) for row in rows], 0, width)


def lengths_of(samples: Any) -> Any:
    """Tokens of each sample, shape `(samples,)`, of samples that know them."""
    return samples.lengths


def without_labels(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The same sample with labels that are no targets: a list of them, an array, or one number."""
    labels = sample["labels"]
    if isinstance(labels, list):
        return {**sample, "labels": [IGNORED] * len(labels)}
    return {**sample, "labels": labels * 0 + IGNORED}
