"""The look at the data before training: what it counts, what it warns of, and a sample as text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launch.engine.preflight import Lengths, look, preview
from launch.recipe import Prepared
from tests.commands import shoal

WORDS = {"[PAD]": 0, "[CLS]": 1, "a": 2, "b": 3, "long": 4, "##er": 5, "[UNK]": 6}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordPiece(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", cls_token="[CLS]", unk_token="[UNK]")


def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in samples)
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in samples])
    first = samples[0][1]
    if isinstance(first, int):
        labels = torch.tensor([label for _, label in samples])
    else:
        labels = torch.tensor([[*row, *[-100] * (longest - len(row))] for _, row in samples])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def prepared(train: list[Any], validation: list[Any], **more: Any) -> Prepared:
    return Prepared(
        build_model=lambda: None,  # type: ignore[arg-type, return-value]
        tokenizer=tokenizer(),
        train=train,
        validation=validation,
        collate=collate,
        loss=lambda model, batch: torch.zeros(()),
        count=lambda batch: int((batch["labels"] != -100).sum()),
        **more,
    )


CLASSES = [([1, 2], 0)] * 19 + [([1, 2, 3, 4], 1)]


def test_lengths_labels_and_overlap_are_counted() -> None:
    found = look(prepared(CLASSES, [([1, 2], 1), ([1, 3], 0)], facts={"labels": ["no", "yes"], "cut_short": 3}))
    training = found.splits["training"]
    assert (training.samples, training.examined, training.lengths) == (20, 20, Lengths(2, 4, 4))
    assert training.labels == {"no": 19, "yes": 1}
    assert training.ignored_share is None
    assert found.overlap == 1, "the inputs count, not the label"
    lines = found.lines()
    assert lines[0] == "training: 20 samples; tokens median 2, 95 % up to 4, longest 4"
    assert "training labels: no 95.0%, yes 5.0%" in lines
    assert "cut short: 3" in lines
    assert "warning: no is the label of more than 9 in 10 training samples" in lines
    assert "warning: 1 of 2 validation samples are in the training data too" in lines


def test_ignored_labels_and_samples_without_any_target() -> None:
    train = [([1, 2, 3], [-100, 2, 3]), ([1, 2], [-100, -100]), ([1, 4, 5, 2], [-100, 4, 5, 2])]
    found = look(prepared(train, train[:1]))
    assert found.splits["training"].ignored_share == pytest.approx(4 / 9), "padding is neither"
    assert found.splits["training"].without_targets == 1
    assert "warning: 1 of 3 training samples have no target: nothing to learn" in found.lines()


def test_tokens_that_the_tokenizer_does_not_know_are_told() -> None:
    found = look(prepared([([1, 6, 2, 6], 0), ([1, 2], 1)], [([1, 3], 0)]))
    assert found.splits["training"].unknown_share == pytest.approx(2 / 6)
    assert "warning: 33% of the training tokens are unknown to the tokenizer" in found.lines()
    assert found.splits["validation"].unknown_share == 0


def test_much_that_was_cut_is_told() -> None:
    facts = {"train": {"rows": 200, "texts_cut_short": 30}, "validation": {"rows": 9, "share_of_source_cut": 0.25}}
    found = look(prepared(CLASSES, [([1, 3], 0)], facts=facts)).lines()
    assert "validation: rows 9, share of source cut 25.0%" in found
    warned = [line.partition(";")[0] for line in found if line.startswith("warning: ") and "cut" in line]
    assert warned == ["warning: train: texts cut short: 15%", "warning: validation: source cut: 25%"]


def test_only_so_many_samples_are_looked_at_and_they_are_spread() -> None:
    found = look(prepared([([1] * (1 + index), 0) for index in range(100)], CLASSES), most=10)
    assert found.splits["training"].examined == 10
    assert found.splits["training"].lengths == Lengths(51, 91, 91)
    assert "10 looked at" in found.lines()[0]


def test_a_stream_is_read_from_the_front() -> None:
    class Rows:
        def __iter__(self) -> Any:
            return iter(CLASSES)

    found = look(dataclasses.replace(prepared(CLASSES, CLASSES), train=Rows()))
    assert found.splits["training"].samples is None
    assert found.splits["training"].examined == 20
    assert found.lines()[0].startswith("training: a stream;")


def test_a_sample_is_shown_with_its_targets_marked() -> None:
    shown = [
        line.plain for line in preview(prepared([([1, 2, 4, 5, 3], [-100, -100, 4, 5, -100]), ([1, 2], [-100, 2])], []))
    ]
    assert shown[1:] == ["  [CLS] a‹ longer› b", "  [CLS]‹ a› + 3 padding"]


def test_a_label_is_shown_by_its_name() -> None:
    shown = [line.plain for line in preview(prepared(CLASSES, [], facts={"labels": ["no", "yes"]}), samples=1)]
    assert shown[1:] == ["  [CLS] a", "    labels: no"]


@pytest.mark.slow
def test_plan_shows_the_data_on_request(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three\n" * 400)
    arguments = ("causal_lm", "recipe_args.train_files=text.txt", "recipe_args.block_size=16")
    before = shoal(tmp_path, "plan", *arguments)
    assert "training: " not in before.stdout
    done = shoal(tmp_path, "plan", *arguments, "--data")
    assert done.returncode == 0, done.stderr
    assert "first training samples, targets in ‹ ›:" in done.stdout
    assert "warning: " in done.stdout, "the end of such a text is like its beginning"
    assert "one two three" in done.stdout
