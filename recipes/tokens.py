"""Token ids of running text: tokenised once, then end to end in one file per split.

A text is tokenised whole, so it is no stream; the files are read from disk only where they are used, so it may be
larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from launch.cache import file_identity
from launch.errors import ConfigError, DataError
from launch.recipe import RecipeContext
from recipes import embedded
from recipes.files import find_files, format_of
from recipes.packing import read_ids
from recipes.rows import RowArgs, check_source, choose_splits
from recipes.text import (
    Documents,
    Piece,
    check_files,
    dataset_revision,
    dataset_splits,
    read_dataset,
    read_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from recipes.packing import Tokens

BATCH_OF_TEXTS = 1000
"""Texts handed to the tokenizer at once; it spreads them over the CPU cores."""

BATCH_OF_CHARACTERS = 1_000_000
"""Fewer texts are handed to it where these have so many characters together."""

SPLITS = ("train", "validation")


class TextArgs(RowArgs):
    """The part of a recipe's arguments that says where running text comes from."""

    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share held out where there is no validation data: whole documents or rows, or the end of a running text."""
    max_train_samples: int | None = Field(None, ge=1)
    """Train on so many rows only, chosen at random; of text and of a stream, the first so many documents or rows."""
    max_validation_samples: int | None = Field(None, ge=1)
    """Evaluate on so many rows only, chosen at random; of text and of a stream, the first documents or rows."""
    text_column: str = "text"
    """Column that holds the text in csv, json, parquet and Hub datasets."""
    documents: Documents = "auto"
    """Where a document ends: row, paragraph (blank line) or file (a whole split); auto: file for text, else row."""
    stride: int | None = Field(None, ge=1)
    """Evaluate text in windows of block_size this far apart, so that tokens have more context; null: block_size."""


def check_text(args: TextArgs) -> None:
    """See, without heavy imports, that the text is there.

    Raises:
        ConfigError: arguments that exclude each other.
        DataError: a file that is not there or cannot be read, a column that is not there, the Hub out of reach.
    """
    for key in ("streaming", "column_names"):
        if getattr(args, key):
            raise ConfigError(f"recipe_args.{key} is for rows of format chat or instruction; leave it out for text")
    check_source(args)
    check_files(args.train_files, args.text_column, "recipe_args.train_files")
    check_files(args.validation_files, args.text_column, "recipe_args.validation_files")


def text_key(args: TextArgs, tokenizer: Any) -> dict[str, Any]:
    """Everything the token files are made from; known without importing a tokenizer."""
    return {
        "version": 3,
        "tokenizer": tokenizer,
        "data": [args.dataset, args.dataset_config, args.text_column, args.documents],
        "splits": [args.train_split, args.validation_split, dataset_revision(args.dataset) if args.dataset else None],
        "train": [file_identity(path) for path in _files(args, "train_files")],
        "validation": [file_identity(path) for path in _files(args, "validation_files")]
        or [args.validation_fraction, args.split_seed],
        "limits": [args.max_train_samples, args.max_validation_samples],
    }


def tokens_folder(args: TextArgs, key: Any, tokenizer: PreTrainedTokenizerBase, context: RecipeContext) -> Path:
    """The folder of the token files: of each split SPLIT.bin (int32 ids, end to end) and SPLIT.ends.bin (int64).

    `sizes.json` has the numbers of tokens and documents.
    """
    return context.cache.folder("tokens", key, lambda aside: _write_tokens(args, tokenizer, aside, context))


def text_sizes(folder: Path) -> dict[str, dict[str, int]]:
    """By split the numbers of `tokens` and `documents`."""
    found: dict[str, dict[str, int]] = json.loads((folder / "sizes.json").read_text())
    return found


# --- documents -------------------------------------------------------------------------------------------


class Texts:
    """The documents of a token file, or all of it as one."""

    def __init__(self, folder: Path, split: str, *, whole: bool) -> None:
        import numpy as np

        self._ids = read_ids(folder / f"{split}.bin")
        ends = [len(self._ids)] if whole else np.fromfile(folder / f"{split}.ends.bin", dtype=np.int64)
        self._starts = np.concatenate([[0], ends]).astype(np.int64)

    @property
    def lengths(self) -> Tokens:
        """Tokens of each document."""
        import numpy as np

        return np.diff(self._starts)

    def read(self, document: int, start: int, end: int) -> Tokens:
        """Ids and labels of a part of a document."""
        import numpy as np

        first = int(self._starts[document])
        ids = self._ids[first + start : first + end]
        return np.stack([ids, ids])


# --- reading and tokenising ------------------------------------------------------------------------------


def _files(args: TextArgs, key: str) -> tuple[Path, ...]:
    return find_files(getattr(args, key), f"recipe_args.{key}")


def _write_tokens(args: TextArgs, tokenizer: PreTrainedTokenizerBase, folder: Path, context: RecipeContext) -> None:
    import numpy as np

    context.progress.start("tokenising texts", None)
    sizes = {split: {"tokens": 0, "documents": 0} for split in SPLITS}
    for texts, tokens in _encode(tokenizer, _pieces_of_splits(args)):
        for split, (ids, ends) in tokens.items():
            with (folder / f"{split}.bin").open("ab") as file:
                ids.tofile(file)
            with (folder / f"{split}.ends.bin").open("ab") as file:
                (np.array(ends, dtype=np.int64) + sizes[split]["tokens"]).tofile(file)
            sizes[split]["tokens"] += len(ids)
            sizes[split]["documents"] += len(ends)
        context.progress.advance(texts)
    for path in (folder / f"{split}{kind}.bin" for split in SPLITS for kind in ("", ".ends")):
        path.touch()  # there may be no text at all
    if not sizes["validation"]["tokens"] and not args.validation_files:
        sizes = _cut_off_end(folder, args.validation_fraction)
    (folder / "sizes.json").write_text(json.dumps(sizes))
    context.progress.finish()


def _pieces_of_splits(args: TextArgs) -> Iterator[tuple[str, Piece]]:
    """All text of a run, each piece with the split it belongs to."""
    train, validation = _sources(args)
    most = {"train": args.max_train_samples, "validation": args.max_validation_samples}
    if validation is None and not _is_running_text(args):
        yield from _first(_hold_out(train, args.validation_fraction, args.split_seed), most)
        return
    for split, pieces in (("train", train), ("validation", validation or ())):
        yield from _first(((split, piece) for piece in pieces), {split: most[split]})


def _first(pieces: Iterator[tuple[str, Piece]], most: dict[str, int | None]) -> Iterator[tuple[str, Piece]]:
    """The first so many documents of each split."""
    left = {split: math.inf if limit is None else limit for split, limit in most.items()}
    for split, piece in pieces:
        if left[split] > 0:
            left[split] -= piece.ends_document
            yield split, piece
        if not any(left.values()):
            return


def _sources(args: TextArgs) -> tuple[Iterator[Piece], Iterator[Piece] | None]:
    """The training text and, where there is any, the validation text."""
    given = read_files(_files(args, "validation_files"), args.text_column, args.documents)
    validation = given if args.validation_files else None
    if args.train_files:
        return read_files(_files(args, "train_files"), args.text_column, args.documents), validation
    if args.dataset is None:
        return (Piece(text, ends_document=True) for text in embedded.paragraphs()), validation
    chosen = choose_splits(args, dataset_splits(args.dataset, args.dataset_config))
    train, held = (
        read_dataset(args.dataset, args.dataset_config, split, args.text_column, args.documents) if split else None
        for split in chosen
    )
    assert train is not None
    return train, validation or held


def _is_running_text(args: TextArgs) -> bool:
    """Whether documents are so few and long that validation text is cut off the end instead of chosen."""
    if args.documents != "auto":
        return args.documents == "file"
    return bool(args.train_files) and all(format_of(path) == "text" for path in _files(args, "train_files"))


def _hold_out(pieces: Iterator[Piece], fraction: float, seed: int) -> Iterator[tuple[str, Piece]]:
    """Choose documents for validation by a hash of their text, so that equal documents are on the same side."""
    document: list[Piece] = []
    for piece in pieces:
        document.append(piece)
        if piece.ends_document:
            text = (f"{seed} " if seed else "") + "".join(part.text for part in document)
            number = int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[:4], "big")
            split = "validation" if number < fraction * 2**32 else "train"
            yield from ((split, part) for part in document)
            document = []


def _cut_off_end(folder: Path, fraction: float) -> dict[str, dict[str, int]]:
    """Make the end of the training text the validation text; the sizes of both."""
    import numpy as np

    tokens = np.fromfile(folder / "train.bin", dtype=np.int32)
    ends = np.fromfile(folder / "train.ends.bin", dtype=np.int64)
    cut = len(tokens) - int(len(tokens) * fraction)
    parts = {
        "train": (tokens[:cut], np.unique(np.append(ends[ends < cut], cut))),
        "validation": (tokens[cut:], ends[ends > cut] - cut),
    }
    for split, (ids, ends_of_split) in parts.items():
        ids.tofile(folder / f"{split}.bin")
        ends_of_split.tofile(folder / f"{split}.ends.bin")
    return {split: {"tokens": len(ids), "documents": len(its_ends)} for split, (ids, its_ends) in parts.items()}


def _encode(
    tokenizer: PreTrainedTokenizerBase, pieces: Iterator[tuple[str, Piece]]
) -> Iterator[tuple[int, dict[str, tuple[array[int], list[int]]]]]:
    """By split token ids and where among them documents end, batch after batch, with the number of texts.

    A document ends with the end-of-text token, and begins with the begin-of-text token where the tokenizer adds
    one by itself.
    """
    begin, end = [tokenizer.bos_token_id] if begins_texts(tokenizer) else [], tokenizer.eos_token_id
    at_start = dict.fromkeys(SPLITS, True)
    ids_of = _ids_of(tokenizer)
    for batch in _batches(pieces):
        found: dict[str, tuple[array[int], list[int]]] = {split: (array("i"), []) for split in SPLITS}
        for (split, piece), tokens in zip(batch, ids_of([piece.text for _, piece in batch]), strict=True):
            ids, ends = found[split]
            if at_start[split]:
                ids.extend(begin)
            ids.extend(tokens)
            if piece.ends_document:
                ids.append(end)
                ends.append(len(ids))
            at_start[split] = piece.ends_document
        yield len(batch), found


def _batches(pieces: Iterator[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
    batch: list[tuple[str, Piece]] = []
    size = 0
    for split, piece in pieces:
        batch.append((split, piece))
        size += len(piece.text)
        if len(batch) == BATCH_OF_TEXTS or size >= BATCH_OF_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ids_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """What gives the token ids of texts, without special tokens.

    Of a fast tokenizer they are taken without the offsets and masks that come with them otherwise, which takes a third
    less time; unless it does something else than that with a text, which is tried.
    """

    def ordinary(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return found

    def fast(texts: list[str]) -> list[list[int]]:
        return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    tried = ["One text, of  two words.\n\n\tAnd\u00e9 <s>", f"{tokenizer.eos_token} a"]
    same = backend is not None and ordinary(tried) == fast(tried)  # the ordinary way sets what the backend is to do
    return fast if same else ordinary


def begins_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts its begin-of-text token before each text, and nothing behind."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bool(tokenizer("a")["input_ids"] == [tokenizer.bos_token_id, *plain])


def check_sizes(sizes: dict[str, dict[str, int]], block_size: int) -> None:
    """See that there is text enough to train and to evaluate on.

    Raises:
        DataError: there is not.
    """
    train, validation = (sizes[split]["tokens"] for split in SPLITS)
    if train < block_size:
        raise DataError(
            f"the training text has {train} tokens, less than one block of recipe_args.block_size = {block_size}; "
            "give more text, or a smaller recipe_args.block_size"
        )
    if validation < 2:
        raise DataError(
            f"the validation text has {validation} tokens, and the first is context only; give "
            "recipe_args.validation_files, or a larger recipe_args.validation_fraction"
        )
