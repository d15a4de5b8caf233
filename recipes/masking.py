"""Samples of which some tokens are hidden: the same ones whenever, wherever and beside whatever they are read."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from recipes.batches import IGNORED
from recipes.tables import list_lengths

if TYPE_CHECKING:
    import numpy as np

    from recipes.rows import RowStream

    Numbers = np.ndarray[Any, np.dtype[np.int64]]

MASKED, RANDOM = 0.8, 0.1
"""Shares of the targets that are replaced by the mask token, and by a random token; the rest stays.

Source: arxiv.org/abs/1810.04805, section 3.1.
"""


@dataclass(frozen=True)
class Masking:
    """Hides tokens of a sample: a function of the tokens alone, and, where there is a seed, of seed and epoch."""

    mask_id: int
    special_ids: tuple[int, ...]
    """Tokens that are never targets, nor put in the place of others."""
    vocabulary: int
    share: float
    seed: int | None
    """None: what is hidden depends on the tokens alone, not on the epoch either."""

    def __call__(self, input_ids: Sequence[int], epoch: int) -> dict[str, Numbers]:
        """`input_ids` with some hidden, and `labels`: what is hidden at its place, else IGNORED. Shape `(seq,)`."""
        import numpy as np

        ids = np.array(input_ids, dtype=np.int64)
        # `RandomState` because numpy guarantees its streams to stay as they are (NEP 19), as of `epoch_order`.
        when = [] if self.seed is None else [self.seed, epoch]
        chance = np.random.RandomState([zlib.crc32(ids.tobytes()), *when])
        places = np.flatnonzero(~np.isin(ids, self.special_ids))
        targets = chance.permutation(places)[: max(1, round(self.share * len(places)))]
        labels = np.full_like(ids, IGNORED)
        labels[targets] = ids[targets]
        way, other = chance.random_sample(len(targets)), chance.choice(self._ordinary, len(targets))
        ids[targets] = np.where(way < MASKED, self.mask_id, np.where(way < MASKED + RANDOM, other, ids[targets]))
        return {"input_ids": ids, "labels": labels}

    @cached_property
    def _ordinary(self) -> Numbers:
        import numpy as np

        return np.setdiff1d(np.arange(self.vocabulary), self.special_ids)


@dataclass
class Masked:
    """Samples by index with some tokens hidden, in each epoch others."""

    samples: Any
    """`StoredRows` with `input_ids`."""
    masking: Masking
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the engine before samples of an epoch are read."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def lengths(self) -> Any:
        """Tokens of each sample, shape `(samples,)`."""
        return list_lengths(self.samples)

    def __getitem__(self, index: int) -> dict[str, Numbers]:
        """One sample."""
        return self.masking(self.samples[index]["input_ids"], self.epoch)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Numbers]]:
        """Many at once, which are read faster than one after the other."""
        return [self.masking(row["input_ids"], self.epoch) for row in self.samples.__getitems__(indices)]


@dataclass
class MaskedStream:
    """Samples of a stream with some tokens hidden, in each epoch others."""

    samples: RowStream
    masking: Masking
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the engine before an epoch is read."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Numbers]]:
        """The samples from the first on."""
        return (self.masking(sample["input_ids"], self.epoch) for sample in self.samples)
