"""Plans, in full: what is decided from a configuration, a machine, a launcher's world and what is known of the data.

The expected plans are files. To write them anew after a deliberate change, and then read the difference:

    python -m tests.test_plan --write
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from launch import __version__
from launch.assets import code_root, shipped_folder
from launch.cli import app
from launch.config import load
from launch.errors import ConfigError, LaunchError, TopologyError
from launch.explain import explain
from launch.plan import Plan, as_json, decide, default_run_folder, make_plan
from launch.recipe import ModelUse, Preview
from launch.slurm_names import Step
from launch.topology import Machine, World

GOLDENS = Path(__file__).parent / "goldens" / "plan"
HOW_TO_WRITE = "python -m tests.test_plan --write"
RUN_FOLDER = Path("/runs/one")

CPU = Machine(host="box", cores=8, gpus=0)
GPUS = Machine(host="box", cores=32, gpus=4)
TPUS = Machine(host="box", cores=96, gpus=0, tpus=8, tpu_name="TPU v5e")
XLA_ON_CPU = Machine(host="box", cores=8, gpus=0, xla_on_cpu=1)
MAC = Machine(host="box", cores=8, gpus=0, mps=True)


def planned(
    *overrides: str, machine: Machine = CPU, world: World | None = None, preview: Preview | None = None
) -> Plan:
    loaded = load(None, ["recipe=causal_lm", *overrides])
    return make_plan(loaded, machine, world or World(), preview or Preview(), RUN_FOLDER)


# --- whole plans -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    overrides: tuple[str, ...]
    machine: Machine = CPU
    world: World = World()
    preview: Preview = Preview()


CASES = {
    "one-cpu-process": Case(("train.max_steps=20", "train.warmup_ratio=0.1")),
    "two-cpu-processes": Case(
        ("parallel.devices=2", "train.max_steps=240", "train.schedule=cosine", "train.micro_batch_size=4"),
        preview=Preview(samples=1000, tokens_per_sample=128),
    ),
    "four-gpus": Case(
        ("train.global_batch_size=64", "train.micro_batch_size=8", "train.precision=bf16", "eval.batch_size=32"),
        machine=GPUS,
        preview=Preview(samples=1001, tokens_per_sample=1024),
    ),
    "one-of-four-gpus": Case(("parallel.devices=1", "train.max_steps=5"), machine=GPUS),
    "eight-tpu-devices": Case(
        ("train.precision=bf16", "train.global_batch_size=64", "train.micro_batch_size=4", "train.max_steps=10"),
        machine=TPUS,
        preview=Preview(samples=1001, tokens_per_sample=128),
    ),
    "xla-on-the-cpu": Case(("parallel.strategy=xla", "parallel.devices=2", "train.max_steps=5"), machine=XLA_ON_CPU),
    "one-mac": Case(("train.max_steps=5", "train.schedule=constant"), machine=MAC),
    "epochs-of-known-samples": Case(
        ("train.epochs=2.5", "train.warmup_steps=7", "train.global_batch_size=10"),
        preview=Preview(samples=101),
    ),
    "epochs-of-unknown-samples": Case(
        ("train.epochs=2.5", "train.warmup_ratio=0.1"), preview=Preview(tokens_per_sample=64)
    ),
    "within-a-launcher": Case(
        ("train.max_steps=20", "parallel.device=cpu"),
        machine=GPUS,
        world=World(rank=1, size=2, local_rank=1, local_size=2, launched=True),
    ),
    "within-a-launcher-on-two-nodes": Case(
        ("train.max_steps=20", "parallel.devices=4", "parallel.nodes=2"),
        machine=GPUS,
        world=World(rank=5, size=8, local_rank=1, local_size=4, launched=True),
    ),
}


def as_golden(case: Case) -> str:
    plan = planned(*case.overrides, machine=case.machine, world=case.world, preview=case.preview)
    return json.dumps(anywhere(as_json(plan)), indent=2, ensure_ascii=False) + "\n"


def anywhere(value: Any) -> Any:
    """The same wherever the code lies, whatever its version and its Python."""
    if isinstance(value, dict):
        return {key: anywhere(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [anywhere(inner) for inner in value]
    places = {
        sys.executable: "<python>",
        str(shipped_folder("accelerate_configs")): "<accelerate_configs>",
        str(code_root()): "<code>",
        __version__: "<version>",
    }
    for place, name in places.items():
        if isinstance(value, str) and (value == place or value.startswith(f"{place}/")):
            return name + value.removeprefix(place)
    return value


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_the_expected_one_in_full(name: str) -> None:
    path = GOLDENS / f"{name}.json"
    assert path.is_file(), f"{path} is missing; write it with `{HOW_TO_WRITE}`, and read it"
    assert json.loads(as_golden(CASES[name])) == json.loads(path.read_text(encoding="utf-8"))


def test_every_expected_plan_is_compared() -> None:
    assert sorted(path.stem for path in GOLDENS.iterdir()) == sorted(CASES)
    assert len(CASES) >= 8


def test_a_plan_comes_back_from_its_json() -> None:
    for case in CASES.values():
        plan = planned(*case.overrides, machine=case.machine, world=case.world, preview=case.preview)
        assert Plan.model_validate_json(json.dumps(as_json(plan))) == plan


@pytest.mark.parametrize(("cpus", "threads"), [(3, 3), (None, 2)])
def test_a_task_of_srun_computes_with_its_own_cpus(cpus: int | None, threads: int) -> None:
    """It may be bound to them, and see no others."""
    step = Step(rank=1, size=2, local_rank=1, local_size=2, address="n1", port=1, cpus=cpus)
    world = World(rank=1, size=2, local_rank=1, local_size=2, launched=True, step=step)
    assert planned(machine=Machine("n1", 4, 0), world=world).processes.threads == threads


def test_gpus_and_cpus_are_started_alike() -> None:
    on_gpus, on_cpus = (planned("parallel.devices=4", machine=machine).command for machine in (GPUS, CPU))
    assert on_gpus == on_cpus
    assert on_gpus[1:3] == ("-m", "launch.train")


# --- the batch -------------------------------------------------------------------------------------------


def refusal(
    kind: type[LaunchError],
    *overrides: str,
    machine: Machine = CPU,
    world: World | None = None,
    preview: Preview | None = None,
) -> str:
    with pytest.raises(LaunchError) as caught:
        planned(*overrides, machine=machine, world=world, preview=preview)
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("train.global_batch_size=10", "parallel.devices=4"),
            "command line: train.global_batch_size = 10: does not divide over 4 processes; use 8, 12, or another "
            "number of processes",
        ),
        (
            ("train.global_batch_size=3", "parallel.devices=4"),
            "command line: train.global_batch_size = 3: does not divide over 4 processes; use 4, or another "
            "number of processes",
        ),
        (
            ("parallel.devices=3",),
            "default: train.global_batch_size = 32: does not divide over 3 processes; use 30, 33, or another "
            "number of processes",
        ),
        (
            ("train.global_batch_size=32", "train.micro_batch_size=5", "parallel.devices=2"),
            "command line: train.micro_batch_size = 5: train.global_batch_size = 32 is not 5 × accumulation × "
            "2 processes; use train.micro_batch_size=4",
        ),
        (
            ("train.global_batch_size=16", "train.micro_batch_size=16", "parallel.devices=2"),
            "command line: train.micro_batch_size = 16: train.global_batch_size = 16 is not 16 × accumulation × "
            "2 processes; use train.micro_batch_size=8",
        ),
    ],
)
def test_a_batch_that_does_not_divide(overrides: tuple[str, ...], message: str) -> None:
    assert refusal(ConfigError, *overrides) == message


def test_the_place_of_a_refused_batch_is_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("recipe: causal_lm\ntrain:\n  global_batch_size: 10\nparallel: {devices: 4}\n")
    with pytest.raises(ConfigError) as caught:
        make_plan(load(path, []), CPU, World(), Preview(), RUN_FOLDER)
    assert str(caught.value).startswith(f"{path}:3: train.global_batch_size = 10: does not divide")


@settings(database=None, deadline=None, max_examples=200)
@given(
    total=st.integers(1, 96),
    micro=st.none() | st.integers(1, 32),
    devices=st.integers(1, 8),
    eval_batch=st.none() | st.integers(1, 50),
)
def test_global_is_micro_times_accumulation_times_world(
    total: int, micro: int | None, devices: int, eval_batch: int | None
) -> None:
    overrides = [f"train.global_batch_size={total}", f"parallel.devices={devices}"]
    overrides += [f"train.micro_batch_size={micro}"] if micro else []
    overrides += [f"eval.batch_size={eval_batch}"] if eval_batch else []
    divides = total % (devices * (micro or 1)) == 0
    try:
        plan = planned(*overrides)
    except ConfigError as error:
        assert not divides
        advice = str(error).rpartition("use ")[2].split(",")[0].partition("=")
        if advice[1]:  # train.micro_batch_size=N: what is advised is accepted
            plan = planned(*overrides[:2], f"train.micro_batch_size={advice[2]}")
        else:
            plan = planned(f"train.global_batch_size={advice[0]}", f"parallel.devices={devices}")
    else:
        assert divides
        assert plan.batch.global_batch_size == total
        assert plan.batch.micro_batch_size == micro or (micro is None and plan.batch.accumulation == 1)
        assert plan.batch.eval_batch_size == (eval_batch or plan.batch.micro_batch_size)
    batch = plan.batch
    assert plan.processes.world_size == devices
    assert batch.micro_batch_size * batch.accumulation * devices == batch.global_batch_size


# --- devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "machine", "message"),
    [
        (
            ("parallel.device=cuda",),
            CPU,
            "command line: parallel.device = cuda: box has none (CUDA_VISIBLE_DEVICES counts too); "
            "use parallel.device=cpu",
        ),
        (
            ("parallel.devices=8",),
            GPUS,
            "command line: parallel.devices = 8: box has 4 GPUs; use parallel.devices=4 or fewer",
        ),
        (
            ("parallel.devices=33", "train.global_batch_size=33"),
            CPU,
            "command line: parallel.devices = 33: box has no GPU and 8 CPU cores, good for at most 32 processes; "
            "use parallel.devices=32 or fewer",
        ),
        (
            ("parallel.devices=2",),
            MAC,
            "command line: parallel.devices = 2: box has 1 MPS device; use parallel.devices=1 or fewer",
        ),
        (
            ("parallel.nodes=2",),
            GPUS,
            "command line: parallel.nodes = 2: `shoal run` starts the processes of one machine; for several use "
            "`shoal submit` (SLURM), or start it on each with --rdzv host:port",
        ),
        (
            ("parallel.strategy=single",),
            GPUS,
            "command line: parallel.strategy = single, but there are 4 processes; use parallel.strategy=ddp, or "
            "parallel.devices=1",
        ),
    ],
)
def test_devices_that_are_not_there(overrides: tuple[str, ...], machine: Machine, message: str) -> None:
    assert refusal(TopologyError, *overrides, machine=machine) == message


def test_mps_where_there_is_none_is_not_told_about_cuda() -> None:
    said = refusal(TopologyError, "parallel.device=mps", machine=GPUS)
    assert said.startswith("command line: parallel.device = mps: box has none")
    assert "CUDA" not in said


def test_too_many_processes_on_the_cpu_of_a_gpu_machine_are_not_told_that_it_has_no_gpu() -> None:
    said = refusal(
        TopologyError, "parallel.device=cpu", "parallel.devices=129", "train.global_batch_size=129", machine=GPUS
    )
    assert "32 CPU cores, good for at most 128 processes; use parallel.devices=128 or fewer" in said
    assert "no GPU" not in said


@pytest.mark.parametrize(
    ("overrides", "machine", "expected"),
    [
        ((), CPU, ("cpu", 1, "single", 8)),
        ((), GPUS, ("cuda", 4, "ddp", 8)),
        ((), MAC, ("mps", 1, "single", 8)),
        (("parallel.devices=2",), GPUS, ("cuda", 2, "ddp", 16)),
        (("parallel.device=cpu",), GPUS, ("cpu", 1, "single", 32)),
        (("parallel.device=cpu", "parallel.devices=8"), GPUS, ("cpu", 8, "ddp", 4)),
        (("parallel.devices=32",), CPU, ("cpu", 32, "ddp", 1)),
        (("parallel.strategy=ddp",), CPU, ("cpu", 1, "ddp", 8)),
        (("parallel.strategy=single",), CPU, ("cpu", 1, "single", 8)),
    ],
)
def test_processes(overrides: tuple[str, ...], machine: Machine, expected: tuple[str, int, str, int]) -> None:
    processes = planned(*overrides, machine=machine).processes
    assert (processes.device, processes.world_size, processes.strategy, processes.threads) == expected


# --- within a launcher -----------------------------------------------------------------------------------

TWO = World(rank=0, size=2, local_rank=0, local_size=2, launched=True)
TWO_NODES = World(rank=0, size=4, local_rank=0, local_size=2, launched=True)


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (
            ("parallel.devices=4",),
            TWO,
            "parallel.devices = 4: the configuration means 4 devices on each of 1 nodes, but the launcher started 2 "
            "processes on 1 nodes; state the same in both, or leave parallel.devices out",
        ),
        (
            ("parallel.devices=2", "parallel.nodes=2"),
            TWO,
            "parallel.devices = 2: the configuration means 2 devices on each of 2 nodes, but the launcher started 2 "
            "processes on 1 nodes; state the same in both, or leave parallel.devices out",
        ),
        (
            ("parallel.devices=2",),
            TWO_NODES,
            "parallel.devices = 2: the configuration means 2 devices on each of 1 nodes, but the launcher started 4 "
            "processes on 2 nodes; state the same in both, or leave parallel.devices out",
        ),
        (
            ("parallel.nodes=2",),
            TWO,
            "parallel.nodes = 2: the configuration means auto devices on each of 2 nodes, but the launcher started 2 "
            "processes on 1 nodes; state the same in both, or leave parallel.nodes out",
        ),
        (
            ("parallel.nodes=2", "parallel.devices=2"),
            World(rank=0, size=4, local_rank=0, local_size=4, launched=True),
            "parallel.nodes = 2: the configuration means 2 devices on each of 2 nodes, but the launcher started 4 "
            "processes on 1 nodes; state the same in both, or leave parallel.nodes out",
        ),
    ],
)
def test_a_launcher_that_contradicts_the_configuration(overrides: tuple[str, ...], world: World, message: str) -> None:
    assert refusal(TopologyError, *overrides, machine=GPUS, world=world) == f"command line: {message}"


def test_single_within_a_launcher_of_two() -> None:
    assert refusal(TopologyError, "parallel.strategy=single", world=TWO) == (
        "command line: parallel.strategy = single, but there are 2 processes; use parallel.strategy=ddp, or "
        "parallel.devices=1"
    )


def test_the_world_of_a_launcher_is_taken_over() -> None:
    processes = planned(machine=GPUS, world=TWO_NODES).processes
    assert (processes.nodes, processes.per_node, processes.world_size, processes.strategy) == (2, 2, 4, "ddp")


def test_a_world_that_is_not_the_same_on_all_nodes_is_refused() -> None:
    uneven = World(rank=0, size=5, local_rank=0, local_size=3, launched=True)
    assert refusal(TopologyError, "train.global_batch_size=30", machine=GPUS, world=uneven) == (
        "the launcher started 5 processes, 3 of them on box; start the same number on every node"
    )


# --- length ----------------------------------------------------------------------------------------------


def test_data_found_empty_is_left_to_the_recipe_to_tell() -> None:
    """An earlier run has prepared the data and found nothing in it: its `sizes.json` says so."""
    length = planned(preview=Preview(samples=0, tokens_per_sample=128)).length
    assert (length.samples, length.updates, length.updates_per_epoch) == (0, None, None)


def test_a_schedule_is_made_once_the_samples_are_known() -> None:
    plan = planned("train.epochs=2", "train.global_batch_size=10", "train.warmup_ratio=0.5")
    assert plan.length.updates is None
    schedule = plan.schedule(101)
    assert (schedule.total, schedule.warmup, schedule.kind, schedule.peak) == (22, 11, "linear", 3e-4)


@pytest.mark.parametrize(
    ("overrides", "machine", "preview", "expected"),
    [
        ((), CPU, Preview(), True),
        (("parallel.devices=2", "parallel.strategy=fsdp2"), CPU, Preview(), True),
        (("train.group_by_length=off",), CPU, Preview(), True),
        (("train.padding_free=off",), CPU, Preview(), False),
        (("train.compile=true",), CPU, Preview(), False),
        ((), GPUS, Preview(), False),
        (("parallel.device=xla",), TPUS, Preview(), False),
        ((), CPU, Preview(tokens_per_sample=128), False),
        ((), CPU, Preview(model=ModelUse({}, "next_token", 128, padded=False)), False),
    ],
)
def test_rows_are_laid_end_to_end_on_cpus(
    overrides: tuple[str, ...], machine: Machine, preview: Preview, expected: bool
) -> None:
    plan = planned(*overrides, machine=machine, preview=preview)
    assert plan.padding_free == expected
    assert ("rows of a batch" in explained(plan)) == expected


@pytest.mark.parametrize(
    ("overrides", "machine", "preview", "expected"),
    [
        ((), CPU, Preview(), "cut"),
        (("parallel.devices=2",), CPU, Preview(), "cut"),
        (("parallel.devices=2", "parallel.strategy=fsdp2"), CPU, Preview(), "dealt"),
        (("parallel.devices=2", "parallel.strategy=zero1"), CPU, Preview(), "dealt"),
        (("train.compile=true",), CPU, Preview(), "dealt"),
        ((), GPUS, Preview(), "dealt"),
        ((), MAC, Preview(), "dealt"),
        (("parallel.device=xla",), TPUS, Preview(), "dealt"),
        (("train.group_by_length=off",), CPU, Preview(), "off"),
        ((), CPU, Preview(tokens_per_sample=128), "off"),
        ((), CPU, Preview(tokens_per_sample=128, model=ModelUse({}, "span", 128)), "cut"),
        ((), CPU, Preview(model=ModelUse({}, "next_token", 128, padded=False)), "off"),
    ],
)
def test_samples_are_dealt_by_length_and_cut_where_a_pass_costs_little(
    overrides: tuple[str, ...], machine: Machine, preview: Preview, expected: str
) -> None:
    plan = planned(*overrides, machine=machine, preview=preview)
    assert plan.by_length == expected
    because = explained(plan).get("within an update", ("", ""))[1]
    assert ("less padding" in because, "micro-batches cut" in because) == (expected == "dealt", expected == "cut")


# --- for people ------------------------------------------------------------------------------------------


def explained(plan: Plan) -> dict[str, tuple[str, str]]:
    return {line.name: (line.value, line.because) for line in explain(plan)}


def test_every_number_is_explained() -> None:
    case = CASES["four-gpus"]
    assert explained(planned(*case.overrides, machine=case.machine, preview=case.preview)) == {
        "recipe": ("causal_lm", ""),
        "processes": ("4 on cuda", "8 CPU threads each"),
        "strategy": ("ddp", "adamw"),
        "number formats": (
            "bfloat16 in forward and backward",
            "gradients summed float32, weights float32, optimizer float32",
        ),
        "global batch": ("64 samples", "micro-batch 8 × accumulation 2 × 4 processes"),
        "tokens per update": ("65,536", "64 samples × 1024 tokens"),
        "training samples": ("1,001", ""),
        "updates": ("16", "1 epochs × 16 updates"),
        "last of an epoch": ("41 samples", "of 64; the mean is over these, none is dropped or repeated"),
        "learning rate": ("0.0003 → 1.87e-05", "at updates 1 and 16; linear, no warm-up"),
        "checkpoints": ("every 30 minutes, when a signal stops the run", "the newest 2 are kept"),
        "run folder": ("/runs/one", ""),
    }


def test_what_is_switched_on_is_told() -> None:
    lines = explained(
        planned(
            *("train.precision=fp16", "train.activation_checkpointing=true", "train.compile=true"),
            *("train.optimizer=sgd", "train.micro_batch_size=auto", "train.global_batch_size=48"),
            machine=GPUS,
        )
    )
    assert lines["strategy"] == ("ddp", "sgd, activation checkpointing, torch.compile")
    assert lines["number formats"][0] == "float16 in forward and backward, loss scaled"
    assert lines["global batch"] == (
        "48 samples",
        "micro-batch: the largest of 1, 2, 3, 4, 6, 12 that fits, found at the start",
    )
    assert explained(planned())["number formats"] == ("float32", "throughout")
    quick = {
        "bf16": (replace(CPU, cpu_has_bf16=True), replace(GPUS, gpu_name="NVIDIA H100 80GB HBM3")),
        "fp16": (replace(GPUS, gpu_name="Tesla T4"),),
    }
    for name, machines in quick.items():
        for machine in machines:
            told = explained(planned(machine=machine))["number formats"]
            assert told == ("float32", f"throughout; train.precision={name} multiplies faster here")
            assert "faster" not in explained(planned(f"train.precision={name}", machine=machine))["number formats"][1]
    saving = ("save.every_steps=1000", "save.every_minutes=null", "save.keep_best=1", "save.keep_last=null")
    assert explained(planned(*saving, "save.asynchronous=true"))["checkpoints"] == (
        "every 1,000 updates, when validation is better than ever, when a signal stops the run",
        "all are kept, and the best 1, written while training goes on",
    )


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            ("train.precision=fp16",),
            TopologyError,
            "command line: train.precision = fp16: needs a GPU, and this run is on the CPU; use train.precision=bf16 "
            "or train.precision=fp32",
        ),
        (
            ("train.optimizer=adafactor", "parallel.strategy=zero2", "parallel.devices=2"),
            ConfigError,
            "command line: train.optimizer = adafactor: looks at rows and columns of whole matrices, of which zero2 "
            "keeps pieces; use train.optimizer=adamw, or parallel.strategy=ddp",
        ),
    ],
)
def test_what_a_device_or_a_strategy_cannot_do_is_refused(
    overrides: tuple[str, ...], error: type[LaunchError], message: str
) -> None:
    with pytest.raises(error) as caught:
        planned(*overrides)
    assert str(caught.value) == message


def test_what_is_not_known_yet_is_said_so() -> None:
    lines = explained(planned("train.epochs=0.5", "train.warmup_ratio=0.1"))
    assert "tokens per update" not in lines
    assert lines["training samples"] == ("known after preparation", "")
    assert lines["updates"] == ("known after preparation", "0.5 epochs × samples / global batch")
    assert lines["learning rate"] == ("peak 0.0003", "linear, warm-up 0.1 of the updates")


def test_steps_are_explained_as_epochs_where_the_samples_are_known() -> None:
    assert explained(planned("train.max_steps=1500"))["updates"] == ("1,500", "train.max_steps")
    known = planned("train.max_steps=1500", "train.global_batch_size=10", preview=Preview(samples=10_000))
    assert explained(known)["updates"] == ("1,500", "train.max_steps, 1.50 epochs")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("train.max_steps=20", "train.warmup_steps=5"),
            ("6e-05 → 0.0003 → 1.87e-05", "at updates 1, 5 and 20; linear, warm-up 5 updates"),
        ),
        (
            ("train.max_steps=20", "train.warmup_steps=20", "train.schedule=constant"),
            ("1.5e-05 → 0.0003", "at updates 1 and 20; constant, warm-up 20 updates"),
        ),
        (("train.max_steps=1",), ("0.0003", "at update 1; linear, no warm-up")),
    ],
)
def test_the_learning_rate_is_explained_by_its_turning_points(
    overrides: tuple[str, ...], expected: tuple[str, str]
) -> None:
    assert explained(planned(*overrides))["learning rate"] == expected


def test_several_nodes_are_explained() -> None:
    assert explained(planned(machine=GPUS, world=TWO_NODES))["processes"][1] == "2 nodes × 2, 16 CPU threads each"


def test_the_plan_of_the_default_recipe_as_people_and_programs_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    arguments = ["plan", "causal_lm", "train.max_steps=7", "parallel.device=cpu", "--out", "here"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.stderr
    assert "micro-batch 8 × accumulation 2 × 1 processes" in shown.stdout
    assert f"-m launch.train {tmp_path}/here" in shown.stdout
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert ["train.max_steps", "7", "command", "line"] in rows
    assert ["train.seed", "0", "default"] in rows
    printed = CliRunner().invoke(app, [*arguments, "--json"])
    decided = decide("causal_lm", arguments[2:4], Path("here"), World())
    assert json.loads(printed.stdout) == json.loads(json.dumps(as_json(decided.plan)))
    assert list(tmp_path.iterdir()) == [], "a plan writes nothing"


def test_the_default_run_folder_is_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    taken = []
    for _ in range(4):
        folder = default_run_folder("/somewhere/my_recipe.py")
        assert folder.parent == tmp_path / "runs"
        assert folder.name.startswith(f"my_recipe-{time.strftime('%Y')}")
        folder.mkdir(parents=True)
        taken.append(folder)
    assert len(set(taken)) == 4


def write_goldens() -> None:
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        (GOLDENS / f"{name}.json").write_text(as_golden(case), encoding="utf-8")
        print(GOLDENS / f"{name}.json")


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write_goldens()
