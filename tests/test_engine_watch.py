"""A loss that is no number, or leaps: told with its samples, left out or undone, alike on all ranks, killed or not."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

from launch.engine.batching import MicroBatch, Order, Window
from launch.engine.watch import Baseline, LossWatch, Seen
from launch.errors import NonFiniteError, SpikeError
from launch.recipe import Prepared
from launch.sameness import compare
from launch.sections import TrainSection
from launch.topology import read_world
from tests import tiny
from tests.commands import shoal
from tests.gloo import run_ranks
from tests.test_engine_sharding import plan_for

# --- what a spike is -------------------------------------------------------------------------------------


def after(losses: list[float], targets: int = 2000) -> Baseline:
    baseline = Baseline()
    for loss in losses:
        baseline.add(loss, targets)
    return baseline


def falling(updates: int, start: float, end: float, noise: float) -> list[float]:
    draw = random.Random(0)
    return [end + (start - end) * math.exp(-update / 50) + draw.gauss(0, noise) for update in range(updates)]


def test_a_loss_that_leaps_stands_out_and_noise_and_a_fall_do_not() -> None:
    losses = falling(400, 10.0, 2.5, 0.05)
    found = [after(losses[:update]).deviations(losses[update], 2000) for update in range(400)]
    assert max(found) < 5
    assert found[:20] == [0.0] * 20, "of too few nothing is said"
    assert after(losses).deviations(4.0, 2000) > 10
    assert after(losses).deviations(1.0, 2000) < 0, "a loss that falls is welcome"


def test_what_deviates_is_judged_by_how_many_targets_it_is_the_mean_of() -> None:
    baseline = after(falling(400, 10.0, 2.5, 0.05))
    assert baseline.deviations(3.5, 2000) == pytest.approx(2 * baseline.deviations(3.5, 500), rel=0.01)
    # A classifier that is nearly always right is wrong at times: that is 8 times the median of the loss, and nothing.
    baseline = after([2.0] * 20 + [0.02] * 64, targets=16)
    assert baseline.deviations(0.16 + 0.02, 16) < 2
    assert baseline.deviations(2.5, 16) > 10


def test_an_odd_loss_among_those_before_does_not_hide_the_next_one() -> None:
    losses = falling(400, 10.0, 2.5, 0.05)
    assert after([*losses, 50.0, 40.0, 60.0]).deviations(5.0, 2000) > 10


def test_what_is_known_survives_a_checkpoint() -> None:
    one, other = after(falling(100, 10.0, 2.5, 0.05)), Baseline()
    other.restore(json.loads(json.dumps(one.state())))
    for update in range(200):
        assert one.deviations(3.0, 100) == other.deviations(3.0, 100)
        one.add(2.5 + update / 100, 2000)
        other.add(2.5 + update / 100, 2000)


# --- what becomes of it ----------------------------------------------------------------------------------


def watch(**keys: Any) -> LossWatch:
    """One that has heard of thirty updates."""
    Accelerator(cpu=True)
    found = LossWatch(TrainSection(**keys))
    for update in range(1, 31):
        found.made(seen(update, 2.0 + update % 3 / 100))
    return found


def seen(update: int, loss: float) -> Seen:
    """An update of two micro-batches with ten targets each, and a filler; all of its loss is the second's."""
    cells = (MicroBatch((4, 7)), MicroBatch((9, 1)), MicroBatch((4,), filler=True))
    return Seen(Window(update, 3, 40, cells), [0.0, 20 * loss, 0.0], [10, 10, 0], loss, 20)


def test_an_update_that_leaps_is_named_with_the_samples_that_do() -> None:
    incident = watch(on_spike="skip").judge(seen(31, 9.0))
    assert incident is not None and incident.action == "skip"
    host = socket.gethostname()
    assert incident.what == (
        "loss 9.0000 is 70 deviations above 2.0100, the median before it; highest: "
        f"rank 0 ({host}) samples [9, 1]: 18; rank 0 ({host}) samples [4, 7]: 0"
    )
    assert [each["samples"] for each in incident.record()["worst"]] == [(9, 1), (4, 7)]
    assert watch(on_spike="skip", spike_deviations=80.0).judge(seen(31, 9.0)) is None
    assert watch(on_spike="ignore").judge(seen(31, 9.0)) is None
    with pytest.raises(SpikeError, match=r"^update 31: loss 9\.0000 .* the weights are those of update 30; .*=skip"):
        watch(on_spike="stop").judge(seen(31, 9.0))


def test_a_loss_that_stays_high_is_told_once() -> None:
    found = watch()
    told = []
    for update in (31, 32, 33, 35):  # the one between is as usual
        told.append(found.judge(seen(update, 9.0)))
        found.made(seen(update, 9.0))
    assert [each and each.action for each in told] == ["warn", None, None, "warn"]


@pytest.mark.parametrize(("loss", "keys"), [(9.0, {"on_spike": "skip"}), (math.inf, {"on_nonfinite": "skip"})])
def test_not_all_updates_are_skipped(loss: float, keys: dict[str, Any]) -> None:
    found = watch(**keys)
    for update in range(31, 36):
        assert found.judge(seen(update, loss))
    resumed = LossWatch(TrainSection(**keys))
    resumed.restore(json.loads(json.dumps(found.state())))
    for each in (found, resumed):
        with pytest.raises(
            NonFiniteError, match=r"^update 36: .* 5 updates before were skipped already.* of update 30"
        ):
            each.judge(seen(36, loss))
    found.made(seen(36, 2.0))
    assert found.judge(seen(37, loss)), "it counts those in a row"


def test_a_gradient_that_is_not_finite_is_skipped_or_stops() -> None:
    incident = watch(on_nonfinite="skip").judge_norm(seen(31, 2.0), math.nan)
    assert incident is not None and incident.action == "skip"
    assert incident.what == "gradient norm is nan although the loss is finite: samples of epoch 3 up to 40"
    with pytest.raises(NonFiniteError, match=r"^update 31: gradient norm is inf"):
        watch().judge_norm(seen(31, 2.0), math.inf)
    assert watch().judge_norm(seen(31, 2.0), 1.0) is None


def test_a_run_goes_back_three_times_to_the_same_weights() -> None:
    found, window = watch(on_spike="rewind"), seen(31, 9.0).window
    incident = found.judge(seen(31, 9.0))
    assert incident is not None and incident.action == "rewind"
    with pytest.raises(SpikeError, match=r"but there is no checkpoint yet to go back to; set a lower save\.every_"):
        watch(on_spike="rewind").count_rewind(window, incident, None)

    def go_back(update: int, checkpoint: int) -> None:
        found.count_rewind(dataclasses.replace(window, update=update), incident, checkpoint)

    go_back(31, 30)
    go_back(40, 30)
    go_back(43, 40)  # saved when the run had just gone back
    with pytest.raises(SpikeError, match=r"^update 47: .* gone back to the weights of checkpoint 40 3 times already"):
        go_back(47, 40)
    go_back(60, 50)
    go_back(62, 50)
    resumed = LossWatch(TrainSection())
    resumed.restore(json.loads(json.dumps(found.state())))
    resumed.count_rewind(dataclasses.replace(window, update=63), incident, 50)
    with pytest.raises(SpikeError):
        resumed.count_rewind(dataclasses.replace(window, update=64), incident, 50)


# --- on every strategy -----------------------------------------------------------------------------------

SAMPLES, UPDATES, EVERY, ODD = 20, 32, 5, 7  # three windows an epoch, the last one ragged
NO_NUMBER, LEAP = 2, 9
"""Epochs in which sample `ODD` is odd."""


class OddSamples(list[Any]):
    """Samples of which one is odd at times."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def odd_loss(samples: OddSamples) -> Any:
    from recipes.causal_lm import loss

    def odd(model: Any, batch: Any) -> Any:
        factor = {NO_NUMBER: math.nan, LEAP: 100.0}.get(samples.epoch, 1.0)
        return loss(model, batch) * (factor if model.training and bool((batch["input_ids"][:, 0] == 0).any()) else 1.0)

    return odd


def odd_samples() -> OddSamples:
    samples = OddSamples(tiny.sequences(SAMPLES))
    samples[ODD][0] = 0
    return samples


def odd_run(strategy: str, world_size: int, source: str, folder: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The weights of this rank after a run with both kinds of odd losses."""
    from transformers import AutoModelForCausalLM

    from launch.engine.data import open_data
    from launch.engine.gathering import full_state
    from launch.engine.progress import Display
    from launch.engine.run import Run
    from launch.engine.sharding import make_accelerator
    from recipes.causal_lm import collate, count
    from tests.test_engine_export import tokenizer

    plan = plan_for(strategy, world_size, Path(folder), f"train.max_steps={UPDATES}", "eval.every_steps=16", *overrides)
    samples = odd_samples()
    prepared = Prepared(
        build_model=lambda: AutoModelForCausalLM.from_pretrained(source),
        tokenizer=tokenizer(),
        train=samples,
        validation=tiny.sequences(7, seed=1),
        collate=collate,
        loss=odd_loss(samples),
        count=count,
        lengths=tiny.lengths,
    )
    data = open_data(plan, prepared, read_world().rank)
    accelerator = make_accelerator(plan)
    run = Run(plan, Path(folder), prepared, data, accelerator, Display(False))
    run.train()
    state = full_state(accelerator, run.model)
    return {name: tensor.float().numpy().copy() for name, tensor in state.items()}


def update_of(epoch: int) -> int:
    """In which an odd sample is used."""
    windows = Order(SAMPLES, 8, 8, 0, 0, 1).windows(3 * epoch + 1, 3 * epoch + 3)
    return next(window.update for window in windows if ODD in window.micro_batches[0].samples)


def by_hand(source: Path, policy: str) -> dict[str, Any]:
    """The weights after the same updates in a plain loop, without those that are odd; rewinding, or not."""
    import torch
    from transformers import AutoModelForCausalLM

    from launch.engine.optim import make_optimizer

    plan, samples = plan_for("single", 1, source, f"train.max_steps={UPDATES}"), tiny.sequences(SAMPLES)
    samples[ODD][0] = 0
    model, schedule = AutoModelForCausalLM.from_pretrained(source), plan.schedule(SAMPLES)
    optimizer = make_optimizer(model, plan.config.train, fused=False)
    kept: Any = None
    for window in Order(SAMPLES, 8, 8, 0, 0, 1).windows(1, UPDATES):
        leaps = window.update == update_of(LEAP)
        if leaps and policy == "rewind":
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])
        elif policy == "none" or (not leaps and window.update != update_of(NO_NUMBER)):
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate(window.update)
            optimizer.zero_grad()
            tiny.reference_loss(model, [samples[index] for index in window.micro_batches[0].samples]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        if window.update % EVERY == 0:
            kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float(np.abs(one[name] - other[name]).max()) for name in one.keys() & other.keys())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tiny.gpt2().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, dict[str, Any]]:
    found = {policy: by_hand(source, policy) for policy in ("skip", "rewind", "none")}
    assert update_of(LEAP) % EVERY, "the checkpoint is not of the update before"
    assert apart(found["skip"], found["none"]) > 1e-3 and apart(found["skip"], found["rewind"]) > 1e-3
    return found


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "policy"),
    [
        *(("ddp", "skip"), ("fsdp2", "skip"), ("zero1", "skip"), ("zero2_offload", "skip"), ("zero3_offload", "skip")),
        *(("fsdp2", "rewind"), ("zero2", "rewind"), ("zero3", "rewind")),
    ],
)
def test_odd_updates_leave_no_trace_in_the_weights(
    strategy: str, policy: str, source: Path, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    stated = ("train.on_nonfinite=skip", f"train.on_spike={policy}", f"save.every_steps={EVERY}", "save.export=false")
    weights = run_ranks(2, odd_run, strategy, 2, str(source), str(tmp_path), stated)
    assert apart(expected[policy], weights[0]) < 1e-4
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    odd = [record for record in found if record["kind"] in ("skipped", "rewound")]
    assert [(record["kind"], record["update"]) for record in odd] == [
        ("skipped", update_of(NO_NUMBER)),
        ({"skip": "skipped", "rewind": "rewound"}[policy], update_of(LEAP)),
    ]
    assert all(ODD in record["worst"][0]["samples"] for record in odd), "the first named is the one"
    assert "loss" not in odd[0] and odd[0]["reason"].startswith("loss is nan: rank ")
    assert odd[1]["loss"] > 10 > odd[1]["baseline"]
    made = [record["update"] for record in found if record["kind"] == "train"]
    assert made == [update for update in range(1, UPDATES + 1) if update not in {each["update"] for each in odd}]


# --- by the real command ---------------------------------------------------------------------------------

OWN = Path(__file__).with_name("own_recipe.py")

SPIKE = 30
"""The update that odd_epoch=14 spoils: the second one of the fifteenth epoch."""


def start(folder: Path, name: str, *overrides: str) -> Any:
    (folder / "run.yaml").write_text(
        f"recipe: {OWN}\n"
        "recipe_args: {dropout: 0.1, odd_epoch: 14}\n"
        "train: {global_batch_size: 8, micro_batch_size: 2, max_steps: 40, learning_rate: 3.0e-3}\n"
        "eval: {every_steps: 20}\n"
        "save: {every_steps: 8, keep_last: 1}\n"
        "parallel: {device: cpu}\n"
    )
    return shoal(folder, "run", "run.yaml", *overrides, "--out", name)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_killed_after_a_rewind_ends_with_the_numbers_of_one_that_was_not(tmp_path: Path) -> None:
    rewinds = ("parallel.devices=2", "train.on_spike=rewind")
    whole = start(tmp_path, "whole", *rewinds)
    assert whole.returncode == 0, whole.stderr
    assert re.search(
        rf"^update {SPIKE}: loss [\d.]+ is \d+ deviations above [\d.]+, the median before it; highest: "
        rf"rank [01] \(.+\) samples \[.*\b5\b.*\]: [\d.]+; .*; back to the weights of step-000024; the samples "
        rf"of updates 25 to {SPIKE} are left out$",
        whole.stderr,
        re.MULTILINE,
    ), whole.stderr
    (rewound,) = records(tmp_path / "whole", "rewound")
    assert (rewound["update"], rewound["checkpoint"], rewound["first_skipped"]) == (SPIKE, 24, 25)

    # Two passes an update, and four to look at the loss and to evaluate: killed in the update after the rewind.
    killed = start(
        tmp_path,
        "killed",
        *rewinds,
        "recipe_args.dying_rank=1",
        f"recipe_args.dying_after={2 * SPIKE + 4}",
        "parallel.max_restarts=1",
        "save.asynchronous=true",
    )
    assert killed.returncode == 0, killed.stderr
    assert "; restart 1 of 1 from update 24 in 1 s" in killed.stderr
    assert killed.stderr.count("back to the weights of step-000024") == 2, "before it was killed, and after"
    # One that saves after each update besides, of which it keeps one, goes back to the same weights.
    often = start(tmp_path, "often", *rewinds, "save.every_minutes=1.0e-6")
    assert often.returncode == 0, often.stderr
    assert len(records(tmp_path / "often", "save")) == 40
    for other in ("killed", "often"):
        found = compare(tmp_path / "whole", tmp_path / other)
        assert found.same and found.tensors, found.differences
