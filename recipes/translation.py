"""Translation: a text in one language to the same in another, by an encoder-decoder model.

Embedded default: dates as people write them, generated, to ISO 8601, with a tiny T5 that spells.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cache import file_identity
from launch.errors import ConfigError, DataError
from launch.recipe import LocalPaths, Prepared, Preview, RecipeContext
from recipes.files import Row, find_files, parallel_rows
from recipes.rows import EmbeddedRows
from recipes.sequence_to_sequence import SequenceArgs, Task
from recipes.small_t5 import small_t5
from recipes.text_pairs import Columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATES = 4400
SEED = 0
_KEY = {"rows": DATES, "seed": SEED, "version": 1}
FIRST, LAST = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)
"""A year of two digits stands for one of this century of years."""

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
STYLES = (
    "{nth} of {month} {year}",
    "{month} {day}, {year}",
    "{day} {mon} {year}",
    "{weekday}, {day} {month} {year}",
    "the {nth} of {month}, '{short}",
    "{mon} {nth} '{short}",
    "{day}.{number}.{year}",
    "in {year}, {month} the {nth}",
)


class Args(SequenceArgs):
    """What a run file may set under `recipe_args`."""

    translation_column: str | None = None
    """Column that holds a row's texts by language, {"en": …, "de": …}, in place of source and target column."""
    source_language: str | None = None
    """Language in translation_column to translate from."""
    target_language: str | None = None
    """Language in translation_column to translate to."""
    source_files: LocalPaths = ()
    """Text files (or .gz) to train on, a sentence a line; line n of target_files is the translation of line n."""
    target_files: LocalPaths = ()
    """The same lines in the other language, in as many files."""
    validation_source_files: LocalPaths = ()
    """Such files to evaluate on; none: a part of the training lines is held out."""
    validation_target_files: LocalPaths = ()
    """The same lines in the other language."""
    metrics: tuple[str, ...] = ("bleu", "chrf", "exact_match")
    """Metrics of the generated texts: shipped ones, files of your own, or of the Hub; none: nothing is generated."""


def preview(args: Args, context: RecipeContext) -> Preview:
    """Check all that can be checked without torch, and find the number of samples if they are prepared already."""
    return _task(args, context).preview()


def tokenizer(args: Args, context: RecipeContext) -> PreTrainedTokenizerBase:
    """The tokenizer as training uses it."""
    return _task(args, context).tokenizer()


def prepare(args: Args, context: RecipeContext) -> Prepared:
    """Tokenise (once, then from the cache) and describe the model."""
    return _task(args, context).prepare()


def _task(args: Args, context: RecipeContext) -> Task:
    rows = _line_rows(args) or EmbeddedRows("dates", _KEY, dates)
    if args.translation_column is None:
        if args.source_language or args.target_language:
            raise ConfigError(
                "recipe_args.source_language and target_language choose texts of recipe_args.translation_column; "
                "set that too, or name source_column and target_column instead"
            )
        columns = {"source_column": args.source_column, "target_column": args.target_column}
        return Task("translation", args, context, SMALL_T5, rows, columns)
    languages = (args.source_language, args.target_language)
    if None in languages or not (args.dataset or args.train_files):
        raise ConfigError(
            f"recipe_args.translation_column = {args.translation_column}: needs recipe_args.source_language and "
            "target_language, and a dataset or train_files"
        )

    def pairs(found: Columns) -> tuple[list[Any], list[Any]]:
        sources, targets = ([_in_language(row, each or "") for row in found["translation"]] for each in languages)
        return sources, targets

    columns = {"translation_column": args.translation_column}
    return Task("translation", args, context, SMALL_T5, rows, columns, pairs)


def _in_language(texts: Any, language: str) -> Any:
    if not isinstance(texts, dict) or language not in texts:
        has = f"the languages {', '.join(texts)}" if isinstance(texts, dict) else f"{texts!r}"
        raise DataError(
            f"recipe_args.translation_column: a row has {has}, not {language!r}; set recipe_args.source_language and "
            "target_language to two that it has"
        )
    return texts[language]


def _line_rows(args: Args) -> EmbeddedRows | None:
    """Rows of files whose lines belong together, if there are any.

    Raises:
        ConfigError: one language without the other, or other data beside them.
        DataError: a file is missing or empty.
    """
    found: dict[str, tuple[Path, ...]] = {}
    for part in ("", "validation_"):
        names = [f"{part}source_files", f"{part}target_files"]
        files = [find_files(getattr(args, name), f"recipe_args.{name}", of_any_kind=True) for name in names]
        if len(files[0]) != len(files[1]):
            raise ConfigError(
                f"recipe_args.{names[0]} names {len(files[0])} files and recipe_args.{names[1]} {len(files[1])}; "
                "they go in pairs"
            )
        found |= dict(zip(names, files, strict=True))
    if not any(found.values()):
        return None
    if not found["source_files"]:
        raise ConfigError("recipe_args.validation_source_files needs recipe_args.source_files beside it")
    if args.dataset or args.train_files:
        raise ConfigError(
            "recipe_args.source_files excludes recipe_args.dataset and recipe_args.train_files; state one of them"
        )
    validation = found["validation_source_files"]
    return EmbeddedRows(
        "recipe_args.source_files",
        {name: [file_identity(path) for path in files] for name, files in found.items()},
        lambda: parallel_rows(found["source_files"], found["target_files"]),
        (lambda: parallel_rows(validation, found["validation_target_files"])) if validation else None,
    )


# --- embedded default --------------------------------------------------------------------------------------


def dates() -> Iterator[Row]:
    """Dates in one of several styles each, and in ISO 8601; the same ones every time."""
    source = random.Random(SEED)
    for _ in range(DATES):
        date = FIRST + datetime.timedelta(days=source.randrange((LAST - FIRST).days + 1))
        yield {"source": written(date, source.choice(STYLES)), "target": date.isoformat()}


def written(date: datetime.date, style: str) -> str:
    """A date in words, such as `3rd of March 1998`."""
    ending = "th" if 10 < date.day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10, "th")
    month = MONTHS[date.month - 1]
    return style.format(
        nth=f"{date.day}{ending}",
        day=date.day,
        month=month,
        mon=month[:3],
        number=date.month,
        year=date.year,
        short=f"{date.year % 100:02}",
        weekday=DAYS[date.weekday()],
    )


SMALL_T5 = small_t5("dates", lambda: (row["source"] for row in dates()), 100, _KEY)
"""A tiny T5 whose tokens are the words of dates, and bytes for all else: it takes text of any language."""
