"""What every shipped recipe keeps to, whatever its task: what the engine, the plan and `shoal` take for granted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launch.assets import recipes_folder
from launch.cache import Cache
from launch.config import load
from launch.engine.batching import Loader, MicroBatch
from launch.engine.contract import checked_lengths
from launch.engine.devices import Filled
from launch.engine.export import logits_of
from launch.engine.inference import Inference
from launch.engine.keeping import _fingerprint
from launch.engine.loss import count_batch, count_tokens
from launch.engine.precision import Autocast
from launch.engine.preflight import look, preview
from launch.engine.scoring import Evaluation
from launch.engine.streams import first_samples
from launch.recipe import Batch, Prepared, RecipeContext
from launch.registry import load_recipe, shipped_recipes
from recipes.batches import count_targets
from tests.gloo import run_ranks

RECIPES = shipped_recipes()
RUN_FILES = sorted(recipes_folder().glob("*.yaml"))
ROWS = 5


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def prepared_by(name: str, cache: str) -> Prepared:
    """The embedded default, with few rows to evaluate on."""
    recipe = load_recipe(load(recipes_folder() / f"{name}.yaml", []))
    prepared = recipe.prepare(RecipeContext(Cache(Path(cache)), 0))
    return dataclasses.replace(prepared, validation=first_samples(prepared.validation, ROWS))


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request: pytest.FixtureRequest, cache: Path) -> tuple[str, Prepared, Any]:
    prepared = prepared_by(request.param, str(cache))
    torch.manual_seed(0)
    return request.param, prepared, prepared.build_model().eval()


def batch_of(prepared: Prepared, *positions: int) -> Batch:
    return prepared.collate([prepared.validation[position] for position in positions])  # type: ignore[index]


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 7
    assert len(RUN_FILES) > len(RECIPES)


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_a_run_file_says_how_to_run_it_and_what_comes_out(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header = text[: text.index("\nrecipe:")]
    for word in ("command", "time", "expected"):
        assert any(line.lstrip("# ").startswith(word) for line in header.splitlines()), word
    assert load(path, []).config.recipe in RECIPES
    assert yaml.safe_load(text)["recipe"] in RECIPES


def test_the_loss_is_a_sum_that_gradients_flow_from(recipe: tuple[str, Prepared, Any]) -> None:
    _, prepared, model = recipe
    together = prepared.loss(model, batch_of(prepared, 0, 1, 2))
    assert together.shape == ()
    one_by_one = [batch_of(prepared, position) for position in range(3)]
    assert together.item() == pytest.approx(sum(prepared.loss(model, each).item() for each in one_by_one), rel=1e-4)
    assert prepared.count(batch_of(prepared, 0, 1, 2)) == sum(prepared.count(each) for each in one_by_one) > 0
    together.backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())
    model.zero_grad()


def test_weights_are_the_same_each_time(recipe: tuple[str, Prepared, Any]) -> None:
    _, prepared, model = recipe
    torch.manual_seed(0)
    again = dict(prepared.build_model().named_parameters())
    assert all(torch.equal(weight, again[name]) for name, weight in model.named_parameters())
    assert {weight.dtype for weight in again.values()} == {torch.float32}


def test_the_model_needs_no_targets_and_reloads(recipe: tuple[str, Prepared, Any], tmp_path: Path) -> None:
    _, prepared, model = recipe
    inputs = {name: value for name, value in batch_of(prepared, 0, 1).items() if name not in prepared.targets}
    with torch.no_grad():
        expected = logits_of(model(**inputs))
        model.save_pretrained(tmp_path)
        got = logits_of(type(model).from_pretrained(tmp_path).eval()(**inputs))
    assert expected and expected.keys() == got.keys()
    assert all(torch.allclose(got[name], value, atol=1e-5) for name, value in expected.items())


def trained_by(loss: torch.Tensor, model: Any) -> list[torch.Tensor]:
    """The weights that a loss depends on."""
    found = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True, allow_unused=True)
    return [weight for weight, grad in zip(model.parameters(), found, strict=True) if grad is not None]


def test_rows_without_targets_add_nothing_to_loss_and_count(recipe: tuple[str, Prepared, Any]) -> None:
    """They fill up a short batch where each shape is compiled for."""
    _, prepared, model = recipe
    samples = [prepared.validation[position] for position in range(2)]  # type: ignore[index]
    filled = Filled(prepared, 5)(samples)
    assert all(len(value) == 5 for value in filled.values())
    one, other = prepared.loss(model, prepared.collate(samples)), prepared.loss(model, filled)
    assert other.item() == pytest.approx(one.item(), rel=1e-5)
    pairs = zip(*(torch.autograd.grad(given, trained_by(given, model)) for given in (one, other)), strict=True)
    assert all(torch.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in pairs)
    cell = MicroBatch((0, 1))
    assert count_batch(cell, filled, prepared.count) == count_batch(cell, prepared.collate(samples), prepared.count)


@pytest.mark.parametrize("name", RECIPES)
def test_batches_are_as_wide_as_asked_for(name: str, cache: Path) -> None:
    """On a CPU no wider than their longest sample; the tokens are the same ones."""
    recipe = load_recipe(load(recipes_folder() / f"{name}.yaml", []))
    exact, eights = (recipe.prepare(RecipeContext(Cache(cache), 0, multiple=multiple)) for multiple in (1, 8))
    samples = first_samples(exact.validation, 7)
    for start in range(7):
        batches = [prepared.collate(samples[start : start + 1]) for prepared in (exact, eights)]
        narrow, wide = (batch["input_ids"][0] for batch in batches)
        assert len(narrow) <= len(wide) < len(narrow) + 8
        if "attention_mask" in batches[0]:
            assert batches[0]["attention_mask"].all()
            assert torch.equal(wide[batches[1]["attention_mask"][0].bool()], narrow)
            assert len(wide) % 8 == 0 or len(wide) == len(narrow)


@pytest.mark.parametrize("name", RECIPES)
def test_batches_have_few_shapes_where_each_is_compiled_for(name: str, cache: Path) -> None:
    """The short batch at the end too; no sample is cut, and each keeps its tokens."""
    recipe = load_recipe(load(recipes_folder() / f"{name}.yaml", []))
    buckets = 3
    few = recipe.prepare(RecipeContext(Cache(cache), 0, buckets=buckets))
    plain = recipe.prepare(RecipeContext(Cache(cache), 0))
    assert _fingerprint(few) == _fingerprint(plain), "checkpoints go on on any device"
    for data in (few.train, few.validation):
        samples = first_samples(data, 101)
        shapes = set()
        for start in range(0, len(samples), 4):
            taken = samples[start : start + 4]
            batch = Filled(few, 4)(taken)
            shapes.add(tuple((key, tuple(value.shape)) for key, value in sorted(batch.items())))
            cell, as_ever = MicroBatch((0,) * len(taken)), plain.collate(taken)
            assert count_batch(cell, batch, few.count) == count_batch(cell, as_ever, plain.count)
        assert len(shapes) <= buckets, shapes


@pytest.mark.parametrize(
    ("file", "overrides"),
    [
        *((name, []) for name in RECIPES),
        ("masked_lm", ["recipe_args.join_texts=false"]),
        *(("causal_lm", [f"recipe_args.packing={packing}"]) for packing in ("off", "isolated")),
        *(("causal_lm_chat", [f"recipe_args.packing={packing}"]) for packing in ("off", "isolated")),
    ],
    ids=str,
)
def test_lengths_are_those_of_batches(file: str, overrides: list[str], cache: Path) -> None:
    prepared = load_recipe(load(recipes_folder() / f"{file}.yaml", overrides)).prepare(RecipeContext(Cache(cache), 0))
    by_split = {name: getattr(prepared, name) for name in ("train", "validation")}
    told = {name: checked_lengths(prepared, name, data) for name, data in by_split.items()}
    for name, data in by_split.items():
        last = len(data) - 1
        some = sorted({*range(min(40, last)), *range(0, last, max(last // 40, 1)), last})
        found = [length_of(prepared.collate([data[index]])) for index in some]
        lengths = told[name]
        if lengths is None:
            assert len({*found[:-1]}) == 1, "samples differ, and nobody is told"
        else:
            assert lengths[some].tolist() == found
    differ = [len({*lengths.tolist()}) > 1 for lengths in told.values() if lengths is not None]
    assert any(differ) == (file != "causal_lm" or bool(overrides))


def length_of(batch: Batch) -> int:
    """Tokens of what is read and of what is written."""
    written = count_targets(batch) if "decoder_input_ids" in batch else 0
    return count_tokens(batch) + written


def test_texts_come_back_and_are_shown(recipe: tuple[str, Prepared, Any]) -> None:
    _, prepared, _ = recipe
    found = look(prepared, 50)
    assert found.splits["training"].lengths is not None
    assert json.loads(json.dumps(found.as_json()))
    assert not [line for line in found.lines() if "have no target" in line]
    assert len(preview(prepared)) >= 3


def evaluated(prepared: Prepared, model: Any, accelerator: Any, batch_size: int) -> Any:
    evaluation = Evaluation(
        accelerator,
        Loader(prepared.validation, prepared.collate),  # type: ignore[arg-type]
        prepared.loss,
        prepared.count,
        batch_size,
        scoring=prepared.scoring,
        inference=lambda model: Inference(accelerator, model, Autocast("cpu", torch.float32)),
    )
    return evaluation(model)


def scores(cache: str) -> dict[str, Any]:
    """Of every recipe, on this rank."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    found = {}
    for name in RECIPES:
        prepared = prepared_by(name, cache)
        torch.manual_seed(0)
        model = accelerator.prepare(prepared.build_model())
        found[name] = [evaluated(prepared, model, accelerator, size) for size in (1, 4)]
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_metrics_are_the_same_for_any_ranks_and_batches(cache: Path) -> None:
    by_world = {size: run_ranks(size, scores, str(cache), timeout_seconds=300)[0] for size in (1, 2)}
    for name in RECIPES:
        recipe = load_recipe(load(recipes_folder() / f"{name}.yaml", []))
        promised = recipe.preview(RecipeContext(Cache(cache), 0)).metrics
        reference = by_world[1][name][0]
        assert reference.counts.samples == ROWS
        json.dumps(reference.details)
        for score in (*by_world[1][name], *by_world[2][name]):
            assert score.counts == reference.counts, name
            assert score.loss == pytest.approx(reference.loss, rel=1e-5), name
            assert score.metrics == pytest.approx(reference.metrics, rel=1e-5), name
        metrics = {*prepared_by(name, str(cache)).loss_metrics(1.0), *reference.metrics}
        # More may be promised: rows without an answer have a metric of their own, and there may be none of them.
        assert promised is not None and metrics <= {*promised}, name
