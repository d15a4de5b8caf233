"""A model card says what a run has done, in metadata that the Hub reads, and nothing of whose machine it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from launch.model_card import CARD, ModelFacts, facts_of, model_card, write_card
from launch.plan import decide
from launch.topology import Machine, World

RESULT = {
    "updates": 40,
    "parameters": {"all": 1_004_424, "trainable": 1_004_424},
    "validation": {"before": {"loss": 2.08}, "after": {"loss": 0.5, "accuracy": 0.876, "matrix": [[1]]}},
    "seconds": {"compute": 3600.0, "data": 3900.0},
}
GPUS = Machine("box", 64, 2, gpu_name="H100-80GB", gpu_memory_bytes=80 * 10**9)


def card(*overrides: str, result: dict[str, Any] | None = None, recipe: str = "causal_lm", **facts: Any) -> ModelCard:
    plan = decide(recipe, list(overrides), Path("/home/somebody/runs/mine"), World(), GPUS).plan
    versions = {"shoal": "0.1.0", "torch": "2.13.0"}
    given = {"data": None, "architecture": "GPT2LMHeadModel"} | facts
    return ModelCard(model_card(ModelFacts(plan, {**RESULT, **(result or {})}, versions=versions, **given)))


def test_it_is_the_metadata_of_the_hub() -> None:
    found = card("save.license=apache-2.0").data  # of the embedded model, which is none of the Hub's
    assert (found.library_name, found.pipeline_tag, found.license) == ("transformers", "text-generation", "apache-2.0")
    assert found.model_name == "mine" and found.base_model is None and found.datasets is None
    assert found.tags == ["shoal"] and found.metrics == ["accuracy"]
    values = {each.metric_type: each.metric_value for each in found.eval_results}
    assert values == {"loss": 0.5, "accuracy": 0.876}


def test_what_comes_from_the_hub_is_named() -> None:
    plan = decide("causal_lm", [], Path("/runs/mine"), World(), GPUS).plan

    def card_with(**changes: Any) -> ModelCard:
        args = {**plan.config.recipe_args, "model": "org/base", "dataset": "org/data", **changes}
        config = plan.config.model_copy(update={"recipe_args": args})
        facts = ModelFacts(plan.model_copy(update={"config": config}), RESULT, None, {}, "LlamaForCausalLM")
        return ModelCard(model_card(facts))

    found = card_with()
    assert (found.data.base_model, found.data.datasets) == ("org/base", ["org/data"])
    assert "fine-tuned from [org/base](https://huggingface.co/org/base)" in found.text
    assert "The dataset org/data." in found.text and "The dataset org/data:" not in found.text
    assert {each.dataset_type for each in found.data.eval_results} == {"org/data"}
    scratch = card_with(from_scratch=True)
    assert scratch.data.base_model is None and "trained from scratch" in scratch.text


def test_the_page_tells_how_it_was_trained_and_how_to_use_it() -> None:
    data = {"splits": {"training": {"samples": 1733}, "validation": {"samples": 427}}}
    text = card("train.max_steps=40", "train.learning_rate=0.002", "train.micro_batch_size=4", data=data).text
    assert "AutoModelForCausalLM.from_pretrained(folder)" in text
    assert (
        "On 427 validation samples:" in text and "| loss | 2.08 | 0.5 |" in text and "| accuracy | – | 0.876 |" in text
    )
    assert "1,733 training samples and 427 validation samples." in text
    assert "| global batch | 16 samples: micro-batch 4 × accumulation 2 × 2 processes |" in text
    assert "| hardware | 2 × H100-80GB, strategy ddp |" in text and "| time | 2 h 05 min |" in text
    assert "shoal run causal_lm" in text and "train.max_steps=40" in text and "train.learning_rate=0.002" in text
    assert "Its licence has not been stated." in text and "1,004,424 parameters)" in text


def test_a_number_that_is_none_is_shown_and_not_sent() -> None:
    found = card(result={"validation": {"after": {"loss": math.nan, "accuracy": 0.5}}})
    assert [each.metric_type for each in found.data.eval_results] == ["accuracy"]
    assert "| loss | – | nan |" in found.text


def test_nothing_is_told_of_the_folders_of_whoever_ran_it(tmp_path: Path) -> None:
    file = tmp_path / "secret-project/letters.txt"
    file.parent.mkdir()
    file.write_text("one\ntwo\n" * 50)
    text = str(card(f"recipe_args.train_files={file}", f"recipe_args.validation_files=[{file}]"))
    assert "The files letters.txt." in text and 'recipe_args.train_files=["letters.txt"]' in text
    assert "secret-project" not in text and "somebody" not in text and str(tmp_path) not in text


@pytest.mark.parametrize(
    ("architecture", "recipe", "task", "loader"),
    [
        ("BertForMaskedLM", "masked_lm", "fill-mask", "AutoModelForMaskedLM"),
        ("BertForSequenceClassification", "text_classification", "text-classification", "SequenceClassification"),
        ("T5ForConditionalGeneration", "translation", "translation", "AutoModelForSeq2SeqLM"),
        ("T5ForConditionalGeneration", "summarization", "summarization", "AutoModelForSeq2SeqLM"),
        ("SomethingNew", "causal_lm", None, "AutoModel.from_pretrained"),
    ],
)
def test_the_task_follows_from_the_architecture(architecture: str, recipe: str, task: str | None, loader: str) -> None:
    found = card(recipe=recipe, architecture=architecture)
    assert found.data.pipeline_tag == task and loader in found.text


def test_an_adapter_has_a_card_of_its_own_in_the_place_of_peft_s(tmp_path: Path) -> None:
    plan = decide("causal_lm", ["recipe_args.lora={}"], tmp_path, World(), GPUS).plan
    for name, content in (
        ("export/config.json", {"architectures": ["GPT2LMHeadModel"]}),
        ("adapter/adapter_config.json", {}),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "adapter" / CARD).write_text("PEFT's template")
    result = {**RESULT, "parameters": {"all": 1000, "trainable": 10}}
    for folder in ("adapter", "export"):
        write_card(tmp_path / folder, facts_of(tmp_path / folder, plan, result, {}))
    alone, merged = (ModelCard.load(tmp_path / folder / CARD) for folder in ("adapter", "export"))
    assert (alone.data.library_name, merged.data.library_name) == ("peft", "transformers")
    assert alone.data.tags == ["shoal", "lora"] and "AutoPeftModel" in alone.text
    assert "A LoRA adapter (GPT2LMHeadModel, 1,000 parameters, 10 of them trained)" in alone.text
    assert "A model (GPT2LMHeadModel" in merged.text
