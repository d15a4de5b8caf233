from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from launch.engine.batching import Loader
from launch.engine.scoring import Evaluation
from launch.errors import ConfigError
from launch.recipe import Scoring
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


def predicting(model: Any, batch: Any) -> tuple[torch.Tensor, list[Any]]:
    """Of each row its length, and whether the model thinks that the second token is even."""
    with torch.no_grad():
        even = model(input_ids=batch["input_ids"]).logits[:, 0].argmax(-1) % 2 == 0
    return loss(model, batch), [*zip((batch["labels"] != -100).sum(1).tolist(), even.tolist(), strict=True)]


def measured(predictions: list[Any]) -> dict[str, Any]:
    lengths = [length for length, _ in predictions]
    # Depends on the order, so that one that is mixed up is noticed.
    weighed = sum(position * length for position, length in enumerate(lengths))
    return {"rows": len(lengths), "weighed": weighed, "lengths": lengths, "even": sum(even for _, even in predictions)}


def measures() -> dict[tuple[int, int], Any]:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(tiny.gpt2())
    return {
        (rows, batch_size): Evaluation(
            accelerator,
            Loader(tiny.sequences(rows), collate),
            loss,
            count,
            batch_size,
            scoring=Scoring(predicting, measured),
            inference=lambda model: model,
        )(model)
        for rows in ROWS
        for batch_size in (1, 4)
    }


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_is_measured_once_and_in_its_place(world_size: int) -> None:
    by_rank = run_ranks(world_size, measures)
    for rows in ROWS:
        lengths = [len(sample) for sample in tiny.sequences(rows)]
        expected = measured([(length, False) for length in lengths])
        for batch_size in (1, 4):
            first = by_rank[0][rows, batch_size]
            assert first.details == {"lengths": lengths}
            for found in by_rank:
                metrics = found[rows, batch_size].metrics
                assert {name: metrics[name] for name in ("rows", "weighed")} == {
                    name: expected[name] for name in ("rows", "weighed")
                }
                assert metrics == first.metrics


def test_a_prediction_too_few_is_told() -> None:
    evaluation = Evaluation(
        Accelerator(cpu=True),
        Loader(tiny.sequences(3), collate),
        loss,
        count,
        3,
        scoring=Scoring(lambda model, batch: (torch.zeros(()), [1, 2]), measured),
        inference=lambda model: model,
    )
    with pytest.raises(ConfigError, match="gave 2 predictions for a batch of 3 samples"):
        evaluation(tiny.gpt2())
