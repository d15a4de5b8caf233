"""Token classification: a label for each word of a sentence, such as named entities or parts of speech.

The words are given; the tokenizer makes one or more tokens of each. The first token of a word is a target, the others
are not (all are with `label_all_subwords`). The loss is cross-entropy, summed over targets. Metrics are of words: each
has the label that is most probable at its first token. Where labels begin with B- or I-, they are of whole entities,
by seqeval; else the share of right labels. Words beyond `max_length` have no label: they are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, JsonValue

from launch.errors import ConfigError, DataError
from launch.recipe import Batch, Inference, Prepared, Preview, RecipeContext, Scoring, Width
from recipes import metrics
from recipes.batches import IGNORED, count_targets, marks, padded, summed_cross_entropy, without_labels
from recipes.conll import read_conll
from recipes.embedded_encoder import small_encoder
from recipes.embedded_entities import ENTITIES
from recipes.files import Row
from recipes.labels import LIKELY_LABELS
from recipes.models import ModelArgs, Source, check_model
from recipes.rows import RowArgs, RowStream, Splits, check_rows, encode_rows, encoded_samples, load_rows, rows_identity
from recipes.tables import list_lengths
from recipes.word_labels import WordLabels, labels_of, listed_values

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

ENTITY_METRICS = ("precision", "recall", "f1", "accuracy")
"""What an evaluation gives: all of it where labels are of entities, else `accuracy` alone."""


class Args(ModelArgs, RowArgs):
    """What a run file may set under `recipe_args`."""

    words_column: str = "tokens"
    """Column that holds the list of words; in CoNLL files (.conll, .txt) this is the first field of each line."""
    labels_column: str = "ner_tags"
    """Column that holds a label for each word, as text or numbers; in CoNLL files the last field, else field_2 …"""
    labels: tuple[str, ...] = ()
    """All labels in their order; none: those of the training rows, sorted. Needed for streaming."""
    label_all_subwords: bool = False
    """Train on all tokens of a word, not just the first; those after the first of a B- label have its I- label."""
    max_length: int = Field(128, ge=8)
    """Tokens of a sample, special ones included; words beyond are left out, and counted."""
    pad_to_multiple_of: int | None = Field(None, ge=1)
    """Batches are padded to their longest sample, and from there to a multiple of this; null: of 8, on CPUs of 1."""


def preview(args: Args, context: RecipeContext) -> Preview:
    """Check all that can be checked without torch, and find the number of samples if they are prepared already."""
    check_rows(args, _columns(args), _readers(args))
    check_model(args)
    metrics.check(("seqeval", "accuracy"))
    if args.streaming and not args.labels:
        raise ConfigError(
            "recipe_args.streaming: the labels must be known before all rows are read; set recipe_args.labels"
        )
    rows = rows_identity(args, _columns(args), ENTITIES, _readers(args))
    source = _source(args, context)
    samples = encoded_samples(context, "token-labels", rows, _identity(args, source))
    outputs = len(args.labels) or LIKELY_LABELS
    use = source.use("token", args.max_length, outputs=outputs, metric_libraries=True)
    return Preview(samples, metrics=ENTITY_METRICS, model=use, streams=args.streaming)


def tokenizer(args: Args, context: RecipeContext) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token.

    Raises:
        ConfigError: it takes fewer tokens than `max_length`.
        DataError: it cannot be loaded, cannot tell words, or has no token that can stand for padding.
    """
    # Byte-level tokenizers take a word for the end of the one before unless a space is put in front of it.
    found = _source(args, context).padding_tokenizer(args.max_length, add_prefix_space=True)
    if not found.is_fast:
        raise DataError(
            f"recipe_args.model = {args.model}: its tokenizer cannot tell which token is of which word (it is none of "
            "the tokenizers library); name another in recipe_args.tokenizer"
        )
    return found


def prepare(args: Args, context: RecipeContext) -> Prepared:
    """Read the rows, find the labels and tokenise (once, then from the cache), and describe the model."""
    rows = load_rows(args, context, _columns(args), ENTITIES, _readers(args))
    source, tokens = _source(args, context), tokenizer(args, context)
    labels = labels_of(rows, args.labels, context)
    names = dict(enumerate(labels.names))
    config = source.config(tokens, num_labels=len(names), id2label=names, label2id={v: k for k, v in names.items()})
    config.use_cache = False  # of keys and values, which decoders keep for generating
    source.check_length(config, "max_length", args.max_length)

    def encoder(split: str) -> Encoder:
        return Encoder(tokens, labels, args.max_length, args.label_all_subwords, split)

    encoded = encode_rows(
        rows,
        context,
        "token-labels",
        encoder("training"),
        _identity(args, source),
        args.preparation_processes,
        encoder("validation"),
    )
    return Prepared(
        build_model=lambda: source.build("AutoModelForTokenClassification", config, tokens),
        tokenizer=tokens,
        train=encoded.train,
        validation=encoded.validation,
        collate=Collate(tokens.pad_token_id, context.width(args.pad_to_multiple_of, args.max_length)),
        loss=loss,
        count=count,
        scoring=Scoring(predict, labels.measure),
        lengths=list_lengths,
        without_targets=without_labels,
        targets=("labels", "word_labels"),
        facts=_facts(encoded, rows, labels),
    )


def _columns(args: Args) -> dict[str, str]:
    return {"words_column": args.words_column, "labels_column": args.labels_column}


def _source(args: Args, context: RecipeContext) -> Source:
    def texts() -> Iterator[str]:
        for row in load_rows(args, context, _columns(args), ENTITIES, _readers(args)).train:
            yield " ".join(map(str, listed_values(row["words"], "training", "words")))

    identity = rows_identity(args, _columns(args), ENTITIES, _readers(args))
    return Source(args, small_encoder(texts, identity), context.cache)


# --- rows and labels ---------------------------------------------------------------------------------------


def _readers(args: Args) -> dict[str, Any]:
    def read(path: Path) -> Iterator[Row]:
        return read_conll(path, args.words_column, args.labels_column)

    return {".conll": read, ".txt": read}


def _identity(args: Args, source: Source) -> JsonValue:
    """All that the features are made from, beside the rows."""
    return {
        "version": 1,
        "tokenizer": source.tokenizer_identity(),
        "labels": [args.label_all_subwords, *args.labels],
        "max_length": args.max_length,
    }


@dataclass(frozen=True)
class Encoder:
    """Makes features of rows: `input_ids`, `labels` of all tokens, `word_labels`, and `words` before the row was cut.

    `word_labels` are of the first token of each word, and are what is measured. Rows without a token of a word have no
    features.
    """

    tokens: PreTrainedTokenizerBase
    labels: WordLabels
    max_length: int
    all_subwords: bool
    split: str

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns of a batch of rows to columns of features.

        Raises:
            DataError: words or labels that are none, or not as many labels as words.
        """
        features: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "word_labels", "words")}
        rows = [row for row in map(self._row, batch["words"], batch["labels"]) if row[0]]
        if not rows:
            return features
        encoded = self.tokens(
            [words for words, _ in rows], is_split_into_words=True, truncation=True, max_length=self.max_length
        )
        for index, (words, numbers) in enumerate(rows):
            of_tokens, of_words = self._of_tokens(encoded.word_ids(index), numbers)
            if any(label != IGNORED for label in of_words):
                values = (encoded["input_ids"][index], of_tokens, of_words, len(words))
                for column, value in zip(features.values(), values, strict=True):
                    column.append(value)
        return features

    def _row(self, words: Any, labels: Any) -> tuple[list[str], list[int]]:
        words = listed_values(words, self.split, "words")
        labels = listed_values(labels, self.split, "labels")
        where = f"{self.split} row {' '.join(map(str, words))!r:.60}"
        if len(words) != len(labels):
            raise DataError(f"{where}: has {len(words)} words but {len(labels)} labels; each word needs one")
        for word in words:
            if not isinstance(word, str):
                raise DataError(f"{where}: holds {word!r} where a word should be; set recipe_args.words_column")
        return words, [self.labels.number(label, where) for label in labels]

    def _of_tokens(self, word_of_token: Sequence[int | None], numbers: list[int]) -> tuple[list[int], list[int]]:
        """Labels of tokens for the loss, and those of words at their first tokens."""
        of_tokens, of_words, before = [], [], None
        for word in word_of_token:
            first = word is not None and word != before
            of_words.append(numbers[word] if word is not None and first else IGNORED)
            if word is not None and not first and self.all_subwords:
                of_tokens.append(self.labels.following(numbers[word]))
            else:
                of_tokens.append(of_words[-1])
            before = word
        return of_tokens, of_words


def _facts(encoded: Splits, rows: Splits, labels: WordLabels) -> dict[str, Any]:
    """Of each split that is held: rows, words, those left out, and how often each label occurs.

    Raises:
        DataError: a split has no word.
    """
    import numpy as np

    facts: dict[str, Any] = {"labels": list(labels.names)}
    for name in ("train", "validation"):
        samples, read = getattr(encoded, name), getattr(rows, name)
        if isinstance(samples, RowStream):
            continue
        if not len(samples):
            raise DataError(f"the {name} rows hold no words; is recipe_args.words_column the right one?")
        numbers = samples.numbers("word_labels")
        targets = numbers[numbers != IGNORED]
        words = int(samples.numbers("words").sum())
        facts[name] = {
            "rows": len(read),
            "rows without words": len(read) - len(samples),
            "words": words,
            "words left out": words - len(targets),
            "words by label": dict(
                zip(labels.names, np.bincount(targets, minlength=len(labels.names)).tolist(), strict=True)
            ),
        }
    return facts


# --- batches, loss and metrics -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Collate:
    """Pads samples on the right to the longest, and makes tensors of them."""

    pad_id: int
    width: Width

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `labels` and `word_labels`, all int64 `(batch, seq)`."""

        def rows(name: str, filler: int) -> torch.Tensor:
            return padded([sample[name] for sample in samples], filler, self.width)

        return {
            "input_ids": rows("input_ids", self.pad_id),
            "attention_mask": marks([sample["input_ids"] for sample in samples], self.width),
            **{name: rows(name, IGNORED) for name in ("labels", "word_labels")},
        }


def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each target, summed; a scalar in fp32."""
    return summed_cross_entropy(_logits(model, batch), batch["labels"])


def count(batch: Batch) -> int:
    """Tokens that are targets."""
    return count_targets(batch)


def predict(model: Inference, batch: Batch) -> tuple[torch.Tensor, list[Any]]:
    """The summed loss, and of each sample two lists: the labels predicted of its words, and the true ones."""
    logits, truth = _logits(model, batch), batch["word_labels"]
    pairs = [
        (guess[known != IGNORED].tolist(), known[known != IGNORED].tolist())
        for guess, known in zip(logits.argmax(-1).cpu(), truth.cpu(), strict=True)
    ]
    return summed_cross_entropy(logits, batch["labels"]), pairs


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """In fp32, shape `(batch, seq, labels)`."""
    logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    return logits
