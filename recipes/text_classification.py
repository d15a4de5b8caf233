"""Text classification: which label a text has, or two texts together; of several, which of them (multi-label).

Any encoder or decoder of transformers is given a head with one output for each label. The labels are those of the
training rows; their names go into the exported model. The loss is cross-entropy, one target for each sample; of
several labels per row it is binary cross-entropy, one target for each sample and label. Metrics are computed by
scikit-learn from what was predicted of all validation rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, JsonValue

from launch.errors import ConfigError, DataError
from launch.recipe import Batch, Inference, Prepared, Preview, RecipeContext, Scoring, Width
from recipes.batches import IGNORED, marks, padded, summed_cross_entropy
from recipes.embedded_docstrings import DOCSTRINGS
from recipes.embedded_encoder import small_encoder
from recipes.encoding import text_of
from recipes.label_metrics import choose, measure, numbers_of
from recipes.labels import (
    LIKELY_LABELS,
    Labels,
    Reading,
    check_number,
    found_labels,
    holds_lists,
    known_labels,
)
from recipes.models import ModelArgs, Source, check_model
from recipes.rows import RowArgs, RowStream, Splits, check_rows, encode_rows, encoded_samples, load_rows, rows_identity
from recipes.tables import class_names, list_lengths

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class Args(ModelArgs, RowArgs):
    """What a run file may set under `recipe_args`."""

    text_column: str = "text"
    """Column that holds the text."""
    second_text_column: str | None = None
    """Column that holds a second text, where pairs of texts are classified."""
    label_column: str = "label"
    """Column that holds the label, as text or as a whole number, or a list of labels."""
    problem: Literal["auto", "single_label", "multi_label"] = "auto"
    """Whether a row has one label or any number; auto: any number where the column holds lists or is split."""
    label_separator: str | None = Field(None, min_length=1)
    """What stands between the labels of a row where they are one text, such as "," (multi-label)."""
    labels: tuple[str, ...] = ()
    """All labels in their order; none: those of the training rows, sorted. Needed for streaming."""
    max_length: int = Field(128, ge=8)
    """Tokens of a sample, special ones included; longer texts are cut short at their end, and counted."""
    pad_to_multiple_of: int | None = Field(None, ge=1)
    """Batches are padded to their longest sample, and from there to a multiple of this; null: of 8, on CPUs of 1."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """With several labels per row, those at least as probable as this are predicted."""
    metrics: tuple[str, ...] = ()
    """What to measure (names of recipes/metrics, paths, names on the Hub); none: all that suit the problem."""


def preview(args: Args, context: RecipeContext) -> Preview:
    """Check all that can be checked without torch, and find the number of samples if they are prepared already."""
    check_rows(args, _columns(args))
    check_model(args)
    if args.problem == "single_label" and args.label_separator:
        raise ConfigError("recipe_args.label_separator is for several labels per row; leave recipe_args.problem out")
    if args.streaming and not args.labels:
        raise ConfigError(
            "recipe_args.streaming: the labels must be known before all rows are read; set recipe_args.labels"
        )
    if args.labels:
        check_number(args.labels, several=args.problem == "multi_label")
    chosen = choose(args.metrics, several=bool(args.label_separator) or args.problem == "multi_label")
    rows = rows_identity(args, _columns(args), DOCSTRINGS)
    source = _source(args, context)
    samples = encoded_samples(context, "classification", rows, _identity(args, source))
    names = args.labels or known_labels(context, _labels_identity(args, rows))
    outputs = len(names or ()) or LIKELY_LABELS
    use = source.use("sequence", args.max_length, outputs=outputs, metric_libraries=True)
    given = numbers_of(chosen, len(names) if names else None)
    return Preview(samples, metrics=given, model=use, streams=args.streaming)


def tokenizer(args: Args, context: RecipeContext) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token.

    Raises:
        DataError: it cannot be loaded, or has no token that can stand for padding.
    """
    return _source(args, context).padding_tokenizer(args.max_length)


def prepare(args: Args, context: RecipeContext) -> Prepared:
    """Read the rows, find the labels and tokenise (once, then from the cache), and describe the model."""
    rows = load_rows(args, context, _columns(args), DOCSTRINGS)
    source, tokens = _source(args, context), tokenizer(args, context)
    reading, labels = _labels(args, rows, context)
    chosen = choose(args.metrics, labels.several)
    config = _config(source, tokens, labels)
    source.check_length(config, "max_length", args.max_length)
    encoded = encode_rows(
        rows,
        context,
        "classification",
        Encoder(tokens, reading, labels, args.max_length, "training"),
        _identity(args, source),
        args.preparation_processes,
        Encoder(tokens, reading, labels, args.max_length, "validation"),
    )
    return Prepared(
        build_model=lambda: source.build("AutoModelForSequenceClassification", config, tokens),
        tokenizer=tokens,
        train=encoded.train,
        validation=encoded.validation,
        collate=Collate(
            tokens.pad_token_id,
            context.width(args.pad_to_multiple_of, args.max_length),
            len(labels.names) if labels.several else None,
            types=getattr(config, "type_vocab_size", 1) > 1,
        ),
        loss=loss,
        count=count,
        scoring=Scoring(
            lambda model, batch: predict(model, batch, args.threshold),
            lambda predictions: measure(predictions, labels, chosen),
        ),
        lengths=list_lengths,
        without_targets=lambda sample: {**sample, "labels": None if labels.several else IGNORED},
        facts=_facts(encoded, rows, labels, args.max_length),
    )


def _columns(args: Args) -> dict[str, str]:
    columns = {"text_column": args.text_column, "label_column": args.label_column}
    if args.second_text_column is not None:
        columns["second_text_column"] = args.second_text_column
    return columns


def _source(args: Args, context: RecipeContext) -> Source:
    def texts() -> Iterator[str]:
        for row in load_rows(args, context, _columns(args), DOCSTRINGS).train:
            yield from (text_of(row[name], "the training rows") for name in ("text", "second_text") if name in row)

    embedded = small_encoder(texts, rows_identity(args, _columns(args), DOCSTRINGS))
    return Source(args, embedded, context.cache)


def _config(source: Source, tokens: PreTrainedTokenizerBase, labels: Labels) -> PretrainedConfig:
    config = source.config(
        tokens,
        num_labels=len(labels.names),
        id2label=dict(enumerate(labels.names)),
        label2id={name: number for number, name in enumerate(labels.names)},
        problem_type="multi_label_classification" if labels.several else "single_label_classification",
    )
    config.use_cache = False  # of keys and values, which decoders keep for generating
    return config


# --- labels and features -----------------------------------------------------------------------------------


def _labels(args: Args, rows: Splits, context: RecipeContext) -> tuple[Reading, Labels]:
    reading = Reading(args.label_separator, class_names(rows.validation.schema, "label"))
    if args.problem == "auto":
        several = bool(args.label_separator) or holds_lists(rows.validation)
    else:
        several = args.problem == "multi_label"
    names = args.labels or tuple(found_labels(rows, reading, context, _labels_identity(args, rows.identity)))
    check_number(names, several)
    return reading, Labels(names, several)


def _labels_identity(args: Args, rows: JsonValue) -> JsonValue:
    return {"version": 1, "rows": rows, "separator": args.label_separator}


def _identity(args: Args, source: Source) -> JsonValue:
    """All that the features are made from, beside the rows."""
    return {
        "version": 1,
        "tokenizer": source.tokenizer_identity(),
        "labels": [args.problem, args.label_separator, list(args.labels)],
        "max_length": args.max_length,
    }


@dataclass(frozen=True)
class Encoder:
    """Makes features of rows: `input_ids`, `token_type_ids` of pairs, `labels`, and `length` before texts are cut.

    Rows without any text have none.
    """

    tokens: PreTrainedTokenizerBase
    reading: Reading
    labels: Labels
    max_length: int
    split: str

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns of a batch of rows to columns of features.

        Raises:
            DataError: a text that is none, or a label that is none of the task.
        """
        texts = zip(*(self._texts(batch[name]) for name in ("text", "second_text") if name in batch), strict=True)
        rows = [(row, value) for row, value in zip(texts, batch["label"], strict=True) if any(map(str.strip, row))]
        features = self._tokens([row for row, _ in rows])
        numbers = [self._label(value, row[0]) for row, value in rows]
        features["labels"] = numbers if self.labels.several else [number for (number,) in numbers]
        return features

    def _texts(self, values: list[Any]) -> list[str]:
        return [text_of(value, f"the {self.split} rows") for value in values]

    def _tokens(self, rows: list[tuple[str, ...]]) -> dict[str, list[Any]]:
        names = ["input_ids", *(["token_type_ids"] if rows and len(rows[0]) == 2 else [])]
        told = {"return_token_type_ids": True, "verbose": False}
        whole = self.tokens(*map(list, zip(*rows, strict=True)), **told) if rows else {name: [] for name in names}
        features = {name: list(whole[name]) for name in names}
        lengths = [len(ids) for ids in features["input_ids"]]
        for index, length in enumerate(lengths):
            if length > self.max_length:  # few are: they are tokenised twice, so that it is known how long they were
                cut = self.tokens(*rows[index], truncation=True, max_length=self.max_length, **told)
                for name in names:
                    features[name][index] = cut[name]
        return {**features, "length": lengths}

    def _label(self, value: Any, text: str) -> list[int]:
        return self.labels.numbers(self.reading(value), f"{self.split} row {text!r:.60}")


def _facts(encoded: Splits, rows: Splits, labels: Labels, max_length: int) -> dict[str, Any]:
    """The labels, and of each split that is held: rows, those without text, texts cut short; rows of several labels."""
    import numpy as np

    facts: dict[str, Any] = {"labels": list(labels.names)}
    for name, samples, read in (
        ("training", encoded.train, rows.train),
        ("validation", encoded.validation, rows.validation),
    ):
        if isinstance(samples, RowStream) or isinstance(read, RowStream):
            continue
        if not len(samples):
            raise DataError(f"the {name} rows hold no text; is recipe_args.text_column the right one?")
        cut = int((samples.numbers("length") > max_length).sum())
        facts[name] = {"rows": len(read), "rows_without_text": len(read) - len(samples), "texts_cut_short": cut}
        if labels.several:
            rows_by_label = np.bincount(samples.numbers("labels"), minlength=len(labels.names)).tolist()
            facts[name]["rows_by_label"] = dict(zip(labels.names, rows_by_label, strict=True))
    return facts


# --- batches and loss --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collate:
    """Pads samples on the right to the longest, and makes tensors of them."""

    pad_id: int
    width: Width
    several: int | None
    """Number of labels, where a sample has any number of them."""
    types: bool
    """Whether the model tells the two texts of a pair apart by `token_type_ids`."""

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and, of pairs, `token_type_ids`, all int64 `(batch, seq)`, and `labels`.

        These are int64 `(batch,)`, or fp32 `(batch, labels)` of 0 and 1 where a sample has any number of them; of a
        sample without targets IGNORED.
        """
        import torch

        def rows(name: str, filler: int) -> torch.Tensor:
            return padded([sample[name] for sample in samples], filler, self.width)

        mask = marks([sample["input_ids"] for sample in samples], self.width)
        batch = {"input_ids": rows("input_ids", self.pad_id), "attention_mask": mask}
        if self.types and "token_type_ids" in samples[0]:
            batch["token_type_ids"] = rows("token_type_ids", 0)
        if self.several is None:
            batch["labels"] = torch.tensor([sample["labels"] for sample in samples])
        else:
            batch["labels"] = torch.zeros(len(samples), self.several)
            for row, sample in zip(batch["labels"], samples, strict=True):
                if sample["labels"] is None:
                    row.fill_(IGNORED)
                else:
                    row[sample["labels"]] = 1.0
        return batch


def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each sample, or of each sample and label, summed; a scalar in fp32."""
    return _summed(_logits(model, batch), batch["labels"])


def count(batch: Batch) -> int:
    """Samples, or with several labels samples × labels."""
    return batch["labels"].numel()


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits: torch.Tensor = model(**inputs).logits.float()
    return logits


def _summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from torch.nn import functional

    if labels.is_floating_point():
        each = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return (each * (labels != IGNORED)).sum()
    return summed_cross_entropy(logits, labels)


# --- metrics -----------------------------------------------------------------------------------------------


def predict(model: Inference, batch: Batch, threshold: float) -> tuple[torch.Tensor, list[Any]]:
    """The summed loss, and for each sample what was predicted and what is true: two numbers, or two lists of them."""
    logits, labels = _logits(model, batch), batch["labels"]
    if not labels.is_floating_point():
        predicted = zip(logits.argmax(-1).tolist(), labels.tolist(), strict=True)
        return _summed(logits, labels), list(predicted)
    likely = logits.sigmoid() >= threshold
    rows = [[row.nonzero().flatten().tolist() for row in pair] for pair in zip(likely, labels, strict=True)]
    return _summed(logits, labels), rows
