"""Adapters (PEFT): trained over any strategy, resumed, exported as they are, and an empty export is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.engine.exported import TOLERANCE, difference, load_exported, unlike, untied
from launch.recipe import Prepared
from launch.topology import read_world
from tests import tiny
from tests.gloo import run_ranks
from tests.test_engine_sharding import plan_for

pytest.importorskip("peft", reason="the package peft is not installed")

from launch.engine.adapters import merged_weights, unlike_merged


def attempt(strategy: str, world_size: int, source: str, folder: str, stop_at: int | None) -> dict[str, Any]:
    """Train adapters on a base that is frozen; this rank's result."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from launch.engine.data import open_data
    from launch.engine.gathering import full_state
    from launch.engine.progress import Display
    from launch.engine.run import Run
    from launch.engine.sharding import make_accelerator
    from recipes.causal_lm import collate, count, loss
    from tests.test_engine_export import tokenizer

    def build_model() -> Any:
        adapters = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        return get_peft_model(AutoModelForCausalLM.from_pretrained(source), adapters)

    plan = plan_for(strategy, world_size, Path(folder), "train.max_steps=8", "eval.every_steps=null")
    samples = tiny.sequences(20)
    prepared = Prepared(build_model, tokenizer(), samples, tiny.sequences(7, seed=1), collate, loss, count)
    data = open_data(plan, prepared, read_world().rank)
    accelerator = make_accelerator(plan)

    def signal() -> int | None:
        return 15 if stop_at is not None and run.updates_done >= stop_at - 1 else None

    run = Run(plan, Path(folder), prepared, data, accelerator, Display(False), signal)
    run.train()
    state = full_state(accelerator, run.model)
    data.close()
    return {name: tensor.float().numpy().copy() for name, tensor in state.items()}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2", "zero2", "zero3"])
def test_adapters_are_trained_resumed_and_exported(strategy: str, tmp_path: Path) -> None:
    source, whole, parts = tmp_path / "base", tmp_path / "whole", tmp_path / "parts"
    tiny.gpt2().save_pretrained(source)
    base = load_file(source / "model.safetensors")
    world_size = 1 if strategy == "single" else 2
    for folder in (whole, parts):
        folder.mkdir()
    expected = run_ranks(world_size, attempt, strategy, world_size, str(source), str(whole), None)[0]
    run_ranks(world_size, attempt, strategy, world_size, str(source), str(parts), 5)
    result = run_ranks(world_size, attempt, strategy, world_size, str(source), str(parts), None)[0]
    adapters = [name for name in expected if "lora_" in name]
    assert len(adapters) == 4
    for name, array in expected.items():
        assert np.array_equal(array, result[name]), name
        if name in adapters:
            assert array.any(), "it has learned"
    frozen = "base_model.model.transformer.h.0.mlp.c_fc.weight"
    assert np.array_equal(expected[frozen], base["transformer.h.0.mlp.c_fc.weight"].numpy())

    adapter, export, probe = whole / "adapter", whole / "export", whole / "probe.safetensors"
    stored = load_file(adapter / "adapter_model.safetensors")
    assert sorted(stored) == sorted(name.replace(".default", "") for name in adapters)
    assert not (adapter / "model.safetensors").exists(), "the base is not written once more"
    loaded, _ = load_exported(adapter)
    assert difference(loaded, probe, "cpu") <= TOLERANCE
    assert unlike(loaded, probe) == []

    merged = load_file(export / "model.safetensors")
    assert merged.keys() == base.keys()
    for name, value in merged.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        changed = f"{layer}.lora_A.default.weight" in expected and name.endswith(".weight")
        first, second = (expected[f"{layer}.lora_{each}.default.weight"] if changed else None for each in "AB")
        # By the definition, with alpha / r = 8 / 2; GPT-2 keeps its weights transposed.
        wanted = base[name].numpy() + (4 * (second @ first).T if changed else 0)
        assert np.allclose(value.numpy(), wanted, rtol=0, atol=1e-6), name
    plain, _ = load_exported(export)
    assert type(plain).__name__ == "GPT2LMHeadModel"
    assert difference(plain, probe, "cpu") <= TOLERANCE
    assert unlike_merged(plain, merged_weights(loaded)) == []
    assert untied(plain, probe) == untied(loaded, probe) == []
    with torch.no_grad():
        plain.transformer.h[1].attn.c_attn.weight[0, 0] += 0.01
    assert unlike_merged(plain, merged_weights(loaded)) == ["transformer.h.1.attn.c_attn.weight"]

    # What a save that gathers nothing leaves: a file of 40 bytes, which loads with a warning; and one of zeros.
    zeros = {name: torch.zeros_like(value) for name, value in stored.items()}
    for spoilt in ({}, zeros):
        save_file(spoilt, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        assert sorted(unlike(load_exported(adapter)[0], probe)) == sorted(adapters)
