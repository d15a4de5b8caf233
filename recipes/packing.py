"""Blocks of tokens to train on, made of documents: which part of which document goes into which block.

A sample is an int32 array: of shape `(seq,)`, token ids of which each but the first is a target; of shape `(2, seq)`,
ids and labels; or `(3, seq)`, ids, labels and positions, where documents that share a block must not see each other.
The first token of a document's part is never a target, so no label crosses the end of a document.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from launch.errors import ConfigError
from launch.recipe import RecipeContext, Width
from recipes.batches import IGNORED

if TYPE_CHECKING:
    import numpy as np
    import torch

    Tokens = np.ndarray[Any, np.dtype[np.int32]]

Packing = Literal["continuous", "isolated", "off"]

Read = Callable[[int, int, int], "Tokens"]
"""Ids and labels, shape `(2, end - start)`, of a part of a document: its number, start and end."""


# --- deciding --------------------------------------------------------------------------------------------


def windows(length: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Start, end and first target of the windows over `length` tokens; each token is a target in one at most.

    Windows that overlap (`stride` below `block_size`) give a target at least `block_size - stride` tokens of context,
    but for those of the first window. Without overlap the first token of each window is context only.
    Source: https://huggingface.co/docs/transformers/perplexity
    """
    start = told = 0
    while True:
        end = min(start + block_size, length)
        yield start, end, max(told, start + 1)
        if end == length:
            return
        start, told = start + stride, end


def best_fit(lengths: Tokens, block_size: int) -> list[list[int]]:
    """Which pieces go into one block: the longest first, each where it leaves the least room, else into a new block.

    Source: Ding et al., Fewer Truncations Improve Language Modeling, 2024.
    """
    import numpy as np

    blocks: list[list[int]] = []
    rooms: list[int] = []  # what is left in blocks, each size once, in order
    with_room: dict[int, list[int]] = {}
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, block = block_size, len(blocks)
            blocks.append([])
        else:
            room = rooms[place]
            block = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        blocks[block].append(piece)
        if room > length:
            if room - length not in with_room:
                insort(rooms, room - length)
                with_room[room - length] = []
            with_room[room - length].append(block)
    return blocks


@dataclass(frozen=True)
class Plan:
    """How blocks are made of documents."""

    packing: Packing
    block_size: int
    stride: int | None = None
    """How far apart windows of validation text begin; None: a block."""

    def folder(self, context: RecipeContext, key: JsonValue, lengths: Mapping[str, Tokens]) -> Path:
        """The folder that says which part of which document goes into which block, by the documents' lengths.

        `SPLIT.pieces.npy`, shape `(pieces, 4)`: document, start, end, first target. `SPLIT.blocks.npy`, shape
        `(blocks + 1,)`: the first piece of each block. `key` is all that the documents are made from.
        """

        def build(folder: Path) -> None:
            sizes = {split: self._write(folder, split, each) for split, each in lengths.items()}
            (folder / "blocks.json").write_text(json.dumps(sizes))

        return context.cache.folder("blocks", self._key(key), build)

    def known_blocks(self, context: RecipeContext, key: JsonValue) -> int | None:
        """Number of training blocks if they are made already."""
        path = context.cache.path("blocks", self._key(key)) / "blocks.json"
        return int(json.loads(path.read_text())["train"]) if path.is_file() else None

    def _key(self, key: JsonValue) -> list[JsonValue]:
        return [1, key, self.packing, self.block_size, self.stride]

    def _write(self, folder: Path, split: str, lengths: Tokens) -> int:
        import numpy as np

        stride = (self.stride if split == "validation" else None) or self.block_size
        pieces = np.array(
            [
                (document, *window)
                for document, length in enumerate(lengths.tolist())
                for window in windows(length, self.block_size, stride)
            ],
            dtype=np.int64,
        ).reshape(-1, 4)
        sizes = np.ones(len(pieces), dtype=np.int64)
        if self.packing == "isolated":
            blocks = best_fit(pieces[:, 2] - pieces[:, 1], self.block_size)
            pieces = pieces[[piece for block in blocks for piece in block]]
            sizes = np.array([len(block) for block in blocks], dtype=np.int64)
        np.save(folder / f"{split}.pieces.npy", pieces)
        np.save(folder / f"{split}.blocks.npy", np.concatenate([[0], np.cumsum(sizes)]))
        return len(sizes)


# --- samples ---------------------------------------------------------------------------------------------


class Blocks:
    """A file of token ids, cut into blocks; the last one may be shorter. Only what is used is read from disk."""

    def __init__(self, path: Path, block_size: int) -> None:
        self._ids = read_ids(path)
        self.tokens = len(self._ids)
        self._block_size = block_size

    def __len__(self) -> int:
        """Number of blocks."""
        return math.ceil(self.tokens / self._block_size)

    def __getitem__(self, index: int) -> Tokens:
        """Token ids of one block, shape `(block_size,)` or, for the last, shorter."""
        return self._ids[index * self._block_size : (index + 1) * self._block_size]


class Packed:
    """Blocks as a `Plan` has decided them; `folder` is the one it wrote."""

    def __init__(self, folder: Path, split: str, read: Read, *, isolated: bool) -> None:
        import numpy as np

        self._pieces = np.load(folder / f"{split}.pieces.npy", mmap_mode="r")
        self._blocks = np.load(folder / f"{split}.blocks.npy", mmap_mode="r")
        self._read, self._isolated = read, isolated

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._blocks) - 1

    @property
    def lengths(self) -> Tokens:
        """Tokens of each block, shape `(blocks,)`."""
        import numpy as np

        return np.add.reduceat(self._pieces[:, 2] - self._pieces[:, 1], self._blocks[:-1])

    def __getitem__(self, index: int) -> Tokens:
        """One block, shape `(3, seq)` with positions where documents are isolated, else `(2, seq)`."""
        import numpy as np

        pieces = self._pieces[self._blocks[index] : self._blocks[index + 1]].tolist()
        return np.concatenate([self._part(*piece) for piece in pieces], axis=1)

    def _part(self, document: int, start: int, end: int, first_target: int) -> Tokens:
        import numpy as np

        part = np.array(self._read(document, start, end))
        part[1, : first_target - start] = IGNORED
        return np.vstack([part, np.arange(end - start, dtype=np.int32)]) if self._isolated else part


def read_ids(path: Path) -> Tokens:
    """The int32 numbers in a file, read from disk as they are used."""
    import numpy as np

    return np.memmap(path, dtype=np.int32, mode="r") if path.stat().st_size else np.zeros(0, np.int32)


# --- batches ---------------------------------------------------------------------------------------------


_UNPADDED = Width()


def collate(samples: list[Tokens], width: Width = _UNPADDED) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels`, int64, `(batch, seq)`; `attention_mask` where a sample is padded or there are few widths.

    Padded on the right to the `width` for the longest. With `position_ids` where samples have them; those of padding
    are 0, which makes each a document of its own.
    """
    import numpy as np
    import torch

    rows = [_with_labels(sample) for sample in samples]
    lengths = np.array([row.shape[1] for row in rows])
    columns = max(width(int(lengths.max())), 1)
    laid = np.zeros((len(rows[0]), len(rows), columns), dtype=np.int64)
    real = np.arange(columns) < lengths[:, None]
    laid[:, real] = np.concatenate(rows, axis=1)
    laid[1][~real] = IGNORED
    batch = dict(zip(("input_ids", "labels", "position_ids"), map(torch.from_numpy, laid), strict=False))
    if width.few or not real.all():
        batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    return batch


def without_targets(sample: Tokens) -> Tokens:
    """The same tokens with labels that are no targets."""
    found = _with_labels(sample).copy()
    found[1] = IGNORED
    return found


def _with_labels(sample: Tokens) -> Tokens:
    import numpy as np

    if sample.ndim > 1:
        return sample
    return np.stack([sample, sample])


# --- seeing that a model keeps documents apart -----------------------------------------------------------


def check_isolation(model: Any, name: str) -> None:
    """See that a document gets the same logits behind another one in a block as it gets alone.

    transformers builds the mask from positions that start anew, for models with plain attention. A model that has
    none (a state-space one), or its own masks, would let documents see each other without a word.

    Raises:
        ConfigError: it does not.
    """
    import torch

    ids = torch.arange(1, 9)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 4:]
            alone = model(input_ids=ids[:, 4:], use_cache=False).logits[0]
        apart = torch.allclose(packed, alone, rtol=1e-3, atol=1e-3)
    except TypeError:  # it takes no positions
        apart = False
    finally:
        model.train(training)
    if not apart:
        raise ConfigError(
            f"recipe_args.packing = isolated: {name} ({model.config.model_type}) lets documents in a block see each "
            "other; use recipe_args.packing=off, or continuous for text"
        )
