"""Models and tokenizers that recipes make themselves: who makes them elsewhere is to train the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes import embedded, embedded_questions, summarization, translation
from recipes.embedded_encoder import small_encoder
from recipes.models import Embedded

MADE = {
    "language model": embedded.LANGUAGE_MODEL,
    "encoder": small_encoder(embedded.paragraphs, "paragraphs"),
    "questions": embedded_questions.QUESTION_ENCODER,
    "dates": translation.SMALL_T5,
    "logs": summarization.SMALL_T5,
}


@pytest.mark.parametrize("model", MADE.values(), ids=MADE)
def test_what_is_made_is_the_same_each_time(model: Embedded, tmp_path: Path) -> None:
    """Though tokenizers count and number tokens in the order of hash tables, which differs each time."""
    made = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        model.make(folder)
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert set(made[0]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert made[0] == made[1] == made[2]
