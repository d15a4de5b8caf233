"""Runs on XLA devices as they are planned: no torch_xla is needed for it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from launch.cache import Cache
from launch.cli_plan import _machine_of
from launch.config import load
from launch.devices import read_devices
from launch.doctor import _torch_xla
from launch.errors import ConfigError, LaunchError, TopologyError
from launch.explain import explain
from launch.plan import Plan, decide, make_plan
from launch.recipe import Preview, RecipeContext
from launch.registry import find_run_file, load_recipe
from launch.topology import Machine, World
from tests.test_plan import CPU, GPUS, RUN_FOLDER, TPUS, XLA_ON_CPU, planned


def test_tpus_are_taken_where_they_are() -> None:
    plan = planned("train.global_batch_size=32", machine=TPUS)
    processes = plan.processes
    assert (processes.strategy, processes.device, processes.world_size, processes.devices) == ("xla", "xla", 1, 8)
    assert (plan.rows, plan.batch.micro_batch_size, plan.batch.accumulation) == (32, 4, 1)
    assert (plan.batch.eval_batch_size, plan.eval_rows) == (4, 32)
    lines = {line.name: (line.value, line.because) for line in explain(plan)}
    assert lines["processes"][0] == "1 on xla, 8 devices"
    assert lines["global batch"][1] == "micro-batch 4 × accumulation 1 × 8 devices"
    assert plan.environment["PJRT_DEVICE"] == "TPU" and plan.environment["USE_TORCH_XLA"] == "1"


def test_where_the_cpu_is_asked_for_it_is_taken() -> None:
    assert planned("parallel.device=cpu", machine=TPUS).processes.strategy == "single"
    assert planned("parallel.strategy=ddp", "parallel.devices=2", machine=TPUS).processes.device == "cpu"


def test_the_cpu_counts_as_xla_only_where_both_are_said() -> None:
    assert planned(machine=XLA_ON_CPU).processes.device == "cpu"
    plan = planned("parallel.device=xla", "parallel.devices=2", machine=XLA_ON_CPU)
    assert (plan.processes.strategy, plan.processes.devices) == ("xla", 2)
    assert (plan.environment["PJRT_DEVICE"], plan.environment["CPU_NUM_DEVICES"]) == ("CPU", "2")


def test_another_machine_with_tpus() -> None:
    there = read_devices("8xTPUv5e")
    plan = planned("parallel.device=xla", "parallel.devices=8", machine=_machine_of(there))
    assert (plan.processes.devices, plan.processes.gpu_memory_bytes) == (8, 16 * 10**9)


@pytest.mark.parametrize(
    ("overrides", "machine", "world", "message"),
    [
        (
            ("parallel.strategy=xla",),
            CPU,
            World(),
            "parallel.strategy = xla: box has no TPU; set PJRT_DEVICE=CPU to try it on the CPU, or leave it out",
        ),
        (
            ("parallel.device=xla",),
            GPUS,
            World(),
            "parallel.device = xla: box has no TPU; set PJRT_DEVICE=CPU to try it on the CPU, or leave it out",
        ),
        (
            ("parallel.strategy=xla", "parallel.device=cpu"),
            TPUS,
            World(),
            "parallel.strategy = xla: excludes parallel.device = cpu (command line); xla is for XLA devices, and they "
            "have no other strategy",
        ),
        (
            ("parallel.strategy=ddp", "parallel.device=xla"),
            TPUS,
            World(),
            "parallel.strategy = ddp: excludes parallel.device = xla (command line); xla is for XLA devices, and they "
            "have no other strategy",
        ),
        (
            ("parallel.nodes=2",),
            TPUS,
            World(),
            "parallel.nodes = 2: with XLA shoal has one process on one host, which drives all of its devices; "
            "start one, with `shoal run` or accelerate_configs/tpu.yaml",
        ),
        (
            ("parallel.strategy=xla",),
            TPUS,
            World(size=8, local_size=8, launched=True),
            "8 processes were started: with XLA shoal has one process on one host, which drives all of its devices; "
            "start one, with `shoal run` or accelerate_configs/tpu.yaml",
        ),
        (("train.precision=fp16",), TPUS, World(), "train.precision = fp16: XLA devices have no fp16; use "),
        (
            ("train.compile=true",),
            TPUS,
            World(),
            "train.compile = true: XLA compiles all there is; leave it out on XLA",
        ),
        (
            ("train.activation_checkpointing=true",),
            TPUS,
            World(),
            "train.activation_checkpointing = true: was never run on XLA devices; leave it out",
        ),
        (
            ("train.micro_batch_size=auto",),
            TPUS,
            World(),
            "train.micro_batch_size = auto: is not measured on XLA devices; state a number",
        ),
        (
            ("train.global_batch_size=12",),
            TPUS,
            World(),
            "train.global_batch_size = 12: does not divide over 8 devices; use 8, 16, or another number of devices",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_told_in_one_line(
    overrides: tuple[str, ...], machine: Machine, world: World, message: str
) -> None:
    with pytest.raises(LaunchError) as caught:
        planned(*overrides, machine=machine, world=world)
    assert isinstance(caught.value, (ConfigError, TopologyError))
    text = str(caught.value)
    assert text.partition(": ")[2].startswith(message), text
    assert "\n" not in text


def test_batches_have_few_lengths_only_where_each_is_compiled_for() -> None:
    assert planned("parallel.xla_widths=3", "train.global_batch_size=32", machine=TPUS).buckets == 3
    assert planned("parallel.xla_widths=3").buckets is None


def test_batches_are_padded_to_eights_where_that_is_how_a_device_computes() -> None:
    assert planned("train.global_batch_size=32", machine=TPUS).multiple == planned(machine=GPUS).multiple == 8
    assert planned().multiple == 1


def test_an_evaluation_alone_takes_so_many_samples_on_each_device() -> None:
    loaded = load(None, ["recipe=causal_lm", "eval.batch_size=3"])
    plan = make_plan(loaded, TPUS, World(), Preview(), RUN_FOLDER, evaluates=True)
    assert (plan.batch.global_batch_size, plan.eval_rows) == (24, 24)


def test_what_has_to_fit_is_a_device_and_not_the_host(tmp_path: Path) -> None:
    machine = replace(TPUS, memory_bytes=10**12)
    recipe = load_recipe(load(find_run_file("causal_lm"), []))
    preview = recipe.preview(RecipeContext(Cache(tmp_path), 0))
    plan = planned("train.global_batch_size=32", machine=machine, preview=preview)
    assert plan.memory is not None and plan.memory.capacity == 14_720_000_000, "of 16 GB"


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is not None, reason="torch_xla is here")
def test_a_missing_torch_xla_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    with pytest.raises(TopologyError, match="the package torch_xla is not installed; pip install 'torch_xla"):
        decide("causal_lm", ["parallel.strategy=xla"], tmp_path / "run", World())


def test_doctor_says_where_torch_xla_is_missing() -> None:
    assert _torch_xla(0).state == "skipped"
    found = _torch_xla(4)
    assert (found.state, found.found) == ("warning", "4 TPU devices are here")
    assert "torch_xla[tpu]==2.9.0" in found.fix


def test_a_plan_read_back_is_the_same() -> None:
    plan = planned("train.global_batch_size=32", machine=replace(TPUS, tpu_name="TPU"))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
