"""CoNLL files: a line for each word and its labels, a blank line between sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launch.errors import DataError
from recipes.files import Row, open_text


def read_conll(path: Path, words: str, labels: str) -> Iterator[Row]:
    """Sentences of a CoNLL file: a line for each word and its labels, a blank line between sentences.

    Columns: `field_1`, `field_2` and so on; the first is called `words` too, the last `labels`.

    Raises:
        DataError: a line with fewer than two fields, or not as many as the first of its sentence.
    """
    sentence: list[list[str]] = []
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            fields = line.split("\t") if "\t" in line else line.split()
            if not line.strip() or fields[0] == "-DOCSTART-":
                if sentence:
                    yield _as_row(sentence, words, labels)
                sentence = []
                continue
            if len(fields) < 2 or (sentence and len(fields) != len(sentence[0])):
                wanted = f"{len(sentence[0])}, as the line before" if sentence else "a word and its label"
                raise DataError(f"{path}:{number}: has {len(fields)} field{'s'[: len(fields) > 1]}; it needs {wanted}")
            sentence.append([field.strip() for field in fields])
    if sentence:
        yield _as_row(sentence, words, labels)


def _as_row(sentence: list[list[str]], words: str, labels: str) -> Row:
    fields = [list(values) for values in zip(*sentence, strict=True)]
    return {words: fields[0], labels: fields[-1]} | {f"field_{place}": each for place, each in enumerate(fields, 1)}
