"""The plan of memory: its arithmetic, against torch's own for worlds that nobody has, and against a real run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.comparison import CUDA_BUILD, HEADROOM, LIBRARIES, Comparison, compare, possible
from launch.devices import kind_of, read_devices
from launch.errors import ConfigError
from launch.explain import explain
from launch.memory import Need, Setting, checkpoint_bytes, need, numbers_of, optimizer_bytes, training_flops
from launch.outline import Outline, outline
from launch.plan import Plan, decide
from launch.recipe import LOSS_BYTES_CPU, Adapters, ModelUse
from launch.strategy import Strategy
from launch.topology import Machine, World, world_to_be
from launch.utilisation import utilisation_of_a_token
from tests.commands import shoal
from tests.fake_world import MODEL, SAMPLES, TOKENS

USE = ModelUse(MODEL, "next_token", TOKENS, padded=False)
ONE = Setting(1, SAMPLES, 1, numbers_low=False, on_cpu=True)


def drawn(numbers: str = "fp32", use: ModelUse = USE) -> Outline:
    found = outline(use, numbers)  # type: ignore[arg-type]
    assert found is not None
    return found


def needed(strategy: Strategy, **changes: Any) -> Need:
    setting = replace(ONE, **({"world_size": 1 if strategy is Strategy.SINGLE else 8} | changes))
    return need(drawn(numbers_of(strategy, setting.numbers_low)), strategy, setting)


# --- against torch ---------------------------------------------------------------------------------------


def test_up_to_1024_ranks_the_need_is_what_torch_tracks_of_fsdp2_on_a_fake_process_group() -> None:
    sizes = (2, 3, 1024)
    command = [sys.executable, "-m", "tests.fake_world", *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [each["world_size"] for each in told] == list(sizes)
    for each in told:
        found = needed(Strategy.FSDP2, world_size=each["world_size"])
        assert found.parameters == 4 * each["numbers"] == each["SHARDED_PARAM"]
        assert found.optimizer == pytest.approx(each["OPT"], abs=4 * 50)  # a counter of each weight besides
        assert found.total == pytest.approx(each["Total"], rel=0.03)


def test_a_real_run_takes_what_was_planned(tmp_path: Path) -> None:
    """Of a model so small the libraries are the most; benchmarks/memory.py has larger ones."""
    out = tmp_path / "run"
    changes = (
        *("recipe_args.from_scratch=true", "recipe_args.block_size=128", "recipe_args.model=embedded"),
        "recipe_args.config_overrides={n_embd: 512, n_layer: 6, n_head: 8, vocab_size: 30000}",
        *("train.global_batch_size=16", "train.micro_batch_size=16", "train.max_steps=2", "eval.max_samples=1"),
        *("eval.at_start=false", "save.export=false", "parallel.device=cpu"),
    )
    command = [sys.executable, "-m", "launch", "run", "causal_lm", *changes, "--out", str(out)]
    environment = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=_with(environment))
    assert done.returncode == 0, done.stderr
    (peak,) = json.loads((out / "result.json").read_text())["peak_memory"]
    memory = json.loads((out / "plan.json").read_text())["plan"]["memory"]
    parts = {name: size for name, size in memory["needs"]["single"].items() if name not in ("host", "moment")}
    assert peak == pytest.approx(sum(parts.values()) + memory["libraries"], rel=0.15)
    assert sum(parts.values()) > memory["libraries"], "the test is of the model's share"


def _with(variables: dict[str, str]) -> dict[str, str]:
    import os

    return {**os.environ, **variables}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["causal_lm", "text_classification"])
def test_what_metrics_are_computed_with_is_planned_too(tmp_path: Path, recipe: str) -> None:
    """Of models so small that libraries are nearly all of it; run twice, for to prepare data takes memory as well."""
    for out in ("first", "second"):
        options = ("train.max_steps=2", "eval.max_samples=4", "save.export=false")
        done = shoal(tmp_path, "run", recipe, *options, "parallel.device=cpu", "--out", out)
        assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "second/result.json").read_text())
    assert [result["planned_memory"]] == pytest.approx(result["peak_memory"], rel=0.15)


# --- arithmetic ------------------------------------------------------------------------------------------


def test_what_is_sharded_falls_with_the_ranks_and_what_is_not_stays() -> None:
    for strategy in (Strategy.FSDP2, Strategy.ZERO3):
        few, many = (needed(strategy, world_size=size) for size in (8, 64))
        assert few.parameters > 4 * many.parameters
        assert few.optimizer > 7 * many.optimizer
        assert few.activations == many.activations
    few, many = (needed(Strategy.ZERO1, world_size=size) for size in (8, 64))
    assert few.optimizer > 7 * many.optimizer
    assert few.parameters - many.parameters == pytest.approx(4 * drawn().trained * (1 / 8 - 1 / 64), rel=0.01)
    assert needed(Strategy.DDP, world_size=8) == needed(Strategy.DDP, world_size=64)


def test_of_one_process_the_parts_are_those_one_counts_by_hand() -> None:
    numbers = drawn().parameters
    found = needed(Strategy.SINGLE)
    assert (found.parameters, found.optimizer) == (4 * numbers, 8 * numbers)
    assert (found.moment, found.gradients) == ("loss", 0)
    assert found.logits == 3 * 4 * SAMPLES * TOKENS * MODEL["vocab_size"]
    assert found.activations == SAMPLES * sum(unit.kept for unit in drawn().units)
    assert needed(Strategy.SINGLE, accumulation=2).gradients == 4 * numbers
    assert needed(Strategy.DDP).gradients == 4 * numbers, "its buckets"


def test_a_loss_that_is_found_in_pieces_needs_one_of_them_and_the_gradient_of_the_head_early() -> None:
    use = replace(USE, fused_loss=True)
    found = need(drawn(use=use), Strategy.SINGLE, ONE)
    tokens, classes, width = SAMPLES * TOKENS, MODEL["vocab_size"], MODEL["hidden_size"]
    piece = min(tokens * 4 * classes, LOSS_BYTES_CPU)
    assert found.moment == "loss"
    assert found.logits == 2 * piece + 4 * classes * width + 2 * 4 * tokens * width
    many = replace(ONE, micro_batch_size=64)
    pieces, whole = need(drawn(use=use), Strategy.SINGLE, many), need(drawn(), Strategy.SINGLE, many)
    assert pieces.logits < whole.logits / 4 and pieces.total < whole.total
    frozen = drawn(use=replace(use, adapters=Adapters(4)))
    assert need(frozen, Strategy.SINGLE, ONE).logits == found.logits - 4 * classes * width
    assert need(drawn(use=use), Strategy.XLA, many).logits == whole.logits, "where it is compiled it is not done"
    head = drawn(use=replace(use, adapters=Adapters(4, ("lm_head",))))
    assert head.fused is None, "an adapter of the head needs its scores"


@pytest.mark.parametrize("on_cpu", [True, False])
def test_of_few_samples_weights_gradients_and_optimizer_are_all(on_cpu: bool) -> None:
    """The step of a fused AdamW takes nothing besides, on a CPU too."""
    small = drawn(use=replace(USE, tokens=8))
    found = need(small, Strategy.SINGLE, replace(ONE, micro_batch_size=1, on_cpu=on_cpu))
    assert (found.gradients, found.buffers) == (4 * small.parameters, 0)
    assert 16 * small.parameters <= found.total < 16.001 * small.parameters


def test_checkpointing_keeps_what_blocks_are_given_and_one_block_at_a_time() -> None:
    full, less = needed(Strategy.SINGLE), needed(Strategy.SINGLE, checkpointing=True)
    assert less.total < full.total
    blocks = [unit for unit in drawn().units if unit.block]
    assert full.activations - less.activations == SAMPLES * sum(unit.kept - unit.entry for unit in blocks)


def test_offloading_leaves_on_a_gpu_what_is_computed_with_and_puts_the_rest_into_main_memory() -> None:
    for strategy in (Strategy.FSDP2_OFFLOAD, Strategy.ZERO3_OFFLOAD):
        on_gpu = needed(strategy, on_cpu=False)
        assert (on_gpu.parameters, on_gpu.optimizer) == (0, 0)
        assert on_gpu.host >= 16 * drawn().parameters // 8
        assert needed(strategy, on_cpu=True).host == 0, "there it is the same memory"


def test_optimizers_remember_what_they_remember() -> None:
    whole = drawn()
    assert optimizer_bytes(whole, replace(ONE, optimizer="sgd")) == 0
    assert optimizer_bytes(whole, replace(ONE, optimizer="sgd", momentum=True)) == 4 * whole.trained
    assert 0 < optimizer_bytes(whole, replace(ONE, optimizer="adafactor")) < whole.trained
    assert checkpoint_bytes(whole, ONE) == 12 * whole.parameters


def test_operations_are_six_for_each_weight_and_token_and_attention_besides() -> None:
    whole = drawn()
    products = whole.parameters - MODEL["vocab_size"] * MODEL["hidden_size"]  # embeddings are looked up
    attention = 3 * MODEL["num_hidden_layers"] * 4 * TOKENS * TOKENS * MODEL["hidden_size"]
    assert training_flops(whole, checkpointing=False) == pytest.approx(6 * products * TOKENS + attention, rel=0.01)
    assert training_flops(whole, checkpointing=True) > training_flops(whole, checkpointing=False)


# --- side by side ----------------------------------------------------------------------------------------


def comparison(memory_bytes: int | None, world_size: int = 8, **changes: Any) -> Comparison:
    found = compare(USE, replace(ONE, on_cpu=False, world_size=world_size, **changes), "cuda", memory_bytes)
    assert found is not None
    return found


def test_auto_takes_the_plainest_that_fits_and_where_none_does_what_needs_least() -> None:
    plenty, enough = comparison(80 * 10**9), comparison(None)
    assert (plenty.choose(), enough.choose()) == (Strategy.DDP, Strategy.DDP)
    ddp, fsdp = (plenty.bytes(each) for each in (Strategy.DDP, Strategy.FSDP2))
    assert fsdp < ddp
    assert comparison(int(fsdp / 0.92) + 10**6).choose() is Strategy.FSDP2
    none = comparison(LIBRARIES["cuda"])
    assert none.choose() is Strategy.FSDP2_OFFLOAD
    assert not none.fits(none.choose())


def test_strategies_are_those_that_so_many_processes_can_have() -> None:
    assert possible(1, "cuda") == [Strategy.SINGLE]
    assert Strategy.FSDP2_OFFLOAD in possible(2, "cuda")
    assert not any(each.offload for each in possible(2, "cpu"))


def test_a_torch_that_was_built_for_cuda_takes_main_memory_without_a_gpu() -> None:
    plain, larger = (compare(USE, ONE, "cpu", None, cuda_build=built) for built in (False, True))
    assert plain and larger and larger.libraries - plain.libraries == CUDA_BUILD["cpu"] > 0
    on_gpu = [compare(USE, replace(ONE, on_cpu=False), "cuda", None, cuda_build=built) for built in (False, True)]
    assert on_gpu[0] == on_gpu[1] is not None


def test_of_an_unknown_architecture_nothing_is_compared() -> None:
    assert compare(replace(USE, config={"model_type": "mamba"}), ONE, "cpu", None) is None


# --- devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("Tesla T4", "T4-16GB"),
        ("NVIDIA GeForce RTX 4090", "RTX4090-24GB"),
        ("NVIDIA L4", "L4-24GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(told: str, name: str) -> None:
    kind = kind_of(told)
    assert kind is not None
    assert kind.name == name


def test_a_gpu_of_another_make_or_of_two_sizes_is_not_guessed() -> None:
    assert kind_of("NVIDIA GeForce GTX 1080") is None
    assert kind_of("NVIDIA A100") is None
    assert kind_of("") is None


def test_devices_elsewhere_are_named_by_number_and_kind() -> None:
    assert read_devices("8xH100-80GB").number == 8
    assert read_devices("8 x h100").kind.name == "H100-80GB"
    assert read_devices("4xMI210-64GB").kind.memory_bytes == 64 * 10**9
    assert read_devices("2xcpu-16GB").on_cpu


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("H100", "such as 8xH100-80GB"),
        ("0xH100", "such as 8xH100-80GB"),
        ("8xA100", "there are 8xA100-40GB and 8xA100-80GB"),
        ("8xMI210", "say how much memory each has, as in 8xMI210-48GB"),
    ],
)
def test_what_cannot_be_understood_is_told_with_what_can(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^command line: --on = {text}: .*{said}"):
        read_devices(text)


# --- in a plan -------------------------------------------------------------------------------------------

LARGE = ("recipe_args.from_scratch=true", "recipe_args.config_overrides={n_embd: 4096, n_layer: 32, n_head: 32}")


def shown(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", "causal_lm", *arguments], env={"COLUMNS": "250"})
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_a_plan_for_machines_elsewhere_shows_what_each_strategy_needs_there() -> None:
    text = shown(
        "--on", "8xH100-80GB", "--nodes", "4", "train.global_batch_size=64", "train.micro_batch_size=2", *LARGE
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "processes 32 on cuda 4 nodes × 8, H100-80GB" in lines
    assert any(
        line.startswith("strategy fsdp2 the plainest that fits: ddp needs 108.1 GB of 73.6 GB") for line in lines
    )
    row = next(line for line in lines if line.startswith("ddp "))
    assert (
        row.startswith("ddp 108.1 GB 104.6 GB no")
        and " no parameters 25.8 GB, gradients 25.8 GB, optimizer 51.6 GB" in row
    )
    assert any(line.startswith("parameters 6,4") for line in lines)
    assert any(line.startswith("time about ") for line in lines)


def test_here_the_plan_is_of_this_machine_and_json_holds_it_whole() -> None:
    found = json.loads(shown("parallel.device=cpu", "--json"))
    assert found["memory"]["needs"].keys() == {"single"}
    assert found["memory"]["parameters"] == 675_328
    assert found["memory"]["capacity"] == int(found["processes"]["memory_bytes"] * HEADROOM["cpu"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--on", "8xH100", "--debug-cpu", "2"], "--on and --debug-cpu both say where the run is to be"),
        (["--on", "8xH100", "--data"], "--data prepares here, and --on plans for elsewhere"),
        (["--on", "many"], "--on = many: is to be a number of devices and their kind"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = shoal(tmp_path, "plan", "causal_lm", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"shoal: command line: {said}") and done.stderr.count("\n") == 1


def planned(world: World, machine: Machine, *overrides: str) -> Plan:
    return decide(
        "causal_lm", ["train.global_batch_size=64", "train.micro_batch_size=2", *overrides], None, world, machine
    ).plan


NODE = Machine("node", cores=64, gpus=8, gpu_name="H100-80GB", gpu_memory_bytes=80 * 10**9)


def test_auto_looks_at_memory_only_where_it_decides_for_all_ranks() -> None:
    assert planned(World(), NODE, *LARGE).processes.strategy is Strategy.FSDP2
    assert planned(world_to_be(2, 8), NODE, *LARGE).processes.strategy is Strategy.FSDP2
    started = World(rank=3, size=16, local_rank=3, local_size=8, launched=True)
    assert planned(started, NODE, *LARGE).processes.strategy is Strategy.DDP, "other hosts may decide otherwise"
    assert planned(World(), NODE).processes.strategy is Strategy.DDP
    stated = planned(World(), NODE, "parallel.strategy=zero2", *LARGE)
    assert stated.processes.strategy is Strategy.ZERO2


def test_where_memory_is_not_known_auto_is_the_plainest_and_says_why() -> None:
    plan = planned(World(), replace(NODE, gpu_memory_bytes=0), *LARGE)
    assert plan.processes.strategy is Strategy.DDP
    (line,) = [line for line in explain(plan) if line.name == "strategy"]
    assert line.because == "the plainest, for the memory of a process is not known; adamw"


def test_a_plan_of_several_machines_may_show_the_data_too(tmp_path: Path) -> None:
    done = shoal(tmp_path, "plan", "causal_lm", "--nodes", "2", "--data", "parallel.device=cpu", "parallel.devices=1")
    assert done.returncode == 0, done.stderr
    assert "2 nodes × 1" in done.stdout and "known after preparation" not in done.stdout


def test_the_buffers_that_a_file_of_deepspeed_asks_for_are_in_the_plan(tmp_path: Path) -> None:
    def buffers(content: str) -> int:
        (tmp_path / "mine.json").write_text(content)
        file = f"parallel.deepspeed_config={tmp_path}/mine.json"
        plan = planned(World(), NODE, "parallel.strategy=zero2", file, *LARGE)
        assert plan.memory is not None
        return plan.memory.needs[Strategy.ZERO2].buffers

    stated = '{{"zero_optimization": {{"stage": 2, "reduce_bucket_size": {}}}}}'
    ours = buffers('{"zero_optimization": {"stage": 2}}')
    assert ours == buffers(stated.format('"auto"')) == buffers(stated.format(25_000_000))
    assert buffers(stated.format(100_000_000)) - ours == 4 * (100_000_000 - 25_000_000), "of fp32"


def test_the_share_of_the_devices_that_is_made_use_of_is_that_of_the_model_s_own_operations() -> None:
    """Of GPT-2 small in blocks of 1,024 tokens: 6 operations for each weight of a product, and attention's own."""
    small = ("recipe_args.from_scratch=true", "recipe_args.block_size=1024", "train.precision=bf16")
    sizes = "recipe_args.config_overrides={n_embd: 768, n_layer: 12, n_head: 12, n_positions: 1024, vocab_size: 50257}"
    plan = planned(World(), NODE, *small, sizes)
    products = 12 * 12 * 768**2 + 50257 * 768
    attention = 12 * 12 * 768 * 1024  # of each token with all: scores and mixing, forward and backward
    found = utilisation_of_a_token(plan)
    assert found == pytest.approx((6 * products + attention) / (8 * 989e12), rel=0.02)
    again = planned(World(), NODE, *small, sizes, "train.activation_checkpointing=true")
    assert utilisation_of_a_token(again) == found, "doing it twice is no use"
    full = planned(World(), NODE, *small, sizes, "train.precision=fp32")
    assert utilisation_of_a_token(full) == pytest.approx(found * 989 / 67)


@pytest.mark.parametrize(
    ("machine", "recipe", "overrides"),
    [
        (replace(NODE, gpu_name="Something new"), "causal_lm", ()),
        (Machine("box", cores=8, gpus=0), "causal_lm", ()),
        (NODE, "text_classification", ("train.global_batch_size=64",)),  # whose samples differ in length
        (NODE, "causal_lm", ("recipe_args.lora={}",)),
    ],
)
def test_it_is_absent_rather_than_wrong(machine: Machine, recipe: str, overrides: tuple[str, ...]) -> None:
    plan = decide(recipe, ["train.micro_batch_size=1", *overrides], None, World(), machine).plan
    assert utilisation_of_a_token(plan) is None
