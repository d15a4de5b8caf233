from __future__ import annotations

import itertools
import math
import resource
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from launch.engine.batching import Loader
from launch.engine.inference import Inference
from launch.engine.precision import Autocast
from launch.engine.scoring import Evaluation, Score
from launch.errors import ConfigError
from launch.recipe import Scoring, Width
from recipes import masked_lm
from recipes.causal_lm import collate, count, loss
from tests import tiny
from tests.gloo import run_ranks

ROWS = (50, 1, 3)
BATCH_SIZES = (1, 3, 4, 16)


def loaded(rows: int, *, by_length: bool) -> Loader:
    samples = tiny.sequences(rows)
    return Loader(samples, collate, lengths=tiny.lengths(samples) if by_length else None)


def scores() -> dict[tuple[int, int, bool], tuple[float, int, int, bool]]:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(tiny.gpt2()).train()
    found = {}
    for rows, batch_size, by_length in itertools.product(ROWS, BATCH_SIZES, (False, True)):
        score = Evaluation(accelerator, loaded(rows, by_length=by_length), loss, count, batch_size)(model)
        found[rows, batch_size, by_length] = (score.loss, score.counts.samples, score.counts.targets, model.training)
    return found


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_is_exact_for_any_ranks_and_batches(world_size: int) -> None:
    """With 1 row on 3 ranks, two ranks have none."""
    by_rank = run_ranks(world_size, scores)
    assert len(by_rank[0]) == len(ROWS) * len(BATCH_SIZES) * 2
    for rows in ROWS:
        samples = tiny.sequences(rows)
        with torch.no_grad():  # in float64: added up in fp32 the reference itself would be off by 1e-6
            expected = float(tiny.reference_loss(tiny.gpt2().eval().double(), samples))
        for batch_size, by_length in itertools.product(BATCH_SIZES, (False, True)):
            for found in by_rank:
                got, counted, targets, training = found[rows, batch_size, by_length]
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


@pytest.mark.parametrize("by_length", [False, True])
def test_only_the_first_samples_are_evaluated_on_request(by_length: bool) -> None:
    accelerator = Accelerator(cpu=True)
    model = tiny.gpt2().eval()
    advanced: list[int] = []
    evaluation = Evaluation(accelerator, loaded(10, by_length=by_length), loss, count, 4, max_samples=6)
    score = evaluation(model, advanced.append)
    with torch.no_grad():
        assert score.loss == pytest.approx(float(tiny.reference_loss(model, tiny.sequences(10)[:6])), abs=1e-6)
    assert score.counts.samples == 6
    assert advanced == [4, 2]


def test_batches_of_an_evaluation_hold_samples_of_like_length() -> None:
    seen: list[list[int]] = []

    def noted(model: Any, batch: Any) -> torch.Tensor:
        seen.append((batch["labels"] != -100).sum(1).tolist())
        return loss(model, batch)

    Evaluation(Accelerator(cpu=True), loaded(20, by_length=True), noted, count, 4)(tiny.gpt2())
    assert sum(seen, []) == sorted((len(each) for each in tiny.sequences(20)), reverse=True)  # noqa: RUF017


def test_nothing_to_predict_is_a_loss_of_zero() -> None:
    lonely: list[Any] = [tiny.sequences(4)[3]]
    score = Evaluation(Accelerator(cpu=True), Loader(lonely, collate), loss, count, 1)(tiny.gpt2())
    assert (score.loss, score.counts.targets) == (0.0, 0)


def predicting(model: Any, batch: Any) -> tuple[torch.Tensor, list[Any]]:
    """Of each row its number of targets, and whether the model thinks that the second token is even."""
    with torch.no_grad():
        even = model(input_ids=batch["input_ids"]).logits[:, 0].argmax(-1) % 2 == 0
    return loss(model, batch), [*zip((batch["labels"][:, 1:] != -100).sum(1).tolist(), even.tolist(), strict=True)]


def measured(predictions: list[Any]) -> dict[str, Any]:
    lengths = [length for length, _ in predictions]
    # Depends on the order, so that one that is mixed up is noticed.
    weighed = sum(position * length for position, length in enumerate(lengths))
    return {"rows": len(lengths), "weighed": weighed, "lengths": lengths, "even": sum(even for _, even in predictions)}


def measures() -> dict[tuple[int, int, bool], Any]:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(tiny.gpt2())
    return {
        (rows, batch_size, by_length): Evaluation(
            accelerator,
            loaded(rows, by_length=by_length),
            loss,
            count,
            batch_size,
            scoring=Scoring(predicting, measured),
            inference=lambda model: model,
        )(model)
        for rows in ROWS
        for batch_size in (1, 4)
        for by_length in (False, True)
    }


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_is_measured_once_and_in_its_place(world_size: int) -> None:
    by_rank = run_ranks(world_size, measures)
    for rows in ROWS:
        lengths = [len(sample) - 1 for sample in tiny.sequences(rows)]
        expected = measured([(length, False) for length in lengths])
        for case in itertools.product((rows,), (1, 4), (False, True)):
            first = by_rank[0][case]
            assert first.details == {"lengths": lengths}
            for found in by_rank:
                metrics = found[case].metrics
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


LARGE = 32_768
"""Tokens of a vocabulary as large models have it."""
LARGE_ROWS, KINDS = 50_000, 100


def large_rows() -> list[dict[str, np.ndarray[Any, Any]]]:
    """Rows of one target each, among which there are KINDS of inputs."""
    targets = np.random.RandomState(0).randint(0, LARGE, LARGE_ROWS)
    targets[::3] = np.arange(LARGE_ROWS)[::3] % KINDS  # what `Telling` tells
    return [{"input_ids": np.array([row % KINDS]), "labels": np.array([target])} for row, target in enumerate(targets)]


class Telling(torch.nn.Module):
    """Logits of 32k tokens for each of KINDS inputs, of which the input itself is the largest."""

    def __init__(self) -> None:
        super().__init__()
        logits = torch.randn(KINDS, LARGE, generator=torch.Generator().manual_seed(0)) + 8 * torch.eye(KINDS, LARGE)
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits[input_ids])


def large_evaluation() -> tuple[float, dict[str, float], int]:
    """Loss, metrics, and by how many bytes the peak memory has grown since after the first rows."""
    accelerator, model = Accelerator(cpu=True), Telling().eval()
    loader = Loader(large_rows(), masked_lm.Collate(0, Width()))

    def score(most: int) -> Score:
        scoring = Scoring(masked_lm.predict, masked_lm.measure)
        inference = partial(Inference, accelerator, autocast=Autocast("cpu", torch.float32))
        found = Evaluation(
            accelerator, loader, masked_lm.loss, masked_lm.count, 64, most, scoring=scoring, inference=inference
        )(model)
        assert found is not None
        return found

    score(640)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = score(LARGE_ROWS)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return found.loss, found.metrics, grown * 1024


@pytest.mark.slow
def test_logits_of_many_rows_are_never_held() -> None:
    """50,000 rows of 32k logits are 6.6 GB; measured in a process of its own, whose peak is not that of other tests."""
    ((loss, metrics, grown),) = run_ranks(1, large_evaluation, timeout_seconds=550)
    log_probabilities = Telling().logits.detach().double().log_softmax(-1).numpy()
    inputs, targets = (np.concatenate([row[name] for row in large_rows()]) for name in ("input_ids", "labels"))
    assert loss == pytest.approx(-log_probabilities[inputs, targets].mean(), rel=1e-6)
    assert metrics == {"masked_accuracy": (log_probabilities.argmax(-1)[inputs] == targets).mean()}
    assert 1 / 3 < metrics["masked_accuracy"] < 1 / 2
    assert grown < 100e6
