"""A run that was interrupted ends as one that was not: same samples, losses, learning rates, weights and scores."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.recipe import Prepared
from launch.topology import read_world
from tests import tiny
from tests.gloo import run_ranks
from tests.test_engine_sharding import plan_for

SAMPLES = 20  # windows of 8: two and a ragged one an epoch
UPDATES = 10

TIMES = {"time", "tokens_per_second", "seconds", "stall_seconds", "system"}


def with_dropout(model: Any, share: float) -> Any:
    """The model, with what GPT-2 has of dropout set to `share`; Llama has none."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
    return model


def attempt(
    strategy: str,
    world_size: int,
    source: str,
    folder: str,
    stop_at: int | None,
    overrides: tuple[str, ...] = (),
    dropout: float = 0.1,
    evaluating: bool = False,
    before: Callable[[], None] = lambda: None,
    change: Callable[[Prepared], Prepared] = lambda prepared: prepared,
) -> dict[str, Any]:
    """Start or continue the run in `folder`; a signal reaches the last rank as update `stop_at` begins.

    Or, where `evaluating`, during the evaluation after it. `before` is called first, and `change` may put other data
    in the place of the usual ones; functions of a module, since ranks get them by name.
    """
    before()
    from transformers import AutoModelForCausalLM

    from launch.engine.data import open_data
    from launch.engine.gathering import full_state
    from launch.engine.progress import Display
    from launch.engine.run import Run
    from launch.engine.sharding import make_accelerator
    from recipes.causal_lm import collate, count, loss
    from tests.test_engine_export import tokenizer

    plan = plan_for(strategy, world_size, Path(folder), f"train.max_steps={UPDATES}", *overrides)
    prepared = Prepared(
        build_model=lambda: with_dropout(AutoModelForCausalLM.from_pretrained(source), dropout),
        tokenizer=tokenizer(),
        train=tiny.sequences(SAMPLES),
        validation=tiny.sequences(7, seed=1),
        collate=collate,
        loss=loss,
        count=count,
        lengths=tiny.lengths,
    )
    prepared = change(prepared)
    data = open_data(plan, prepared, read_world().rank)
    accelerator = make_accelerator(plan)
    said: list[str] = []
    come = False

    def signal() -> int | None:
        nonlocal come
        if stop_at is not None and evaluating:
            shown = [bar.description for bar in display._bars]
            come = come or (run.updates_done == stop_at and "evaluating" in shown)
        elif stop_at is not None:
            come = run.updates_done >= stop_at - 1
        return 15 if come and accelerator.process_index == world_size - 1 else None

    display = Display(False)
    display.say = said.append  # type: ignore[method-assign]
    run = Run(plan, Path(folder), prepared, data, accelerator, display, signal)
    run.train()
    state = full_state(accelerator, run.model)
    return {
        "state": {name: tensor.float().numpy().copy() for name, tensor in state.items()},
        "updates": run.updates_done,
        "stopped": run.stopped,
        "best": run.judge.best,
        "scores": {name: score.loss for name, score in run.scores.items()},
        "said": said,
    }


def records(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in lines
        if record["kind"] in (kinds or ("train", "eval"))
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, build in (("gpt2", tiny.gpt2), ("llama", tiny.llama)):
        folders[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(folders[name])
    return folders


def in_attempts(
    source: Path,
    folder: Path,
    attempts: list[tuple[str, int, int | None]],
    *overrides: str,
    dropout: float = 0.1,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Each attempt's result on rank 0; more attempts may follow in the same folder. `arguments` are of `attempt`."""
    folder.mkdir(exist_ok=True)
    each = functools.partial(attempt, dropout=dropout, **arguments)
    return [
        run_ranks(world_size, each, strategy, world_size, str(source), str(folder), stop_at, overrides)[0]
        for strategy, world_size, stop_at in attempts
    ]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, array in one["state"].items():
        assert np.array_equal(array, other["state"][name]), name
    for name in ("updates", "best", "scores"):
        assert one[name] == other[name]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "workers", "micro"),
    [
        *(("single", 0, 1), ("single", 2, 2), ("ddp", 0, 2), ("ddp", 2, 1)),
        *(("fsdp2", 2, 1), ("fsdp2_offload", 0, 2), ("zero1", 2, 1), ("zero2", 0, 1)),
        *(("zero3", 2, 2), ("zero2_offload", 2, 2), ("zero3_offload", 0, 1)),
    ],
)
def test_two_stops_in_one_epoch_change_nothing_bit_for_bit(
    strategy: str, workers: int, micro: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    """With dropout, accumulation, a ragged last window, and a stop right at the end of an epoch."""
    world_size = 1 if strategy == "single" else 2
    overrides = (f"train.micro_batch_size={micro}", f"parallel.data_workers={workers}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (expected,) = in_attempts(sources["gpt2"], whole, [(strategy, world_size, None)], *overrides)
    stops = [(strategy, world_size, stop) for stop in (5, 6, None)]
    results = in_attempts(sources["gpt2"], parts, stops, *overrides)
    assert [result["stopped"] for result in results] == [15, 15, None]
    assert [result["updates"] for result in results] == [5, 6, UPDATES]
    assert records(parts) == records(whole)
    assert_same(results[-1], expected)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_three_ranks_go_on_bit_for_bit(strategy: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Three numbers may be added in several orders, two may not."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    overrides = ("train.global_batch_size=12", "train.micro_batch_size=2")
    (expected,) = in_attempts(sources["gpt2"], whole, [(strategy, 3, None)], *overrides)
    *_, result = in_attempts(sources["gpt2"], parts, [(strategy, 3, 5), (strategy, 3, None)], *overrides)
    assert records(parts) == records(whole)
    assert_same(result, expected)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gpt2", (("ddp", 2), ("single", 1), ("ddp", 3))),
        ("gpt2", (("fsdp2", 2), ("fsdp2", 3), ("zero3", 2))),
        ("gpt2", (("zero3", 3), ("ddp", 2), ("fsdp2", 3))),
        ("gpt2", (("zero2", 2), ("zero1", 3), ("single", 1))),
        ("gpt2", (("zero2_offload", 3), ("zero3_offload", 2), ("fsdp2_offload", 2))),
        ("llama", (("single", 1), ("zero2", 3), ("fsdp2", 2))),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{strategy}x{size}" for strategy, size in value),
)
def test_it_goes_on_with_other_ranks_and_strategies(
    name: str, path: Any, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Each window has the samples it would have had, at the learning rate it would have had."""
    overrides = ("train.global_batch_size=12", "train.micro_batch_size=2", "eval.every_steps=4")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (expected,) = in_attempts(sources[name], whole, [("single", 1, None)], *overrides, dropout=0.0)
    attempts = [(*way, stop) for way, stop in zip(path, (2, 7, None), strict=True)]
    results = in_attempts(sources[name], parts, attempts, *overrides, dropout=0.0)
    assert [result["updates"] for result in results] == [2, 7, UPDATES]
    for got, wanted in zip(records(parts), records(whole), strict=True):
        for key in wanted.keys() - {"loss", "gradient_norm", "perplexity"}:
            assert got[key] == wanted[key], key
        assert got["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    for key, array in expected["state"].items():
        assert np.allclose(array, results[-1]["state"][key], atol=1e-4), key
    assert results[-1]["scores"]["after"] == pytest.approx(expected["scores"]["after"], abs=1e-5)
