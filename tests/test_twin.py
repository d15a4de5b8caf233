"""The CPU twin: what it is meant to be the twin of, and that all that differs is found by comparing the plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.config import load
from launch.errors import ConfigError
from launch.plan import Plan, make_plan
from launch.recipe import Preview
from launch.sections import ParallelSection
from launch.strategy import Strategy
from launch.topology import Machine, World
from launch.twin import assume, changes, decide_twin, differences, flatten

OWN = Path(__file__).with_name("own_recipe.py")
HERE = Machine("box", cores=8, gpus=0)


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "run.yaml"
    path.write_text(f"recipe: {OWN}\ntrain: {{global_batch_size: 8, max_steps: 4}}\n")
    return str(path)


def planned(machine: Machine, *overrides: str, world: World | None = None, folder: str = "/runs/one") -> Plan:
    loaded = load(None, ["recipe=causal_lm", "train.max_steps=4", *overrides])
    return make_plan(loaded, machine, world or World(), Preview(), Path(folder))


def by_key(lines: list[str]) -> dict[str, str]:
    return dict(line.strip().split(": ", 1) for line in lines)


def test_every_key_that_differs_is_told_and_no_other() -> None:
    overrides = ("parallel.strategy=zero2", "train.global_batch_size=16")
    run = planned(Machine("gpus", cores=8, gpus=8), *overrides)
    twin = planned(
        *(HERE, *overrides, "parallel.device=cpu", "parallel.devices=2", "train.padding_free=off"),
        "train.precision=bf16",
        folder="/runs/two",
    )
    told = by_key(differences(run, twin))
    assert told == {
        "config.train.padding_free": "auto → off",
        "config.train.precision": "fp32 → bf16",
        "config.parallel.device": "auto → cpu",
        "config.parallel.devices": "auto → 2",
        "processes.device": "cuda → cpu",
        "processes.per_node": "8 → 2",
        "processes.world_size": "8 → 2",
        "processes.threads": "1 → 4",
        "batch.micro_batch_size": "2 → 8",
        "batch.eval_batch_size": "2 → 8",
        "deepspeed.train_micro_batch_size_per_gpu": "2 → 8",
        "deepspeed.bf16.enabled": "false → true",
        "environment.OMP_NUM_THREADS": "1 → 4",
        "environment.CUDA_VISIBLE_DEVICES": '(not set) → ""',
        "communication": "nccl → gloo",
        "dtypes.forward": "float32 → bfloat16",
        "dtypes.parameter": "float32 → bfloat16",
        "environment.DS_ACCELERATOR": "(not set) → cpu",
    }
    assert differences(run, planned(Machine("gpus", 8, 8), *overrides, folder="/runs/two")) == [], "but for the folder"


def test_one_process_has_no_communication() -> None:
    one, two = (planned(HERE, "parallel.device=cpu", f"parallel.devices={number}") for number in (1, 2))
    told = by_key(differences(one, two))
    assert told["communication"] == "none → gloo"


def test_a_mapping_is_flattened_to_dotted_keys() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}


@pytest.mark.parametrize(
    ("stated", "here", "gpus", "world", "assumed"),
    [
        ({"devices": 8}, HERE, 8, World(), "a machine with 8 GPUs (parallel.devices), otherwise as this one"),
        ({}, HERE, 2, World(), "a machine with 2 GPUs (as many as the twin has processes), otherwise as this one"),
        (
            {"device": "cuda"},
            Machine("box", 1, 4),
            4,
            World(),
            "a machine with 4 GPUs (as here), otherwise as this one",
        ),
        (
            {"devices": 4, "nodes": 2},
            HERE,
            4,
            World(size=8, local_size=4, launched=True, to_be=True),
            "each of 2 nodes with 4 GPUs (parallel.devices), otherwise as this one",
        ),
        ({"device": "cpu", "devices": 2}, HERE, 0, World(), "this machine's cpu"),
    ],
)
def test_the_devices_a_run_asks_for_are_taken_to_be_there(
    stated: dict[str, object], here: Machine, gpus: int, world: World, assumed: str
) -> None:
    target = assume(ParallelSection(**stated), here, processes=2)  # type: ignore[arg-type]
    assert (target.machine.gpus, target.machine.cores, target.world) == (gpus, here.cores, world)
    assert target.assumed == assumed


def test_what_only_a_gpu_can_do_and_a_strategy_left_open_are_stated_for_the_twin() -> None:
    config = load(None, ["recipe=causal_lm"]).config
    on_cpu = ["parallel.device=cpu", "parallel.devices=2", "parallel.nodes=1"]
    assert changes(config, None, 2) == on_cpu
    half = load(None, ["recipe=causal_lm", "train.precision=fp16"]).config
    assert changes(half, None, 2) == [*on_cpu, "train.precision=fp32"]
    run = planned(Machine("gpus", 8, 8), "train.global_batch_size=8")
    assert run.processes.strategy is Strategy.DDP
    assert changes(config, run, 2) == [*on_cpu, "train.padding_free=off"]
    assert changes(config, run.model_copy(update={"by_length": "off"}), 2) == on_cpu, "there is no padding"
    assert changes(config, run.model_copy(update={"padding_free": True}), 2) == on_cpu
    alone = ["parallel.device=cpu", "parallel.devices=1", "parallel.nodes=1"]
    assert changes(config, run, 1) == [*alone, "parallel.strategy=ddp", "train.padding_free=off"]


@pytest.mark.parametrize("strategy", [each for each in Strategy if each not in (Strategy.SINGLE, Strategy.XLA)])
def test_the_twin_has_the_strategy_of_the_run(strategy: Strategy, run_file: str, tmp_path: Path) -> None:
    twin = decide_twin(run_file, [f"parallel.strategy={strategy}", "parallel.devices=8"], tmp_path / "run", 2)
    processes = twin.decided.plan.processes
    assert (processes.strategy, processes.device, processes.world_size) == (strategy, "cpu", 2)
    assert twin.lines[0] == f"CPU twin of this run, strategy {strategy}"
    assert by_key(twin.lines[3:])["processes.world_size"] == "8 → 2"


def test_the_twin_of_a_run_on_tpus_is_one_process(run_file: str, tmp_path: Path) -> None:
    twin = decide_twin(run_file, ["parallel.strategy=xla", "parallel.devices=8"], tmp_path / "run", 1)
    processes, batch = twin.decided.plan.processes, twin.decided.plan.batch
    assert (processes.strategy, processes.device, batch.accumulation) == ("single", "cpu", 1)
    told = by_key(twin.lines[3:])
    assert (told["processes.devices"], told["processes.device"]) == ("8 → 1", "xla → cpu")


def test_half_precision_which_only_a_gpu_has_becomes_fp32_and_that_is_told(run_file: str) -> None:
    twin = decide_twin(run_file, ["train.precision=fp16", "parallel.strategy=zero2"], None, 2)
    told = by_key(twin.lines[3:])
    assert told["config.train.precision"] == "fp16 → fp32"
    assert told["dtypes.forward"] == "float16 → float32"
    assert told["deepspeed.fp16.enabled"] == "true → false"


def test_a_strategy_left_open_is_that_of_the_run_also_for_one_process_and_for_several_nodes(run_file: str) -> None:
    twin = decide_twin(run_file, ["parallel.devices=4", "parallel.nodes=2"], None, 1)
    assert twin.decided.plan.processes.strategy is Strategy.DDP
    told = by_key(twin.lines[3:])
    assert told["processes.nodes"] == "2 → 1"
    assert told["processes.world_size"] == "8 → 1"


def test_a_run_that_cannot_be_planned_is_told_so_and_its_twin_goes_on(run_file: str) -> None:
    twin = decide_twin(run_file, ["parallel.devices=3"], None, 2)
    assert twin.decided.plan.processes.world_size == 2
    assert len(twin.lines) == 2
    assert twin.lines[1].startswith("what differs cannot be told, because the run itself cannot be planned: ")
    assert "does not divide over 3 processes" in twin.lines[1]


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (
            ["parallel.devices=1"],
            2,
            "command line: --debug-cpu 2: this run is one process (strategy single), and so is its twin; use "
            "--debug-cpu 1, or parallel.devices=2 or more",
        ),
        (
            ["parallel.devices=2", "parallel.strategy=zero1"],
            1,
            "command line: --debug-cpu 1: this run's strategy is zero1, and one process has nothing to shard over; use "
            "--debug-cpu 2 or more",
        ),
        (
            ["parallel.strategy=xla"],
            2,
            "command line: --debug-cpu 2: this run is one process (strategy xla), and so is its twin; use "
            "--debug-cpu 1",
        ),
        (["train.max_step=1"], 2, "command line: train.max_step = 1: unknown key; did you mean train.max_steps?"),
    ],
)
def test_a_twin_that_cannot_be_is_refused_in_one_line(
    overrides: list[str], processes: int, message: str, run_file: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        decide_twin(run_file, overrides, None, processes)
    assert str(caught.value) == message


def test_a_twin_of_a_run_on_the_cpu_may_differ_in_nothing(run_file: str) -> None:
    twin = decide_twin(run_file, ["parallel.device=cpu", "parallel.devices=2"], None, 2)
    assert twin.lines[1:] == ["the run is planned as on this machine's cpu", "nothing differs"]


def test_plan_shows_the_differences_and_keeps_them_out_of_its_json(run_file: str) -> None:
    shown = CliRunner().invoke(app, ["plan", run_file, "--debug-cpu", "2"])
    assert "  communication: nccl → gloo" in shown.stdout.splitlines()
    machine_readable = CliRunner().invoke(app, ["plan", run_file, "--debug-cpu", "2", "--json"])
    assert json.loads(machine_readable.stdout)["processes"]["device"] == "cpu"
    assert "  communication: nccl → gloo" in machine_readable.stderr.splitlines()
