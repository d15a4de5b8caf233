"""What the metrics of texts share: a predicted text per row, and one reference or several."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from launch.errors import DataError


def text_features() -> Any:
    """One reference per row, or a list of them."""
    from datasets import Features, List, Value

    text = Value("string")
    return [Features(predictions=text, references=text), Features(predictions=text, references=List(text))]


def reference_lists(references: list[Any]) -> list[list[str]]:
    """The references of each row, one or more.

    Raises:
        DataError: a row without a reference.
    """
    lists = [[row] if isinstance(row, str) else row for row in references]
    for number, row in enumerate(lists):
        if not row:
            raise DataError(f"metrics: references, row {number}: has no reference; leave the row out")
    return lists


def reference_streams(references: list[Any]) -> list[list[str | None]]:
    """First references of all rows, second ones, and so on, as sacrebleu takes them; None where a row has fewer.

    Raises:
        DataError: a row without a reference.
    """
    return [list(stream) for stream in zip_longest(*reference_lists(references))]
