"""Causal language modelling: continue running text, one token after the other.

Documents are tokenised, ended with the end-of-text token, laid end to end over the whole split, and cut into
blocks of `block_size` tokens. Nothing is thrown away: the last block of a split may be shorter. The metric is
perplexity, the exponential of the mean loss over all predicted tokens of the validation split; the first token of
each block is context only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from launch.cache import file_identity
from launch.errors import ConfigError, DataError
from launch.recipe import Batch, HubNameOrFolder, LocalPaths, Prepared, Preview, RecipeContext
from recipes import embedded
from recipes.files import find_files, format_of
from recipes.models import ModelArgs, Source, check_model
from recipes.text import (
    Documents,
    Piece,
    check_files,
    check_hub,
    dataset_splits,
    read_dataset,
    read_files,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position that is no target (torch's `cross_entropy` default)."""

METRICS = ("perplexity",)
"""What an evaluation gives beside the loss."""

BATCH_OF_TEXTS = 1000
"""Texts handed to the tokenizer at once; it spreads them over the CPU cores."""


class Args(ModelArgs):
    """What a run file may set under `recipe_args`."""

    dataset: HubNameOrFolder | None = None
    """Dataset on the Hub or local folder of one; null with no train_files either: Python's language reference."""
    dataset_config: str | None = None
    """Configuration of the Hub dataset, such as wikitext-2-raw-v1."""
    train_files: LocalPaths = ()
    """Files to train on (text, csv, tsv, json, jsonl, parquet, or .gz of these), globs or folders, not a dataset."""
    validation_files: LocalPaths = ()
    """Files, globs or folders to evaluate on; none: a part of the training text is held out."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share held out where there is no validation data: whole documents, or the end of a running text."""
    text_column: str = "text"
    """Column that holds the text in csv, json, parquet and Hub datasets."""
    documents: Documents = "auto"
    """Where a document ends: row, paragraph (blank line) or file (a whole split); auto: file for text, else row."""
    block_size: int = Field(128, ge=2)
    """Tokens in one training sample."""


def preview(args: Args, context: RecipeContext) -> Preview:
    """Check all that can be checked without torch, and find the number of samples if they are prepared already."""
    if args.dataset and (args.train_files or args.validation_files):
        raise ConfigError("recipe_args.dataset and recipe_args.train_files exclude each other; state one of the two")
    if args.validation_files and not args.train_files:
        raise ConfigError("recipe_args.validation_files needs recipe_args.train_files beside it")
    check_files(args.train_files, args.text_column, "recipe_args.train_files")
    check_files(args.validation_files, args.text_column, "recipe_args.validation_files")
    check_model(args)
    if args.dataset and not Path(args.dataset).is_dir():
        check_hub("recipe_args.dataset", args.dataset, "dataset")
    prepared = context.cache.path("tokens", _tokens_key(args, _source(args, context))) / "sizes.json"
    if not prepared.is_file():
        return Preview(tokens_per_sample=args.block_size, metrics=METRICS)
    sizes = json.loads(prepared.read_text())
    return Preview(math.ceil(sizes["train"] / args.block_size), args.block_size, METRICS)


def prepare(args: Args, context: RecipeContext) -> Prepared:
    """Tokenise (once, then from the cache) and describe the model."""
    source = _source(args, context)
    tokenizer = _load_tokenizer(source)
    config = source.config(tokenizer)
    source.check_length(config, "block_size", args.block_size)
    folder = context.cache.folder(
        "tokens", _tokens_key(args, source), lambda aside: _write_tokens(args, tokenizer, aside, context)
    )
    train, validation = (Blocks(folder / f"{split}.bin", args.block_size) for split in ("train", "validation"))
    _check_sizes(args, train, validation)
    return Prepared(
        build_model=lambda: source.build("AutoModelForCausalLM", config, tokenizer),
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        collate=collate,
        loss=loss,
        count=count,
        loss_metrics=lambda mean_loss: {"perplexity": math.exp(mean_loss) if mean_loss < 700 else math.inf},
        sample_prompt="The",
    )


def tokenizer(args: Args, context: RecipeContext) -> PreTrainedTokenizerBase:
    """The tokenizer alone."""
    return _load_tokenizer(_source(args, context))


def _source(args: Args, context: RecipeContext) -> Source:
    return Source(args, embedded.LANGUAGE_MODEL, context.cache)


def _load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer, with an end-of-text and a padding token.

    Raises:
        DataError: it cannot be loaded, or has no end-of-text token.
    """
    tokenizer = source.tokenizer()
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"recipe_args.model = {source.args.model}: its tokenizer has no end-of-text token (eos_token), which ends "
            "documents here"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is never a target, so it may share a token
    tokenizer.model_max_length = max(tokenizer.model_max_length, 2**30)  # texts are cut into blocks by us
    return tokenizer


# --- data ------------------------------------------------------------------------------------------------


def _tokens_key(args: Args, source: Source) -> dict[str, Any]:
    """Everything the token files are made from; known without importing a tokenizer."""
    return {
        "version": 1,
        "tokenizer": source.tokenizer_identity(),
        "data": [args.dataset, args.dataset_config, args.text_column, args.documents],
        "train": [file_identity(path) for path in _files(args.train_files)],
        "validation": [file_identity(path) for path in _files(args.validation_files)] or args.validation_fraction,
    }


def _write_tokens(args: Args, tokenizer: PreTrainedTokenizerBase, folder: Path, context: RecipeContext) -> None:
    """Write train.bin and validation.bin (int32 token ids, end to end) and sizes.json (tokens in each)."""
    context.progress.start("tokenising texts", None)
    paths = {split: folder / f"{split}.bin" for split in ("train", "validation")}
    with paths["train"].open("wb") as train, paths["validation"].open("wb") as validation:
        files = {"train": train, "validation": validation}
        for texts, ids in _encode(tokenizer, _pieces_of_splits(args)):
            for split, tokens in ids.items():
                tokens.tofile(files[split])
            context.progress.advance(texts)
    if paths["validation"].stat().st_size == 0 and not args.validation_files:
        _cut_off_end(paths["train"], paths["validation"], args.validation_fraction)
    sizes = {split: path.stat().st_size // 4 for split, path in paths.items()}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    context.progress.finish()


def _pieces_of_splits(args: Args) -> Iterator[tuple[str, Piece]]:
    """All text of a run, each piece with the split it belongs to."""
    train, validation = _sources(args)
    if validation is not None:
        yield from (("train", piece) for piece in train)
        yield from (("validation", piece) for piece in validation)
    elif _is_running_text(args):
        yield from (("train", piece) for piece in train)
    else:
        yield from _hold_out(train, args.validation_fraction)


def _sources(args: Args) -> tuple[Iterator[Piece], Iterator[Piece] | None]:
    """The training text and, where there is any, the validation text."""
    if args.train_files:
        train, validation = (
            read_files(_files(files), args.text_column, args.documents)
            for files in (args.train_files, args.validation_files)
        )
        return train, validation if args.validation_files else None
    if args.dataset is None:
        return (Piece(text, ends_document=True) for text in embedded.paragraphs()), None
    names = dataset_splits(args.dataset, args.dataset_config)
    if "train" not in names:
        raise DataError(f"recipe_args.dataset = {args.dataset}: has no split `train`; it has {', '.join(names)}")
    train, validation = (
        read_dataset(args.dataset, args.dataset_config, split, args.text_column, args.documents)
        for split in ("train", "validation")
    )
    return train, validation if "validation" in names else None


def _files(names: tuple[str, ...]) -> tuple[Path, ...]:
    return find_files(names, "recipe_args.train_files")


def _is_running_text(args: Args) -> bool:
    """Whether documents are so few and long that validation text is cut off the end instead of chosen."""
    if args.documents != "auto":
        return args.documents == "file"
    return bool(args.train_files) and all(format_of(path) == "text" for path in _files(args.train_files))


def _hold_out(pieces: Iterator[Piece], fraction: float) -> Iterator[tuple[str, Piece]]:
    """Choose documents for validation by a hash of their text, so that equal documents are on the same side."""
    document: list[Piece] = []
    for piece in pieces:
        document.append(piece)
        if piece.ends_document:
            text = "".join(part.text for part in document)
            number = int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[:4], "big")
            split = "validation" if number < fraction * 2**32 else "train"
            yield from ((split, part) for part in document)
            document = []


def _cut_off_end(train: Path, validation: Path, fraction: float) -> None:
    import numpy as np

    tokens = np.fromfile(train, dtype=np.int32)
    cut = len(tokens) - int(len(tokens) * fraction)
    tokens[cut:].tofile(validation)
    tokens[:cut].tofile(train)


def _encode(
    tokenizer: PreTrainedTokenizerBase, pieces: Iterator[tuple[str, Piece]]
) -> Iterator[tuple[int, dict[str, array[int]]]]:
    """Token ids per split, batch after batch, with the number of texts they came from.

    A document ends with the end-of-text token, and begins with the begin-of-text token where the tokenizer adds
    one by itself.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    begin = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"] == [tokenizer.bos_token_id, *plain] else []
    at_start = {"train": True, "validation": True}
    while batch := list(itertools.islice(pieces, BATCH_OF_TEXTS)):
        texts = [piece.text for _, piece in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        ids = {"train": array("i"), "validation": array("i")}
        for (split, piece), tokens in zip(batch, encoded, strict=True):
            if at_start[split]:
                ids[split].extend(begin)
            ids[split].extend(tokens)
            if piece.ends_document:
                ids[split].append(tokenizer.eos_token_id)
            at_start[split] = piece.ends_document
        yield len(batch), ids


def _check_sizes(args: Args, train: Blocks, validation: Blocks) -> None:
    if train.tokens < args.block_size:
        raise DataError(
            f"the training text has {train.tokens} tokens, less than one block of recipe_args.block_size = "
            f"{args.block_size}; give more text, or a smaller recipe_args.block_size"
        )
    if validation.tokens < 2:
        raise DataError(
            f"the validation text has {validation.tokens} tokens, and the first is context only; give "
            "recipe_args.validation_files, or a larger recipe_args.validation_fraction"
        )


class Blocks:
    """A file of token ids, cut into blocks; the last one may be shorter. Only what is used is read from disk."""

    def __init__(self, path: Path, block_size: int) -> None:
        import numpy as np

        self.tokens = path.stat().st_size // 4
        self._ids = np.memmap(path, dtype=np.int32, mode="r") if self.tokens else np.zeros(0, np.int32)
        self._block_size = block_size

    def __len__(self) -> int:
        """Number of blocks."""
        return math.ceil(self.tokens / self._block_size)

    def __getitem__(self, index: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Token ids of one block, shape `(block_size,)` or, for the last, shorter."""
        return self._ids[index * self._block_size : (index + 1) * self._block_size]


# --- batches and loss ------------------------------------------------------------------------------------


def collate(blocks: list[np.ndarray[Any, np.dtype[np.int32]]]) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels`, int64, shape `(batch, seq)`; `attention_mask` only where a block is padded."""
    import numpy as np
    import torch

    lengths = [len(block) for block in blocks]
    ids = np.zeros((len(blocks), max(lengths)), dtype=np.int64)
    real = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids[real] = np.concatenate(blocks)
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(np.where(real, ids, IGNORED))}
    if not real.all():
        batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    return batch


def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each token given those before it, summed; a scalar in fp32."""
    from torch.nn import functional

    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False).logits
    # Shift the small labels rather than copy the large logits.
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def count(batch: Batch) -> int:
    """Predicted tokens of a batch: all labels but the first of each block."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
