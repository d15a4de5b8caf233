"""LoRA by `recipe_args.lora`: what is trained and kept, on any ranks, and what cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from transformers import DistilBertConfig, DistilBertModel

from launch.checkpoints import checkpoint_folder, read_state
from launch.config import load
from launch.engine.exported import TOLERANCE, difference, load_exported, unlike, untied
from launch.engine.shards import Stored
from launch.errors import ConfigError
from launch.recipe import Prepared
from launch.registry import load_recipe
from launch.topology import read_world
from recipes.causal_lm import Args, collate, count, loss
from recipes.lora import Lora, add_adapters
from recipes.models import check_model
from tests import tiny
from tests.commands import shoal
from tests.gloo import run_ranks
from tests.test_engine_export import tokenizer
from tests.test_engine_sharding import plan_for

pytest.importorskip("peft", reason="the package peft is not installed")

from launch.engine.adapters import merged_weights, unlike_merged, write_adapted
from launch.engine.export import write_probe

KIND = "AutoModelForCausalLM"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.gpt2().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# --- training --------------------------------------------------------------------------------------------


def attempt(
    strategy: str, world_size: int, base: str, folder: str, what: str = "", stop_at: int | None = None
) -> tuple[list[float], dict[str, Any]]:
    """Train with accumulation and activation checkpointing; losses of this attempt, and all weights at its end.

    `what`: `unused` gives the model a weight that the loss does not depend on, `drifting` changes a frozen weight.
    """
    from launch.engine.data import open_data
    from launch.engine.gathering import full_state
    from launch.engine.progress import Display
    from launch.engine.run import Run
    from launch.engine.sharding import make_accelerator

    def build_model() -> Any:
        model = add_adapters(tiny_model(base), Lora(r=2, alpha=8), KIND, [])
        if what == "unused":
            model.base_model.model.extra = torch.nn.Linear(2, 2)
        return model

    def drifting(model: Any, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            model.get_base_model().transformer.wpe.weight += 0.01
        return loss(model, batch)

    overrides = ("train.max_steps=6", "train.activation_checkpointing=true", "eval.every_steps=null")
    plan = plan_for(strategy, world_size, Path(folder), *overrides, "save.export=false", "save.every_steps=6")
    losses = drifting if what == "drifting" else loss
    prepared = Prepared(build_model, tokenizer(), tiny.sequences(20), tiny.sequences(7, seed=1), collate, losses, count)
    data = open_data(plan, prepared, read_world().rank)
    accelerator = make_accelerator(plan)

    def signal() -> int | None:
        return 15 if stop_at is not None and run.updates_done >= stop_at - 1 else None

    run = Run(plan, Path(folder), prepared, data, accelerator, Display(False), signal)
    run.train()
    data.close()
    state = {name: value.float().numpy().copy() for name, value in full_state(accelerator, run.model).items()}
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines() if accelerator.is_main_process else []
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"], state


def tiny_model(folder: str) -> Any:
    return transformers.GPT2LMHeadModel.from_pretrained(folder)


def folders(tmp_path: Path, *names: str) -> list[str]:
    for name in names:
        (tmp_path / name).mkdir()
    return [str(tmp_path / name) for name in names]


@pytest.mark.dist
def test_two_ranks_of_ddp_train_as_one_process_and_save_what_is_trained(base: Path, tmp_path: Path) -> None:
    alone, both = folders(tmp_path, "alone", "both")
    ((losses, state),) = run_ranks(1, attempt, "single", 1, str(base), alone)
    losses_of_both, state_of_both = run_ranks(2, attempt, "ddp", 2, str(base), both)[0]
    assert len(losses) == 6 and losses_of_both == pytest.approx(losses, abs=1e-5)
    for name, value in state.items():
        assert np.allclose(state_of_both[name], value, rtol=0, atol=1e-5), name
        assert "lora_B" not in name or value.any(), f"{name} has learned"
    stored = Stored(checkpoint_folder(Path(both), 6))
    kept = {name for name in stored.shapes if name.startswith("model/")}
    frozen = set(read_state(checkpoint_folder(Path(both), 6))["frozen"])
    assert kept == {f"model/{name}" for name in state if "lora_" in name}
    assert frozen == {f"model/{name}" for name in state if "lora_" not in name and "lm_head" not in name}


@pytest.mark.dist
def test_a_weight_that_the_loss_does_not_depend_on_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"does not depend on base_model\.model\.extra\.weight, .*extra\.bias, and"
    ):
        run_ranks(2, attempt, "ddp", 2, str(base), *folders(tmp_path, "run"), "unused")


def test_a_run_does_not_go_on_upon_another_base(base: Path, tmp_path: Path) -> None:
    (run,) = folders(tmp_path, "run")
    run_ranks(1, attempt, "single", 1, str(base), run, "", 3)
    other = tiny_model(str(base))
    with torch.no_grad():
        other.transformer.ln_f.bias[0] += 1e-3
    other.save_pretrained(base)
    message = r"made on another base: base_model\.model\.transformer\.ln_f\.bias are not the weights"
    with pytest.raises(AssertionError, match=message):
        run_ranks(1, attempt, "single", 1, str(base), run)


def test_a_frozen_weight_that_changes_all_the_same_is_kept(base: Path, tmp_path: Path) -> None:
    whole, parts = folders(tmp_path, "whole", "parts")
    ((_, expected),) = run_ranks(1, attempt, "single", 1, str(base), whole, "drifting")
    run_ranks(1, attempt, "single", 1, str(base), parts, "drifting", 4)
    ((_, state),) = run_ranks(1, attempt, "single", 1, str(base), parts, "drifting")
    assert all(np.array_equal(state[name], value) for name, value in expected.items())


# --- what is written -------------------------------------------------------------------------------------


def untied_language_model(folder: Path) -> tuple[Any, str]:
    """With adapters of an embedding and of a layer, and a module that is trained whole."""
    tiny.llama().save_pretrained(folder)
    model, lora = transformers.AutoModelForCausalLM.from_pretrained(folder), {"modules_to_save": "norm"}
    return add_adapters(model, Lora(target_modules=("embed_tokens", "q_proj"), **lora), KIND, []), "model.norm"


def classifier_of_a_base_without_head(folder: Path) -> tuple[Any, str]:
    sizes = {"vocab_size": tiny.VOCABULARY, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    torch.manual_seed(1)
    DistilBertModel(DistilBertConfig(**sizes)).save_pretrained(folder)
    kind = "AutoModelForSequenceClassification"
    model, told = getattr(transformers, kind).from_pretrained(folder, num_labels=5, output_loading_info=True)
    return add_adapters(model, Lora(target_modules="all-linear"), kind, told["missing_keys"]), "pre_classifier"


@pytest.mark.parametrize("make", [untied_language_model, classifier_of_a_base_without_head])
def test_the_merged_model_and_the_adapter_alone_are_the_live_model(make: Any, tmp_path: Path) -> None:
    live, whole = make(tmp_path / "base")
    torch.manual_seed(3)
    with torch.no_grad():
        for value in live.parameters():
            if value.requires_grad:
                value += 0.05 * torch.randn_like(value)
    assert any(f"{whole}.modules_to_save" in name for name, value in live.named_parameters() if value.requires_grad)
    accelerator, samples = Accelerator(cpu=True), tiny.sequences(2)
    prepared = Prepared(lambda: live, tokenizer(), samples, samples, collate, loss, count)
    probe = tmp_path / "probe.safetensors"
    sums = write_adapted(accelerator, live, tokenizer(), tmp_path, lambda: make(tmp_path / "base")[0])
    write_probe(accelerator, live, prepared, sums, probe)
    (adapted, _), (merged, _) = (load_exported(tmp_path / name) for name in ("adapter", "export"))
    assert unlike(adapted, probe) == untied(adapted, probe) == []
    assert unlike_merged(merged, merged_weights(adapted)) == untied(merged, probe) == []
    assert difference(adapted, probe, "cpu") <= TOLERANCE and difference(merged, probe, "cpu") <= TOLERANCE
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with torch.no_grad():
        merged.get_submodule(whole).weight.view(-1)[0] += 0.01
    assert unlike_merged(merged, merged_weights(adapted)) == [f"{whole}.weight"]


@pytest.mark.slow
def test_the_command_trains_exports_and_generates(tmp_path: Path) -> None:
    settings = ["train.max_steps=2", "eval.max_samples=4", "recipe_args.block_size=16", "parallel.device=cpu"]
    stated = [*settings, "recipe_args.lora.r=4", "save.every_steps=2", "eval.every_steps=null"]
    done = shoal(tmp_path, "run", "causal_lm.yaml", *stated, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "trainable: 4,096 of 679,424 parameters (0.6 %)" in done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["parameters"] == {"all": 679_424, "trainable": 4_096}
    assert result["adapter"] == str(tmp_path / "run/adapter")
    for arguments, folder, file in (
        ([], "export", "model.safetensors"),
        (["--adapter"], "adapter", "adapter_model.safetensors"),
    ):
        done = shoal(tmp_path, "export", "run", *arguments)
        assert done.returncode == 0, done.stderr
        ours, theirs = tmp_path / f"run/{folder}-step-000002" / file, tmp_path / "run" / folder / file
        assert ours.read_bytes() == theirs.read_bytes()
    said = [shoal(tmp_path, "generate", "run", "The", "--max-new-tokens", "5", *more) for more in ([], ["--adapter"])]
    assert said[0].returncode == 0 and said[0].stdout == said[1].stdout


# --- what cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["c_attn", "q_proj"]},
            "target_modules: a GPT2LMHeadModel has no module 'q_proj' for that; its linear modules are attn.c_attn, "
            "attn.c_proj, lm_head, mlp.c_fc, mlp.c_proj",
        ),
        ({"modules_to_save": "head"}, "modules_to_save: a GPT2LMHeadModel has no module 'head' for that"),
        ({"target_modules": "lm_head"}, "target_modules: lm_head is one weight with transformer.wte in a GPT2LMHead"),
        ({"modules_to_save": "wte"}, "modules_to_save: wte is one weight with lm_head in a GPT2LMHeadModel"),
    ],
)
def test_modules_that_cannot_have_adapters_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        add_adapters(tiny.gpt2(), Lora(**settings), KIND, [])
    assert str(raised.value).startswith(f"recipe_args.lora.{message}") and "\n" not in str(raised.value)


def test_an_architecture_that_peft_has_no_default_for_needs_target_modules() -> None:
    model = transformers.DistilBertForMaskedLM(DistilBertConfig(vocab_size=9, dim=4, n_layers=1, n_heads=2))
    with pytest.raises(ConfigError, match=r"no default for a distilbert model; name some of attention\.k_lin, .* all-"):
        add_adapters(model, Lora(), "AutoModelForMaskedLM", [])


def test_what_is_known_beforehand_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"from_scratch=true makes a random one; set recipe_args\.from_scratch=false"):
        check_model(Args(lora=Lora(), from_scratch=True))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the package peft; pip install 'shoal\[lora\]'"):
        check_model(Args(lora=Lora()))


def test_names_of_another_type_are_told() -> None:
    for wrong in ("7", "{a: 1}", "true"):
        stated = ["recipe=causal_lm", f"recipe_args.lora={{target_modules: {wrong}}}"]
        with pytest.raises(
            ConfigError, match=r"^command line: recipe_args\.lora\.target_modules = .*: must be a list$"
        ):
            load_recipe(load(None, stated))
