from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from launch.engine.batching import Loader
from launch.engine.scoring import Evaluation
from recipes.causal_lm import collate, count, loss
from tests import tiny
from tests.gloo import run_ranks

ROWS = (50, 1, 3)
BATCH_SIZES = (1, 3, 4, 16)


def scores() -> dict[tuple[int, int], tuple[float, int, int, bool]]:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(tiny.gpt2()).train()
    found = {}
    for rows in ROWS:
        for batch_size in BATCH_SIZES:
            evaluation = Evaluation(accelerator, Loader(tiny.sequences(rows), collate), loss, count, batch_size)
            score = evaluation(model)
            found[rows, batch_size] = (score.loss, score.counts.samples, score.counts.targets, model.training)
    return found


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_is_exact_for_any_ranks_and_batches(world_size: int) -> None:
    """With 1 row on 3 ranks, two ranks have none."""
    by_rank = run_ranks(world_size, scores)
    assert len(by_rank[0]) == len(ROWS) * len(BATCH_SIZES)
    for rows in ROWS:
        samples = tiny.sequences(rows)
        with torch.no_grad():
            expected = float(tiny.reference_loss(tiny.gpt2().eval(), samples))
        for batch_size in BATCH_SIZES:
            for found in by_rank:
                got, counted, targets, training = found[rows, batch_size]
                assert got == pytest.approx(expected, abs=1e-6)
                assert math.exp(got) == pytest.approx(math.exp(expected), rel=1e-6)
                assert counted == rows
                assert targets == sum(len(sample) - 1 for sample in samples)
                assert training  # the mode is put back


def test_dropout_is_off_while_evaluating_and_on_again_afterwards() -> None:
    model = tiny.gpt2().train()
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    for module in dropouts:
        module.p = 0.5
    score = Evaluation(Accelerator(cpu=True), Loader(tiny.sequences(10), collate), loss, count, 4)(model)
    with torch.no_grad():
        assert score.loss == pytest.approx(float(tiny.reference_loss(tiny.gpt2().eval(), tiny.sequences(10))), abs=1e-6)
    assert all(module.training for module in dropouts)


def test_only_the_first_samples_are_evaluated_on_request() -> None:
    accelerator = Accelerator(cpu=True)
    model = tiny.gpt2().eval()
    advanced: list[int] = []
    evaluation = Evaluation(accelerator, Loader(tiny.sequences(10), collate), loss, count, 4, max_samples=6)
    score = evaluation(model, advanced.append)
    with torch.no_grad():
        assert score.loss == pytest.approx(float(tiny.reference_loss(model, tiny.sequences(10)[:6])), abs=1e-6)
    assert score.counts.samples == 6
    assert advanced == [4, 2]


def test_nothing_to_predict_is_a_loss_of_zero() -> None:
    lonely: list[Any] = [tiny.sequences(4)[3]]
    score = Evaluation(Accelerator(cpu=True), Loader(lonely, collate), loss, count, 1)(tiny.gpt2())
    assert (score.loss, score.counts.targets) == (0.0, 0)
