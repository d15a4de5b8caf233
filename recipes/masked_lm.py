"""Masked language modelling, as BERT is trained: some tokens of a text are hidden, and told from those around them.

Of the tokens of a sample that are not special, `masked_share` are targets: of these 80 % are replaced by the mask
token, 10 % by a random one, and 10 % stay as they are. Which ones follows from the sample's own tokens, and in training
from the seed and the epoch too. So validation is the same whenever and wherever it is measured, and training sees new
masks in each epoch that are the same for any number of processes, and after a resume. Metrics are the
pseudo-perplexity, the exponential of the mean loss over targets, and the share of targets that are told right.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, JsonValue

from launch.errors import DataError
from launch.recipe import Batch, Inference, Metrics, Prepared, Preview, RecipeContext, Scoring, Width
from recipes.batches import IGNORED, count_targets, lengths_of, marks, padded, without_labels
from recipes.embedded import paragraphs
from recipes.embedded_encoder import small_encoder
from recipes.encoding import text_of
from recipes.head_loss import LossArgs, summed_loss, summed_loss_and_best, with_head_loss
from recipes.masking import Masked, MaskedStream, Masking
from recipes.models import ModelArgs, Source, check_model
from recipes.rows import (
    EmbeddedRows,
    RowArgs,
    RowStream,
    Splits,
    check_rows,
    encode_rows,
    encoded_samples,
    load_rows,
    rows_identity,
)
from recipes.tables import list_lengths

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from recipes.masking import Numbers


class Args(ModelArgs, RowArgs, LossArgs):
    """What a run file may set under `recipe_args`."""

    text_column: str = "text"
    """Column that holds the text."""
    join_texts: bool = True
    """Lay texts end to end and cut them into samples of max_length; false: a sample for each text, cut short."""
    max_length: int = Field(128, ge=8)
    """Tokens of a sample, special ones included."""
    masked_share: float = Field(0.15, gt=0, lt=1)
    """Share of a sample's tokens that are to be told; at least one is."""
    pad_to_multiple_of: int | None = Field(None, ge=1)
    """Batches are padded to their longest sample, and from there to a multiple of this; null: of 8, on CPUs of 1."""


def preview(args: Args, context: RecipeContext) -> Preview:
    """Check all that can be checked without torch, and find the number of samples if they are prepared already."""
    check_rows(args, _columns(args))
    check_model(args)
    rows = rows_identity(args, _columns(args), REFERENCE)
    source = _source(args, context)
    samples = encoded_samples(context, "masked-lm", rows, _identity(args, source))
    tokens = args.max_length if args.join_texts else None
    use = source.use("masked_token", args.max_length, fused_loss=args.fuses(context))
    return Preview(samples, tokens, ("pseudo_perplexity", "masked_accuracy"), use, args.streaming)


def tokenizer(args: Args, context: RecipeContext) -> PreTrainedTokenizerBase:
    """The tokenizer, which has a mask token and a padding token.

    Raises:
        ConfigError: it takes fewer tokens than `max_length`.
        DataError: it cannot be loaded, or has no such token.
    """
    found = _source(args, context).padding_tokenizer(args.max_length)
    if found.mask_token_id is None:
        raise DataError(
            f"recipe_args.model = {args.model}: its tokenizer has no mask_token, which masked language modelling "
            "needs; use an encoder such as BERT"
        )
    return found


def prepare(args: Args, context: RecipeContext) -> Prepared:
    """Read the texts and tokenise them (once, then from the cache), and describe the model."""
    rows = load_rows(args, context, _columns(args), REFERENCE)
    source, tokens = _source(args, context), tokenizer(args, context)
    config = source.config(tokens)
    source.check_length(config, "max_length", args.max_length)
    encode = Encoder(tokens, args.max_length, args.join_texts)
    identity = _identity(args, source)
    encoded = encode_rows(rows, context, "masked-lm", encode, identity, args.preparation_processes)
    train = encoded.train
    masking = Masking(tokens.mask_token_id, tuple(tokens.all_special_ids), len(tokens), args.masked_share, context.seed)

    def build_model() -> Any:
        model = source.build("AutoModelForMaskedLM", config, tokens)
        return with_head_loss(model, loss) if args.fuses(context) else model

    return Prepared(
        build_model=build_model,
        tokenizer=tokens,
        train=MaskedStream(train, masking) if isinstance(train, RowStream) else Masked(train, masking),
        validation=Masked(encoded.validation, replace(masking, seed=None)),
        collate=Collate(tokens.pad_token_id, context.width(args.pad_to_multiple_of, args.max_length)),
        loss=loss,
        count=count,
        lengths=lengths_of,
        without_targets=without_labels,
        loss_metrics=lambda mean_loss: {"pseudo_perplexity": math.exp(mean_loss) if mean_loss < 700 else math.inf},
        scoring=Scoring(predict, measure),
        facts=_facts(encoded, rows),
    )


def _columns(args: Args) -> dict[str, str]:
    return {"text_column": args.text_column}


def _source(args: Args, context: RecipeContext) -> Source:
    def texts() -> Iterator[str]:
        rows = load_rows(args, context, _columns(args), REFERENCE).train
        return (text_of(row["text"], "the training rows") for row in rows)

    return Source(args, small_encoder(texts, rows_identity(args, _columns(args), REFERENCE)), context.cache)


def _reference_rows() -> Iterator[dict[str, Any]]:
    return ({"text": paragraph} for paragraph in paragraphs())


REFERENCE = EmbeddedRows("language reference", {"python": list(sys.version_info[:3]), "version": 1}, _reference_rows)
"""The paragraphs of Python's own language reference."""


# --- samples -----------------------------------------------------------------------------------------------


def _identity(args: Args, source: Source) -> JsonValue:
    """All that the samples are made from, beside the rows."""
    return {
        "version": 1,
        "tokenizer": source.tokenizer_identity(),
        "join_texts": args.join_texts,
        "max_length": args.max_length,
    }


@dataclass(frozen=True)
class Encoder:
    """Makes samples of texts: `input_ids`, and `length` before a text was cut short."""

    tokens: PreTrainedTokenizerBase
    max_length: int
    join: bool

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """A column of texts to columns of samples; texts are joined within the batch.

        Raises:
            DataError: a text that is none.
        """
        texts = [text for text in (text_of(value, "the rows") for value in batch["text"]) if text.strip()]
        plain = self.tokens(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        if not self.join:
            kept = [ids for ids in plain if ids]
            begin, end = self._around()
            most = self.max_length - len(begin) - len(end)
            return {
                "input_ids": [[*begin, *ids[:most], *end] for ids in kept],
                "length": [len(begin) + len(ids) + len(end) for ids in kept],
            }
        samples = self._joined(plain)
        return {"input_ids": samples, "length": [len(sample) for sample in samples]}

    def _joined(self, texts: list[list[int]]) -> list[list[int]]:
        """Samples of full length, but for the last; between two texts stands what ends a sample."""
        begin, end = self._around()
        most = self.max_length - len(begin) - len(end)
        running = list(itertools.chain.from_iterable([*ids, *end] for ids in texts))
        running = running[: len(running) - len(end)]
        return [[*begin, *running[start : start + most], *end] for start in range(0, len(running), most)]

    def _around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text."""
        whole = self.tokens("a")["input_ids"]
        plain = self.tokens("a", add_special_tokens=False)["input_ids"]
        start = next(place for place in range(len(whole)) if whole[place : place + len(plain)] == plain)
        return whole[:start], whole[start + len(plain) :]


def _facts(encoded: Splits, rows: Splits) -> dict[str, Any]:
    """Of each split that is held: rows, those without text, tokens, and texts cut short.

    Raises:
        DataError: a split has no text.
    """
    facts = {}
    for name in ("train", "validation"):
        samples, read = getattr(encoded, name), getattr(rows, name)
        if isinstance(samples, RowStream):
            continue
        if not len(samples):
            raise DataError(f"the {name} rows hold no text; is recipe_args.text_column the right one?")
        lengths, used = samples.numbers("length"), list_lengths(samples)
        facts[name] = {
            "rows": len(read),
            "rows without text": rows.facts[name]["empty"].get("text", 0),
            "tokens": int(used.sum()),
            "cut short": int((lengths > used).sum()),
        }
    return facts


# --- batches, loss and metrics -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Collate:
    """Pads samples on the right to the longest, and makes tensors of them."""

    pad_id: int
    width: Width

    def __call__(self, samples: list[dict[str, Numbers]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, all int64 `(batch, seq)`."""
        ids, labels = ([sample[name].tolist() for sample in samples] for name in ("input_ids", "labels"))
        return {
            "input_ids": padded(ids, self.pad_id, self.width),
            "attention_mask": marks(ids, self.width),
            "labels": padded(labels, IGNORED, self.width),
        }


def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each target, summed; a scalar in fp32."""
    return summed_loss(model, _inputs(batch), batch["labels"])


def count(batch: Batch) -> int:
    """Tokens that are targets."""
    return count_targets(batch)


def predict(model: Inference, batch: Batch) -> tuple[torch.Tensor, list[Any]]:
    """The summed loss, and of each sample how many targets are told right, and how many there are."""
    labels = batch["labels"]
    summed, best = summed_loss_and_best(model, _inputs(batch), labels)
    targets = labels != IGNORED
    right = ((best == labels) & targets).sum(-1)
    return summed, list(zip(right.tolist(), targets.sum(-1).tolist(), strict=True))


def measure(counts: list[Any]) -> Metrics:
    """The share of targets that are told right."""
    right, targets = map(sum, zip(*counts, strict=True))
    return {"masked_accuracy": right / max(targets, 1)}


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
