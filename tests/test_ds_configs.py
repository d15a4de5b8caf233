"""The DeepSpeed files we ship: for shoal, for plain `accelerate launch` and for any Trainer of Hugging Face."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from deepspeed.runtime.config import DeepSpeedConfig
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from launch.assets import shipped_folder
from launch.deepspeed_file import complete, read_deepspeed_file, strategy_of_deepspeed
from launch.dotted import leaves
from launch.plan import decide
from launch.render import deepspeed_config
from launch.strategy import Strategy
from launch.topology import Machine, World
from tests import tiny

FOLDER = shipped_folder("ds_configs")
README = (FOLDER / "README.md").read_text(encoding="utf-8")
ZERO = [strategy for strategy in Strategy if strategy.kind == "zero"]
GATHER = "stage3_gather_16bit_weights_on_model_save"


def path_of(strategy: Strategy) -> Path:
    return FOLDER / f"{strategy}.json"


def test_there_is_a_file_for_each_strategy_of_deepspeed_and_no_other() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(map(str, ZERO))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("strategy", ZERO)
def test_completed_it_is_what_we_render(strategy: Strategy, precision: Any) -> None:
    layer = read_deepspeed_file(path_of(strategy))
    assert strategy_of_deepspeed(layer) == strategy
    rendered = deepspeed_config(strategy, 2, 4, 1, 1.0, precision)
    completed = complete(layer, rendered, {})
    if strategy.stage == 3:  # for the Trainer, which saves by it
        assert completed["zero_optimization"].pop(GATHER) is True
        rendered["zero_optimization"].pop(GATHER)
    assert completed == rendered
    taken = DeepSpeedConfig(json.loads(json.dumps(completed)))
    assert (taken.train_batch_size, taken.zero_config.stage) == (8, strategy.stage)
    assert (taken.zero_config.offload_optimizer is not None) == strategy.offload


@pytest.mark.parametrize("strategy", ZERO)
def test_a_trainer_fills_it_in(strategy: Strategy, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=3, max_grad_norm=0.5, bf16=True, use_cpu=True
    )
    config = HfTrainerDeepSpeedConfig(str(path_of(strategy)))
    config.trainer_config_process(arguments)
    config.trainer_config_finalize(arguments, tiny.gpt2(), 10)
    filled = dict(leaves(config.config))
    assert "auto" not in filled.values()
    assert filled["train_micro_batch_size_per_gpu"] == 3
    assert (filled["gradient_clipping"], filled["bf16.enabled"], filled["fp16.enabled"]) == (0.5, True, False)
    assert DeepSpeedConfig(config.config).zero_config.stage == strategy.stage


def commands() -> Iterator[list[str]]:
    for block in re.findall(r"^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        yield from (shlex.split(line.removeprefix("$ ")) for line in block.splitlines())


def test_the_readme_explains_every_key_and_its_commands_are_right(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used = {key for strategy in ZERO for key, _ in leaves(json.loads(path_of(strategy).read_text()))}
    cells = re.findall(r"^\| (`.+?) \|", README, re.MULTILINE)
    assert {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)} == used

    monkeypatch.chdir(FOLDER.parent)
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    ours, theirs = commands()
    assert ours[:2] == ["shoal", "run"]
    plan = decide(ours[2], ours[3:], None, World(), Machine("box", 2, 0)).plan
    assert (plan.processes.strategy, plan.processes.world_size) == ("zero2", 2)
    parsed = launch_command_parser().parse_args(theirs[2:])
    assert (parsed.use_deepspeed, parsed.num_processes, parsed.training_script) == (True, 2, "launch.train")
    assert Path(parsed.deepspeed_config_file).is_file()
    assert Path(parsed.training_script_args[0]).is_file()


@pytest.mark.parametrize("strategy", ZERO)
def test_the_accelerate_file_of_the_same_strategy_says_how_to_use_one(strategy: Strategy) -> None:
    text = (shipped_folder("accelerate_configs") / f"{strategy}.yaml").read_text(encoding="utf-8")
    assert f"deepspeed_config_file: ds_configs/{strategy}.json" in text
