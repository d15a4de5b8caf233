"""What the plan of memory says of models, against those of transformers: every weight, and what autograd keeps."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from launch.outline import outline
from launch.recipe import Adapters, Head, ModelUse
from launch.tape import Numbers

SAMPLES, TOKENS, TARGETS, LABELS = 3, 64, 40, 5

WIDTHS = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160, "vocab_size": 1000}
BERT = {**WIDTHS, "hidden_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {**WIDTHS, "hidden_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
T5 = {
    **{"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 160, "num_layers": 2, "num_decoder_layers": 3},
    **{"vocab_size": 1000, "dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0},
}
BART = {
    **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 160, "decoder_ffn_dim": 96},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 2, "vocab_size": 1000, "max_position_embeddings": 128},
    **{"dropout": 0.0, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "decoder_start_token_id": 0},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        **{"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 192, "vocab_size": 1000, "n_positions": 128},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0},
        **{"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0},
    },
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": {**LLAMA, "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "head_dim": 24},
    "bert": BERT,
    "roberta": BERT,
    "distilbert": {
        **{"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 160, "vocab_size": 1000, "dropout": 0.0},
        **{"attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0},
    },
    "t5": T5,
    "mt5": T5,
    "bart": BART,
    "marian": BART,
    "mbart": BART,
}
HEADS: dict[Head, Any] = {
    "next_token": transformers.AutoModelForCausalLM,
    "masked_token": transformers.AutoModelForMaskedLM,
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "span": transformers.AutoModelForQuestionAnswering,
    "text_to_text": transformers.AutoModelForSeq2SeqLM,
}
OF_ENCODERS: tuple[Head, ...] = ("masked_token", "sequence", "token", "span")
CASES: list[tuple[str, Head]] = [
    *((kind, head) for kind in ("gpt2", "llama") for head in ("next_token", "sequence", "token")),
    *((kind, "next_token") for kind in ("mistral", "qwen2", "qwen3")),
    *((kind, head) for kind in ("bert", "distilbert") for head in OF_ENCODERS),
    *((kind, head) for kind in ("roberta",) for head in ("masked_token", "sequence")),
    *((kind, "text_to_text") for kind in ("t5", "mt5", "bart", "marian", "mbart")),
]
WITHIN: dict[str, float] = {"t5": 0.065, "mt5": 0.045}
"""By how much the kept bytes may be off: sums in T5's attention, by whether torch converts a table in place."""


def _made(kind: str, head: Head) -> Any:
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    config.use_cache = False
    if head in ("sequence", "token"):
        config.num_labels = LABELS
        config.classifier_dropout = 0.0
    if head == "sequence" and kind == "bert":
        config.problem_type = "single_label_classification"
    torch.manual_seed(0)
    return HEADS[head].from_config(config).train()


def _use(kind: str, head: Head, *, padded: bool = True) -> ModelUse:
    outputs = {"sequence": LABELS, "token": LABELS, "span": 2}.get(head, 0)
    targets = TARGETS if head == "text_to_text" else 0
    return ModelUse({"model_type": kind, **CONFIGS[kind]}, head, TOKENS, targets, outputs, padded)


def _kept(model: Any, head: Head, numbers: Numbers, *, padded: bool) -> int:
    """Bytes of all storages that autograd keeps of a forward pass, without those of weights."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen.setdefault(storage.data_ptr(), tensor)  # alive, so that no other takes its place
        return tensor

    inputs = {"input_ids": torch.randint(2, 1000, (SAMPLES, TOKENS))}
    if padded:
        inputs["attention_mask"] = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
        inputs["attention_mask"][0, -5:] = 0
    if head == "text_to_text":
        inputs["decoder_input_ids"] = torch.randint(2, 1000, (SAMPLES, TARGETS))
    cast = torch.autocast("cpu", torch.bfloat16) if numbers == "autocast" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cast:
        model(**inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize(("kind", "head"), CASES)
def test_weights_and_kept_bytes_are_those_of_the_real_model(kind: str, head: Head) -> None:
    model = _made(kind, head)
    paddings = (True, False) if head == "next_token" else (True,)
    for numbers in ("fp32", "autocast", "low"):
        for padded in paddings:
            drawn = outline(_use(kind, head, padded=padded), numbers)
            assert drawn is not None
            assert Counter(weight.shape for weight in drawn.weights) == Counter(
                tuple(parameter.shape) for parameter in model.parameters()
            )
            expected = _kept(model.to(torch.bfloat16) if numbers == "low" else model, head, numbers, padded=padded)
            found = sum(unit.kept * SAMPLES + unit.casts for unit in drawn.units)
            assert found == pytest.approx(expected, rel=WITHIN.get(kind, 0.01)), (numbers, padded)


@pytest.mark.parametrize(
    ("kind", "targets"), [("gpt2", ()), ("llama", ()), ("llama", ("all-linear",)), ("llama", ("mlp.up_proj", "k_proj"))]
)
def test_of_adapters_the_trained_weights_and_kept_bytes_are_those_that_peft_makes(
    kind: str, targets: tuple[str, ...]
) -> None:
    peft = pytest.importorskip("peft")
    model = _made(kind, "next_token")
    named = targets[0] if targets == ("all-linear",) else [*targets] or None
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=named))
    drawn = outline(replace(_use(kind, "next_token", padded=False), adapters=Adapters(4, targets)), "fp32")
    assert drawn is not None
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert drawn.trained == trained
    assert drawn.parameters == sum(parameter.numel() for parameter in adapted.parameters())
    expected = _kept(adapted, "next_token", "fp32", padded=False)
    assert sum(unit.kept * SAMPLES for unit in drawn.units) == pytest.approx(expected, rel=0.05)


def test_of_an_unknown_architecture_or_one_used_for_what_it_is_not_nothing_is_said() -> None:
    assert outline(replace(_use("gpt2", "next_token"), config={"model_type": "mamba"}), "fp32") is None
    assert outline(replace(_use("gpt2", "next_token"), config={}), "fp32") is None
    assert outline(replace(_use("bert", "token"), head="text_to_text"), "fp32") is None


def test_an_entry_of_a_block_is_what_checkpointing_keeps() -> None:
    drawn = outline(_use("llama", "next_token"), "fp32")
    assert drawn is not None
    assert [unit.entry for unit in drawn.units if unit.block] == [TOKENS * 64 * 4] * 2
