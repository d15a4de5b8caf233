"""How the data of a run come to its ranks: as the plan says, by what the recipe tells of lengths."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

from launch.engine import cutting
from launch.engine.batching import MicroBatch, Position
from launch.engine.data import open_data
from launch.engine.scoring import Evaluation
from launch.errors import ConfigError
from launch.recipe import Prepared
from recipes.causal_lm import collate, count, loss
from tests import tiny
from tests.test_engine_export import tokenizer
from tests.test_engine_sharding import plan_for

SAMPLES = 20
PREPARED = Prepared(
    *(tiny.gpt2, tokenizer(), tiny.sequences(SAMPLES), tiny.sequences(7, seed=1), collate, loss, count),
    lengths=tiny.lengths,
)


def shapes_of(folder: Path, *overrides: str, prepared: Prepared = PREPARED) -> list[list[tuple[int, ...]]]:
    """Of the first two windows of rank 0, the lengths of the samples of each micro-batch; and the batches are these."""
    plan = plan_for("single", 1, folder, "train.micro_batch_size=8", *overrides)
    work = open_data(plan, prepared, 0).work(plan, 2, Position(), 0, 1)
    found = []
    for window, batches in work:
        cells = [tuple(len(prepared.train[index]) for index in cell.samples) for cell in window.micro_batches]  # type: ignore[index]
        assert [tuple(batch["input_ids"].shape) for batch in batches] == [(len(cell), max(cell)) for cell in cells]
        found.append(cells)
    return found


def test_samples_are_dealt_as_planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cutting, "PASS_TOKENS", 8)
    plain, cut = shapes_of(tmp_path, "train.group_by_length=off"), shapes_of(tmp_path)
    dealt = shapes_of(tmp_path, "train.compile=true")  # which would compile a program for each shape
    for as_it_comes, in_one, in_parts in zip(plain, dealt, cut, strict=True):
        assert len(as_it_comes) == len(in_one) == 1 < len(in_parts)
        assert in_one[0] == tuple(sorted(as_it_comes[0], reverse=True)) != as_it_comes[0]
        assert sum(in_parts, ()) == in_one[0]
    assert shapes_of(tmp_path, prepared=dataclasses.replace(PREPARED, lengths=None)) == plain


def test_what_is_evaluated_is_dealt_by_length_too(tmp_path: Path) -> None:
    seen = []
    for setting in ("auto", "off"):
        plan = plan_for("single", 1, tmp_path, f"train.group_by_length={setting}")
        data = open_data(plan, PREPARED, 0).validation
        scored = Evaluation(Accelerator(cpu=True), data, loss, count, plan.eval_rows)
        seen.append([window.micro_batches for window, _ in scored._work()])
    by_length = tuple(np.argsort(-tiny.lengths(PREPARED.validation), kind="stable").tolist())
    assert seen[0] == [(MicroBatch(by_length[start : start + 3]),) for start in (0, 3, 6)]
    assert seen[1] == [(MicroBatch(each),) for each in ((0, 1, 2), (3, 4, 5), (6,))]


@pytest.mark.parametrize(
    ("told", "got"),
    [
        (lambda samples: np.ones(len(samples) - 1, int), r"shape \(19,\), int64"),
        (lambda samples: np.ones((len(samples), 1), int), r"shape \(20, 1\), int64"),
        (lambda samples: [0.5] * len(samples), r"shape \(20,\), float64"),
    ],
)
def test_lengths_that_are_none_are_refused(told: Any, got: str, tmp_path: Path) -> None:
    prepared = dataclasses.replace(PREPARED, lengths=told)
    with pytest.raises(
        ConfigError, match=rf"test_engine_data.py:\d+: lengths\(\) gave an array of {got}, for the 20 tr"
    ):
        shapes_of(tmp_path, prepared=prepared)
    assert shapes_of(tmp_path, "train.group_by_length=off", prepared=prepared)
