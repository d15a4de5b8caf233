"""Values that are no text are told in one line also where a model is made of the texts themselves."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launch.cache import Cache
from launch.errors import DataError
from launch.recipe import RecipeContext
from recipes import masked_lm, question_answering, text_classification, token_classification

ANSWER = {"text": ["b"], "answer_start": [2]}
QUESTION = {"id": "x", "question": "what", "context": "a b", "answers": ANSWER}


@pytest.mark.parametrize(
    ("recipe", "row", "message"),
    [
        (masked_lm, {"text": 5}, "hold 5 where a text should be; set recipe_args.text_column"),
        (masked_lm, {"text": ["a"]}, r"hold \['a'\] where a text should be; set recipe_args.text_column"),
        (text_classification, {"text": {"a": 1}, "label": 0}, "hold {'a': 1} where a text should be"),
        (token_classification, {"tokens": 5, "ner_tags": ["O"]}, "hold 5 where a list of words should be"),
        (token_classification, {"tokens": [5], "ner_tags": ["O"]}, "holds 5 where a word should be"),
        (question_answering, {**QUESTION, "question": ["a"]}, r"question x: question: got \['a'\]; must be text; set "),
        (
            question_answering,
            {**QUESTION, "context": 5},
            "question x: context: got 5; must be text; set recipe_args.con",
        ),
    ],
)
def test_a_value_that_is_no_text(tmp_path: Path, recipe: ModuleType, row: dict[str, Any], message: str) -> None:
    other = {"text": {"label": 1}, "tokens": {"ner_tags": ["B-X"] * len(row.get("ner_tags", ()))}}
    rows = [row, *({**row, **changed} for name, changed in other.items() if name in row)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    args = recipe.Args(train_files=str(file), validation_files=str(file))
    with pytest.raises(DataError, match=message):
        recipe.prepare(args, RecipeContext(Cache(tmp_path / "cache"), seed=0))
