"""A user's Accelerate YAML and DeepSpeed JSON beside a run file: taken over, completed, and never contradicted."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launch.assets import shipped_folder
from launch.cache import Cache
from launch.cli import app
from launch.config import load
from launch.errors import ConfigError, LaunchError, TopologyError
from launch.fitting import Fits, question, remember
from launch.outside import read_outside, refuse_another
from launch.parity import cases, compare
from launch.plan import Decided, decide
from launch.record import create_run_folder
from launch.render import deepspeed_config
from launch.strategy import Strategy
from launch.topology import Machine, World, cache_folder, read_world
from launch.twin import decide_twin
from tests.commands import python, shoal
from tests.test_accelerate_file import CHANGE, environment_of

OWN = Path(__file__).with_name("own_recipe.py")
HERE = Machine("box", cores=8, gpus=0)
GPUS = Machine("box", cores=8, gpus=4)
RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user stands."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, content: dict[str, Any] | str) -> Path:
    file = Path(path)
    file.parent.mkdir(exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content, indent=2), encoding="utf-8")
    return file.absolute()


def run_file(parallel: str = "", train: str = "", path: str = "run.yaml") -> str:
    write(path, f"recipe: {OWN}\ntrain: {{global_batch_size: 8, max_steps: 2{train}}}\nparallel: {{{parallel}}}\n")
    return path


ACCELERATE = "parallel.accelerate_config=mine.yaml"
DEEPSPEED = "parallel.deepspeed_config=mine.json"


def decided(*overrides: str, world: World | None = None, machine: Machine = HERE, file: str = "") -> Decided:
    return decide(file or run_file(), list(overrides), Path("run"), world or World(), machine)


def refusal(*overrides: str, world: World | None = None, machine: Machine = HERE, file: str = "") -> str:
    with pytest.raises(LaunchError) as caught:
        decided(*overrides, world=world, machine=machine, file=file)
    return str(caught.value).replace(f"{Path.cwd()}/", "")


def launched(text: str, monkeypatch: pytest.MonkeyPatch, **more: str) -> World:
    """The world of a worker that `accelerate launch --config_file` with this text has started."""
    return read_world({**environment_of(write("launched.yaml", text), monkeypatch), **RANK, **more})


# --- what is taken over ----------------------------------------------------------------------------------

KINDS = [
    ("distributed_type: 'NO'\nnum_processes: 1\n", "single", 1),
    ("distributed_type: MULTI_GPU\nnum_processes: 4\n", "ddp", 4),
    ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}\n", "fsdp2", 2),
    ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {version: 2, offload_params: true}\n", "fsdp2_offload", 2),
    ("distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stage: 3}\n", "zero3", 2),
]


@pytest.mark.parametrize(("text", "strategy", "size"), KINDS, ids=[strategy for _, strategy, _ in KINDS])
def test_strategy_and_devices_of_an_accelerate_file_are_taken_over(text: str, strategy: str, size: int) -> None:
    mine = write("mine.yaml", text)
    found = decided(ACCELERATE)
    processes = found.plan.processes
    assert (processes.strategy, processes.world_size) == (strategy, size)
    assert found.loaded.origin("parallel.devices") == f"{mine}:2"
    if strategy not in ("single", "ddp"):
        assert found.loaded.origin("parallel.strategy") == f"{mine}:1"


def test_what_the_run_file_states_is_not_taken_over_but_must_agree() -> None:
    write("mine.yaml", "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\nnum_processes: -1\n")
    found = decided(ACCELERATE, "parallel.strategy=fsdp2", "parallel.devices=4")
    assert found.plan.processes.world_size == 4
    assert found.loaded.origin("parallel.strategy") == "command line"
    assert decided(ACCELERATE, machine=GPUS).plan.processes.world_size == GPUS.gpus, "-1 leaves it open"


def test_the_cpu_is_taken_over() -> None:
    mine = write("mine.yaml", "distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    found = decided(ACCELERATE, machine=GPUS)
    assert found.plan.processes.device == "cpu"
    assert found.loaded.origin("parallel.device") == f"{mine}:3"
    assert decided(world=World(variables={"ACCELERATE_USE_CPU": "true"}), machine=GPUS).plan.processes.device == "cpu"
    assert refusal(ACCELERATE, "parallel.device=cuda", machine=GPUS) == (
        "mine.yaml:3: use_cpu = true: the plan decides it: false (parallel.device, command line); state the same in "
        "both, or leave it out"
    )


def test_several_machines_are_taken_over_and_then_need_a_launcher() -> None:
    write("mine.yaml", "distributed_type: MULTI_GPU\nnum_processes: 4\nnum_machines: 2\n")
    said = refusal(ACCELERATE)
    assert said.startswith("mine.yaml:3: parallel.nodes = 2: `shoal run` starts the processes of one machine; ")
    assert refusal(ACCELERATE, "parallel.nodes=1").splitlines() == [
        "mine.yaml:3: num_machines = 2: the plan decides it: 1 (parallel.nodes, command line); state the same in both, "
        "or leave it out"
    ]


STAGES = [
    ({"stage": 1}, "zero1"),
    ({"stage": 2}, "zero2"),
    ({"stage": 3}, "zero3"),
    ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "zero2_offload"),
    ({"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, "zero3_offload"),
]


@pytest.mark.parametrize(("zero", "strategy"), STAGES, ids=[strategy for _, strategy in STAGES])
def test_the_strategy_of_a_deepspeed_file_is_taken_over(zero: dict[str, Any], strategy: str) -> None:
    mine = write("mine.json", {"zero_optimization": zero})
    found = decided(DEEPSPEED, "parallel.devices=2")
    assert found.plan.processes.strategy == strategy
    assert found.loaded.origin("parallel.strategy") == f"{mine}:3"
    assert found.plan.deepspeed == deepspeed_config(Strategy(strategy), 4, 1, 2, 1.0, "fp32")


def test_a_deepspeed_file_named_in_an_accelerate_file_counts_and_is_recorded() -> None:
    mine = write("zero.json", {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}})
    text = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  deepspeed_config_file: zero.json\n"
    yaml_file = write("mine.yaml", text)
    found = decided(ACCELERATE)
    assert found.plan.processes.strategy == "zero2"
    assert found.plan.deepspeed is not None
    assert found.plan.deepspeed["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5}
    assert found.plan.config.parallel.deepspeed_config == str(mine)
    assert found.loaded.origin("parallel.deepspeed_config") == f"{yaml_file}:4"


def test_the_record_of_a_run_is_a_run_file_for_the_same_run() -> None:
    write("zero.json", {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}})
    text = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  deepspeed_config_file: zero.json\n"
    write("mine.yaml", text)
    plan = decided(ACCELERATE, "parallel.device=cpu").plan
    again = decide(str(create_run_folder(plan) / "run.yaml"), [], Path("run"), World(), HERE).plan
    assert again == plan


def test_the_cli_shows_the_lines_of_the_files_that_decide() -> None:
    write("mine.yaml", "distributed_type: FSDP\nuse_cpu: true\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}\n")
    shown = shoal(Path.cwd(), "plan", run_file("accelerate_config: mine.yaml"))
    assert shown.returncode == 0, shown.stderr
    rows = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines() if line.startswith(" parallel.")}
    assert rows["parallel.strategy"] == ['"fsdp2"', f"{Path.cwd()}/mine.yaml:1"]
    assert rows["parallel.device"] == ['"cpu"', f"{Path.cwd()}/mine.yaml:2"]
    assert rows["parallel.devices"] == ["2", f"{Path.cwd()}/mine.yaml:3"]
    assert rows["parallel.accelerate_config"][1:] == ["line", "3"]


# --- what is completed -----------------------------------------------------------------------------------


def test_auto_is_decided_and_the_rest_is_passed_on() -> None:
    zero = {"stage": 2, "reduce_bucket_size": 5e7, "overlap_comm": True, "allgather_bucket_size": "auto"}
    content = {
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto"),
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "wall_clock_breakdown": True,
    }
    write("mine.json", content)
    overrides = [DEEPSPEED, "parallel.devices=2", "train.precision=bf16", "train.micro_batch_size=2"]
    result = decided(*overrides).plan.deepspeed
    expected = deepspeed_config(Strategy.ZERO2, 2, 2, 2, 1.0, "bf16")
    expected["zero_optimization"] |= {"reduce_bucket_size": 5e7, "overlap_comm": True}
    assert result == {**expected, "wall_clock_breakdown": True}


def test_a_stage_left_to_the_run_file() -> None:
    write("mine.json", {"zero_optimization": {"stage": "auto", "overlap_comm": False}})
    result = decided(DEEPSPEED, "parallel.devices=2", "parallel.strategy=zero3").plan.deepspeed
    assert result is not None
    assert result["zero_optimization"]["stage"] == 3


def test_a_micro_batch_size_that_fits_is_remembered_for_the_buffers_it_was_found_with() -> None:
    overrides = [DEEPSPEED, "parallel.devices=2", "train.micro_batch_size=auto"]
    for bucket in (5, 6):
        write("mine.json", {"zero_optimization": {"stage": 2, "reduce_bucket_size": bucket}})
        plan = decided(*overrides).plan
        assert plan.batch.candidates == (1, 2, 4)
        remember(Cache(cache_folder()), question(plan), Fits(bucket - 4, 2 * (bucket - 4)))
        assert decided(*overrides).plan.batch.micro_batch_size == bucket - 4


# --- contradictions --------------------------------------------------------------------------------------

SAME = "state the same in both, or leave it out"
AGAINST_ACCELERATE = [
    ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n", ["parallel.strategy=zero2"], "command line: "
     "parallel.strategy = zero2: mine.yaml:1 asks for fsdp2; state the same in both, or leave parallel.strategy out"),
    ("distributed_type: MULTI_GPU\n", ["parallel.strategy=fsdp2"], 'mine.yaml:1: distributed_type = "MULTI_GPU": the '
     'plan decides it: "FSDP" (parallel.strategy, command line); state the same in both'),
    ("distributed_type: MULTI_GPU\nnum_processes: 4\n", [], "mine.yaml:2: num_processes = 4: the plan decides it: 2 "
     f"(parallel.devices, command line); {SAME}"),
    ("distributed_type: MULTI_GPU\nmixed_precision: bf16\n", [], 'mine.yaml:2: mixed_precision = "bf16": the plan '
     f'decides it: "no" (train.precision, default); {SAME}'),
    ("distributed_type: MULTI_GPU\nmixed_precision: fp16\n", ["train.precision=bf16"], 'mine.yaml:2: mixed_precision = '
     f'"fp16": the plan decides it: "bf16" (train.precision, command line); {SAME}'),
    ("distributed_type: MULTI_GPU\ndynamo_config:\n  dynamo_backend: INDUCTOR\n", [], "mine.yaml:3: "
     'dynamo_config.dynamo_backend = "INDUCTOR": the plan decides it: "no" (train.compile, default); ' + SAME),
    ("distributed_type: MULTI_GPU\ndynamo_config:\n  dynamo_backend: EAGER\n", ["train.compile=true"], "mine.yaml:3: "
     'dynamo_config.dynamo_backend = "EAGER": the plan decides it: "inductor" (train.compile, command line); ' + SAME),
    ("distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n  fsdp_activation_checkpointing: true\n", [],
     "mine.yaml:4: fsdp_config.fsdp_activation_checkpointing = true: the plan decides it: false "
     f"(train.activation_checkpointing, default); {SAME}"),
    ("distributed_type: DEEPSPEED\ndeepspeed_config:\n  gradient_accumulation_steps: 4\n  gradient_clipping: 0.5\n", [],
     "mine.yaml:3: deepspeed_config.gradient_accumulation_steps = 4: the plan decides it: 1 (train.micro_batch_size, "
     f"default); {SAME}\nmine.yaml:4: deepspeed_config.gradient_clipping = 0.5: the plan decides it: 1.0 "
     f"(train.max_grad_norm, default); {SAME}"),
    ("distributed_type: MULTI_GPU\nfp8_config: {backend: TE}\n", [], 'mine.yaml:2: fp8_config = {"fp8_backend": "TE"}: '
     "shoal trains in fp32, bf16 or fp16; use train.precision; leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "overrides", "message"), AGAINST_ACCELERATE, ids=range(len(AGAINST_ACCELERATE)))
def test_a_contradiction_to_an_accelerate_file_names_both_places(text: str, overrides: list[str], message: str) -> None:
    write("mine.yaml", text)
    assert refusal(ACCELERATE, "parallel.devices=2", *overrides) == message


ON_TWO = "on 2 processes"
SAME_OR_AUTO = 'state the same in both, or write "auto"'
AGAINST_DEEPSPEED = [
    ({"train_batch_size": 16}, [], "2: train_batch_size = 16: the run file decides it: 8 (train.global_batch_size, "
     f"run.yaml:2); {SAME_OR_AUTO}"),
    ({"train_micro_batch_size_per_gpu": 1}, [], "2: train_micro_batch_size_per_gpu = 1: the run file decides it: 4 "
     f"(train.micro_batch_size, {ON_TWO}, default); {SAME_OR_AUTO}"),
    ({"gradient_accumulation_steps": 4}, ["train.micro_batch_size=2"], "2: gradient_accumulation_steps = 4: the run "
     f"file decides it: 2 (train.micro_batch_size, {ON_TWO}, command line); {SAME_OR_AUTO}"),
    ({"gradient_clipping": 0.1}, ["train.max_grad_norm=null"], "2: gradient_clipping = 0.1: the run file decides it: "
     f"0.0 (train.max_grad_norm, command line); {SAME_OR_AUTO}"),
    ({"bf16": {"enabled": True}}, [], "3: bf16.enabled = true: the run file decides it: false (train.precision, "
     f"default); {SAME_OR_AUTO}"),
    ({"fp16": {"enabled": True}}, ["train.precision=bf16"], "3: fp16.enabled = true: the run file decides it: false "
     f"(train.precision, command line); {SAME_OR_AUTO}"),
    ({"optimizer": {"type": "AdamW"}}, [], '2: optimizer = {"type": "AdamW"}: shoal builds the optimizer; use '
     "train.optimizer, train.learning_rate, train.weight_decay; leave optimizer out"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "overrides", "message"), AGAINST_DEEPSPEED, ids=range(len(AGAINST_DEEPSPEED)))
def test_a_contradiction_to_a_deepspeed_file_names_both_places(
    content: dict[str, Any], overrides: list[str], message: str
) -> None:
    write("mine.json", {**content, "zero_optimization": {"stage": 2}})
    assert refusal(DEEPSPEED, "parallel.devices=2", *overrides) == f"mine.json:{message}"


def test_a_stage_that_contradicts_the_run_file() -> None:
    write("mine.json", {"zero_optimization": {"stage": 3}})
    assert refusal(DEEPSPEED, file=run_file("devices: 2, strategy: zero2")) == (
        "run.yaml:3: parallel.strategy = zero2: mine.json:3 asks for zero3; state the same in both, or leave "
        "parallel.strategy out"
    )
    write("mine.json", {"zero_optimization": {"stage": "auto", "offload_optimizer": {"device": "cpu"}}})
    assert refusal(DEEPSPEED, file=run_file("devices: 2, strategy: zero2")) == (
        'mine.json:5: zero_optimization.offload_optimizer.device = "cpu": the run file decides it: "none" '
        f"(parallel.strategy, run.yaml:3); {SAME_OR_AUTO}"
    )


def test_no_stage_is_not_guessed() -> None:
    write("mine.json", {"zero_optimization": {"overlap_comm": True}})
    for overrides in ((), ("parallel.strategy=zero2", "parallel.devices=2")):
        assert refusal(DEEPSPEED, *overrides) == (
            'mine.json: zero_optimization.stage: must be set, to 1, 2 or 3, or to "auto" where parallel.strategy says '
            "it"
        )


@pytest.mark.parametrize("stage", [2, "auto"])
def test_a_deepspeed_file_needs_a_strategy_of_deepspeed(stage: Any) -> None:
    write("mine.json", {"zero_optimization": {"stage": stage}})
    said = refusal(file=run_file("devices: 2, strategy: ddp, deepspeed_config: mine.json"))
    assert said == (
        "run.yaml:3: parallel.strategy = ddp: mine.json:3 asks for zero2; state the same in both, or leave "
        "parallel.strategy out"
        if stage == 2
        else "run.yaml:3: parallel.deepspeed_config = mine.json: the strategy is ddp, not one of DeepSpeed's; set "
        "parallel.strategy to zero1, zero2 or zero3, or zero_optimization.stage in the file"
    )


def test_one_process_has_nothing_to_shard_over() -> None:
    write("mine.json", {"zero_optimization": {"stage": 2}})
    assert refusal(DEEPSPEED) == (
        "mine.json:3: parallel.strategy = zero2: there is one process, and nothing to shard over; use "
        "parallel.strategy=single, or parallel.devices=2 or more"
    )


def test_the_two_files_must_agree() -> None:
    write("mine.json", {"zero_optimization": {"stage": 2}})
    write("mine.yaml", "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stage: 3}\n")
    assert refusal(ACCELERATE, DEEPSPEED) == (
        "mine.yaml:1: asks for zero3, but mine.json:3 asks for zero2; let both ask for the same"
    )
    write("mine.yaml", "distributed_type: MULTI_GPU\nnum_processes: 2\n")
    assert refusal(ACCELERATE, DEEPSPEED) == (
        'mine.yaml:1: distributed_type = "MULTI_GPU": the plan decides it: "DEEPSPEED" (parallel.strategy, '
        "mine.json:3); state the same in both"
    )


def test_only_one_deepspeed_file_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine.json", "other.json"):
        write(name, {"zero_optimization": {"stage": 2}})
    text = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  deepspeed_config_file: other.json\n"
    write("mine.yaml", text)
    another = "is another DeepSpeed file than"
    fix = "name the same in both, or only one"
    yaml_says = "deepspeed_config.deepspeed_config_file = other.json (mine.yaml:4)"
    stated = "command line: parallel.deepspeed_config = mine.json"
    assert refusal(ACCELERATE, DEEPSPEED) == f"{stated}: {another} {yaml_says}; {fix}"
    world = launched(text, monkeypatch)
    launcher_says = "deepspeed_config_file = other.json (`accelerate launch`)"
    assert refusal(DEEPSPEED, world=world) == f"{stated}: {another} {launcher_says}; {fix}"


def test_the_same_file_by_another_path_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = write("mine.json", {"zero_optimization": {"stage": 2}})
    text = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  deepspeed_config_file: mine.json\n"
    file = run_file("deepspeed_config: ../mine.json", path="runs/run.yaml")
    assert mine.samefile(Path("runs/../mine.json"))
    assert decided(file=file, world=launched(text, monkeypatch)).plan.processes.strategy == "zero2"


# --- where the files are ---------------------------------------------------------------------------------


def test_a_path_starts_beside_the_run_file_or_where_the_user_stands() -> None:
    write("mine.json", {"zero_optimization": {"stage": 1}})
    write("runs/mine.json", {"zero_optimization": {"stage": 2}})
    beside = run_file("devices: 2, deepspeed_config: mine.json", path="runs/run.yaml")
    assert decided(file=beside).plan.processes.strategy == "zero2"
    assert decided(DEEPSPEED, file=beside).plan.processes.strategy == "zero1"


@pytest.mark.parametrize("name", ["accelerate_config", "deepspeed_config"])
def test_a_file_that_is_not_there(name: str) -> None:
    where = "no such file; a path in a run file starts beside it, one on the command line where you stand"
    file = run_file(f"{name}: mine", path="runs/run.yaml")
    assert refusal(file=file) == f"runs/run.yaml:3: parallel.{name} = runs/mine: {where}"
    assert refusal(f"parallel.{name}=mine") == f"command line: parallel.{name} = mine: {where}"


def test_a_mistake_in_a_file_is_told_by_the_cli_in_one_line() -> None:
    write("mine.json", '{"zero_optimization": {\n "stage": 2,\n "reduce_bucket_sise": 5}}')
    shown = shoal(Path.cwd(), "plan", run_file("devices: 2"), DEEPSPEED)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == (
        f"shoal: {Path.cwd()}/mine.json:3: zero_optimization.reduce_bucket_sise = 5: unknown key; did you mean "
        "zero_optimization.reduce_bucket_size?\n"
    )


# --- plain `accelerate launch` ---------------------------------------------------------------------------

FOREIGN = """\
distributed_type: DEEPSPEED
mixed_precision: bf16
num_processes: 2
deepspeed_config: {zero_stage: 2, gradient_accumulation_steps: 4}
"""


def test_a_foreign_default_configuration_is_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(world=launched(FOREIGN, monkeypatch)).splitlines() == [
        'ACCELERATE_MIXED_PRECISION = "bf16": the plan decides it: "no" (train.precision, default); change '
        f"mixed_precision {CHANGE}",
        'ACCELERATE_GRADIENT_ACCUMULATION_STEPS = "4": the plan decides it: 1 (train.micro_batch_size, default); '
        f"change deepspeed_config.gradient_accumulation_steps {CHANGE}",
    ]
    agreeing = decided("train.precision=bf16", "train.micro_batch_size=1", world=launched(FOREIGN, monkeypatch))
    assert agreeing.plan.processes.strategy == "zero2"


@pytest.mark.parametrize("kind", ["'NO'", "MULTI_GPU"])
def test_torch_compile_behind_the_plan_is_told_also_where_there_is_one_process(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"distributed_type: {kind}\nnum_processes: 2\ndynamo_config: {{dynamo_backend: INDUCTOR}}\n"
    environ = environment_of(write("launched.yaml", text), monkeypatch)
    world = read_world(environ if kind == "'NO'" else {**environ, **RANK})
    assert world.launched == (kind == "MULTI_GPU")
    assert refusal(world=world) == (
        'ACCELERATE_DYNAMO_BACKEND = "INDUCTOR": the plan decides it: "no" (train.compile, default); change '
        f"dynamo_config.dynamo_backend {CHANGE}"
    )


def test_stray_variables_are_told_as_well() -> None:
    stray = {"PARALLELISM_CONFIG_TP_SIZE": "2", "FSDP_OFFLOAD_PARAMS": "true", "FSDP_VERSION": "2"}
    world = read_world({**RANK, **stray, "ACCELERATE_USE_FSDP": "true"})
    said = refusal("parallel.strategy=fsdp2_offload", world=world)
    assert said == (
        'PARALLELISM_CONFIG_TP_SIZE = "2": shoal shards over all processes and splits no model or sequence; use '
        f"parallel.strategy; change parallelism_config.parallelism_config_tp_size {CHANGE}"
    )
    without = read_world({**RANK, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"})
    assert without.deepspeed_file is None, "it counts for DeepSpeed alone"


def test_the_deepspeed_file_of_accelerate_launch_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = write("zero.json", {"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}})
    text = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  deepspeed_config_file: zero.json\n"
    found = decided(world=launched(text, monkeypatch))
    assert found.plan.deepspeed is not None
    assert found.plan.deepspeed["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 7}
    assert found.loaded.origin("parallel.strategy") == f"{mine}:3"
    assert found.loaded.origin("parallel.deepspeed_config") == "`accelerate launch`"
    write("zero.json", {"zero_optimization": {"stage": "auto"}})
    assert refusal(world=launched(text, monkeypatch)) == (
        "`accelerate launch`: parallel.deepspeed_config = zero.json: the strategy is ddp, not one of DeepSpeed's; "
        "set parallel.strategy to zero1, zero2 or zero3, or zero_optimization.stage in the file"
    )


def test_a_file_and_the_launcher_that_was_given_it_say_each_thing_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write("mine.yaml", FOREIGN)
    said = refusal(ACCELERATE, world=launched(FOREIGN, monkeypatch)).splitlines()
    assert [line.partition(" = ")[0] for line in said] == [
        "mine.yaml:2: mixed_precision",
        "mine.yaml:4: deepspeed_config.gradient_accumulation_steps",
    ]
    write("mine.yaml", FOREIGN.replace("num_processes: 2", "num_processes: 4"))
    said = refusal(ACCELERATE, world=launched(FOREIGN, monkeypatch))
    assert f"num_processes = 4: the plan decides it: 2 (the launcher started them); {SAME}" in said


def test_a_launcher_given_another_file_than_the_run_file_names_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    write("mine.yaml", "distributed_type: MULTI_GPU\nnum_processes: 2\n")
    world = launched("distributed_type: MULTI_GPU\nmixed_precision: fp16\nnum_processes: 2\n", monkeypatch)
    assert refusal(ACCELERATE, world=world).startswith('ACCELERATE_MIXED_PRECISION = "fp16": the plan decides it: "no"')


def test_a_run_folder_is_started_by_a_launcher_that_asks_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = decided("parallel.devices=2", "parallel.strategy=zero2", "parallel.device=cpu").plan
    made = create_run_folder(plan)
    own = (made / "accelerate.yaml").read_text(encoding="utf-8")
    refuse_another(plan, made, launched(own, monkeypatch))
    refuse_another(plan, made, read_world(plan.environment))
    refuse_another(plan, made, World(deepspeed_file=str(made / "deepspeed.json")))
    with pytest.raises(TopologyError) as strategy:
        refuse_another(plan, made, launched(KINDS[2][0], monkeypatch))
    assert str(strategy.value) == (
        f"{made}: the strategy is zero2, but the launcher was configured for fsdp2; start it with "
        f"{made}/accelerate.yaml"
    )
    with pytest.raises(ConfigError) as precision:
        refuse_another(plan, made, launched(own.replace("mixed_precision: 'no'", "mixed_precision: bf16"), monkeypatch))
    assert str(precision.value) == (
        f'ACCELERATE_MIXED_PRECISION = "bf16": the plan decides it: "no" (train.precision, {made}/run.yaml); change '
        f"mixed_precision {CHANGE}"
    )
    with pytest.raises(ConfigError) as file:
        refuse_another(plan, made, World(deepspeed_file="/other.json"))
    assert str(file.value) == (
        f"{made}: a run folder is decided, DeepSpeed's configuration too; /other.json goes with a run file"
    )


# --- twins and comparisons -------------------------------------------------------------------------------


def test_the_twin_of_a_run_with_an_accelerate_file_has_its_strategy_and_its_deepspeed_file() -> None:
    write("zero.json", {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}})
    text = "distributed_type: DEEPSPEED\nnum_processes: 8\ndeepspeed_config:\n  deepspeed_config_file: zero.json\n"
    write("mine.yaml", text)
    twin = decide_twin(run_file(), [ACCELERATE], None, 2)
    plan = twin.decided.plan
    assert (plan.processes.strategy, plan.processes.device, plan.processes.world_size) == ("zero2", "cpu", 2)
    assert plan.deepspeed is not None
    assert plan.deepspeed["zero_optimization"]["reduce_bucket_size"] == 5
    assert plan.config.parallel.accelerate_config is None
    assert twin.lines[:2] == [
        "CPU twin of this run, strategy zero2",
        "the run is planned as on a machine with 8 GPUs (parallel.devices), otherwise as this one",
    ]
    told = dict(line.strip().split(": ", 1) for line in twin.lines[3:])
    assert told["processes.world_size"] == "8 → 2"
    assert told["config.parallel.accelerate_config"].endswith("mine.yaml → null")
    assert "config.parallel.deepspeed_config" not in told


def test_the_twin_keeps_the_strategy_of_an_accelerate_file_also_where_the_run_cannot_be_planned() -> None:
    write("mine.yaml", "distributed_type: FSDP\nnum_processes: 3\nfsdp_config: {fsdp_version: 2}\n")
    twin = decide_twin(run_file(), [ACCELERATE], None, 2)
    assert "cannot be planned" in twin.lines[1]
    assert twin.decided.plan.processes.strategy == "fsdp2"


def test_debug_cpu_of_several_machines() -> None:
    text = "distributed_type: FSDP\nnum_processes: 8\nnum_machines: 2\nfsdp_config: {fsdp_version: 2}\n"
    write("mine.yaml", text)
    shown = CliRunner().invoke(app, ["plan", run_file(), ACCELERATE, "--debug-cpu", "2"])
    assert shown.exit_code == 0, shown.stderr
    assert "  processes.world_size: 8 → 2" in shown.stdout.splitlines()
    assert "the run is planned as on each of 2 nodes with 4 GPUs" in shown.stdout


def test_a_comparison_of_strategies_leaves_the_files_of_one_of_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    write("mine.json", {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}})
    planned = []

    def refuse(plan: Any) -> Path:
        planned.append(plan)
        raise ConfigError("planned, and not started")

    monkeypatch.setattr("launch.parity.create_run_folder", refuse)
    both = cases([Strategy.ZERO3], [2])
    (outcome,) = compare(run_file("deepspeed_config: mine.json"), [], both, Path("runs"), lambda _: None)
    assert outcome.problem == "planned, and not started"
    assert planned[0].deepspeed == deepspeed_config(Strategy.ZERO3, 4, 1, 2, 1.0, "fp32")


def test_nothing_named_is_nothing_read() -> None:
    outside = read_outside(load(Path(run_file()), []), World())
    assert (outside.accelerate, outside.deepspeed) == (None, None)


# --- real runs -------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python(Path.cwd(), *arguments, HF_HOME=str(Path("hub").absolute()))


def updates_of(run: str) -> list[dict[str, Any]]:
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


OWN_ZERO = {"stage": 2, "reduce_bucket_size": 100_000, "allgather_bucket_size": "auto"}
OWN_FILE = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto"),
    "bf16": {"enabled": "auto"},
    "zero_optimization": OWN_ZERO,
}


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_with_a_deepspeed_file_and_its_folder_started_by_accelerate_launch() -> None:
    write("mine.json", OWN_FILE)
    file = run_file("device: cpu, devices: 2, deepspeed_config: mine.json")
    run = command("launch", "run", file, "--out", "one")
    assert run.returncode == 0, run.stderr
    merged = deepspeed_config(Strategy.ZERO2, 4, 1, 2, 1.0, "fp32")
    merged["zero_optimization"]["reduce_bucket_size"] = 100_000
    assert json.loads(Path("one/deepspeed.json").read_text()) == merged
    assert len(updates_of("one")) == 2

    made = create_run_folder(decide(file, [], Path("two"), World()).plan)
    (said,) = [line for line in (made / "accelerate.yaml").read_text().splitlines() if "accelerate launch --" in line]
    run = command("accelerate.commands.launch", *said.split()[3:])
    assert run.returncode == 0, run.stderr
    assert [record["loss"] for record in updates_of("two")] == [record["loss"] for record in updates_of("one")]


@pytest.mark.dist
@pytest.mark.slow
def test_accelerate_launch_with_a_yaml_that_names_a_shipped_deepspeed_file() -> None:
    shipped = shipped_folder("accelerate_configs") / "zero2.yaml"
    values = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    values["deepspeed_config"] = {"deepspeed_config_file": "ds_configs/zero2.json"}
    write("mine.yaml", yaml.safe_dump(values))
    Path("ds_configs").symlink_to(shipped_folder("ds_configs"))
    started = ("--config_file", "mine.yaml", "-m", "launch.train")
    run = command("accelerate.commands.launch", *started, run_file("device: cpu"), "--out", "one")
    assert run.returncode == 0, run.stderr
    assert json.loads(Path("one/deepspeed.json").read_text()) == deepspeed_config(Strategy.ZERO2, 4, 1, 2, 1.0, "fp32")
    assert len(updates_of("one")) == 2
