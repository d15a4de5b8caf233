from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from launch.engine import cutting
from launch.engine.batching import Loader, Order
from launch.engine.loop import Step, fit
from launch.engine.updating import updates
from launch.errors import NonFiniteError
from recipes.causal_lm import collate, count, loss
from tests import tiny
from tests.gloo import run_ranks

GLOBAL_BATCH = 8
SAMPLES = 20  # the third window of an epoch holds 4 of 8
MODELS = {"gpt2": tiny.gpt2, "llama": tiny.llama}


def one_update_each(name: str, splits: list[tuple[int, bool]]) -> list[dict[str, Any]]:
    """For each split, loss and gradient of updates 1 (full) and 3 (ragged), from fresh weights."""
    cutting.PASS_TOKENS = 1  # or none of so small micro-batches would be cut
    accelerator = Accelerator(cpu=True)
    samples = tiny.sequences(SAMPLES)
    results = []
    for micro_batch_size, by_length in splits:
        rank, world_size = accelerator.process_index, accelerator.num_processes
        dealt = (tiny.lengths(samples), True) if by_length else ()
        order = Order(SAMPLES, GLOBAL_BATCH, micro_batch_size, 0, rank, world_size, *dealt)
        for update in (1, 3):
            bare = MODELS[name]()
            # With plain SGD at a rate of 1 the change of a weight is minus its gradient.
            model, optimizer = accelerator.prepare(bare, torch.optim.SGD(bare.parameters(), lr=1.0))
            before = [parameter.detach().clone() for parameter in bare.parameters()]
            window = next(order.windows(update, update))
            batches = [collate([samples[index] for index in cell.samples]) for cell in window.micro_batches]
            result = Step(accelerator, model, updates(accelerator, model, optimizer, None), loss, count)(
                window, batches
            )
            gradient = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, bare.parameters(), strict=True)])
            results.append(
                {
                    "update": update,
                    "split": (micro_batch_size, by_length),
                    "micro_batches": len(batches),
                    "loss": result.loss,
                    "norm": result.gradient_norm,
                    "samples": result.counts.samples,
                    "targets": result.counts.targets,
                    "tokens": result.counts.tokens,
                    "gradient": gradient.numpy(),
                }
            )
    return results


def reference(name: str, update: int) -> tuple[float, torch.Tensor, list[Any]]:
    samples = tiny.sequences(SAMPLES)
    window = next(Order(SAMPLES, GLOBAL_BATCH, GLOBAL_BATCH, 0, 0, 1).windows(update, update))
    chosen = [samples[index] for cell in window.micro_batches for index in cell.samples]
    model = MODELS[name]()
    mean = tiny.reference_loss(model, chosen)
    mean.backward()
    return mean.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), chosen


@pytest.mark.dist
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_update_is_the_same_for_every_split(name: str, world_size: int) -> None:
    micro_batch_sizes = {1: [1, 2, 4, 8], 2: [1, 2, 4], 3: [1, 2]}[world_size]
    splits = [(size, by_length) for size in micro_batch_sizes for by_length in (False, True)]
    by_rank = run_ranks(world_size, one_update_each, name, splits)
    assert len(by_rank[0]) == 2 * len(splits)
    made = {(*each["split"], each["update"]): each["micro_batches"] for each in by_rank[0]}
    assert made[micro_batch_sizes[-1], True, 1] > made[micro_batch_sizes[-1], False, 1], "some were cut"
    for results in zip(*by_rank, strict=True):
        expected_loss, expected_gradient, chosen = reference(name, results[0]["update"])
        for result in results:
            assert result["loss"] == pytest.approx(expected_loss, abs=1e-6)
            difference = torch.from_numpy(result["gradient"]) - expected_gradient
            assert difference.norm() < 1e-5 * expected_gradient.norm(), result
            assert result["norm"] == pytest.approx(float(expected_gradient.norm()), rel=1e-5)
            assert result["samples"] == len(chosen)
            assert result["targets"] == sum(len(sample) - 1 for sample in chosen)
            assert result["tokens"] == sum(len(sample) for sample in chosen)
        assert len({result["micro_batches"] for result in results}) == 1


def rate(update: int) -> float:
    """A different learning rate for each update."""
    return 0.1 * update


def four_updates(stop_after: int) -> tuple[list[int], Any]:
    """Updates made and the weights after them: an epoch with its ragged end, and the beginning of the next."""
    accelerator = Accelerator(cpu=True)
    samples = tiny.sequences(SAMPLES)
    bare = tiny.gpt2()
    model, optimizer = accelerator.prepare(bare, torch.optim.SGD(bare.parameters(), lr=0.0))
    order = Order(SAMPLES, GLOBAL_BATCH, 2, 0, accelerator.process_index, accelerator.num_processes)
    made: list[int] = []

    def after_update(window: Any, result: Any) -> bool:  # noqa: ARG001
        made.append(window.update)
        return window.update == stop_after

    fit(
        Step(accelerator, model, updates(accelerator, model, optimizer, 1.0), loss, count),
        Loader(samples, collate).load(lambda: order.windows(1, 4)),
        rate,
        after_update,
    )
    return made, torch.cat([parameter.detach().flatten() for parameter in bare.parameters()]).numpy()


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stop_after", [3, 9])
def test_several_updates_are_those_of_a_plain_loop(world_size: int, stop_after: int) -> None:
    model, samples = tiny.gpt2(), tiny.sequences(SAMPLES)
    start = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
    updates = [update for update in (1, 2, 3, 4) if update <= stop_after]
    for window in Order(SAMPLES, GLOBAL_BATCH, GLOBAL_BATCH, 0, 0, 1).windows(1, updates[-1]):
        model.zero_grad()
        tiny.reference_loss(model, [samples[index] for index in window.micro_batches[0].samples]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate(window.update) * parameter.grad
    expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for made, weights in run_ranks(world_size, four_updates, stop_after):
        assert made == updates
        assert (torch.from_numpy(weights) - expected).norm() < 1e-5 * (expected - start).norm()


def test_the_tolerance_tells_a_mean_of_means_apart() -> None:
    """What a naive loop does: average the mean losses of micro-batches. It must lie far outside our tolerance."""
    exact, _, chosen = reference("gpt2", 1)
    model = tiny.gpt2()
    halves = [chosen[:4], chosen[4:]]
    with torch.no_grad():
        naive = sum(float(tiny.reference_loss(model, half)) for half in halves) / 2
    assert abs(naive - exact) > 100 * 1e-6


def sgd_step(accelerator: Accelerator, model: Any, max_grad_norm: float | None) -> Step:
    """With plain SGD at a rate of 1 the change of a weight is minus its gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return Step(accelerator, model, updates(accelerator, model, optimizer, max_grad_norm), loss, count)


def test_an_update_without_targets_leaves_the_weights_alone() -> None:
    accelerator = Accelerator(cpu=True)
    model = tiny.gpt2()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = sgd_step(accelerator, model, 1.0)
    window = next(Order(2, 2, 2, 0, 0, 1).windows(1, 1))
    result = step(window, [collate([tiny.sequences(4)[3], tiny.sequences(4)[3]])])
    assert result.counts.targets == 0
    assert result.loss == 0
    assert all(torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))


def test_gradients_are_clipped_to_the_norm() -> None:
    accelerator = Accelerator(cpu=True)
    changes = {}
    for limit in (None, 0.01):
        model = tiny.gpt2()
        before = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
        step = sgd_step(accelerator, model, limit)
        window = next(Order(4, 4, 4, 0, 0, 1).windows(1, 1))
        result = step(window, [collate([tiny.sequences(4)[index] for index in window.micro_batches[0].samples])])
        after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        changes[limit] = (before - after).norm().item()
        assert result.gradient_norm > 0.01
    assert changes[None] == pytest.approx(result.gradient_norm, rel=1e-4)
    assert changes[0.01] == pytest.approx(0.01, rel=1e-3)


def poisoned_update(kind: str) -> tuple[str, bool]:
    """One update whose sample 5 spoils the loss or only the gradient, seen from this rank."""
    accelerator = Accelerator(cpu=True)
    samples = tiny.sequences(SAMPLES)
    bare = tiny.gpt2()
    model, optimizer = accelerator.prepare(bare, torch.optim.SGD(bare.parameters(), lr=1.0))
    order = Order(SAMPLES, GLOBAL_BATCH, 2, 0, accelerator.process_index, accelerator.num_processes)
    window = next(order.windows(1, 1))
    target = first_window_samples()[0]

    def poisoned(model: Any, batch: Any) -> torch.Tensor:
        summed = loss(model, batch)
        if not bool((batch["marks"] == target).any()):
            return summed
        if kind == "loss":
            return summed * float("nan")
        # d sqrt(x) / dx at 0 is infinite, although sqrt(0) is 0.
        return summed + torch.sqrt(summed * 0.0)

    batches = []
    for cell in window.micro_batches:
        batch = collate([samples[index] for index in cell.samples])
        batches.append({**batch, "marks": torch.tensor(cell.samples)})
    before = [parameter.detach().clone() for parameter in bare.parameters()]
    try:
        Step(accelerator, model, updates(accelerator, model, optimizer, 1.0), poisoned, count)(window, batches)
    except NonFiniteError as error:
        unchanged = all(torch.equal(b, p) for b, p in zip(before, bare.parameters(), strict=True))
        return str(error), unchanged
    return "no error", False


def first_window_samples() -> list[int]:
    window = next(Order(SAMPLES, GLOBAL_BATCH, GLOBAL_BATCH, 0, 0, 1).windows(1, 1))
    return list(window.micro_batches[0].samples)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_all_ranks_stop_at_a_loss_that_is_not_finite(kind: str) -> None:
    (message, unchanged), (other_message, other_unchanged) = run_ranks(2, poisoned_update, kind)
    assert message == other_message
    assert unchanged
    assert other_unchanged
    assert message.startswith("update 1: ")
    if kind == "loss":
        first, second = first_window_samples()[:2]
        assert "loss is nan: rank 0 (" in message
        assert f"samples [{first}, {second}]" in message
        assert "rank 1" not in message
    else:
        assert "gradient norm is" in message
