"""`shoal tokenize`: what a tokenizer makes of texts, compared with what was put into it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.tokenized import show
from tests.commands import shoal


@pytest.fixture(scope="module")
def pairing() -> Any:
    """A tokenizer of words, as BERT has one: pairs, special tokens, padding; it knows six words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "a", "mat"]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep")},
        model_max_length=6,
        padding_side="left",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def test_a_pair(pairing: Any) -> None:
    found = show(pairing, ["the cat", "sat on"])
    (row,) = found["rows"]
    assert row["inputs"] == {
        "input_ids": [2, 4, 5, 3, 6, 7, 3],
        "token_type_ids": [0, 0, 0, 0, 1, 1, 1],
        "attention_mask": [1] * 7,
    }
    assert [token["token"] for token in row["tokens"] if token["special"]] == ["[CLS]", "[SEP]", "[SEP]"]
    assert row["decoded"] == "[CLS] the cat [SEP] sat on [SEP]"
    assert row["decoded_without_special_tokens"] == "the cat sat on"
    assert row["round_trips"]
    assert (found["vocabulary_size"], found["model_max_length"], found["padding_side"]) == (10, 6, "left")
    special = found["special_tokens"]
    assert special["pad"] == {"token": "[PAD]", "id": 0} and special["cls"] == {"token": "[CLS]", "id": 2}
    assert special["mask"] is special["eos"] is None


def test_a_batch_is_padded_on_its_side(pairing: Any) -> None:
    first, second = show(pairing, ["the cat sat", "a"], batch=True)["rows"]
    assert first["inputs"]["input_ids"] == [2, 4, 5, 6, 3]
    assert second["inputs"]["input_ids"] == [0, 0, 2, 8, 3]
    assert second["inputs"]["attention_mask"] == [0, 0, 1, 1, 1]
    assert second["decoded_without_special_tokens"] == "a"


def test_a_text_that_does_not_come_back(pairing: Any) -> None:
    (row,) = show(pairing, ["the dog sat"])["rows"]
    assert not row["round_trips"] and row["inputs"]["input_ids"] == [2, 4, 1, 6, 3]


def test_the_command_needs_no_data_of_the_recipe(tmp_path: Path) -> None:
    text = "a=b, tab\tand 😀"
    in_words, as_json = (
        shoal(tmp_path, "tokenize", "causal_lm", text, "train.max_steps=3", *more) for more in ((), ("--json",))
    )
    assert (in_words.returncode, as_json.returncode, as_json.stderr) == (0, 0, ""), in_words.stderr
    (row,) = json.loads(as_json.stdout)["rows"]
    assert row["decoded"] == text and row["round_trips"]
    lines = in_words.stdout.splitlines()
    assert f"input_ids: {row['inputs']['input_ids']}" in lines and "decodes to the same text" in lines
    assert sum(
        line.split()[:2] == [str(position), str(token["id"])]
        for line in lines
        for position, token in enumerate(row["tokens"])
    ) == len(row["tokens"])
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("tokens-")]


def test_a_recipe_that_gives_its_tokenizer_with_its_data_only(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("own_recipe.py"), tmp_path / "mine.py")
    (tmp_path / "mine.yaml").write_text("recipe: ./mine.py\ntrain: {max_steps: 1}\n")
    done = shoal(tmp_path, "tokenize", "mine.yaml", "a", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["inputs"]["input_ids"] == [0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train.max_steps=3",), 2, "0 texts; give one, or two that make a pair, or any number with --batch"),
        (("a", "b", "c"), 2, "3 texts; give one, or two that make a pair"),
        (("a", "train.max_step=3"), 2, "train.max_step = 3: unknown key; did you mean train.max_steps?"),
        (("a", "recipe_args.model=/none"), 3, "recipe_args.model = /none: no such folder"),
    ],
)
def test_what_cannot_be_tokenised(arguments: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    done = shoal(tmp_path, "tokenize", "causal_lm", *arguments)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1)
    assert done.stderr.startswith("shoal: ") and message in done.stderr
