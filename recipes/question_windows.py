"""Questions with their contexts cut into windows that a model can read, and where in a window the answer is.

A row of SQuAD becomes one window or more: the question, then as much of the context as there is room for, each window
beginning `stride` tokens before the end of the one before. Characters are counted in code points, as SQuAD does.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import DataError
from recipes.batches import IGNORED
from recipes.encoding import Columns
from recipes.files import NO_READERS, Row, open_text, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOWHERE = (-1, -1)
"""Characters of a token that is none of the context's."""

Span = tuple[int, int]
"""A beginning, and an end: characters (the end is behind the last) or tokens (the end is the last)."""


# --- rows ------------------------------------------------------------------------------------------------


def read_squad(path: Path) -> Iterator[Row]:
    """Rows `id`, `question`, `context`, `answers` of a SQuAD file as published; of other JSON the rows it holds.

    Raises:
        DataError: names the file and the question that lacks something.
    """
    with open_text(path) as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError:
            content = None  # perhaps objects line by line
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, list):
        yield from read_rows(path, readers=NO_READERS)
        return
    for article in data:
        if not isinstance(article, dict):
            raise DataError(f"{path}: `data` holds {article!r:.40}; must be articles as in SQuAD files, or rows")
        if "paragraphs" not in article:
            yield article
            continue
        for paragraph in article["paragraphs"]:
            yield from (_squad_row(path, paragraph, question) for question in paragraph["qas"])


def _squad_row(path: Path, paragraph: Any, question: Any) -> Row:
    try:
        answers = [] if question.get("is_impossible") else question["answers"]
        return {
            "id": question["id"],
            "question": question["question"],
            "context": paragraph["context"],
            "answers": {name: [answer[name] for answer in answers] for name in ("text", "answer_start")},
        }
    except (KeyError, TypeError, AttributeError) as error:
        name = question.get("id", "without id") if isinstance(question, dict) else repr(question)[:40]
        raise DataError(f"{path}: question {name}: is not as in SQuAD files: {error!r} is missing or wrong") from None


def answers_of(row: Row) -> list[tuple[str, int]]:
    """Texts of the answers and the characters they begin at; none: there is no answer in the context.

    Raises:
        DataError: names the question, what it has and what is allowed.
    """
    given = row["answers"]
    try:
        answers = _parsed(given) if isinstance(given, str) else given
        if isinstance(answers, list):
            pairs = [(answer["text"], answer["answer_start"]) for answer in answers]
        else:
            pairs = list(zip(answers["text"], answers["answer_start"], strict=True)) if answers else []
        if all(isinstance(text, str) and isinstance(start, int) for text, start in pairs):
            return [(text, start) for text, start in pairs if text.strip()]
    except (ValueError, SyntaxError, KeyError, TypeError):
        pass
    raise DataError(
        f'question {row["id"]}: answers: got {given!r:.80}; must be {{"text": ["…"], "answer_start": [0]}}, one start '
        "for each text, in a csv file as JSON; set recipe_args.answers_column if another column holds them"
    )


def _parsed(text: str) -> Any:
    """Of a csv file: JSON, or as Python writes it."""
    try:
        return json.loads(text) if text.strip() else []
    except ValueError:
        return ast.literal_eval(text)


def place_of(context: str, text: str, start: int) -> Span | None:
    """The characters of an answer, without white space around it; None: the context does not hold it.

    Where it is elsewhere than stated, the nearest place is taken: some files count in bytes or UTF-16 units.
    """
    stripped = text.strip()
    start += len(text) - len(text.lstrip())
    if start < 0 or not context.startswith(stripped, start):
        places = [match.start() for match in re.finditer(re.escape(stripped), context)]
        if not places:
            return None
        start = min(places, key=lambda place: abs(place - start))
    return start, start + len(stripped)


# --- windows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Makes windows of rows."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    stride: int
    max_question_length: int

    def __call__(self, rows: Columns, with_offsets: bool = False) -> Columns:
        """Columns of windows, in the order of rows and of the context: a function for `encode_rows`.

        The tokenizer's own inputs, `start_positions` and `end_positions` (tokens of the window), `number` (of the
        window among those of its question) and `question_cut`; on demand `offsets`, characters of each token.
        """
        made: Columns = {name: [] for name in self._names}
        questions, cut = self._fitting_questions(_texts(rows, "question"))
        encoded = self.tokenizer(
            questions,
            _texts(rows, "context"),
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            padding=False,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        of_row: list[list[int]] = [[] for _ in questions]
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            of_row[row].append(window)
        offsets = [_context_only(encoded, window) for window in range(len(encoded["input_ids"]))]
        targets: Columns = {"start_positions": [], "end_positions": [], "number": [], "question_cut": []}
        for row, windows in enumerate(of_row):
            values = {name: rows[name][row] for name in ("id", "context", "answers")}
            firsts = [self._first_token(encoded["input_ids"][window]) for window in windows]
            for start, end in positions(values, [offsets[window] for window in windows], firsts):
                targets["start_positions"].append(start)
                targets["end_positions"].append(end)
            targets["number"] += range(len(windows))
            targets["question_cut"] += [cut[row]] * len(windows)
        order = [window for windows in of_row for window in windows]
        for name in made:
            made[name] = [encoded[name][window] for window in order]
        if with_offsets:
            made["offsets"] = [[number for span in offsets[window] for number in span] for window in order]
        return {**made, **targets}

    @property
    def _names(self) -> list[str]:
        return [name for name in self.tokenizer.model_input_names if name in ("input_ids", "token_type_ids")]

    def _fitting_questions(self, questions: list[str]) -> tuple[list[str], list[bool]]:
        """Questions of at most `max_question_length` tokens, and which of them have been cut for that."""
        texts = [question.strip() for question in questions]
        plain = {"add_special_tokens": False, "return_attention_mask": False}
        lengths = [len(ids) for ids in self.tokenizer(texts, **plain)["input_ids"]]
        cut = [length > self.max_question_length for length in lengths]
        for place in (place for place, is_cut in enumerate(cut) if is_cut):
            # The last word may be cut into other tokens once what follows is gone, so this is looked at again.
            for most in range(self.max_question_length, 0, -1):
                encoded = self.tokenizer(texts[place], return_offsets_mapping=True, **plain)
                if len(encoded["input_ids"]) <= self.max_question_length:
                    break
                texts[place] = texts[place][: encoded["offset_mapping"][most - 1][1]]
        return texts, cut

    def _first_token(self, ids: list[int]) -> int:
        """The place of the token that stands for the whole window: CLS, which some models have at the end."""
        return ids.index(self.tokenizer.cls_token_id) if self.tokenizer.cls_token_id in ids else 0


def _texts(rows: Columns, name: str) -> list[str]:
    for row, value in zip(rows["id"], rows[name], strict=True):
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"question {row}: {name}: got {value!r:.60}; must be text; set recipe_args.{name}_column if another "
                "column holds it"
            )
    return [value or "" for value in rows[name]]


def _context_only(encoded: Any, window: int) -> list[Span]:
    """Characters of each token of a window."""
    spans = zip(encoded["offset_mapping"][window], encoded.sequence_ids(window), strict=True)
    return [span if sequence == 1 else NOWHERE for span, sequence in spans]


def positions(row: Row, windows: list[list[Span]], firsts: list[int]) -> list[Span]:
    """The first and the last token of the answer in each window of a question.

    A window that holds it in part or not at all points to its first token, twice. Of several answers the first counts
    that some window holds whole; if there are answers, but none of that kind, all positions are IGNORED.

    Args:
        row: `id`, `context` and `answers`.
        windows: for each window the characters of its tokens.
        firsts: for each window the place of the token that means: not here.
    """
    nothing = [(first, first) for first in firsts]
    answers = answers_of(row)
    for text, start in answers:
        characters = place_of(row["context"] or "", text, start)
        found = _tokens(characters, windows) if characters else []
        if any(found):
            return [span or none for span, none in zip(found, nothing, strict=True)]
    return [(IGNORED, IGNORED) for _ in firsts] if answers else nothing


def _tokens(characters: Span, windows: list[list[Span]]) -> list[Span | None]:
    """Of each window that holds the characters whole, their first and last token."""
    start, end = characters
    touched = [
        [place for place, (left, right) in enumerate(spans) if left < end and right > start] for spans in windows
    ]
    # Between the first and the last character that any window has of it, for a tokenizer may leave out some.
    parts = [
        (spans[places[0]][0], spans[places[-1]][1]) if places else None
        for spans, places in zip(windows, touched, strict=True)
    ]
    known = [part for part in parts if part]
    if not known:
        return [None] * len(windows)
    whole = (min(left for left, _ in known), max(right for _, right in known))
    return [(places[0], places[-1]) if part == whole else None for part, places in zip(parts, touched, strict=True)]
