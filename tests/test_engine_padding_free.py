"""Rows laid end to end: where each token lies, and that a model computes the same of them, or goes on padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from launch.engine import layout
from launch.engine import padding_free as module
from launch.engine.layout import Layout, rows_of_documents
from launch.engine.padding_free import PaddingFree, padding_free, some_rows
from recipes.batches import IGNORED, summed_cross_entropy
from tests import tiny

LENGTHS = [5, 17, 9, 12, 4, 4, 4, 5, 7]
TARGETS = [3, 4, 11, 8, 2, 3, 2, 3, 2]
"""Tokens that a decoder is to write for each row."""

PAD, VOCABULARY = 1, 60
SMALL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
ENCODER = SMALL | {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
LLAMA = ENCODER | {"num_key_value_heads": 2, "max_position_embeddings": 64}
BART = SMALL | {
    **{
        f"{side}_{what}": number for side in ("encoder", "decoder") for what, number in (("layers", 2), ("ffn_dim", 64))
    },
    **{"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2},
}
T5 = SMALL | {"d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 64, "decoder_start_token_id": 1}


def model_of(kind: str, head: Any, settings: dict[str, Any], **others: Any) -> Any:
    torch.manual_seed(0)
    model = head.from_config(AutoConfig.for_model(kind, **settings), **others)
    for parameter in model.parameters():  # what is initialised small would hide a token that is seen from elsewhere
        parameter.data.mul_(3) if parameter.dim() > 1 else None
    return model.eval()


def rows_of(lengths: list[int], filler: int, seed: int) -> torch.Tensor:
    random = np.random.RandomState(seed)
    rows = [random.randint(4, VOCABULARY, length) for length in lengths]
    found = np.full((len(rows), max(lengths)), filler)
    for place, row in enumerate(rows):
        found[place, : len(row)] = row
    return torch.from_numpy(found)


def batch_of(kind: str, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    ids = rows_of([6] * len(LENGTHS) if "sources as long" in kind else LENGTHS, PAD, 0)
    mask = (ids != PAD).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "sequence":
        batch["labels"] = torch.arange(len(LENGTHS)) % 2
    elif kind == "token":
        batch["labels"] = torch.where(mask > 0, ids % 2, IGNORED)
    elif kind == "next":
        batch["labels"] = torch.where(mask > 0, ids, IGNORED)
    else:
        labels = rows_of([17, *TARGETS[1:]] if "sources as long" in kind else TARGETS, IGNORED, 1)
        batch |= {"labels": labels, "decoder_input_ids": labels.clamp(min=PAD).roll(1, 1)}
    return {name: value[rows] for name, value in batch.items()}


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits, batch["labels"]
    if labels.dim() > 1 and logits.shape[-1] == VOCABULARY and "decoder_input_ids" not in batch:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return summed_cross_entropy(logits, labels)


MODELS: dict[str, tuple[str, str, Any, dict[str, Any], dict[str, Any]]] = {
    "bert": ("sequence", "bert", AutoModelForSequenceClassification, ENCODER, {}),
    "bert, eager": ("token", "bert", AutoModelForTokenClassification, ENCODER, {"attn_implementation": "eager"}),
    "roberta": ("token", "roberta", AutoModelForTokenClassification, ENCODER, {}),
    "distilbert": (
        *("sequence", "distilbert", AutoModelForSequenceClassification),
        SMALL | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        {},
    ),
    "modernbert": ("sequence", "modernbert", AutoModelForSequenceClassification, ENCODER | {"local_attention": 6}, {}),
    "gpt2": ("next", "gpt2", AutoModelForCausalLM, SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4}, {}),
    "llama": ("next", "llama", AutoModelForCausalLM, LLAMA, {}),
    "llama, eager": ("next", "llama", AutoModelForCausalLM, LLAMA, {"attn_implementation": "eager"}),
    "llama, classes": ("sequence", "llama", AutoModelForSequenceClassification, LLAMA, {}),
    "mistral that sees four tokens": ("next", "mistral", AutoModelForCausalLM, LLAMA | {"sliding_window": 4}, {}),
    "gemma3": ("next", "gemma3_text", AutoModelForCausalLM, LLAMA | {"head_dim": 8, "sliding_window": 4}, {}),
    "bart": ("texts", "bart", AutoModelForSeq2SeqLM, BART, {}),
    "marian": ("texts", "marian", AutoModelForSeq2SeqLM, BART, {}),
    "bart, sources as long": ("texts of sources as long", "bart", AutoModelForSeq2SeqLM, BART, {}),
    "t5": ("texts", "t5", AutoModelForSeq2SeqLM, T5, {}),
    "t5, sources as long": ("texts of sources as long", "t5", AutoModelForSeq2SeqLM, T5, {}),
}


def computed(
    model: Any, batch: dict[str, torch.Tensor], hooks: PaddingFree | None
) -> tuple[float, dict[str, Any], int]:
    """The loss, its gradients, and how many tokens the blocks have computed."""
    tokens: list[int] = []
    watched = [
        block.register_forward_hook(lambda _, args, output: tokens.append(args[0].shape[:2].numel()))
        for blocks in module._stacks(model).values()
        for block in blocks[1:]  # the first is given padded rows
    ]
    model.zero_grad()
    if hooks:
        with hooks.laid(batch):
            summed = loss(model, batch)
            summed.backward()
    else:
        summed = loss(model, batch)
        summed.backward()
    for handle in watched:
        handle.remove()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return float(summed.detach()), gradients, sum(tokens)


def farness(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The norm of the difference, of the other's norm."""
    assert one.keys() == other.keys()
    far = sum(float((one[name] - other[name]).square().sum()) for name in other)
    return float((far / sum(float(each.square().sum()) for each in other.values())) ** 0.5)


def without_dropout(model: Any) -> None:
    for part in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


def hooks_of(model: Any) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_of_rows_that_are_laid(name: str, checkpointed: bool) -> None:
    kind, *what, others = MODELS[name]
    model = model_of(*what, **others)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    before = hooks_of(model)
    hooks = padding_free(model, loss, batch_of(kind, slice(4)))
    assert hooks is not None
    if checkpointed:
        without_dropout(model.train())
    batch = batch_of(kind)
    padded, expected, all_tokens = computed(model, batch, None)
    laid, gradients, tokens = computed(model, batch, hooks)
    assert laid == pytest.approx(padded, rel=1e-6)
    assert farness(gradients, expected) < 5e-5
    assert tokens < 0.7 * all_tokens
    again, *_ = computed(model, batch, None)
    assert again == padded, "without being told it computes padded rows"
    hooks.remove()
    assert hooks_of(model) == before


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_may_be_on_the_left(attention: str) -> None:
    """Then what free places hold is padding, and sees nothing."""
    model = model_of("llama", AutoModelForSequenceClassification, LLAMA, attn_implementation=attention)
    batch = batch_of("sequence")
    for row, length in enumerate(LENGTHS):
        for name in ("input_ids", "attention_mask"):
            batch[name][row] = batch[name][row].roll(max(LENGTHS) - length)
    hooks = padding_free(model, loss, {name: value[:4] for name, value in batch.items()})
    assert hooks is not None
    padded, laid = computed(model, batch, None), computed(model, batch, hooks)
    assert laid[0] == pytest.approx(padded[0], rel=1e-6)
    assert farness(laid[1], padded[1]) < 5e-5
    assert laid[2] < 0.7 * padded[2]


# --- models that go on padded ----------------------------------------------------------------------------


class MeanOfAll(torch.nn.Module):
    """A head that looks at padding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.bert, self.config, self.head = model.bert, model.config, torch.nn.Linear(32, 2)

    def forward(self, **inputs: Any) -> Any:
        found = self.bert(**inputs)
        found.logits = self.head(found.last_hidden_state.mean(1))
        return found


def twice(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return loss(model, batch) + loss(model, batch)


def with_tokens_before(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As prompts that are trained come before a text."""
    before = {
        "input_ids": torch.full((len(batch["labels"]), 2), 7),
        "attention_mask": torch.ones(len(batch["labels"]), 2),
    }
    inputs = {name: torch.cat([value.long(), batch[name]], 1) for name, value in before.items()}
    return summed_cross_entropy(model(**inputs).logits, batch["labels"])


def without_a_mask(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return summed_cross_entropy(model(batch["input_ids"]).logits, batch["labels"])


BLOOM = SMALL | {"hidden_size": 32, "n_layer": 2, "n_head": 4}
BERT = ("sequence", "bert", AutoModelForSequenceClassification, ENCODER)
PADDED: dict[str, tuple[tuple[str, str, Any, dict[str, Any]], Any, Any]] = {
    "positions in a bias of its own": (("next", "bloom", AutoModelForCausalLM, BLOOM), loss, None),
    "blocks left out at random": (("texts", "m2m_100", AutoModelForSeq2SeqLM, BART), loss, None),
    "a head that looks at padding": (BERT, loss, MeanOfAll),
    "two batches in one": (BERT, twice, None),
    "more tokens than the batch says": (BERT, with_tokens_before, None),
    "padding that is seen": (BERT, without_a_mask, None),
}


@pytest.mark.parametrize("name", PADDED)
def test_what_would_not_be_the_same_goes_on_padded(name: str) -> None:
    (kind, *what), function, change = PADDED[name]
    model = model_of(*what)
    model = change(model).eval() if change else model
    before, expected = hooks_of(model), float(function(model, batch_of(kind)).detach())
    assert padding_free(model, function, batch_of(kind, slice(4))) is None
    assert hooks_of(model) == before
    assert float(function(model, batch_of(kind)).detach()) == expected
    assert not model.training


def test_it_is_tried_without_a_trace() -> None:
    model = model_of("bert", AutoModelForSequenceClassification, ENCODER).train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert padding_free(model, loss, batch_of("sequence", slice(4)))
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_other_tokens_than_those_of_the_batch_are_computed_as_they_are() -> None:
    """Such as texts that a recipe's loss lets the model write."""
    model = model_of("llama", AutoModelForCausalLM, LLAMA)
    batch = batch_of("next")
    hooks = padding_free(model, loss, batch_of("next", slice(4)))
    assert hooks is not None
    prompt = torch.arange(5, 12)[None]
    alone, expected = model(prompt).logits, model.generate(prompt, max_new_tokens=5, do_sample=False)
    with hooks.laid(batch):
        assert torch.equal(model(prompt).logits, alone)
    with hooks.laid(batch):
        assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)
    padded = computed(model, batch, None)
    assert computed(model, batch, hooks)[0] == pytest.approx(padded[0], rel=1e-6)


def test_a_batch_with_next_to_no_padding_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("bert", AutoModelForSequenceClassification, ENCODER)
    hooks = padding_free(model, loss, batch_of("sequence", slice(4)))

    def is_laid(batch: dict[str, torch.Tensor]) -> bool:
        return computed(model, batch, hooks)[2] < computed(model, batch, None)[2]

    assert is_laid(batch_of("sequence"))
    assert not is_laid(batch_of("sequence", slice(0, 4)))
    assert not is_laid(batch_of("sequence", slice(4, 8)))
    batch = {"input_ids": torch.full((13, 17), 5), "labels": torch.ones(13, dtype=torch.int64)}
    batch["attention_mask"] = (torch.arange(17) < torch.tensor([17, *[9] * 12])[:, None]).long()
    assert is_laid(batch)
    monkeypatch.setattr(layout, "WIDTHS", (1.0,))
    assert not is_laid(batch), "no two of them have room in one row"


def test_tokens_without_a_target_are_computed_if_one_comes_behind() -> None:
    labels = torch.tensor([[4, IGNORED, 5, IGNORED], [IGNORED, 4, 4, 4], [IGNORED] * 4])
    given = {"attention_mask": torch.tensor([[1, 1], [1, 0], [1, 0]]), "decoder_input_ids": labels, "labels": labels}
    masks = module._masks(given)
    assert masks["source"].tolist() == [[True, True], [True, False], [True, False]]
    assert masks["target"].tolist() == [[True, True, True, False], [True] * 4, [False] * 4]
    given["decoder_attention_mask"] = torch.tensor([[1, 1, 0, 0]] * 3)
    assert module._masks(given)["target"].tolist() == [[True, True, False, False]] * 3


# --- where tokens lie ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("documents", [1, 2, 7, 32, 200])
def test_each_document_lies_in_one_row_and_little_is_left_free(documents: int, sides: int) -> None:
    random = np.random.RandomState(documents)
    lengths = np.clip(random.lognormal(3, 0.7, (documents, sides)).astype(np.int64), 1, 256)
    rows = rows_of_documents(lengths)
    assert sorted(document for row in rows for document in row) == list(range(documents))
    computed = len(rows) * np.max([lengths[row].sum(0) for row in rows], axis=0).sum()
    assert computed <= documents * lengths.max(0).sum(), "never more than padded"
    if documents >= 32:
        assert computed < (1.1 if sides == 1 else 1.4) * lengths.sum()


def test_rows_of_a_batch_come_back_as_they_were() -> None:
    random = np.random.RandomState(0)
    for _ in range(20):
        mask = torch.from_numpy(random.rand(6, 11) < 0.6)
        mask[:, 3] = True
        rows = rows_of_documents(mask.sum(1, keepdim=True).numpy())
        where = Layout.of(mask, rows)
        tokens = torch.arange(1, mask.numel() + 1).view(mask.shape)
        laid = where.laid(tokens)
        assert sorted(laid[where.group >= 0].tolist()) == sorted(tokens[mask].tolist()), "each token once"
        assert torch.equal(where.apart(laid)[mask], tokens[mask])
        assert torch.equal(where.laid(torch.arange(11)[None])[where.group >= 0], where.token[where.group >= 0])


def test_a_batch_to_try_has_rows_that_differ_in_length() -> None:
    from recipes.causal_lm import collate

    read: list[int] = []

    class Read(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    def tried(samples: list[Any], *, known: bool = True) -> tuple[list[int] | None, list[int]]:
        """Tokens of its rows, and which samples were read."""
        read.clear()
        batch = some_rows(Read(samples), tiny.lengths(samples) if known else None, collate)
        return None if batch is None else batch["attention_mask"].sum(1).tolist(), read.copy()

    samples = tiny.sequences(20)
    lengths = [len(sample) for sample in samples]
    assert len({*lengths[:4]}) == 4
    assert tried(samples) == tried(samples, known=False) == (lengths[:4], [0, 1, 2, 3])
    alike = [samples[0]] * 6 + samples[1:4]
    assert tried(alike) == (lengths[:4], [0, 6, 7, 8])
    assert tried(alike, known=False)[0] is None, "no other samples are read to find out"
    assert tried(alike[:7]) == ([*lengths[:2], *lengths[:2]], [0, 6])
    for none in ([], samples[:1], [samples[0]] * 20):
        assert tried(none)[0] is None
    assert some_rows(iter(samples), None, collate) is not None  # type: ignore[arg-type]
