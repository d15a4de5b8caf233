"""Strategies by name, their number formats, and the files for `accelerate launch` as its own code reads them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from launch.assets import shipped_folder
from launch.config import load
from launch.errors import TopologyError
from launch.plan import decide, make_plan
from launch.recipe import Preview
from launch.sections import ParallelSection
from launch.strategy import Dtypes, Strategy, planned_dtypes, strategy_with_offload
from launch.topology import Machine, World, read_world

CONFIGS = sorted(shipped_folder("accelerate_configs").glob("*.yaml"))
RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


def test_the_names_are_those_of_the_configuration() -> None:
    names = get_args(ParallelSection.model_fields["strategy"].annotation)
    assert list(names) == ["auto", *map(str, Strategy)]


def test_what_a_strategy_is_made_of() -> None:
    made = {str(strategy): (strategy.kind, strategy.stage, strategy.offload, strategy.shards) for strategy in Strategy}
    assert made == {
        "single": ("single", 0, False, False),
        "ddp": ("ddp", 0, False, False),
        "fsdp2": ("fsdp2", 0, False, True),
        "fsdp2_offload": ("fsdp2", 0, True, True),
        "zero1": ("zero", 1, False, True),
        "zero2": ("zero", 2, False, True),
        "zero3": ("zero", 3, False, True),
        "zero2_offload": ("zero", 2, True, True),
        "zero3_offload": ("zero", 3, True, True),
        "xla": ("xla", 0, False, False),
    }
    assert strategy_with_offload(3, "cpu", "cpu") is Strategy.ZERO3_OFFLOAD
    assert strategy_with_offload(3, "cpu", "none") is None
    assert strategy_with_offload(1, "cpu", "none") is None


@pytest.mark.parametrize("strategy", Strategy)
def test_mixed_precision_keeps_sums_and_weights_in_fp32(strategy: Strategy) -> None:
    assert set(vars(planned_dtypes(strategy, "fp32")).values()) == {"float32"}
    low = planned_dtypes(strategy, "bf16")
    assert low == Dtypes(
        forward="bfloat16",
        parameter="bfloat16" if strategy.kind == "zero" else "float32",
        reduction="float32",
        master="float32",
        optimizer="float32",
    )
    assert planned_dtypes(strategy, "fp16").forward == "float16"


# --- accelerate_configs/ ---------------------------------------------------------------------------------


def test_there_is_a_file_for_each_strategy() -> None:
    strategies = {*map(str, Strategy)} - {"xla"}
    assert {path.stem for path in CONFIGS} == {*strategies, "cpu", "tpu"}


def environment_of(path: Path) -> dict[str, str]:
    """What `accelerate launch --config_file path` hands to its processes; it reads the file and checks its keys."""
    arguments = ["--config_file", str(path), "--num_processes", "2", "-m", "launch.train", "causal_lm"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = "zero_stage"  # as `launch_command` does
        return dict(prepare_deepspeed_cmd_env(args)[1])
    if args.use_fsdp or args.multi_gpu:
        return dict(prepare_multi_gpu_env(args))
    return dict(prepare_simple_launcher_cmd_env(args)[1])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_accepts_the_file_and_the_worker_finds_its_strategy(path: Path) -> None:
    found = read_world({**environment_of(path), **RANK}).strategy
    assert found == (None if path.stem in ("cpu", "single", "ddp", "tpu") else path.stem)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_head_of_a_file_says_how_to_use_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"accelerate launch --config_file accelerate_configs/{path.name}" in text
    assert yaml.safe_load(text)["mixed_precision"] == "no", "stated once, in the run file"


# --- what a launcher says --------------------------------------------------------------------------------


def world(**environ: str) -> World:
    return read_world({**RANK, **environ})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"ACCELERATE_USE_FSDP": "true"},
            "`accelerate launch` was configured for FSDP version 1, which loses its optimizer state on resuming; use "
            "fsdp_version: 2, as in accelerate_configs/fsdp2.yaml",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
            "`accelerate launch` was configured for ZeRO stage 0, optimizer offloaded to none, weights to none; there "
            "are zero1, zero2, zero3, zero2_offload (the optimizer on the CPU) and zero3_offload (optimizer and "
            "weights on the CPU), see accelerate_configs/",
        ),
    ],
)
def test_a_launcher_that_asks_for_what_there_is_not(environ: dict[str, str], message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        world(**environ)
    assert str(caught.value) == message


def planned(world: World, *overrides: str) -> str:
    loaded = load(None, ["recipe=causal_lm", "parallel.device=cpu", *overrides])
    return str(make_plan(loaded, Machine("box", 4, 0), world, Preview(), Path("/runs/one")).processes.strategy)


ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def test_the_strategy_of_a_launcher_is_taken_over_and_never_contradicted() -> None:
    assert planned(world(**ZERO2)) == "zero2"
    assert planned(world(**ZERO2), "parallel.strategy=zero2") == "zero2"
    assert planned(world()) == "ddp"
    assert planned(world(), "parallel.strategy=zero2") == "zero2", "torchrun has no opinion"
    with pytest.raises(TopologyError) as caught:
        planned(world(**ZERO2), "parallel.strategy=fsdp2")
    assert str(caught.value) == (
        "command line: parallel.strategy = fsdp2, but the launcher was configured for zero2; state the same in both, "
        "or leave parallel.strategy out"
    )


@pytest.mark.parametrize("strategy", ["fsdp2", "zero1", "zero3_offload"])
def test_one_process_cannot_be_sharded(strategy: str) -> None:
    with pytest.raises(TopologyError) as caught:
        planned(World(), f"parallel.strategy={strategy}")
    assert str(caught.value) == (
        f"command line: parallel.strategy = {strategy}: there is one process, and nothing to shard over; use "
        "parallel.strategy=single, or parallel.devices=2 or more"
    )


def test_a_missing_deepspeed_is_told_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = ["parallel.device=cpu", "parallel.devices=2", "parallel.strategy=zero2"]
    assert decide("causal_lm", stated, None, World()).plan.deepspeed
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # Python's own way to make an import fail
    with pytest.raises(TopologyError) as caught:
        decide("causal_lm", stated, None, World())
    assert str(caught.value) == (
        "command line: parallel.strategy = zero2: the package deepspeed is not installed; "
        "pip install 'shoal[deepspeed]', or use parallel.strategy=fsdp2"
    )
