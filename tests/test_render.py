"""What is written for DeepSpeed and Accelerate: complete, consistent with the plan, and understood by both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.assets import shipped_folder
from launch.config import load
from launch.plan import make_plan
from launch.recipe import Preview
from launch.render import accelerate_values, accelerate_yaml, deepspeed_config
from launch.strategy import Strategy
from launch.topology import Machine, World


def leaves(value: Any) -> list[Any]:
    return [leaf for inner in value.values() for leaf in leaves(inner)] if isinstance(value, dict) else [value]


@pytest.mark.parametrize("strategy", [strategy for strategy in Strategy if strategy.kind == "zero"])
def test_a_deepspeed_configuration_is_complete(strategy: Strategy) -> None:
    config = deepspeed_config(strategy, 4, 3, 2, 0.5, "bf16")
    assert "auto" not in leaves(config)
    assert config["train_batch_size"] == 4 * 3 * 2
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 3)
    assert (config["gradient_clipping"], config["bf16"]) == (0.5, {"enabled": True})
    assert config["fp16"]["enabled"] is False
    assert config["communication_data_type"] == "fp32"
    assert deepspeed_config(strategy, 4, 3, 2, 0.5, "fp16")["fp16"]["enabled"] is True
    zero = config["zero_optimization"]
    assert zero["stage"] == strategy.stage
    assert ("offload_optimizer" in zero) == strategy.offload
    assert ("offload_param" in zero) == (strategy is Strategy.ZERO3_OFFLOAD)
    assert deepspeed_config(strategy, 4, 3, 2, None, "fp32")["gradient_clipping"] == 0.0


def test_the_plan_holds_the_configuration_that_deepspeed_will_get() -> None:
    stated = ["recipe=causal_lm", "parallel.device=cpu", "parallel.devices=2", "parallel.strategy=zero2"]
    loaded = load(None, [*stated, "train.global_batch_size=16", "train.micro_batch_size=2"])
    plan = make_plan(loaded, Machine("box", 4, 0), World(), Preview(), Path("/runs/one"))
    assert plan.deepspeed == deepspeed_config(Strategy.ZERO2, 2, 4, 2, 1.0, "fp32")
    assert re.fullmatch(r"\{.*\}", json.dumps(plan.deepspeed))


# --- Accelerate ------------------------------------------------------------------------------------------


def test_the_shipped_files_are_what_would_be_rendered() -> None:
    """Nothing is stated twice: what the files say of two processes follows from the same function."""
    compared = 0
    for strategy in Strategy:
        world_size = 1 if strategy in (Strategy.SINGLE, Strategy.XLA) else 2
        name = "tpu" if strategy is Strategy.XLA else strategy
        shipped = yaml.safe_load((shipped_folder("accelerate_configs") / f"{name}.yaml").read_text())
        shipped.pop("gpu_ids", None)  # which of them: for a person to choose
        assert shipped == accelerate_values(strategy, 1, world_size), strategy
        compared += 1
    assert compared == 10


def rendered(*overrides: str) -> str:
    loaded = load(None, ["recipe=causal_lm", "parallel.device=cpu", *overrides])
    return accelerate_yaml(make_plan(loaded, Machine("box", 4, 0), World(), Preview(), Path("/runs/one")))


EXPECTED = """\
# Starts the run in /runs/one by plain `accelerate launch`:
#
#   OMP_NUM_THREADS=2 \\
#   CUDA_VISIBLE_DEVICES= \\
#   PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \\
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600 \\
#   accelerate launch --config_file /runs/one/accelerate.yaml -m launch.train /runs/one
#
# Batch sizes, precision, clipping and schedule are in plan.json beside it, which the workers read.

compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: false
num_machines: 1
num_processes: 2
machine_rank: 0
mixed_precision: 'no'
main_process_port: 0
rdzv_backend: static
same_network: true
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_offload_params: true
  fsdp_cpu_ram_efficient_loading: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
"""


def test_the_file_for_accelerate_in_full() -> None:
    assert rendered("parallel.devices=2", "parallel.strategy=fsdp2_offload") == EXPECTED


def test_one_process_has_no_port() -> None:
    assert yaml.safe_load(rendered()) == {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO",
        "use_cpu": False,
        "num_machines": 1,
        "num_processes": 1,
        "machine_rank": 0,
        "mixed_precision": "no",
    }
