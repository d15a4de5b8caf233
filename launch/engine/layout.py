"""Where the tokens of a padded batch lie in fewer rows, and what they see of each other there."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from launch.recipe import Lengths

WIDTHS = (1.0, 1.5, 2.0, 3.0)
"""How wide a row may be laid, in the longest document."""

ATTENTION = 2048
"""Tokens in a row at which attention takes about as long as all else in a block: of width 512, six times that width.

A block of that width multiplies 24 × width² times for a token, and 4 × width for each that it sees.
"""


def rows_of_documents(lengths: Lengths) -> list[list[int]]:
    """Which documents lie in one row: of all widths in WIDTHS, each side its own, at those that cost least. Pure.

    `lengths` has shape `(documents, sides)`; a document lies in the same row on all sides. First fit, the longest
    first: Johnson, Near-optimal bin packing algorithms, 1973.
    """
    order = np.argsort(-lengths.sum(1), kind="stable").tolist()
    widths = itertools.product(WIDTHS, repeat=lengths.shape[1])
    tried = [_first_fit(lengths, order, np.ceil(lengths.max(0) * width).astype(np.int64)) for width in widths]
    return min(tried, key=lambda rows: _cost(lengths, rows))


def _first_fit(lengths: Lengths, order: list[int], room: Lengths) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in order]
    left = np.repeat(room[None], len(order), 0)
    for document in order:
        row = int((left >= lengths[document]).all(1).argmax())
        rows[row].append(document)
        left[row] -= lengths[document]
    return [row for row in rows if row]


def _cost(lengths: Lengths, rows: list[list[int]]) -> float:
    """Tokens that are computed, those that see many counted for more."""
    widths = widths_of(lengths, rows)
    return float(len(rows) * (widths * (1 + widths / ATTENTION)).sum())


def widths_of(lengths: Lengths, rows: list[list[int]]) -> Lengths:
    """Tokens of the widest row on each side, shape `(sides,)`."""
    widths: Lengths = np.max([lengths[row].sum(0) for row in rows], axis=0)
    return widths


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a padded batch lie in fewer rows.

    Places that are left free at the end of a row hold the first token of the batch, seen by none but those like them.
    """

    shape: tuple[int, int]
    """Of the padded batch: rows, tokens."""
    document: torch.Tensor
    """The padded row that the token at each place is of; shape `(rows, width)`."""
    token: torch.Tensor
    """Where in that row it is; the same shape."""
    group: torch.Tensor
    """The same number at places that see each other: that of their document, or -1 at free ones; the same shape."""
    back: torch.Tensor
    """For each token of the padded batch its place, counted through all rows; 0 of padding. Shape `(batch, seq)`."""

    @classmethod
    def of(cls, mask: torch.Tensor, rows: list[list[int]]) -> Layout:
        """`mask`, shape `(batch, seq)`, is not 0 where a padded batch has a token."""
        real = [np.flatnonzero(row) for row in mask.numpy()]
        width = max(sum(len(real[document]) for document in row) for row in rows)
        document, token = np.zeros((2, len(rows), width), np.int64)
        group = np.full((len(rows), width), -1)
        back = np.zeros(mask.shape, np.int64)
        for number, row in enumerate(rows):
            start = 0
            for each in row:
                end = start + len(real[each])
                document[number, start:end] = group[number, start:end] = each
                token[number, start:end] = real[each]
                back[each, real[each]] = np.arange(number * width + start, number * width + end)
                start = end
        tensors = map(torch.from_numpy, (document, token, group, back))
        return cls((mask.shape[0], mask.shape[1]), *tensors)

    @functools.cached_property
    def _flat(self) -> torch.Tensor:
        return (self.document * self.shape[1] + self.token).flatten()

    def laid(self, padded: torch.Tensor) -> torch.Tensor:
        """`padded`, shape `(1|batch, seq, …)`, as `(rows, width, …)`."""
        if padded.shape[0] != self.shape[0]:
            return padded[0][self.token]
        return padded.flatten(0, 1)[self._flat].view(*self.document.shape, *padded.shape[2:])

    def apart(self, laid: torch.Tensor) -> torch.Tensor:
        """`laid`, shape `(rows, width, …)`, as it was, `(batch, seq, …)`; of padding some token's."""
        return laid.flatten(0, 1)[self.back.flatten()].view(*self.shape, *laid.shape[2:])


def seen_by(mask: torch.Tensor | None, seeing: Layout, seen: Layout, *, causal: bool) -> torch.Tensor:
    """The mask, shape `(rows, 1, width, width)`, of rows that were laid, made of the padded batch's.

    None is how models say, with no padding, that all tokens are seen, or with `causal` all before.
    """
    same = seeing.group[:, :, None] == seen.group[:, None, :]
    if mask is None:
        return (same & (seeing.token[:, :, None] >= seen.token[:, None, :]) if causal else same)[:, None]
    document = seeing.document[:, :, None] if mask.shape[0] > 1 else torch.zeros((1, 1, 1), dtype=torch.int64)
    token = seeing.token[:, :, None] if mask.shape[2] > 1 else torch.zeros((1, 1, 1), dtype=torch.int64)
    given = mask[document, 0, token, seen.token[:, None, :]]
    if mask.dtype == torch.bool:
        return (given & same)[:, None]
    return given.masked_fill(~same, torch.finfo(mask.dtype).min)[:, None]
