"""What recipes share whose model reads one text and writes another: encoder-decoder models.

A row has a source text and a target text. The loss is the cross-entropy of the target's tokens, each given the source
and the target before it; an evaluation has the model write its own text for every source and compares that with the
target as it stands in the data. Where rows come from is settled in `recipes.rows`, what is computed of texts in
`recipes.metrics`; which task it is, only the recipes know.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, JsonValue

from launch.errors import ConfigError, DataError
from launch.recipe import Batch, Inference, Metrics, Prepared, Preview, RecipeContext, Scoring, Width
from recipes import metrics
from recipes.batches import count_targets, without_labels
from recipes.head_loss import LossArgs, summed_loss, with_head_loss
from recipes.metric_options import check_options
from recipes.models import Embedded, ModelArgs, Source, check_model
from recipes.rows import (
    EmbeddedRows,
    RowArgs,
    Splits,
    check_rows,
    encode_rows,
    encoded_samples,
    load_rows,
    rows_identity,
)
from recipes.tables import list_lengths
from recipes.text_pairs import Collate, Encoder, Pairs, facts
from recipes.writing import Writing, ready_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 20
"""Validation samples that an evaluation keeps in full: source, prediction and references."""

GIVES = {
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "exact_match": ("exact_match",),
    "rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
}
"""Numbers that a metric of texts gives; of a user's own only its result tells."""


class SequenceArgs(ModelArgs, RowArgs, LossArgs):
    """The arguments that recipes of this kind share."""

    source_column: str = "source"
    """Column of the text that is read; a list in it is joined by spaces."""
    target_column: str = "target"
    """Column of the text to be written."""
    target_lists: Literal["references", "join"] = "references"
    """What a list of targets is: several right answers (the first one is trained on), or parts to join by spaces."""
    source_prefix: str = ""
    """Put before every source, such as `summarize: ` for T5; kept in the exported configuration as `prefix`."""
    source_language_code: str | None = None
    """What a multilingual tokenizer calls the source's language: en_XX (mBART), eng_Latn (NLLB), en (M2M100)."""
    target_language_code: str | None = None
    """What it calls the target's language; generated text begins with it where the model is trained so."""
    forced_bos_token: str | None = None
    """Token that generated text must begin with; null: as the language code or the model's own settings say."""
    max_source_length: int = Field(512, ge=2)
    """Tokens of a source, special ones included; what is longer is cut at its end, and counted."""
    max_target_length: int = Field(128, ge=2)
    """Tokens of a target, special ones included; what is longer is cut at its end, and counted."""
    pad_to_multiple_of: int | None = Field(None, ge=1)
    """Batches are padded to their longest text, and from there to a multiple of this; null: of 8, on CPUs of 1."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of a target's probability that is spread over all tokens, in training and in the validation loss."""
    metrics: tuple[str, ...] = ()
    """Metrics of the generated texts: shipped ones, files of your own, or of the Hub; none: nothing is generated."""
    metric_options: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    """By metric, what else it is told, such as {bleu: {tokenize: zh}} or {rouge: {use_stemmer: true}}."""
    num_beams: int = Field(1, ge=1)
    """Texts followed at once when generating; 1: the likeliest next token each time."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest generated text in tokens; null: max_target_length."""
    length_penalty: float | None = None
    """Above 0 favours longer beams; null: as the model's own settings say."""
    no_repeat_ngram_size: int | None = Field(None, ge=0)
    """Sequences of so many tokens are generated once at most, 0: any number; null: as the model's settings say."""


@dataclass(frozen=True)
class Task:
    """One recipe with its arguments."""

    name: str
    args: SequenceArgs
    context: RecipeContext
    model: Embedded
    """What `recipe_args.model=embedded` stands for."""
    rows: EmbeddedRows
    """Rows where neither a dataset nor files of rows are named."""
    columns: Mapping[str, str]
    """By argument, what the user's data calls a column."""
    pairs: Pairs = lambda rows: (rows["source"], rows["target"])

    def preview(self) -> Preview:
        """Check all that can be checked without torch; the number of samples if they are prepared already."""
        args = self.args
        check_options(args.metrics, args.metric_options, "recipe_args.metric_options")
        check_model(args)
        check_rows(args, self.columns)
        metrics.check(args.metrics, "recipe_args.metrics")
        if args.length_penalty is not None and args.num_beams == 1:
            raise ConfigError(
                f"recipe_args.length_penalty = {args.length_penalty:g}: chooses between beams, and "
                "recipe_args.num_beams is 1; set it to 2 or more"
            )
        rows = rows_identity(args, self.columns, self.rows)
        samples = encoded_samples(self.context, self.name, rows, self._identity)
        known = all(name in GIVES for name in args.metrics)
        given = tuple(number for name in args.metrics for number in GIVES.get(name, ()))
        names = (*given, "generated_length") if known and given else () if known else None
        use = self._source.use(
            *("text_to_text", args.max_source_length),
            target_tokens=args.max_target_length,
            fused_loss=args.fuses(self.context),
            metric_libraries=bool(args.metrics),
        )
        return Preview(samples, metrics=names, model=use, streams=args.streaming)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as training uses it: it knows its languages, and ends every text with the end-of-text token."""
        return ready_tokenizer(self._source, self.args)

    def prepare(self) -> Prepared:
        """Tokenise (once, then from the cache) and describe the model."""
        args, source = self.args, self._source
        tokenizer = self.tokenizer()
        config = source.config(tokenizer)
        writing = Writing.of(args, config, tokenizer)
        source.check_length(config, "max_source_length", args.max_source_length)
        source.check_length(config, "max_target_length", args.max_target_length)
        source.check_length(config, "max_new_tokens", writing.most_tokens)
        splits = load_rows(args, self.context, self.columns, self.rows)
        encoder = Encoder(args, copy.deepcopy(tokenizer), self.pairs)  # it may keep how it was last told to cut
        encoded = encode_rows(
            *(splits, self.context, self.name, encoder.samples, self._identity, args.preparation_processes),
            validation_encode=encoder.samples_with_texts,
        )
        if not len(encoded.validation):
            raise DataError("every row of the validation data has an empty source or target; give other data")

        def loss(model: torch.nn.Module | Inference, batch: Batch) -> torch.Tensor:
            """Cross-entropy of each target token given the source and those before it, summed; a scalar in fp32."""
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
            return summed_loss(model, {**inputs, "use_cache": False}, batch["labels"], args.label_smoothing)

        def build_model() -> Any:
            model = writing.told(source.build("AutoModelForSeq2SeqLM", config, tokenizer))
            return with_head_loss(model, loss) if args.fuses(self.context) else model

        return Prepared(
            build_model=build_model,
            tokenizer=tokenizer,
            train=encoded.train,
            validation=encoded.validation,
            collate=Collate(
                tokenizer.pad_token_id,
                writing.start,
                self._width(args.max_source_length),
                self._width(args.max_target_length),
            ),
            loss=loss,
            count=count,
            lengths=lambda samples: list_lengths(samples, ("input_ids", "labels")),
            without_targets=without_labels,
            scoring=self._scoring(encoded, tokenizer, writing, loss) if args.metrics else None,
            facts=facts(splits, encoded),
            sample_prompt=encoded.validation[0]["source"],
        )

    def _width(self, most: int) -> Width:
        multiple = self.args.pad_to_multiple_of or self.context.multiple
        return self.context.width(multiple, -(-most // multiple) * multiple)

    def _scoring(self, encoded: Splits, tokenizer: Any, writing: Writing, loss: Any) -> Scoring:
        args, validation = self.args, encoded.validation
        special = set(tokenizer.all_special_ids)

        def predict(model: Inference, batch: Batch) -> tuple[torch.Tensor, list[Any]]:
            summed = loss(model, batch)
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            ids = model.generate(**given, **writing.settings)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            lengths = [sum(token not in special for token in row) for row in ids.tolist()]
            return summed, list(zip(texts, lengths, strict=True))

        def measure(predictions: list[Any]) -> Metrics:
            texts, lengths = [text for text, _ in predictions], [length for _, length in predictions]
            rows = validation[: len(texts)]
            references = list(rows["references"])
            one_each = [row[0] for row in references] if all(len(row) == 1 for row in references) else references
            shown = zip(rows["source"][:EXAMPLES], texts, references, strict=False)
            return {
                **metrics.compute(args.metrics, texts, one_each, args.metric_options, "recipe_args.metrics"),
                "generated_length": fmean(lengths),
                "examples": [dict(zip(("source", "prediction", "references"), row, strict=True)) for row in shown],
            }

        return Scoring(predict, measure)

    @property
    def _source(self) -> Source:
        return Source(self.args, self.model, self.context.cache)

    @property
    def _identity(self) -> JsonValue:
        args = self.args
        told = ("source_prefix", "target_lists", "max_source_length", "max_target_length")
        languages = ("source_language", "target_language", "source_language_code", "target_language_code")
        settings = {name: getattr(args, name, None) for name in (*told, *languages)}
        return {"version": 1, "tokenizer": self._source.tokenizer_identity(), **settings}


def count(batch: Batch) -> int:
    """Target tokens of a batch."""
    return count_targets(batch)
