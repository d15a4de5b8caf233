"""What a recipe hands over is tried before the first update: sums that are none are refused, by all ranks alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.recipe import Prepared
from tests import tiny
from tests.gloo import run_ranks


def prepared() -> Prepared:
    """A recipe as it should be; the first of its samples has no target."""
    from recipes.causal_lm import collate, count, loss
    from tests.test_engine_export import tokenizer

    samples: Any = [*reversed(tiny.sequences(4)), *tiny.sequences(4)]
    assert len(samples[0]) == 1
    return Prepared(tiny.gpt2, tokenizer(), samples, samples, collate, loss, count)


def mean_loss(model: Any, batch: Any) -> Any:
    from recipes.causal_lm import count, loss

    return loss(model, batch) / max(count({name: tensor.cpu() for name, tensor in batch.items()}), 1)


def without_sum(model: Any, batch: Any) -> Any:
    return model(**batch, use_cache=False).logits.logsumexp(-1)[:, 0]


def as_number(model: Any, batch: Any) -> Any:
    from recipes.causal_lm import loss

    return loss(model, batch).item()


def detached(model: Any, batch: Any) -> Any:
    from recipes.causal_lm import loss

    return loss(model, batch).detach()


def constant_count(batch: Any) -> int:  # noqa: ARG001
    return 1


def tensor_count(batch: Any) -> Any:
    return (batch["labels"][:, 1:] != -100).sum()


def refusal(strategy: str, precision: str, folder: str, change: Callable[[Prepared], Prepared]) -> str | None:
    """What this rank is told when it begins a run of two updates; None where it makes them."""
    from launch.engine.data import open_data
    from launch.engine.progress import Display
    from launch.engine.run import Run
    from launch.engine.sharding import make_accelerator
    from launch.errors import ConfigError
    from launch.topology import read_world
    from tests.test_engine_sharding import plan_for

    world = read_world()
    settings = (f"train.precision={precision}", "train.max_steps=2", "save.export=false", "eval.every_steps=null")
    plan = plan_for(strategy, world.size, Path(folder), *settings, "eval.at_start=false")
    handed_over = change(prepared())
    data = open_data(plan, handed_over, world.rank)
    run = Run(plan, Path(folder), handed_over, data, make_accelerator(plan), Display(False))
    try:
        run.train()
    except ConfigError as error:
        return str(error)
    assert run.updates_done == 2
    return None


@pytest.mark.dist
@pytest.mark.parametrize(
    ("field", "function", "told"),
    [
        ("loss", mean_loss, "that is a mean, with which targets do not count alike; return the sum (reduction='sum')"),
        (
            "loss",
            without_sum,
            "loss() returned a tensor of shape (1,), float32; it must return a scalar tensor: return ",
        ),
        (
            "loss",
            as_number,
            "(float); it must return a scalar tensor: return the sum over all targets (reduction='sum')",
        ),
        ("loss", detached, "loss() returned a tensor without gradient; leave out detach(), item() and"),
        ("count", constant_count, "count() of a sample is 1, and of the same sample twice 1; it must be 2"),
        ("count", tensor_count, "count() returned a tensor of shape (), int64; it must return an int"),
    ],
)
def test_what_breaks_the_contract_is_told_with_its_line(field: str, function: Any, told: str, tmp_path: Path) -> None:
    change = functools.partial(replace, **{field: function})
    (message,) = run_ranks(1, refusal, "single", "fp32", str(tmp_path), change)
    assert message is not None and "\n" not in message
    assert message.startswith(f"{__file__}:{function.__code__.co_firstlineno}: ") and told in message


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_all_ranks_refuse_alike_whatever_shards(strategy: str, tmp_path: Path) -> None:
    first, second = run_ranks(2, refusal, strategy, "bf16", str(tmp_path), functools.partial(replace, loss=mean_loss))
    assert first == second and "that is a mean" in first


def traces() -> list[str]:
    """What the check changes of a model, its mode and the random numbers, when collating draws some."""
    import torch
    from accelerate import Accelerator

    from launch.engine.contract import check_sums
    from launch.engine.randomness import random_states

    handed_over = prepared()

    def collate(samples: list[Any]) -> Any:
        batch = handed_over.collate(samples)
        batch["labels"][torch.rand(batch["labels"].shape) < 0.3] = -100  # other targets each time
        return batch

    model = handed_over.build_model().train()
    before = [random_states(), {name: weight.clone() for name, weight in model.state_dict().items()}]
    check_sums(Accelerator(cpu=True), model, replace(handed_over, collate=collate), handed_over.loss)
    changed = [
        name
        for was, now in zip(before, [random_states(), model.state_dict()], strict=True)
        for name in was
        if not torch.equal(was[name], now[name])
    ]
    return [*changed, *(["eval mode"] if not model.training else [])]


@pytest.mark.dist
def test_the_check_leaves_no_trace_and_copes_with_random_targets() -> None:
    assert run_ranks(1, traces) == [[]]
