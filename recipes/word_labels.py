"""Labels of words: which there are, their numbers, and how well they were predicted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from launch.errors import ConfigError, DataError
from launch.recipe import Metrics, RecipeContext
from recipes import metrics
from recipes.labels import in_order, listed
from recipes.tables import StoredRows, class_names

if TYPE_CHECKING:
    from recipes.rows import RowStream, Splits


@dataclass(frozen=True)
class WordLabels:
    """The labels of words, numbered from 0 in their order."""

    names: tuple[str, ...]
    stated: tuple[str, ...] = ()
    """Names that the data itself gives to its numbers (`datasets.ClassLabel`); none: a number is its own name."""

    @property
    def are_of_entities(self) -> bool:
        """Whether they say where entities begin (B-) and go on (I-)."""
        return any(name.startswith(("B-", "I-")) for name in self.names)

    def number(self, value: Any, where: str) -> int:
        """Of a value of the labels column.

        Raises:
            DataError: it is none of the labels.
        """
        if self.stated and isinstance(value, int) and 0 <= value < len(self.stated):
            value = self.stated[value]
        if (found := self._numbers.get(str(value))) is not None:
            return found
        raise DataError(
            f"{where}: its label {value!r:.40} is not among those of the training rows: {listed(self.names)}; correct "
            "it, or state them all in recipe_args.labels"
        )

    def following(self, number: int) -> int:
        """The label of what goes on with the same entity."""
        name = self.names[number]
        return self._numbers.get(f"I-{name[2:]}", number) if name.startswith("B-") else number

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def measure(self, sentences: list[Any]) -> Metrics:
        """Metrics of pairs for each sentence, the labels that were predicted and the true ones, word by word."""
        from sklearn.metrics import precision_recall_fscore_support

        if self.are_of_entities:
            tags = [[[self.names[number] for number in row] for row in side] for side in zip(*sentences, strict=True)]
            return metrics.compute(("seqeval",), tags[0], tags[1])
        guessed, known = ([number for row in side for number in row] for side in zip(*sentences, strict=True))
        found: Metrics = metrics.compute(("accuracy",), guessed, known)
        numbers = range(len(self.names))
        each = precision_recall_fscore_support(known, guessed, labels=numbers, average=None, zero_division=0)
        found["by_label"] = {
            name: dict(zip(("precision", "recall", "f1", "words"), values, strict=True))
            for name, *values in zip(self.names, *(part.tolist() for part in each), strict=True)
        }
        return found


def labels_of(rows: Splits, chosen: tuple[str, ...], context: RecipeContext) -> WordLabels:
    """The labels that are chosen, else those that the data states, else those of the training rows.

    Raises:
        ConfigError: a label is chosen twice.
        DataError: there are fewer than two.
    """
    stated = class_names(rows.validation.schema, "labels")
    names = chosen or stated or tuple(_found_labels(rows.train, rows.identity, context))
    if len(set(names)) < len(names):
        raise ConfigError("recipe_args.labels: names a label twice")
    if len(names) < 2:
        raise DataError(
            f"the training rows have {f'one label only, {names[0]!r}' if names else 'no label'}; classification needs "
            "two or more; is recipe_args.labels_column the right one?"
        )
    return WordLabels(names, stated)


def _found_labels(train: StoredRows | RowStream, identity: JsonValue, context: RecipeContext) -> list[str]:
    """The labels of rows, in order; looked for once, then known from the cache."""

    def build(folder: Path) -> None:
        found = {str(label) for row in train for label in listed_values(row["labels"], "training", "labels")}
        (folder / "labels.json").write_text(json.dumps(in_order(found)), encoding="utf-8")

    folder = context.cache.folder("labels-of-words", {"rows": identity, "version": 1}, build)
    names: list[str] = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    return names


def listed_values(value: Any, split: str, name: str) -> list[Any]:
    """The words or labels of a row; none where it has none.

    Raises:
        DataError: it is no list.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(
            f"the {split} rows hold {value!r:.60} where a list of {name} should be; set recipe_args.{name}_column"
        )
    return value
