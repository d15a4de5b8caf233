"""An Accelerate YAML: Accelerate's own keys at every depth, no typo gets through, contradictions name both places."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from accelerate.commands.config import cluster
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import constants, launch
from accelerate.utils import dataclasses as plugins
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from torch.distributed.fsdp import BackwardPrefetch, ShardingStrategy, StateDictType

from launch.accelerate_file import (
    _TAKEN,
    UNSTATED,
    VARIABLES,
    contradictions,
    deepspeed_file_of,
    launcher_contradictions,
    read_accelerate_file,
    strategy_of_accelerate,
)
from launch.accelerate_keys import PREFIXED, AccelerateFile, Backend, Distributed, Prefetch, Sharding, StateDict
from launch.assets import shipped_folder
from launch.errors import ConfigError
from launch.keys import describe, section_of

CONFIGS = sorted(shipped_folder("accelerate_configs").glob("*.yaml"))


def file_with(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_accelerate_file(file_with(folder, text))
    return str(caught.value).replace(f"{folder}/", "")


# --- the keys are those of Accelerate --------------------------------------------------------------------

SECTIONS = {
    name: set(section.model_fields)
    for name, info in AccelerateFile.model_fields.items()
    if (section := section_of(info.annotation))
}
PARSER = launch_command_parser()
GROUPS = {
    "fsdp_config": "FSDP Arguments",
    "deepspeed_config": "DeepSpeed Arguments",
    "parallelism_config": "ParallelismConfig Arguments",
    "fp8_config": "FP8 Arguments",
    "megatron_lm_config": "Megatron-LM Arguments",
    "mpirun_config": "MPI Arguments",
}


def test_every_key_of_accelerate_is_known_and_no_other() -> None:
    theirs = {field.name for field in dataclasses.fields(ClusterConfig)}
    assert set(AccelerateFile.model_fields) == theirs | {"fp16", "dynamo_backend"}, "with what it converts"
    assert set(SECTIONS) == {*GROUPS, "dynamo_config"}


def arguments_of(section: str) -> set[str]:
    """What `accelerate launch` takes for a section."""
    if section == "dynamo_config":
        return {action.dest for action in PARSER._actions if action.dest.startswith("dynamo_")}
    group = next(group for group in PARSER._action_groups if group.title == GROUPS[section])
    return {action.dest for action in group._group_actions}


def asked_by_the_questionnaire(section: str) -> set[str]:
    """What `accelerate config` writes into a section, under full names."""
    found = set(re.findall(rf'\b{section}\[(?:prefix \+ )?"(\w+)"\]', inspect.getsource(cluster)))
    prefix, _ = PREFIXED.get(section, (f"{section}_" if "parallelism" in section else "megatron_lm_", None))
    if section in ("deepspeed_config", "mpirun_config"):
        return found
    return {name if name.startswith(prefix) else prefix + name for name in found}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_a_section_is_known_and_no_other(section: str) -> None:
    asked = asked_by_the_questionnaire(section)
    assert len(asked) >= {"mpirun_config": 1, "dynamo_config": 5}.get(section, 5)
    theirs = arguments_of(section) | asked | ({"fsdp_ignored_modules"} if section == "fsdp_config" else set())
    assert sorted(theirs - SECTIONS[section]) == []
    assert sorted(SECTIONS[section] - theirs) == []


def test_the_words_are_those_of_accelerate() -> None:
    assert set(get_args(Distributed)) == {kind.value for kind in plugins.DistributedType}
    assert set(get_args(Backend)) == {kind.value for kind in plugins.DynamoBackend}
    assert list(get_args(Sharding)) == constants.FSDP_SHARDING_STRATEGY
    assert list(get_args(Prefetch)) == constants.FSDP_BACKWARD_PREFETCH
    assert list(get_args(StateDict)) == constants.FSDP_STATE_DICT_TYPE
    fields = {name: str(info.annotation) for name, info in AccelerateFile.model_fields.items()}
    assert all(f"'{kind.value}'" in fields["mixed_precision"] for kind in plugins.PrecisionType)
    sections = {key.name: key.kind for key in describe(AccelerateFile)}
    for key, words in {
        "fsdp_config.fsdp_auto_wrap_policy": constants.FSDP_AUTO_WRAP_POLICY,
        "deepspeed_config.deepspeed_multinode_launcher": constants.DEEPSPEED_MULTINODE_LAUNCHERS,
        "dynamo_config.dynamo_mode": constants.TORCH_DYNAMO_MODES,
    }.items():
        assert sections[key] == "|".join(words)


@pytest.mark.parametrize(("names", "kinds"), [
    (get_args(Sharding), ShardingStrategy), (get_args(StateDict), StateDictType),
    (get_args(Prefetch)[:2], BackwardPrefetch),
])  # fmt: skip
def test_a_number_stands_for_the_name_that_accelerate_gives_it(names: tuple[str, ...], kinds: Any) -> None:
    for number, name in enumerate(names, start=1):
        assert kinds(number).name.lstrip("_") == name


def test_every_variable_of_accelerate_launch_is_known() -> None:
    given = set(re.findall(r'current_env\["((?:ACCELERATE|FSDP)_\w+)"\]', inspect.getsource(launch)))
    given |= {
        f"PARALLELISM_CONFIG_{name}" for name in re.findall(
            r'current_env\[prefix \+ "(\w+)"\]', inspect.getsource(launch.prepare_extend_env_parallelism_config)
        )
    }  # fmt: skip
    read = inspect.getsource(plugins.FullyShardedDataParallelPlugin)
    given |= {f"FSDP_{name}" for name in re.findall(r'environ\.get\(\s*env_prefix \+ "(\w+)"', read)}
    given |= set(
        re.findall(r'environ\.get\(\s*"(ACCELERATE_\w+)"', inspect.getsource(plugins.DeepSpeedPlugin.__post_init__))
    )
    assert len(given) > 45
    # The first are told by topology.read_world, the others come with one that is told.
    elsewhere = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_CONFIG_DS_FIELDS"}
    elsewhere |= {"ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_FP8_OPT_LEVEL"}
    assert sorted(given - set(VARIABLES) - elsewhere) == []
    assert sorted(set(VARIABLES) - given - {"PARALLELISM_CONFIG_CP_COMM_STRATEGY"}) == []


def test_the_tables_speak_of_keys_that_there_are() -> None:
    keys = {key.name for key in describe(AccelerateFile)} | set(SECTIONS)
    assert {*VARIABLES.values(), *UNSTATED, *_TAKEN} <= keys


# --- what is read ----------------------------------------------------------------------------------------

KIND = "distributed_type: FSDP\n"
SAID = [
    (KIND + "fsdp_config:\n  fsdp_verison: 2\n", "3: fsdp_config.fsdp_verison = 2: unknown key; did you mean "
     "fsdp_config.fsdp_version?"),
    (KIND + "fsdp_config:\n  verison: 2\n", "3: fsdp_config.verison = 2: unknown key; did you mean "
     "fsdp_config.fsdp_version?"),
    (KIND + "fsdp_config:\n  fsdp_version: '2'\n", '3: fsdp_config.fsdp_version = "2": must be a whole number, not '
     "text; remove the quotes"),
    (KIND + "fsdp_config:\n  fsdp_offload_params: maybe\n", '3: fsdp_config.fsdp_offload_params = "maybe": must be '
     "true or false, got text"),
    (KIND + "fsdp_config:\n  num_processes: 2\n", "3: fsdp_config.num_processes = 2: unknown key; did you mean "
     "num_processes?"),
    (KIND + "fsdp_config:\n  version: 2\n  fsdp_version: 2\n", "3: fsdp_config.version = 2: is another name of "
     "fsdp_config.fsdp_version (mine.yaml:4); keep one"),
    (KIND + "fsdp_config: 3\n", "2: fsdp_config = 3: must be a mapping of `key: value` entries"),
    (KIND + "zero_stage: 2\n", "2: zero_stage = 2: unknown key; did you mean deepspeed_config.zero_stage?"),
    (KIND + "mixed_precision: no\n", "2: mixed_precision = false: an unquoted no is false in YAML; quote it: 'no', "
     "or 'NO'"),
    ("distributed_type: NO\n", "1: distributed_type = false: an unquoted no is false in YAML; quote it: 'no', or "
     "'NO'"),
    (KIND + "mixed_precision: fp17\n", "2: mixed_precision = \"fp17\": must be 'no', 'fp16', 'bf16' or 'fp8'"),
    (KIND + "mixed_precision: FP17\n", "2: mixed_precision = \"FP17\": must be 'no', 'fp16', 'bf16' or 'fp8'"),
    (KIND + "gpu_ids: 0\n", "2: gpu_ids = 0: must be text; quote it to keep it text: '\"0\"'"),
    (KIND + "num_machines: 0\n", "2: num_machines = 0: must be greater than or equal to 1"),
    ("use_cpu: true\n", ": distributed_type: must be set"),
    ("compute_environment: AMAZON_SAGEMAKER\nregion: x\n", '1: compute_environment = "AMAZON_SAGEMAKER": shoal starts '
     "no jobs on Amazon SageMaker; use LOCAL_MACHINE, and the keys that go with it"),
    ("distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: a.json\n  zero_stage: 2\n",
     "4: deepspeed_config.zero_stage = 2: excludes deepspeed_config.deepspeed_config_file (mine.yaml:3), which states "
     "it; leave one of the two out"),
    (KIND + "debug: a: b\n", "2: not valid YAML: mapping values are not allowed here"),
    (KIND + KIND, "2: distributed_type is stated twice (first in line 1); keep one"),
    ("- a\n", "1: an Accelerate file is a mapping of `section:` entries"),
    ("# nothing\n", ": empty Accelerate file; it needs at least `distributed_type: …`"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), SAID, ids=[text for text, _ in SAID])
def test_a_mistake_gives_one_exact_line(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == f"mine.yaml{'' if message[0] == ':' else ':'}{message}"


def test_it_is_read_by_the_yaml_that_accelerate_reads_it_by(tmp_path: Path) -> None:
    text = "distributed_type: 'NO'\nuse_cpu: yes\ndebug: off\nmain_process_port: 0o17\n"
    assert refusal(tmp_path, text).startswith('mine.yaml:4: main_process_port = "0o17": must be a whole number')
    values = read_accelerate_file(file_with(tmp_path, text.replace("0o17", "0x10"))).values
    assert values == yaml.safe_load(text.replace("0o17", "16"))


def test_short_and_former_names_come_under_present_ones(tmp_path: Path) -> None:
    text = (
        "distributed_type: FSDP\nfp16: true\ndynamo_backend: 'NO'\ndynamo_config:\n"
        "fsdp_config: {version: 2, offload_params: true}\nfp8_config: {backend: TE}\n"
    )
    layer = read_accelerate_file(file_with(tmp_path, text))
    assert layer.values == {
        "distributed_type": "FSDP",
        "mixed_precision": "fp16",
        "dynamo_config": {"dynamo_backend": "NO"},
        "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True},
        "fp8_config": {"fp8_backend": "TE"},
    }
    lines = {key: place.rpartition(":")[2] for key, place in layer.places.items()}
    assert (lines["mixed_precision"], lines["dynamo_config.dynamo_backend"]) == ("2", "3")
    assert lines["fsdp_config.fsdp_offload_params"] == "5"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_files_we_ship_are_right_and_of_their_strategy(path: Path) -> None:
    layer = read_accelerate_file(path)
    assert layer.values == yaml.safe_load(path.read_text(encoding="utf-8"))
    assert strategy_of_accelerate(layer) == (None if path.stem in ("cpu", "single", "ddp", "tpu") else path.stem)
    assert contradictions(layer, {}) == []
    assert deepspeed_file_of(layer, path) is None


# What tests/test_typos.py makes mistakes in, beside the files we ship.
RICH = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
enable_cpu_affinity: false
gpu_ids: 0,1
dynamo_config:
  dynamo_backend: INDUCTOR
  dynamo_mode: max-autotune
  dynamo_use_fullgraph: true
  dynamo_use_regional_compilation: true
fsdp_config:
  fsdp_version: 2
  fsdp_min_num_params: 1000
  fsdp_sharding_strategy: FULL_SHARD
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_backward_prefetch: BACKWARD_PRE
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_activation_checkpointing_offload: false
deepspeed_config:
  gradient_accumulation_steps: 4
  gradient_clipping: 1.0
  offload_optimizer_nvme_path: /nvme
  zero3_save_16bit_model: true
fp8_config:
  fp8_backend: TE
  fp8_margin: 0
  fp8_override_linear_precision: [false, false, false]
megatron_lm_config:
  megatron_lm_tp_degree: 2
  megatron_lm_recompute_activations: true
  megatron_lm_attention_dropout: 0.1
parallelism_config:
  parallelism_config_tp_size: 2
  parallelism_config_cp_comm_strategy: allgather
mpirun_config:
  mpirun_hostfile: hosts
machine_rank: 0
main_process_ip: 10.0.0.1
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_name: mine
use_cpu: false
"""


def test_a_typo_in_the_key_that_must_be_there_is_one_mistake(tmp_path: Path) -> None:
    assert refusal(tmp_path, "distributed_typ: FSDP\n") == (
        'mine.yaml:1: distributed_typ = "FSDP": unknown key; did you mean distributed_type?'
    )


# --- what it means ---------------------------------------------------------------------------------------


def read(folder: Path, text: str) -> Any:
    return read_accelerate_file(file_with(folder, text))


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("distributed_type: 'NO'", None),
        ("distributed_type: MULTI_GPU", None),
        ("distributed_type: MULTI_CPU\nuse_cpu: true", None),
        ("distributed_type: XLA", None),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}", "fsdp2"),
        ("distributed_type: FSDP\nfsdp_config: {version: 2, offload_params: true}", "fsdp2_offload"),
        ("distributed_type: MULTI_GPU\nfsdp_config: {fsdp_version: 1}", None),
        ("distributed_type: DEEPSPEED", "zero2"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3, offload_optimizer_device: CPU, "
         "offload_param_device: cpu}", "zero3_offload"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: none, zero_stage: 1}", "zero1"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: a.json}", None),
    ],
)  # fmt: skip
def test_the_strategy_of_a_file(tmp_path: Path, text: str, strategy: str | None) -> None:
    assert strategy_of_accelerate(read(tmp_path, text)) == strategy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distributed_type: FSDP", "1: fsdp_config.fsdp_version = 1 (Accelerate's default): version 1 loses its "
         "optimizer state on resuming; use fsdp_version: 2, as in accelerate_configs/fsdp2.yaml"),
        ("distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 1", "3: fsdp_config.fsdp_version = 1: version 1 loses "
         "its optimizer state on resuming; use fsdp_version: 2, as in accelerate_configs/fsdp2.yaml"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 0", "3: deepspeed_config.zero_stage = 0: with "
         "offload_optimizer_device = none and offload_param_device = none there is no such strategy; there are zero1, "
         "zero2, zero3, zero2_offload (the optimizer on the CPU) and zero3_offload (optimizer and weights on the CPU)"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config:\n  offload_optimizer_device: nvme",
         "1: deepspeed_config.zero_stage = 2 (Accelerate's default): with offload_optimizer_device = nvme and "
         "offload_param_device = none there is no such strategy; there are zero1, zero2, zero3, zero2_offload (the "
         "optimizer on the CPU) and zero3_offload (optimizer and weights on the CPU)"),
    ],
)  # fmt: skip
def test_a_strategy_that_there_is_not(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        strategy_of_accelerate(read(tmp_path, text))
    assert str(caught.value) == f"{tmp_path}/mine.yaml:{message}"


def test_the_deepspeed_file_is_looked_for_where_accelerate_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs, here = tmp_path / "configs", tmp_path / "here"
    configs.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    layer = read(configs, "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: zero.json")
    place = f'{configs}/mine.yaml:3: deepspeed_config.deepspeed_config_file = "zero.json": no such file in {here}'
    with pytest.raises(ConfigError) as caught:
        deepspeed_file_of(layer, configs / "mine.yaml")
    assert str(caught.value) == place
    (configs / "zero.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        deepspeed_file_of(layer, configs / "mine.yaml")
    assert str(caught.value) == (
        f"{place}; there is {configs}/zero.json, but Accelerate looks from where you stand"
    )  # fmt: skip
    (here / "zero.json").write_text("{}", encoding="utf-8")
    assert deepspeed_file_of(layer, configs / "mine.yaml") == Path("zero.json")


# --- against the plan ------------------------------------------------------------------------------------

DECIDED = {
    "num_processes": (4, "parallel.devices, run.yaml:7"),
    "num_machines": (1, "parallel.nodes, default"),
    "use_cpu": (False, "parallel.device, default"),
    "mixed_precision": ("bf16", "train.precision, default"),
    "fsdp_config.fsdp_version": (2, "parallel.strategy = fsdp2, run.yaml:3"),
    "fsdp_config.fsdp_offload_params": (False, "parallel.strategy = fsdp2, run.yaml:3"),
    "fsdp_config.fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "parallel.strategy = fsdp2, run.yaml:3"),
    "fsdp_config.fsdp_state_dict_type": ("SHARDED_STATE_DICT", "parallel.strategy = fsdp2, run.yaml:3"),
    "dynamo_config.dynamo_backend": ("no", "train.compile, default"),
    "fsdp_config.fsdp_activation_checkpointing": (False, "train.activation_checkpointing, run.yaml:8"),
    "deepspeed_config.gradient_accumulation_steps": (2, "train.micro_batch_size, run.yaml:9"),
    "deepspeed_config.gradient_clipping": (1.0, "train.max_grad_norm, default"),
}


def found(folder: Path, text: str) -> list[str]:
    lines = contradictions(read(folder, f"distributed_type: FSDP\n{text}"), DECIDED)
    return [line.replace(f"{folder}/mine.yaml:", "") for line in lines]


STATE = "state the same in both, or leave it out"
CONTRADICTIONS = [
    ("num_processes: 2", f"2: num_processes = 2: the plan decides it: 4 (parallel.devices, run.yaml:7); {STATE}"),
    ("mixed_precision: fp16", '2: mixed_precision = "fp16": the plan decides it: "bf16" (train.precision, default); '
     f"{STATE}"),
    ("use_cpu: true", f"2: use_cpu = true: the plan decides it: false (parallel.device, default); {STATE}"),
    ("fsdp_config:\n  fsdp_offload_params: true", "3: fsdp_config.fsdp_offload_params = true: the plan decides it: "
     f"false (parallel.strategy = fsdp2, run.yaml:3); {STATE}"),
    ("fsdp_config:\n  fsdp_auto_wrap_policy: NO_WRAP", '3: fsdp_config.fsdp_auto_wrap_policy = "NO_WRAP": the plan '
     f'decides it: "TRANSFORMER_BASED_WRAP" (parallel.strategy = fsdp2, run.yaml:3); {STATE}'),
    ("fsdp_config:\n  fsdp_state_dict_type: 1", "3: fsdp_config.fsdp_state_dict_type = 1: the plan decides it: "
     f'"SHARDED_STATE_DICT" (parallel.strategy = fsdp2, run.yaml:3); {STATE}'),
    ("fsdp_config:\n  fsdp_activation_checkpointing: true", "3: fsdp_config.fsdp_activation_checkpointing = true: "
     f"the plan decides it: false (train.activation_checkpointing, run.yaml:8); {STATE}"),
    ("dynamo_backend: inductor", '2: dynamo_config.dynamo_backend = "inductor": the plan decides it: '
     f'"no" (train.compile, default); {STATE}'),
    ("megatron_lm_config:\n  megatron_lm_tp_degree: 2", '2: megatron_lm_config = {"megatron_lm_tp_degree": 2}: shoal '
     "does not use Megatron-LM; use parallel.strategy; leave it out"),
    ("parallelism_config:\n  parallelism_config_tp_size: 2", "3: parallelism_config.parallelism_config_tp_size = 2: "
     "shoal shards over all processes and splits no model or sequence; use parallel.strategy; leave it out"),
    ("mpirun_config:\n  mpirun_hostfile: hosts", '2: mpirun_config = {"mpirun_hostfile": "hosts"}: shoal starts its '
     "processes without mpirun; leave it out"),
    ("fp8_config: {backend: TE}", '2: fp8_config = {"fp8_backend": "TE"}: shoal trains in fp32, bf16 or fp16; '
     "use train.precision; leave it out"),
    ("tpu_use_cluster: true", "2: tpu_use_cluster = true: a TPU pod cannot be started: torch_xla 2.9 lacks what "
     "Accelerate starts one with; shoal uses one host; leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), CONTRADICTIONS, ids=[text for text, _ in CONTRADICTIONS])
def test_a_contradiction_names_both_places(tmp_path: Path, text: str, message: str) -> None:
    assert found(tmp_path, text) == [message]


@pytest.mark.parametrize("kind", ["XLA", "MEGATRON_LM", "MULTI_NPU"])
def test_a_kind_of_processes_that_there_is_not(tmp_path: Path, kind: str) -> None:
    assert contradictions(read(tmp_path, f"distributed_type: {kind}"), {}) == [
        f'{tmp_path}/mine.yaml:1: distributed_type = "{kind}": shoal knows NO, MULTI_CPU, MULTI_GPU, FSDP and '
        "DEEPSPEED; for TPUs use NO, as in accelerate_configs/tpu.yaml: one process has all devices of a host; state "
        "one of these"
    ]


def test_contradictions_are_told_all_at_once(tmp_path: Path) -> None:
    assert len(found(tmp_path, "num_processes: 2\nmixed_precision: fp8\ntpu_name: mine\nmachine_rank: 3\n")) == 3


@pytest.mark.parametrize(
    "text",
    [
        *("num_processes: -1", "mixed_precision: 'no'", "mixed_precision: 'NO'", "mixed_precision: BF16"),
        *("machine_rank: 1", "main_process_ip: 10.0.0.1", "main_process_port: 29500", "rdzv_backend: c10d"),
        *("same_network: false", "gpu_ids: 0,1", "debug: true", "enable_cpu_affinity: true", "downcast_bf16: 'no'"),
        *("fsdp_config: {fsdp_auto_wrap_policy: transformer_based_wrap}", "fsdp_config: {state_dict_type: 3}"),
        *("dynamo_config: {dynamo_backend: 'no', dynamo_mode: default}", "fp8_config: {}", "tpu_vm: ['']"),
        *("deepspeed_config: {gradient_clipping: 1}", "deepspeed_config: {gradient_accumulation_steps: auto}"),
        *("parallelism_config: {parallelism_config_tp_size: 1, parallelism_config_cp_backend: torch}", "fp16: false"),
        *("fsdp_config: {fsdp_use_orig_params: true, fsdp_cpu_ram_efficient_loading: true}", "commands: null"),
    ],
)
def test_what_agrees_or_changes_nothing_passes(tmp_path: Path, text: str) -> None:
    assert found(tmp_path, text) == []


# What `accelerate config` (1.15) writes for four GPUs and FSDP, and for DeepSpeed.
TYPICAL = {
    "fsdp2": """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
enable_cpu_affinity: false
fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_version: 2
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 4
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
""",
    "zero3_offload": """\
compute_environment: LOCAL_MACHINE
debug: false
deepspeed_config:
  gradient_accumulation_steps: 2
  gradient_clipping: 1.0
  offload_optimizer_device: cpu
  offload_param_device: cpu
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
distributed_type: DEEPSPEED
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 4
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
""",
}


@pytest.mark.parametrize("strategy", TYPICAL)
def test_what_accelerate_config_writes_passes(tmp_path: Path, strategy: str) -> None:
    layer = read(tmp_path, TYPICAL[strategy])
    assert strategy_of_accelerate(layer) == strategy
    assert contradictions(layer, DECIDED) == []


# --- what `accelerate launch` passes on ------------------------------------------------------------------


def environment_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables that `accelerate launch --config_file path` hands to its processes."""
    for name in [name for name in VARIABLES if name in launch.os.environ]:
        monkeypatch.delenv(name)
    stated = ["--config_file", str(path), "--num_processes", "2", "-m", "launch.train", "causal_lm"]
    parser = launch_command_parser()
    args, _, _ = _validate_launch_command(parser.parse_args(stated))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = "zero_stage"
        return dict(prepare_deepspeed_cmd_env(args)[1])
    if args.use_fsdp or args.multi_gpu:
        return dict(prepare_multi_gpu_env(args))
    return dict(prepare_simple_launcher_cmd_env(args)[1])


CONTRARY = dict.fromkeys(set(VARIABLES.values()) - {"fsdp_config.fsdp_version"}, ("something else", "because"))


@pytest.mark.parametrize("kind", ["FSDP", "MULTI_GPU", "'NO'", "DEEPSPEED"])
def test_what_accelerate_adds_of_its_own_is_no_opinion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = file_with(tmp_path, f"distributed_type: {kind}\nfsdp_config: {{fsdp_version: 2}}\nparallelism_config:\n")
    environ = environment_of(path, monkeypatch)
    assert {name: environ[name] for name in VARIABLES if name in environ}
    assert launcher_contradictions(environ, CONTRARY) == []


def test_the_processes_of_parallelism_that_nobody_stated_are_no_opinion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\nparallelism_config: {parallelism_config_tp_size: 2}"
    environ = environment_of(file_with(tmp_path, text), monkeypatch)
    (line,) = launcher_contradictions(environ, CONTRARY)
    assert line.startswith('PARALLELISM_CONFIG_TP_SIZE = "2": the plan decides it: "something else" (because); ')


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_worker_started_with_a_file_we_ship_finds_no_contradiction(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {key: value for key, value in DECIDED.items() if "offload" not in key and key != "use_cpu"}
    assert launcher_contradictions(environment_of(path, monkeypatch), plan) == []


CHANGE = (
    "in the configuration of `accelerate launch` (where no --config_file is given, that is "
    "accelerate/default_config.yaml in the Hugging Face cache), or unset the variable"
)


def test_a_contradicting_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "distributed_type: FSDP\nmixed_precision: fp16\ndynamo_config: {dynamo_backend: INDUCTOR}\nfsdp_config:\n"
        "  fsdp_version: 2\n  fsdp_offload_params: true\n  fsdp_reshard_after_forward: false\n"
        "  fsdp_activation_checkpointing: true\n"
    )
    environ = environment_of(file_with(tmp_path, text), monkeypatch)
    assert launcher_contradictions(environ, DECIDED) == [
        'ACCELERATE_MIXED_PRECISION = "fp16": the plan decides it: "bf16" (train.precision, default); change '
        f"mixed_precision {CHANGE}",
        'ACCELERATE_DYNAMO_BACKEND = "INDUCTOR": the plan decides it: "no" (train.compile, default); change '
        f"dynamo_config.dynamo_backend {CHANGE}",
        'FSDP_OFFLOAD_PARAMS = "true": the plan decides it: false (parallel.strategy = fsdp2, run.yaml:3); change '
        f"fsdp_config.fsdp_offload_params {CHANGE}",
        'FSDP_RESHARD_AFTER_FORWARD = "false": shoal frees the gathered weights of a block after its use; change '
        f"fsdp_config.fsdp_reshard_after_forward {CHANGE}",
        'FSDP_ACTIVATION_CHECKPOINTING = "true": the plan decides it: false (train.activation_checkpointing, '
        f"run.yaml:8); change fsdp_config.fsdp_activation_checkpointing {CHANGE}",
    ]


def test_deepspeed_variables_are_compared_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "distributed_type: DEEPSPEED\ndeepspeed_config: {gradient_accumulation_steps: 2, gradient_clipping: 0.5}"
    environ = environment_of(file_with(tmp_path, text), monkeypatch)
    assert environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "2"
    assert launcher_contradictions(environ, DECIDED) == [
        'ACCELERATE_GRADIENT_CLIPPING = "0.5": the plan decides it: 1.0 (train.max_grad_norm, default); change '
        f"deepspeed_config.gradient_clipping {CHANGE}"
    ]
