"""Extractive question answering: find the part of a text that answers a question, or say that none does.

Long contexts are read in overlapping windows, each a sample. Two scores per token, for the answer's beginning and its
end, are trained by cross-entropy over the tokens of a window; a window without the answer points to its first token
(CLS). The loss of a window is the mean of the two, its count is 1. Positions behind the end of a window get no share
of the probability, so that padding changes nothing.

In evaluation every window names its best spans and the score of its first token; those of all windows of a question are
joined: the best span is the answer, or there is none where the lowest first-token score is better by more than
`null_threshold`. Exact match and F1 are those of SQuAD. Where eval.max_samples ends amid the windows of a question, it
is answered from those before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from launch.errors import ConfigError, DataError
from launch.recipe import Batch, Inference, Prepared, Preview, RecipeContext, Scoring, Width
from recipes import metrics
from recipes.answers import Answers
from recipes.batches import IGNORED, marks, padded, summed_cross_entropy
from recipes.embedded_questions import QUESTION_ENCODER, QUESTIONS
from recipes.models import ModelArgs, Source, check_model
from recipes.question_windows import NOWHERE, Windows, answers_of, read_squad
from recipes.rows import RowArgs, Splits, check_rows, encode_rows, encoded_samples, load_rows, rows_identity
from recipes.tables import StoredRows, list_lengths

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

READERS = {".json": read_squad}

SPECIAL_TOKENS = 3
"""Tokens that a model at least has around question and context."""

TARGETS = ("start_positions", "end_positions", "offsets", "question")
"""What a batch holds beside the inputs of the model."""


class Args(ModelArgs, RowArgs):
    """What a run file may set under `recipe_args`. Files: SQuAD's own .json, or rows."""

    id_column: str = "id"
    """Column with the name of a question."""
    question_column: str = "question"
    """Column with the question."""
    context_column: str = "context"
    """Column with the text that may hold the answer."""
    answers_column: str = "answers"
    """Column with {"text": […], "answer_start": […]}; empty lists: the context has no answer; in csv as JSON."""
    max_length: int = Field(384, ge=8)
    """Tokens in a window: question, special tokens and part of the context."""
    stride: int = Field(128, ge=0)
    """Tokens that a window shares with the one before, so that no answer up to this length is cut in all of them."""
    max_question_length: int = Field(64, ge=1)
    """Tokens of a question; a longer one is cut, and counted, so that there is room for the context."""
    max_answer_length: int = Field(30, ge=1)
    """Tokens of an answer that is found; longer spans are not looked at."""
    n_best: int = Field(20, ge=1)
    """Spans that each window names."""
    unanswerable: bool | None = None
    """Whether questions may be left without answer (SQuAD 2.0); null: if one of the validation data has none."""
    null_threshold: float = 0.0
    """No answer is given where the score of having none is better than the best span's by more than this."""
    pad_to_multiple_of: int | None = Field(None, ge=1)
    """Windows of a batch are padded to a multiple of so many tokens, or to max_length; null: of 8, on CPUs of 1."""


def preview(args: Args, context: RecipeContext) -> Preview:
    """Check all that can be checked without torch; the number of windows is known once they are made."""
    needed = args.max_question_length + args.stride + SPECIAL_TOKENS
    if args.max_length <= needed:
        raise _no_room(args, needed)
    check_rows(args, _columns(args), READERS)
    check_model(args)
    metrics.check(["squad"], "recipe_args.model")
    rows = rows_identity(args, _columns(args), QUESTIONS)
    source = _source(args, context)
    samples = encoded_samples(context, "windows", rows, _identity(args, source))
    unanswerable = args.unanswerable
    if unanswerable is None and not (args.dataset or args.train_files):
        unanswerable = True
    use = source.use("span", args.max_length, outputs=2, metric_libraries=True)
    return Preview(samples, args.max_length, metric_names(bool(unanswerable)), use, args.streaming)


def metric_names(unanswerable: bool) -> tuple[str, ...]:
    """Numbers of an evaluation; of questions that may be left without answer there are more."""
    parts = [f"{kind}_{name}" for kind in ("HasAns", "NoAns") for name in ("exact", "f1", "total")]
    best = ["best_exact_match", "best_f1"]
    return ("exact_match", "f1", *(parts + best if unanswerable else ()))


def tokenizer(args: Args, context: RecipeContext) -> PreTrainedTokenizerBase:
    """The tokenizer, which must tell what characters a token stands for, and have a padding token.

    Raises:
        ConfigError: it does not, or there is no room for a context.
        DataError: it cannot be loaded.
    """
    found = _source(args, context).padding_tokenizer()
    name = f"recipe_args.{'tokenizer' if args.tokenizer else 'model'} = {args.tokenizer or args.model}"
    if not found.is_fast:
        raise ConfigError(f"{name}: its tokenizer does not tell the characters of a token; use one with tokenizer.json")
    needed = args.max_question_length + args.stride + found.num_special_tokens_to_add(pair=True)
    if args.max_length <= needed:
        raise _no_room(args, needed)
    found.truncation_side = "right"
    found.model_max_length = max(found.model_max_length, args.max_length)  # the model's positions say what is too long
    return found


def prepare(args: Args, context: RecipeContext) -> Prepared:
    """Cut into windows (once, then from the cache) and describe the model."""
    source, made = _source(args, context), tokenizer(args, context)
    config = source.config(made)
    source.check_length(config, "max_length", args.max_length)
    rows = load_rows(args, context, _columns(args), QUESTIONS, READERS)
    windows = Windows(made, args.max_length, args.stride, args.max_question_length)
    features = encode_rows(
        *(rows, context, "windows", windows, _identity(args, source), args.preparation_processes),
        validation_encode=lambda columns: windows(columns, with_offsets=True),
    )
    lacking = sum(not answers_of(row) for row in rows.validation.select_columns(["id", "answers"]))
    if args.unanswerable is False and lacking:
        raise DataError(
            f"recipe_args.unanswerable = false: {lacking} of {len(rows.validation)} validation questions have no "
            "answer; set recipe_args.unanswerable=true, or leave those questions out"
        )
    answers = Answers(rows.validation, args.unanswerable or lacking > 0, args.null_threshold)

    def predict(model: Inference, batch: Batch) -> tuple[torch.Tensor, list[Any]]:
        outputs = model(**_inputs(batch))
        return summed_loss(outputs, batch), best_spans(outputs, batch, made.cls_token_id, args)

    width = context.width(args.pad_to_multiple_of, args.max_length)
    return Prepared(
        build_model=lambda: source.build("AutoModelForQuestionAnswering", config, made),
        tokenizer=made,
        train=features.train,
        validation=_numbered(features.validation),
        collate=lambda samples: collate(samples, made, width),
        loss=loss,
        count=count,
        scoring=Scoring(predict, answers.measure),
        lengths=list_lengths,
        without_targets=lambda sample: {**sample, "start_positions": IGNORED, "end_positions": IGNORED},
        targets=TARGETS,
        facts=_facts(rows, features, lacking),
    )


def _columns(args: Args) -> dict[str, str]:
    return {f"{name}_column": getattr(args, f"{name}_column") for name in ("id", "question", "context", "answers")}


def _source(args: Args, context: RecipeContext) -> Source:
    return Source(args, QUESTION_ENCODER, context.cache)


def _identity(args: Args, source: Source) -> dict[str, Any]:
    """All that windows are made from beside the rows."""
    sizes = [args.max_length, args.stride, args.max_question_length]
    return {"version": 1, "tokenizer": source.tokenizer_identity(), "sizes": sizes}


def _no_room(args: Args, needed: int) -> ConfigError:
    return ConfigError(
        f"recipe_args.max_length = {args.max_length}: has no room for a context: a question may have "
        f"{args.max_question_length} tokens (max_question_length), the special tokens come on top, and {args.stride} "
        f"(stride) are shared with the window before; set it to {needed + 1} or more, or lower the others"
    )


def _numbered(windows: StoredRows) -> StoredRows:
    """With the place of each window's question among the validation rows, each of which has a window or more."""
    import numpy as np

    numbers = np.cumsum(windows.numbers("number") == 0) - 1
    names = [name for name in windows.column_names if name not in ("number", "question_cut")]
    return windows.with_column("question", numbers).select_columns([*names, "question"])


def _facts(rows: Splits, features: Splits, lacking: int) -> dict[str, Any]:
    """What was counted: by split `windows`, `questions_cut` and `answers_not_found` beside the facts of the rows."""
    import numpy as np

    facts = {split: dict(found) for split, found in rows.facts.items()}
    for split, found in facts.items():
        windows = getattr(features, split)
        first = windows.numbers("number") == 0
        lost = windows.numbers("start_positions") == IGNORED
        found["windows"] = len(windows)
        found["questions_cut"] = int((np.asarray(windows["question_cut"]) & first).sum())
        found["answers_not_found"] = int((lost & first).sum())
    facts["validation"]["without_answer"] = lacking
    return facts


# --- batches and loss ------------------------------------------------------------------------------------


def collate(samples: list[Any], tokenizer: PreTrainedTokenizerBase, width: Width) -> dict[str, torch.Tensor]:
    """The model's inputs, int64, shape `(batch, seq)`, padded on the right; and what `TARGETS` says.

    `start_positions` and `end_positions`, shape `(batch,)`; of validation samples also `offsets`, shape
    `(batch, seq, 2)`, the characters of each token of the context, and `question`, shape `(batch,)`.
    """
    import torch

    def rows(name: str, filler: int) -> torch.Tensor:
        return padded([sample[name] for sample in samples], filler, width)

    batch = {
        "input_ids": rows("input_ids", tokenizer.pad_token_id),
        "attention_mask": marks([sample["input_ids"] for sample in samples], width),
    }
    length = batch["input_ids"].shape[1]
    if "token_type_ids" in samples[0]:
        batch["token_type_ids"] = rows("token_type_ids", tokenizer.pad_token_type_id)
    if "offsets" in samples[0]:
        flat = padded([sample["offsets"] for sample in samples], NOWHERE[0], lambda _: 2 * length)
        batch["offsets"] = flat.view(len(samples), length, 2)
    for name in ("start_positions", "end_positions", "question"):
        if name in samples[0]:
            batch[name] = torch.tensor([sample[name] for sample in samples])
    return batch


def _inputs(batch: Batch) -> Mapping[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name not in TARGETS}


def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean of the cross-entropies of beginning and end of the answer, summed over windows; a scalar in fp32."""
    return summed_loss(model(**_inputs(batch)), batch)


def summed_loss(outputs: Any, batch: Batch) -> torch.Tensor:
    """The loss of what the model has given: `start_logits` and `end_logits`, shape `(batch, seq)`."""
    padding = batch["attention_mask"] == 0
    start, end = (
        summed_cross_entropy(logits.float().masked_fill(padding, float("-inf")), targets)
        for logits, targets in (
            (outputs.start_logits, batch["start_positions"]),
            (outputs.end_logits, batch["end_positions"]),
        )
    )
    return (start + end) / 2


def count(batch: Batch) -> int:
    """Windows of a batch, without those of questions whose answer no window holds."""
    return int((batch["start_positions"] != IGNORED).sum())


# --- answers ---------------------------------------------------------------------------------------------


def best_spans(outputs: Any, batch: Batch, first_token: int | None, args: Args) -> list[list[Any]]:
    """Of each window `[question, score of no answer, [[start, end, score], …]]`, spans in characters, the best first.

    Every span of the context of up to `max_answer_length` tokens is looked at, which takes `batch x seq x
    max_answer_length` numbers.
    """
    start, end, offsets = outputs.start_logits.float(), outputs.end_logits.float(), batch["offsets"]
    outside = offsets[..., 0] < 0
    start, end_inside = (logits.masked_fill(outside, float("-inf")) for logits in (start, end))
    longest = args.max_answer_length
    behind = end_inside.new_full((len(end), longest - 1), float("-inf"))
    # scores[window, token, more]: a span from a token to `more` tokens behind it
    scores = start[:, :, None] + _joined(end_inside, behind).unfold(1, longest, 1)
    best, places = scores.flatten(1).topk(min(args.n_best, scores[0].numel()))
    firsts = places // longest
    lasts = (firsts + places % longest).clamp(max=start.shape[1] - 1)
    lefts, rights = offsets[..., 0].gather(1, firsts), offsets[..., 1].gather(1, lasts)
    null = (batch["input_ids"] == (-1 if first_token is None else first_token)).int().argmax(1, keepdim=True)
    nulls = (outputs.start_logits.float() + outputs.end_logits.float()).gather(1, null)[:, 0]
    spans = [
        [[left, right, score] for left, right, score in zip(*row, strict=True) if score > float("-inf")]
        for row in zip(lefts.tolist(), rights.tolist(), best.tolist(), strict=True)
    ]
    return [list(found) for found in zip(batch["question"].tolist(), nulls.tolist(), spans, strict=True)]


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([first, second], dim=1)
