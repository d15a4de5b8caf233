"""A DeepSpeed JSON: DeepSpeed's own keys at every depth, no typo gets through, and contradictions name both places."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as installed
from deepspeed.runtime.config import DeepSpeedConfig, HybridEngineConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError

from launch.deepspeed_file import _ALWAYS, _REFUSED, complete, read_deepspeed_file, strategy_of_deepspeed
from launch.deepspeed_keys import DeepSpeedFile, NumberFormat
from launch.errors import ConfigError
from launch.keys import all_keys
from launch.render import BUCKET, deepspeed_config
from launch.strategy import Strategy
from tests.mutations import paths_of

RICH = Path(__file__).parent / "data/deepspeed_rich.json"


def file_with(folder: Path, content: dict[str, Any] | str) -> Path:
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2), encoding="utf-8")
    return path


def refusal(folder: Path, content: dict[str, Any] | str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_file(file_with(folder, content))
    return str(caught.value).replace(f"{folder}/", "")


# --- the keys are those of DeepSpeed ---------------------------------------------------------------------

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": TensorBoardConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "wandb": WandbConfig,
    "compile": CompileConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "hybrid_engine": HybridEngineConfig,
    "tensor_parallel": TPTrainingConfig,
    "weight_quantization": WeightQuantConfig,
}
"""The sections that DeepSpeed describes by a model."""

DICTIONARIES = [
    *("optimizer", "scheduler", "torch_autocast", "data_types", "activation_checkpointing", "flops_profiler", "aio"),
    *("checkpoint", "checkpoint.parallel_write", "checkpoint.writer", "timers", "autotuning", "autotuning.model_info"),
    *("expert_parallel", "data_efficiency"),
]
"""The sections that DeepSpeed asks for one key after the other."""


class Asked(dict[str, Any]):
    """A dictionary that notes the keys it is asked for."""

    def __init__(self, name: str, content: dict[str, Any], noted: set[str]) -> None:
        super().__init__(content)
        self.name, self.noted = name, noted

    def _note(self, key: object) -> None:
        if isinstance(key, str):
            self.noted.add(f"{self.name}{key}")

    def get(self, key: Any, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Asked:
        return self


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a model at every depth, by all of its names, with the type of its value."""
    for name, info in model.model_fields.items():
        for spelling in {name, info.alias or name}:
            yield f"{prefix}{spelling}", info
            for kind in (info.annotation, *get_args(info.annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    yield from keys_of(kind, f"{prefix}{spelling}.")


def asked_for() -> set[str]:
    """What DeepSpeed asks a configuration for, which holds an empty dictionary for each section of this kind."""
    noted: set[str] = set()
    root = Asked("", {"train_batch_size": 1, "optimizer": {"type": "Adam"}, "scheduler": {"type": "WarmupLR"}}, noted)
    content = {"optimizer": {"type": "adam"}, "scheduler": {"type": "x"}, "torch_autocast": {"dtype": "bf16"}}
    content |= {"expert_parallel": {"enabled": False}, "timers": {"throughput": {}}}
    for name in DICTIONARIES:
        *around, last = name.split(".")
        within = root
        for section in around:
            within = dict.__getitem__(within, section)
        dict.__setitem__(within, last, Asked(f"{name}.", content.get(name, {}), noted))
    noted.clear()
    DeepSpeedConfig(root)
    return noted


OURS = dict(keys_of(DeepSpeedFile))
REMOVED = {
    *installed._REMOVED_TOP_LEVEL_CONFIG_KEYS,
    *(f"zero_optimization.{key}" for key in installed._REMOVED_ZERO_CONFIG_KEYS),
}


def test_every_key_of_deepspeed_is_known_and_no_other() -> None:
    theirs = asked_for()
    for section, model in MODELS.items():
        theirs |= {section, *(name for name, _ in keys_of(model, f"{section}."))}
    # Read by deepspeed.initialize, or where the processes are connected already.
    theirs |= {"data_parallel_size", "sequence_parallel_size", *REMOVED}
    assert sorted(theirs - set(OURS)) == []
    assert sorted(set(OURS) - theirs) == []
    assert {key for key, info in OURS.items() if info.annotation is Any} == REMOVED
    assert len(OURS) > 300


def accepted(model: type[BaseModel], values: dict[str, Any]) -> bool:
    try:
        model.model_validate_json(json.dumps(values))
    except ValidationError:
        return False
    return True


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)


@pytest.mark.parametrize("section", MODELS)
def test_a_value_that_is_accepted_is_one_that_deepspeed_takes(section: str) -> None:
    needed = {"compute_grad_norm": {"stage": 2}, "offload_optimizer.ratio": {"stage": 3}}
    tried = 0
    for key, _ in keys_of(MODELS[section]):
        for value in (True, 0, 1, -1, 7, 0.5, 1e9, "cpu", "text", [], ["z3"], [1], {}, None):
            if accepted(DeepSpeedFile, nested(f"{section}.{key}", value)):
                tried += 1
                MODELS[section](**{**needed.get(key, {}), **nested(key, value)})
    assert tried


@pytest.mark.parametrize("section", MODELS)
def test_the_defaults_of_deepspeed_are_accepted(section: str) -> None:
    for key, info in keys_of(MODELS[section]):
        default = info.get_default(call_default_factory=True)
        if isinstance(default, BaseModel) or default in ((), {}) or "torch" in str(default):
            continue
        plain = getattr(default, "value", default)
        assert accepted(DeepSpeedFile, nested(f"{section}.{key}", plain)), (key, plain)


def test_the_number_formats_are_those_of_deepspeed() -> None:
    ours = {name for part in get_args(NumberFormat) for name in get_args(part)}
    assert ours == {name for kind in installed.DtypeEnum for name in kind._all_values if isinstance(name, str)}


# --- what is read ----------------------------------------------------------------------------------------

SAID = [
    ('{"zero_optimization": {\n"stge": 2}}', "2: zero_optimization.stge = 2: unknown key; did you mean "
     "zero_optimization.stage?"),
    ('{"stage": 2}', "1: stage = 2: unknown key; did you mean zero_optimization.stage?"),
    ('{\n\n"zero_optimization": {"stage": "2"}}', '3: zero_optimization.stage = "2": must be \'auto\' or must be a '
     "whole number, not text; remove the quotes"),
    ('{"zero_optimization": {"stage": 4}}', "1: zero_optimization.stage = 4: must be 'auto' or must be less than or "
     "equal to 3"),
    ('{"zero_optimization": {"stage": true}}', "1: zero_optimization.stage = true: must be 'auto' or must be a whole "
     "number"),
    ('{"zero_optimization": {"reduce_bucket_size": 5.5}}', "1: zero_optimization.reduce_bucket_size = 5.5: must be "
     "'auto' or must be a whole number"),
    ('{"zero_optimization": true}', "1: zero_optimization = true: must be a mapping of `key: value` entries"),
    ('{"zero_optimization": {"leaf_module": {"classes": [1]}}}', "1: zero_optimization.leaf_module.classes.0 = 1: "
     "must be text; quote it to keep it text: '\"1\"'"),
    ('{"aio": {"use_gds": "auto"}}', '1: aio.use_gds = "auto": must be true or false, got text'),
    ('{"gradient_clipping": NaN}', "1: gradient_clipping = NaN: must be a finite number"),
    ('{"amp": {"enabled": true}}', '1: amp = {"enabled": true}: no longer exists in DeepSpeed, which refuses to start '
     "with it; leave it out"),
    ('{"zero_optimization": {\n"mics_shard_size": 4}}', "2: zero_optimization.mics_shard_size = 4: no longer exists in "
     "DeepSpeed, which refuses to start with it; leave it out"),
    ('{"bf16": {},\n"bfloat16": {"enabled": true}}', '2: bfloat16 = {"enabled": true}: is another name of bf16 '
     "(mine.json:1); keep one"),
    ('{"zero_optimization": {"prefetch_bucket_size": 5,\n"stage3_prefetch_bucket_size": 5}}',
     "1: zero_optimization.prefetch_bucket_size = 5: is another name of zero_optimization.stage3_prefetch_bucket_size "
     "(mine.json:2); keep one"),
    ('{"comet": {"api_key": "pale-blue-dot"}}', "1: comet.api_key: looks like a secret (value not shown); a run file "
     "and a command line are recorded, so put it into the environment instead (HF_TOKEN, WANDB_API_KEY, …)"),
    # What is no JSON.
    ("", "1: not valid JSON: expecting value (column 1)"),
    ("train_batch_size: 4\n", "1: not valid JSON: expecting value (column 1)"),
    ('{"fp16": {"enabled": true}\n "bf16": {}}', "2: not valid JSON: expecting ',' delimiter (column 2)"),
    ('{\n// mine\n"fp16": {}}', "2: not valid JSON: expecting property name enclosed in double quotes (column 1)"),
    ('{"fp16": {"enabled": yes}}', "1: not valid JSON: expecting value (column 22)"),
    ("[1]", '1: a DeepSpeed file is one JSON object: {"key": value, …}'),
    ('{"fp16": {},\n"fp16": {}}', "2: fp16 is stated twice (first in line 1); keep one"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), SAID, ids=[text for text, _ in SAID])
def test_a_mistake_gives_one_exact_line(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == f"mine.json:{message}"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_file(tmp_path / "mine.json")
    assert str(caught.value) == f"{tmp_path}/mine.json: no such DeepSpeed file"


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    said = refusal(tmp_path, {"amp": {}, "train_batch_size": "4", "fp16": {"enabld": True}})
    assert [line.partition(" = ")[0] for line in sorted(said.splitlines())] == [
        "mine.json:2: amp",
        "mine.json:3: train_batch_size",
        "mine.json:5: fp16.enabld",
    ]


def test_tabs_escapes_and_keys_within_lists_keep_their_lines(tmp_path: Path) -> None:
    text = '{\n\t"optimizer": {"type": "a\\"{[:",\n\t\t"params": {"betas": [{"b": 1}, [{}], 0.9]}},\n\t"bf16": {}\n}'
    layer = read_deepspeed_file(file_with(tmp_path, text))
    lines = {key: place.rpartition(":")[2] for key, place in layer.places.items()}
    assert lines == {"optimizer": "2", "optimizer.type": "2", "optimizer.params": "3", "optimizer.params.betas": "3",
                     "bf16": "4"}  # fmt: skip


def test_other_names_are_one_name_afterwards(tmp_path: Path) -> None:
    zero = {"cpu_offload": True, "cpu_offload_param": False, "max_live_parameters": 7}
    layer = read_deepspeed_file(file_with(tmp_path, {"zero_optimization": zero, "bfloat16": {"enabled": True}}))
    assert layer.values == {
        "zero_optimization": {
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "none"},
            "stage3_max_live_parameters": 7,
        },
        "bf16": {"enabled": True},
    }
    assert layer.places["zero_optimization.offload_optimizer"] == f"{tmp_path}/mine.json:3"
    assert layer.places["bf16.enabled"] == f"{tmp_path}/mine.json:8"


RICH_VALUES: dict[str, Any] = json.loads(RICH.read_text(encoding="utf-8"))


def test_the_rich_file_is_right() -> None:
    free_form = "data_sampling"
    found = [path for path, _ in paths_of(read_deepspeed_file(RICH).values) if free_form not in path[:-1]]
    assert len(found) > 170


# --- what it means ---------------------------------------------------------------------------------------

CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("zero", "strategy"),
    [
        ({}, None),
        ({"stage": "auto"}, None),
        ({"stage": "auto", "offload_optimizer": CPU}, None),
        ({"stage": 1}, "zero1"),
        ({"stage": 2}, "zero2"),
        ({"stage": 3, "offload_param": {"device": "none"}}, "zero3"),
        ({"stage": 3, "offload_param": None}, "zero3"),
        ({"stage": 2, "offload_optimizer": CPU}, "zero2_offload"),
        ({"stage": 2, "cpu_offload": True}, "zero2_offload"),
        ({"stage": 2, "offload_optimizer": {"device": "auto"}}, "zero2"),
        ({"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}, "zero3_offload"),
    ],
)
def test_the_strategy_of_a_file(tmp_path: Path, zero: dict[str, Any], strategy: str | None) -> None:
    assert strategy_of_deepspeed(read_deepspeed_file(file_with(tmp_path, {"zero_optimization": zero}))) == strategy


@pytest.mark.parametrize(
    ("zero", "optimizer_on", "weights_on"),
    [
        ({"stage": 0}, "none", "none"),
        ({"stage": 1, "offload_optimizer": CPU}, "cpu", "none"),
        ({"stage": 2, "offload_param": CPU}, "none", "cpu"),
        ({"stage": 3, "offload_param": CPU}, "none", "cpu"),
        ({"stage": 3, "offload_optimizer": CPU}, "cpu", "none"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}, "offload_param": CPU}, "nvme", "cpu"),
    ],
)
def test_a_strategy_that_there_is_not(tmp_path: Path, zero: dict[str, Any], optimizer_on: str, weights_on: str) -> None:
    layer = read_deepspeed_file(file_with(tmp_path, {"zero_optimization": zero}))
    with pytest.raises(ConfigError) as caught:
        strategy_of_deepspeed(layer)
    assert str(caught.value) == (
        f"{tmp_path}/mine.json:3: zero_optimization.stage = {zero['stage']}: with offload_optimizer.device = "
        f"{optimizer_on} and offload_param.device = {weights_on} there is no such strategy; there are zero1, zero2, "
        "zero3, zero2_offload (the optimizer on the CPU) and zero3_offload (optimizer and weights on the CPU)"
    )


# --- against the plan ------------------------------------------------------------------------------------

DECIDED = deepspeed_config(Strategy.ZERO2, 4, 2, 4, 1.0, "bf16")
BECAUSE = {
    "train_batch_size": "train.global_batch_size, run.yaml:4",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size, default",
    "gradient_accumulation_steps": "train.micro_batch_size, default",
    "gradient_clipping": "train.max_grad_norm, command line",
    "zero_optimization.stage": "parallel.strategy = zero2, run.yaml:3",
    "bf16.enabled": "train.precision, run.yaml:5",
    "fp16.enabled": "train.precision, run.yaml:5",
}


def completed(folder: Path, content: dict[str, Any], decided: dict[str, Any] = DECIDED) -> dict[str, Any]:
    return complete(read_deepspeed_file(file_with(folder, content)), decided, BECAUSE)


CONTRADICTIONS = [
    ({"train_batch_size": 64}, 'train_batch_size = 64: the run file decides it: 32 (train.global_batch_size, '
     'run.yaml:4); state the same in both, or write "auto"'),
    ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5: the run file decides it: 1.0 (train.max_grad_norm, command "
     'line); state the same in both, or write "auto"'),
    ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3: the run file decides it: 2 (parallel.strategy "
     '= zero2, run.yaml:3); state the same in both, or write "auto"'),
    ({"zero_optimization": {"offload_optimizer": CPU}}, 'zero_optimization.offload_optimizer.device = "cpu": the run '
     'file decides it: "none" (parallel.strategy = zero2, run.yaml:3); state the same in both, or write "auto"'),
    ({"bf16": {"enabled": False}}, "bf16.enabled = false: the run file decides it: true (train.precision, run.yaml:5); "
     'state the same in both, or write "auto"'),
    ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer = false: shoal decides it: true; "
     "leave it out"),
    ({"fp16": {"enabled": True}}, "fp16.enabled = true: the run file decides it: false (train.precision, run.yaml:5); "
     'state the same in both, or write "auto"'),
    ({"fp16": {"loss_scale": 128}}, "fp16.loss_scale = 128: shoal decides it: 0; leave it out"),
    ({"fp16": {"min_loss_scale": 4}}, "fp16.min_loss_scale = 4: shoal decides it: 1; leave it out"),
    ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow = false: must be true, because shoal stops "
     "before a gradient that is not finite changes the weights; leave it out"),
    ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op = "sum": must be "mean", because shoal counts on '
     "gradients that are averaged over the processes; leave it out"),
    ({"optimizer": {"type": "Adam"}}, 'optimizer = {"type": "Adam"}: shoal builds the optimizer; use '
     "train.optimizer, train.learning_rate, train.weight_decay; leave optimizer out"),
    ({"scheduler": {"type": "WarmupLR"}}, 'scheduler = {"type": "WarmupLR"}: shoal sets the learning rate of every '
     "update; use train.schedule, and train.warmup_steps or train.warmup_ratio; leave scheduler out"),
    ({"wandb": {"enabled": True}}, 'wandb = {"enabled": true}: shoal records the run; use track.wandb and '
     "track.project; leave wandb out"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size = 2: shoal has no sequence parallelism; use "
     "parallel.strategy; leave sequence_parallel_size out"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), CONTRADICTIONS, ids=[next(iter(given)) for given, _ in CONTRADICTIONS])
def test_a_contradiction_names_both_places(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    path = ".".join(line_path(content))
    with pytest.raises(ConfigError) as caught:
        completed(tmp_path, content)
    said = str(caught.value).replace(f"{tmp_path}/", "")
    line = len(path.split(".")) + 1 if message.startswith(f"{path} ") else 2
    assert said == f"mine.json:{line}: {message}"


def line_path(content: Any) -> list[str]:
    """The one path to the one value."""
    return [key for name, inner in content.items() for key in (name, *line_path(inner))] if content and isinstance(
        content, dict
    ) else []  # fmt: skip


def test_the_rest_of_a_hugging_face_file_is_read_and_refused(tmp_path: Path) -> None:
    rest = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    }
    with pytest.raises(ConfigError) as caught:
        completed(tmp_path, {**HUGGING_FACE_ZERO2, "zero_optimization": {"stage": 2}, **rest})
    assert [line.rpartition("; ")[2] for line in str(caught.value).splitlines()] == [
        "leave optimizer out",
        "leave scheduler out",
    ]


def test_contradictions_are_told_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        completed(
            tmp_path, {"train_batch_size": 1, "optimizer": {}, "scheduler": {"type": "x"}, "bf16": {"enabled": 0 > 1}}
        )
    assert len(str(caught.value).splitlines()) == 3, "an empty section asks for nothing"


def test_every_refused_key_is_refused_unless_it_is_off(tmp_path: Path) -> None:
    assert {*_REFUSED, *_ALWAYS} <= set(OURS)
    for key in _REFUSED:
        value = 2 if key.endswith("_size") else {"enabled": True} if f"{key}.enabled" in OURS else {}
        value = value or ({"type": "x"} if f"{key}.type" in OURS else None)
        value = value or ({"autotp_size": 2} if key == "tensor_parallel" else None)
        value = value or ({"offload": True} if key.endswith("zenflow") else {"stages": 2})
        with pytest.raises(ConfigError, match=f"leave {key} out"):
            completed(tmp_path, nested(key, value))
        if f"{key}.enabled" in OURS:
            assert completed(tmp_path, nested(key, {"enabled": False})) == DECIDED


def test_what_to_use_instead_exists() -> None:
    words = " ".join([*_REFUSED.values(), *(why for _, why in _ALWAYS.values())]).replace(",", " ").replace(";", " ")
    named = {word for word in words.split() if word.startswith(("train.", "parallel.", "track.", "save."))}
    assert len(named) >= 10
    assert named <= set(all_keys())


def test_auto_takes_what_is_decided_and_else_the_default_of_deepspeed(tmp_path: Path) -> None:
    zero = {
        "stage": "auto",
        "reduce_bucket_size": "auto",
        "overlap_comm": True,
        "offload_optimizer": {"device": "auto"},
    }
    content = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": "auto", "loss_scale_window": "auto"},
        "zero_optimization": zero,
    }
    result = completed(tmp_path, content)
    assert result == {
        **DECIDED,
        "zero_optimization": {
            **{"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "none"}},
            "reduce_bucket_size": BUCKET,
        },
    }


def test_equal_values_and_what_is_nobodys_business_pass(tmp_path: Path) -> None:
    content = {
        "train_batch_size": 32,
        "gradient_clipping": 1,
        "steps_per_print": 100,
        "fp16": {"loss_scale": 0, "initial_scale_power": 8, "hysteresis": 2, "loss_scale_window": 500},
        "flops_profiler": {"enabled": True},
        "zero_optimization": {"stage": 2, "allgather_bucket_size": 2e8, "reduce_bucket_size": 1e7},
    }
    before = json.dumps(DECIDED)
    assert completed(tmp_path, content) == {
        **DECIDED,
        "steps_per_print": 100,
        "fp16": {**DECIDED["fp16"], "initial_scale_power": 8, "hysteresis": 2, "loss_scale_window": 500},
        "flops_profiler": {"enabled": True},
        "zero_optimization": {"stage": 2, "allgather_bucket_size": 2e8, "reduce_bucket_size": 1e7},
    }
    assert json.dumps(DECIDED) == before, "what is decided is not changed in place"


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    else:
        yield value


# The files of the documentation of transformers, without `optimizer` and `scheduler`.
HUGGING_FACE_ZERO2 = {
    "fp16": {
        **{"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
        **{"hysteresis": 2, "min_loss_scale": 1},
    },
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
HUGGING_FACE_ZERO3 = {
    **HUGGING_FACE_ZERO2,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


@pytest.mark.parametrize(
    ("content", "strategy"),
    [(HUGGING_FACE_ZERO2, "zero2_offload"), (HUGGING_FACE_ZERO3, "zero3_offload"), (RICH_VALUES, "zero3_offload")],
    ids=["Hugging Face ZeRO-2", "Hugging Face ZeRO-3", "rich"],
)
def test_deepspeed_itself_takes_what_comes_out(tmp_path: Path, content: dict[str, Any], strategy: str) -> None:
    layer = read_deepspeed_file(file_with(tmp_path, content))
    assert strategy_of_deepspeed(layer) == strategy
    result = complete(layer, deepspeed_config(Strategy(strategy), 2, 4, 1, 1.0, "bf16"), BECAUSE)
    assert "auto" not in leaves(result)
    taken = DeepSpeedConfig(json.loads(json.dumps(result)))
    assert (taken.train_batch_size, taken.gradient_accumulation_steps, taken.zero_config.stage) == (
        8,
        4,
        int(strategy[4]),
    )
    assert taken.zero_config.offload_optimizer.device == "cpu"
    assert taken.bfloat16_config.enabled and not taken.float16_config.enabled
