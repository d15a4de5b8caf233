"""The same run whatever shards it: losses, gradients norms, learning rates, scores and weights, on real gloo ranks."""

from __future__ import annotations

import json
import math
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from launch.config import load
from launch.errors import NonFiniteError
from launch.plan import Plan, make_plan
from launch.recipe import Prepared, Preview
from launch.strategy import Strategy
from launch.topology import Machine, World, read_world
from tests import tiny
from tests.gloo import run_ranks

SHARDED = [strategy for strategy in Strategy if strategy not in (Strategy.SINGLE, Strategy.XLA)]
UPDATES = 30
SAMPLES = 20  # three windows of 8 an epoch, the last with 4


def plan_for(strategy: str, world_size: int, folder: Path, *overrides: str) -> Plan:
    stated = [
        *("recipe=causal_lm", f"train.max_steps={UPDATES}", "train.global_batch_size=8", "train.micro_batch_size=2"),
        *("train.learning_rate=3e-3", "train.warmup_steps=2", "train.weight_decay=0.5", "train.max_grad_norm=0.5"),
        *("eval.every_steps=3", "eval.batch_size=3", "parallel.device=cpu"),
        *(f"parallel.strategy={strategy}", f"parallel.devices={world_size}", *overrides),
    ]
    return make_plan(load(None, stated), Machine("box", 2, 0), World(), Preview(SAMPLES), folder)


def local_size(parameter: Any) -> int:
    """Numbers of a weight that this rank keeps: FSDP2 has a DTensor, ZeRO-3 a `ds_tensor`."""
    if hasattr(parameter, "ds_tensor"):
        return int(parameter.ds_tensor.numel())
    return int((parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel())


def counting_passes(model: Any, calls: list[int]) -> Any:
    """The model, with a note in `calls` of each pass through an attention layer that gradients may flow from."""
    import torch

    for module in model.modules():
        if type(module).__name__ in ("GPT2Attention", "LlamaAttention"):
            module.register_forward_pre_hook(
                lambda module, inputs: calls.append(1) if torch.is_grad_enabled() else None
            )
    return model


def trained(
    strategy: str, world_size: int, source: str, folder: str, bug: str = "", overrides: tuple[str, ...] = ()
) -> dict[str, Any]:
    """One whole run on this rank, from pretrained weights in `source`, with a planted bug if wanted.

    The single process, which all else is compared with, has all logits at once, the others those of five tokens; and
    the others lay rows end to end as soon as that saves one token.
    """
    if bug:
        BUGS[bug]()
    import torch
    from transformers import AutoModelForCausalLM

    from launch.engine import padding_free
    from launch.engine.data import open_data
    from launch.engine.gathering import full_state
    from launch.engine.progress import Display
    from launch.engine.run import Run
    from launch.engine.sharding import make_accelerator
    from recipes import head_loss
    from recipes.causal_lm import collate, count, loss
    from tests.test_engine_export import tokenizer

    plan = plan_for(strategy, world_size, Path(folder), *overrides)
    calls: list[int] = []
    head_loss.LOSS_BYTES_CPU = 5 * 4 * tiny.VOCABULARY
    padding_free.WORTH = 1
    laid, lay = list[int](), padding_free.Layout.of

    def counting_lay(*given: Any) -> Any:
        laid.append(1)
        return lay(*given)

    padding_free.Layout.of = counting_lay  # type: ignore[method-assign]

    def build_model() -> Any:
        model = AutoModelForCausalLM.from_pretrained(source)
        if strategy != "single":
            head_loss.with_head_loss(model, loss)
            # Weights that are sharded already compute nothing, so that bug leaves the loss as it was.
            assert bug == tell_transformers_of_zero3.__name__ or isinstance(
                model.get_output_embeddings().forward, head_loss.Head
            )
        return counting_passes(model, calls)

    prepared = Prepared(
        build_model=build_model,
        tokenizer=tokenizer(),
        train=tiny.sequences(SAMPLES),
        validation=tiny.sequences(7, seed=1),  # rows do not divide over ranks
        collate=collate,
        loss=loss,
        count=count,
        lengths=tiny.lengths,
    )
    data = open_data(plan, prepared, read_world().rank)
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(os.getpid()))
    accelerator = make_accelerator(plan)
    run = Run(plan, Path(folder), prepared, data, accelerator, Display(False))
    run.train()
    state = full_state(accelerator, run.model)
    bare = accelerator.unwrap_model(run.model)
    return {
        "kind": accelerator.distributed_type.value,
        "formats": run.result()["dtypes"],
        "passes": len(calls),
        "laid": len(laid),
        "forks": len(forks),
        "compiled": int(torch._dynamo.utils.counters["stats"]["unique_graphs"]),
        "dtypes": sorted({str(parameter.dtype) for parameter in bare.parameters()}),
        "tied": bare.get_input_embeddings().weight is bare.get_output_embeddings().weight,
        "state": {name: tensor.float().numpy().copy() for name, tensor in state.items()},
        "updates": run.updates_done,
        "best": run.judge.best,
        "local": sum(local_size(parameter) for parameter in bare.parameters()),
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, build in (("gpt2", tiny.gpt2), ("llama", tiny.llama)):
        folders[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def references(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """One process, for each model, that takes samples as they come: its records and its weights."""
    found = {}
    for name, source in sources.items():
        folder = tmp_path_factory.mktemp(f"{name}-one")
        overrides = ("train.group_by_length=off", "train.padding_free=off")
        (result,) = run_ranks(1, trained, "single", 1, str(source), str(folder), "", overrides)
        found[name] = (records(folder), result)
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def differences(records: list[dict[str, Any]], reference: list[dict[str, Any]]) -> tuple[float, float]:
    """Largest difference of a loss, and relative one of a gradient norm; all else must be equal."""
    losses, norms = [], []
    for got, expected in zip(records, reference, strict=True):
        assert got["kind"] == expected["kind"]
        for name in set(expected) - {"loss", "gradient_norm", "time", "tokens_per_second", "seconds", "system"}:
            assert got[name] == expected[name], name
        if "loss" in expected:
            losses.append(abs(got["loss"] - expected["loss"]))
        if "gradient_norm" in expected:
            norms.append(abs(got["gradient_norm"] / expected["gradient_norm"] - 1))
    assert (len(losses), len(norms)) == (UPDATES + 1 + UPDATES // 3, UPDATES)
    return max(losses), max(norms)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("strategy", SHARDED)
def test_a_strategy_changes_nothing(
    strategy: Strategy, name: str, sources: dict[str, Path], references: dict[str, Any], tmp_path: Path
) -> None:
    reference, expected = references[name]
    results = run_ranks(2, trained, str(strategy), 2, str(sources[name]), str(tmp_path))
    kinds = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero": "DEEPSPEED"}
    assert {result["kind"] for result in results} == {kinds[strategy.kind]}, "no strategy is replaced by another"
    assert results[0]["dtypes"] == ["torch.float32"]
    assert results[0]["laid"] > UPDATES, "most batches are laid end to end"
    loss, norm = differences(records(tmp_path), reference)
    assert loss < 1e-5
    assert norm < 1e-4
    assert set(results[0]["state"]) >= set(expected["state"])
    assert farthest(results[0], expected) < 1e-4
    assert results[0]["tied"] == (name == "gpt2"), "tied weights stay tied, others stay apart"
    if strategy.kind == "fsdp2" or strategy.stage == 3:
        whole = sum(
            array.size for key, array in expected["state"].items() if key != "lm_head.weight" or name == "llama"
        )
        assert results[0]["local"] < 0.75 * whole, "the weights are sharded"

    from launch.engine.exported import TOLERANCE, difference, load_exported

    with safe_open(tmp_path / "export" / "model.safetensors", "np") as file:
        assert ("lm_head.weight" in file.keys()) == (name == "llama"), "a tied weight is saved once"  # noqa: SIM118
    exported, _ = load_exported(tmp_path / "export")
    assert difference(exported, tmp_path / "probe.safetensors", "cpu") <= TOLERANCE
    same = exported.get_input_embeddings().weight is exported.get_output_embeddings().weight
    assert same == (name == "gpt2")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("fsdp2", "zero3"), ("zero3", "fsdp2"), ("zero1", "ddp")])
def test_training_goes_on_from_what_another_strategy_wrote_with_its_ties(
    first: str, second: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    run_ranks(2, trained, first, 2, str(sources["gpt2"]), str(folders[0]))
    results = run_ranks(2, trained, second, 2, str(folders[0] / "export"), str(folders[1]))
    assert all(result["tied"] for result in results)
    scores = [[record["loss"] for record in records(folder) if record["kind"] == "eval"] for folder in folders]
    assert scores[1][0] == pytest.approx(scores[0][-1], abs=1e-6), "it begins where the other ended"


def reference_for(source: Path, folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One process with other settings than `references`: its records and its result."""
    folder.mkdir()
    (result,) = run_ranks(1, trained, "single", 1, str(source), str(folder), "", overrides)
    return records(folder), result


@pytest.fixture(scope="module")
def twelve(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("twelve") / "run"
    return reference_for(sources["gpt2"], folder, "train.global_batch_size=12", "train.micro_batch_size=12")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "world_size", "micro_batch_size", "workers"),
    [
        *(("fsdp2", 3, 1, 0), ("fsdp2", 2, 6, 2), ("zero1", 3, 4, 0), ("zero2", 2, 3, 2)),
        *(("zero2", 3, 2, 0), ("zero3", 3, 1, 2), ("zero3", 2, 6, 0)),
    ],
)
def test_a_split_changes_nothing(
    strategy: str, world_size: int, micro_batch_size: int, workers: int, sources: Any, twelve: Any, tmp_path: Path
) -> None:
    """Of the last window of an epoch, 8 samples of 12, some ranks have fewer than others or none."""
    overrides = (
        *("train.global_batch_size=12", f"train.micro_batch_size={micro_batch_size}"),
        f"parallel.data_workers={workers}",
    )
    results = run_ranks(world_size, trained, strategy, world_size, str(sources["gpt2"]), str(tmp_path), "", overrides)
    assert {result["forks"] for result in results} == {0}, "none once there are the threads of a process group"
    loss, norm = differences(records(tmp_path), twelve[0])
    assert loss < 1e-5
    assert norm < 1e-4
    assert farthest(results[0], twelve[1]) < 1e-4


def farthest(result: dict[str, Any], reference: dict[str, Any]) -> float:
    """Largest difference of a weight."""
    state, expected = result["state"], reference["state"]
    return max(float(np.abs(state[key] - expected[key]).max()) for key in expected)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_what_was_planned_and_near_fp32(
    strategy: Strategy, precision: str, sources: dict[str, Path], references: dict[str, Any], tmp_path: Path
) -> None:
    """In fp16 the first scales overflow: those updates are repeated, and no sample or learning rate is skipped."""
    bug = "compute_in_fp16_on_a_cpu" if precision == "fp16" else ""
    overrides = (f"train.precision={precision}",)
    results = run_ranks(2, trained, str(strategy), 2, str(sources["gpt2"]), str(tmp_path), bug, overrides)
    low = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    assert results[0]["formats"] == results[1]["formats"]
    assert results[0]["formats"] == {
        "forward": low,
        "parameter": low if str(strategy).startswith("zero") else "float32",
        "reduction": "float32",
        "master": "float32",
        "optimizer": "float32",
    }
    got = records(tmp_path)
    overflows = [record.pop("overflows", 0) for record in got if record["kind"] == "train"]
    assert (sum(overflows) > 0) == (precision == "fp16")
    for record in got:
        record.pop("best", None)
    reference = [{key: value for key, value in record.items() if key != "best"} for record in references["gpt2"][0]]
    loss, norm = differences(got, reference)
    assert 1e-6 < loss < 5e-3, "another number format, but the same training"
    assert norm < 0.1, "gradients are unscaled before they are measured and clipped"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_activation_checkpointing_changes_time_and_nothing_else(
    strategy: str, sources: dict[str, Path], references: dict[str, Any], tmp_path: Path
) -> None:
    overrides = ("train.activation_checkpointing=true",)
    results = run_ranks(2, trained, strategy, 2, str(sources["gpt2"]), str(tmp_path), "", overrides)
    loss, norm = differences(records(tmp_path), references["gpt2"][0])
    assert loss < 1e-5
    assert norm < 1e-4
    # Two blocks, two micro-batches an update (one in the last window of an epoch), each pass made twice.
    passes = 2 * sum(1 if update % 3 == 0 else 2 for update in range(1, UPDATES + 1))
    assert results[0]["passes"] == 2 * passes


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_compiled_blocks_change_time_and_nothing_else(
    strategy: str, sources: dict[str, Path], references: dict[str, Any], tmp_path: Path
) -> None:
    results = run_ranks(
        2, trained, strategy, 2, str(sources["gpt2"]), str(tmp_path), "", ("train.compile=true",), timeout_seconds=300
    )
    assert all(result["compiled"] for result in results), "something was compiled"
    loss, norm = differences(records(tmp_path), references["gpt2"][0])
    assert loss < 1e-5
    assert norm < 1e-4


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "strategies"), [("sgd", ["ddp", "fsdp2", "zero2", "zero3"]), ("adafactor", ["ddp"])]
)
def test_other_optimizers_are_shared_out_as_well(
    optimizer: str, strategies: list[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    overrides = (f"train.optimizer={optimizer}", *(["train.sgd_momentum=0.9"] if optimizer == "sgd" else []))
    expected, reference = reference_for(sources["gpt2"], tmp_path / "one", *overrides)
    for strategy in strategies:
        folder = tmp_path / strategy
        folder.mkdir()
        results = run_ranks(2, trained, strategy, 2, str(sources["gpt2"]), str(folder), "", overrides)
        loss, norm = differences(records(folder), expected)
        assert loss < 1e-5, strategy
        assert norm < 1e-4, strategy
        assert farthest(results[0], reference) < 1e-4, strategy


@pytest.mark.dist
def test_the_learning_rate_is_the_planned_one_whatever_shards_it(references: dict[str, Any], tmp_path: Path) -> None:
    """Over ranks, accumulation and strategies the records are compared exactly above; here with the plan."""
    plan = plan_for("fsdp2", 2, tmp_path)
    rates = [record["learning_rate"] for record in references["gpt2"][0] if record["kind"] == "train"]
    schedule = plan.schedule(SAMPLES)
    assert rates == [schedule.learning_rate(update) for update in range(1, UPDATES + 1)]
    assert (rates[0], rates[-1]) == (plan.length.first_learning_rate, plan.length.last_learning_rate)
    assert max(rates) == plan.length.peak_learning_rate
    assert rates[-1] > 0, "not at 0 before the end"


# --- decisions -------------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_that_judge_differently_still_stop_together(
    strategy: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Rank 1 would go on for ever; rank 0 has seen enough after two evaluations that tie."""
    overrides = ("train.early_stopping_patience=2", "train.early_stopping_min_delta=9")
    bug = "judge_differently_on_rank_1"
    results = run_ranks(2, trained, strategy, 2, str(sources["gpt2"]), str(tmp_path), bug, overrides)
    assert [result["updates"] for result in results] == [6, 6]
    evaluations = [record for record in records(tmp_path) if record["kind"] == "eval"]
    assert [record["update"] for record in evaluations] == [0, 3, 6]
    assert results[0]["best"] == results[1]["best"], "of the best evaluation all have the same opinion"


@pytest.mark.dist
def test_without_agreement_they_would_not(sources: dict[str, Path], tmp_path: Path) -> None:
    overrides = ("train.early_stopping_patience=2", "train.early_stopping_min_delta=9")
    with pytest.raises(AssertionError, match=r"did not answer|failed"):
        run_ranks(
            2,
            trained,
            "fsdp2",
            2,
            str(sources["gpt2"]),
            str(tmp_path),
            "judge_alone",
            overrides,
            timeout_seconds=20,
        )


def judge_differently_on_rank_1() -> None:
    from launch.engine.stopping import EarlyStopping, Judgement

    exact = EarlyStopping.judge

    def judge(self: EarlyStopping, loss: float) -> Judgement:
        judged = exact(self, loss)
        return judged if int(os.environ["RANK"]) == 0 else Judgement(best=not judged.best, stop=False)

    EarlyStopping.judge = judge  # type: ignore[method-assign]


def judge_alone() -> None:
    from launch.engine import judging

    judge_differently_on_rank_1()
    judging.from_main = lambda accelerator, value: value


def compute_in_fp16_on_a_cpu() -> None:
    """Which is refused for being slow; its arithmetic is real. The first scale is one that overflows."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from launch import plan, render
    from launch.engine import precision, run

    plan.check_abilities = lambda loaded, processes: None
    CPU_Accelerator.is_fp16_supported = lambda self: True
    run.LossScale = lambda: precision.LossScale(2.0**24)  # type: ignore[misc,assignment]
    exact = render.deepspeed_config

    def with_a_large_scale(*arguments: Any) -> dict[str, Any]:
        config = exact(*arguments)
        config["fp16"]["initial_scale_power"] = 24
        return config

    plan.deepspeed_config = with_a_large_scale


def spoiled(strategy: str, source: str, folder: str, what: str) -> tuple[str, float]:
    """A run whose third update has a loss, or only a gradient, that is not finite on rank 1; how it ended."""
    import torch
    from transformers import AutoModelForCausalLM

    from launch.engine.data import open_data
    from launch.engine.gathering import full_state
    from launch.engine.progress import Display
    from launch.engine.run import Run
    from launch.engine.sharding import make_accelerator
    from recipes.causal_lm import collate, count, loss
    from tests.test_engine_export import tokenizer

    calls = 0

    def spoil(model: Any, batch: Any) -> torch.Tensor:
        nonlocal calls
        summed = loss(model, batch)
        training = torch.is_grad_enabled()  # DeepSpeed's engine says `training` while it evaluates
        calls += training
        if calls < 5 or not training or torch.distributed.get_rank() == 0:  # two micro-batches an update
            return summed
        # d sqrt(x) / dx at 0 is infinite, although sqrt(0) is 0.
        return summed * math.nan if what == "loss" else summed + torch.sqrt(summed * 0.0)

    plan, samples = plan_for(strategy, 2, Path(folder)), tiny.sequences(SAMPLES)
    prepared = Prepared(
        lambda: AutoModelForCausalLM.from_pretrained(source), tokenizer(), samples, samples, collate, spoil, count
    )
    data = open_data(plan, prepared, read_world().rank)
    accelerator = make_accelerator(plan)
    run = Run(plan, Path(folder), prepared, data, accelerator, Display(False))
    try:
        run.train()
    except NonFiniteError as error:
        state = full_state(accelerator, run.model)
        return str(error), sum(float(tensor.abs().sum()) for tensor in state.values())
    return "no error", 0.0


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("strategy", ["fsdp2", "zero1", "zero2", "zero3", "zero2_offload"])
def test_what_is_not_finite_on_one_rank_stops_all_before_the_weights_are_touched(
    strategy: str, what: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    (message, size), (other_message, _) = run_ranks(2, spoiled, strategy, str(sources["gpt2"]), str(tmp_path), what)
    assert message == other_message
    assert message.startswith("update 3: " + {"loss": "loss is nan: rank 1 (", "gradient": "gradient norm is "}[what])
    assert math.isfinite(size) and size > 0


# --- bugs that these tests must notice -------------------------------------------------------------------


def forget_the_world() -> None:
    """Normalise as if gradients were summed over ranks, where they are averaged."""
    from launch.engine import loop

    loop.weigh = lambda summed, counts, world_size: summed / max(counts.targets, 1)


def average_the_averages() -> None:
    """Divide each micro-batch's loss by its own targets, as most training loops do."""
    from launch.engine import loop

    loop.weigh = lambda summed, counts, world_size: summed / 20


def tell_transformers_of_zero3() -> None:
    """Let `from_pretrained` hand out weights without a shape, so that none of them decays."""
    from launch.engine import sharding

    sharding.unset_hf_deepspeed_config = lambda: None


def forget_other_ranks_in_scores() -> None:
    """Leave out the sum over ranks in an evaluation."""
    from launch.engine import scoring

    scoring.count_over_ranks = lambda accelerator, counts: (counts, [])


def walk_the_schedule_on_every_rank() -> None:
    """Advance the learning rate once per rank and update, as a scheduler prepared by Accelerate does."""
    from launch.schedule import Schedule

    exact = Schedule.learning_rate
    Schedule.learning_rate = lambda self, update: exact(self, min(2 * update, self.total))  # type: ignore[method-assign]


def build_other_weights_on_each_rank() -> None:
    """Seed the weights by rank; DDP and ZeRO overwrite them with rank 0's, FSDP2 shards them as they are."""
    import torch
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained

    def build(source: str) -> Any:
        model = exact(source)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * int(torch.distributed.get_rank())
        return model

    AutoModelForCausalLM.from_pretrained = build


def untie_the_head() -> None:
    """Give the head weights of its own, as loading a checkpoint without its ties does."""
    import torch
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained

    def build(source: str) -> Any:
        model = exact(source)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    AutoModelForCausalLM.from_pretrained = build


def order_samples_by_rank() -> None:
    """Seed the order of samples with the rank: some are seen twice in an epoch, others never."""
    from launch.engine import batching

    exact = batching.epoch_order
    batching.epoch_order = lambda samples, seed, epoch: exact(samples, seed + int(os.environ.get("RANK", 0)), epoch)


BUGS = {
    function.__name__: function
    for function in (
        untie_the_head,
        order_samples_by_rank,
        judge_differently_on_rank_1,
        judge_alone,
        compute_in_fp16_on_a_cpu,
        forget_the_world,
        average_the_averages,
        tell_transformers_of_zero3,
        forget_other_ranks_in_scores,
        walk_the_schedule_on_every_rank,
        build_other_weights_on_each_rank,
    )
}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "strategy"),
    [
        ("forget_the_world", "ddp"),
        ("forget_the_world", "zero2"),
        ("average_the_averages", "fsdp2"),
        ("untie_the_head", "zero3"),
        ("order_samples_by_rank", "ddp"),
        ("tell_transformers_of_zero3", "zero3"),
        ("forget_other_ranks_in_scores", "ddp"),
        ("walk_the_schedule_on_every_rank", "fsdp2"),
        ("build_other_weights_on_each_rank", "fsdp2"),
    ],
)
def test_a_planted_bug_is_noticed(
    bug: str, strategy: str, sources: dict[str, Path], references: dict[str, Any], tmp_path: Path
) -> None:
    run_ranks(2, trained, strategy, 2, str(sources["gpt2"]), str(tmp_path), bug)
    try:
        loss, norm = differences(records(tmp_path), references["gpt2"][0])
    except AssertionError:
        return
    assert loss > 1e-4 or norm > 1e-3, "far outside of what is allowed"


# --- waiting for another ---------------------------------------------------------------------------------

PATIENCE = 3.0
"""Seconds of `parallel.timeout_seconds`."""


def pauses_on_rank_1(seconds: float) -> float:
    """When we came here; rank 1 leaves later, or not at all where that is too late for the others."""
    began = time.monotonic()
    if os.environ["RANK"] == "1":
        time.sleep(seconds)
        if seconds > 2 * PATIENCE:
            raise TimeoutError("rank 1 is too late")
    return began


def waits_in_training(strategy: str, source: str, folder: str, longest: float, late: float) -> tuple[int, float, str]:
    """Train while rank 1 is slow in the first update and far too slow in the second; how that ended on this rank.

    `longest` is the time-out, of which more than half is too long after the first update where it is far above.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from launch.engine import waiting
    from launch.engine.data import open_data
    from launch.engine.progress import Display
    from launch.engine.run import Run
    from launch.engine.sharding import make_accelerator
    from recipes.causal_lm import collate, count, loss
    from tests.test_engine_export import tokenizer

    waiting.MARGIN = 0.0
    pauses = iter([PATIENCE / 2, late])
    began = 0.0

    def slow_loss(model: Any, batch: Any) -> Any:
        nonlocal began
        if torch.is_grad_enabled():  # and not while the loss is seen to be a sum
            began = pauses_on_rank_1(next(pauses))
        return loss(model, batch)

    times = (f"parallel.timeout_seconds={longest}", f"parallel.hang_seconds={PATIENCE / 2}")
    overrides = (*times, "train.micro_batch_size=4", "eval.at_start=false")
    plan = plan_for(strategy, 2, Path(folder), *overrides)
    rows = tiny.sequences(SAMPLES)
    model = AutoModelForCausalLM.from_pretrained(source)
    prepared = Prepared(lambda: model, tokenizer(), rows, rows, collate, slow_loss, count)
    data = open_data(plan, prepared, read_world().rank)
    run = Run(plan, Path(folder), prepared, data, make_accelerator(plan), Display(False))
    try:
        run.train()
    except Exception as error:
        return run.updates_done, time.monotonic() - began, str(error)
    return run.updates_done, time.monotonic() - began, ""


def waits_in_the_world(strategy: str, folder: str) -> tuple[float, str]:
    """The same for the group that all ranks are in from the start."""
    import torch

    from launch.engine.sharding import make_accelerator

    make_accelerator(plan_for(strategy, 2, Path(folder), f"parallel.timeout_seconds={PATIENCE}"))
    began = 0.0
    try:
        for pause in (PATIENCE / 2, 2.5 * PATIENCE):
            began = pauses_on_rank_1(pause)
            torch.distributed.all_reduce(torch.zeros(1))
    except Exception as error:
        return time.monotonic() - began, str(error)
    return time.monotonic() - began, ""


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "longest", "late"),
    [
        ("ddp", PATIENCE, 2.5 * PATIENCE),
        ("zero1", PATIENCE, 2.5 * PATIENCE),
        ("fsdp2", 600.0, 24.0),
        ("zero3", 600.0, 24.0),
    ],
)
def test_a_rank_waits_for_another_as_long_as_is_said_and_then_gives_up(
    strategy: str, longest: float, late: float, sources: dict[str, Path], tmp_path: Path
) -> None:
    """DeepSpeed exchanges gradients in a group of its own, and torch gives that one 30 minutes.

    Where much longer is allowed, it is so for the first update alone.
    """
    (updates, seconds, error), _ = run_ranks(
        2, waits_in_training, strategy, str(sources["gpt2"]), str(tmp_path), longest, late, timeout_seconds=60
    )
    assert error
    assert updates == 1, "half the time is not too long"
    assert PATIENCE <= seconds < (2 * PATIENCE if longest == PATIENCE else late), error


def waits_less_later() -> list[tuple[float, bool]]:
    """How long rank 0 waits for rank 1, which is late each time, and whether it has come."""
    import torch

    from launch.engine import waiting as module
    from launch.engine.waiting import Waiting
    from launch.sections import ParallelSection

    module.MARGIN = 0.0
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=50))
    group, found = torch.distributed.new_group(timeout=timedelta(seconds=40)), []

    def exchange(late: float, group: Any = None) -> None:
        began = time.monotonic()
        if os.environ["RANK"] == "1":
            time.sleep(late)
        try:
            torch.distributed.all_reduce(torch.zeros(1), group=group)
        except RuntimeError:
            found.append((time.monotonic() - began, False))
        else:
            found.append((time.monotonic() - began, True))

    waiting = Waiting(ParallelSection(timeout_seconds=30, hang_seconds=0.5))
    exchange(0.0)
    waiting.after_update(plain=True)
    exchange(0.3)
    waiting.long()  # a save, after which rank 1 has more to do than rank 0
    exchange(2.0)
    waiting.after_update(plain=False)
    exchange(2.0)
    waiting.after_update(plain=True)
    exchange(2.0, group)
    exchange(2.0)
    return found


@pytest.mark.dist
def test_ranks_wait_less_after_the_first_update_but_for_what_one_may_do_alone() -> None:
    (*patient, first, second), _ = run_ranks(2, waits_less_later, timeout_seconds=60)
    assert [came for _, came in patient] == [True] * 4
    assert [came for _, came in (first, second)] == [False] * 2, "all groups wait less"
    assert 1.0 <= first[0] < 1.8 and 1.0 <= second[0] < 1.8


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_so_does_the_world_that_accelerate_and_deepspeed_make(strategy: str, tmp_path: Path) -> None:
    (seconds, error), _ = run_ranks(2, waits_in_the_world, strategy, str(tmp_path), timeout_seconds=60)
    assert error
    assert PATIENCE <= seconds < 2 * PATIENCE, error
