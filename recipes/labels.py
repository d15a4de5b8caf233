"""Labels of rows: what a row's label column means, which labels there are, and their numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from launch.errors import ConfigError, DataError
from launch.recipe import RecipeContext
from recipes.tables import ROWS_AT_ONCE, StoredRows

if TYPE_CHECKING:
    from recipes.rows import Splits

_WHOLE_NUMBER = re.compile(r"-?\d+")

LIKELY_LABELS = 10
"""So many are taken for granted before they are known; it makes no difference to speak of."""

SHOWN = 10
"""Labels named in a message; there may be thousands."""


@dataclass(frozen=True)
class Reading:
    """How the values of a label column are read as text."""

    separator: str | None = None
    """What stands between the labels of a row where they are one text."""
    stated: tuple[str, ...] = ()
    """Names that the data itself gives to its numbers (`datasets.ClassLabel`); none: a number is its own name."""

    def __call__(self, value: Any) -> list[str]:
        """The labels of one row; none where it has none.

        Raises:
            DataError: a value that is no label, or a list that holds one twice.
        """
        if isinstance(value, list):
            values = value
        elif self.separator is not None and isinstance(value, str):
            values = value.split(self.separator)
        else:
            values = [value]
        found = [text for text in map(self._as_text, values) if text]
        if len(set(found)) < len(found):
            raise DataError(
                f"the labels {value!r:.60} name one twice; a row holds the labels that it has, not a 0 or 1 for each "
                "that there is"
            )
        return found

    def _as_text(self, value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # whole numbers become broken ones where a column has gaps
        if isinstance(value, int):
            if not self.stated:
                return str(value)
            return self.stated[value] if value >= 0 else ""  # -1 is for rows whose label is kept secret
        if not isinstance(value, str):
            raise DataError(f"{value!r:.60} is no label; a label is text or a whole number")
        return value.strip()


@dataclass(frozen=True)
class Labels:
    """The labels of a task, numbered from 0 in their order."""

    names: tuple[str, ...]
    several: bool
    """Whether a row can have any number of them (multi-label) and not just one."""

    def numbers(self, names: Sequence[str], where: str) -> list[int]:
        """Of the labels of one row.

        Raises:
            DataError: a label that is not among them, or not one label where there must be one.
        """
        if not self.several and len(names) != 1:
            raise DataError(
                f"{where}: has {len(names) or 'no'} label{'s' if names else ''}; with recipe_args.problem=single_label "
                "each row needs one"
            )
        try:
            return sorted(self._numbers[name] for name in names)
        except KeyError as error:
            (unknown,) = error.args
            raise DataError(
                f"{where}: its label {unknown!r} is not among those of the training rows: {listed(self.names)}; "
                "correct it, or state them all in recipe_args.labels"
            ) from None

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}


def listed(names: Sequence[str]) -> str:
    """Names, as many as can be read."""
    more = f" … ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def in_order(names: Iterable[str]) -> list[str]:
    """Labels sorted, whole numbers by their value."""
    found = sorted(names)
    return sorted(found, key=int) if all(map(_WHOLE_NUMBER.fullmatch, found)) else found


def holds_lists(rows: StoredRows) -> bool:
    """Whether the label column holds lists."""
    return "list" in str(rows.schema.field("label").type)


def found_labels(splits: Splits, reading: Reading, context: RecipeContext, identity: JsonValue) -> list[str]:
    """The labels that the data names, else those of the training rows, in order; then known from the cache.

    The training rows of a stream are not looked at.
    """

    def build(folder: Path) -> None:
        names = list(reading.stated) or in_order(_labels_in(splits.train, reading, context))
        (folder / "labels.json").write_text(json.dumps(names), encoding="utf-8")

    context.cache.folder("labels", identity, build)
    names = known_labels(context, identity)
    assert names is not None, "they have just been written"
    return names


def known_labels(context: RecipeContext, identity: JsonValue) -> list[str] | None:
    """What `found_labels` has found; None: it was not called yet."""
    file = context.cache.path("labels", identity) / "labels.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _labels_in(rows: Any, reading: Reading, context: RecipeContext) -> set[str]:
    found: set[str] = set()
    context.progress.start("looking for labels", len(rows))
    labels = rows.select_columns(["label"])
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = labels[start : start + ROWS_AT_ONCE]["label"]
        for value in batch:
            found.update(reading(value))
        context.progress.advance(len(batch))
    context.progress.finish()
    return found


def check_number(names: Sequence[str], several: bool) -> None:
    """See that there is something to choose from.

    Raises:
        ConfigError: a label stated twice.
        DataError: too few labels.
    """
    if len(set(names)) < len(names):
        raise ConfigError("recipe_args.labels: names a label twice")
    if len(names) < (1 if several else 2):
        raise DataError(
            f"the training rows have {f'one label only, {names[0]!r}' if names else 'no label'}; classification needs "
            "two or more; is recipe_args.label_column the right one?"
        )
