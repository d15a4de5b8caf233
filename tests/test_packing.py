from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from launch.cache import Cache
from launch.errors import ConfigError
from launch.recipe import RecipeContext, Width
from recipes.causal_lm import Args, collate, count, loss, prepare, preview
from recipes.packing import IGNORED, best_fit, check_isolation, windows
from tests import tiny
from tests.test_causal_lm import documents, ids, make_model_folder

BLOCK = 16


@pytest.fixture
def context(tmp_path: Path) -> RecipeContext:
    return RecipeContext(Cache(tmp_path / "cache"), seed=0)


def write_documents(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def arguments(tmp_path: Path, texts: list[str], **values: Any) -> Args:
    """Training and validation on the same documents, of 2 to 41 tokens with their ends."""
    model = make_model_folder(tmp_path / "model", begins=False)
    path = write_documents(tmp_path / "a.jsonl", texts)
    files = {"train_files": (path,), "validation_files": (path,)}
    return Args(**{"model": str(model), "from_scratch": True, "block_size": BLOCK, **files, **values})


def all_samples(samples: Any) -> list[Any]:
    return [samples[index] for index in range(len(samples))]


def pieces_of(sample: Any) -> list[tuple[int, ...]]:
    """The pieces of documents in a block, told apart by positions that start anew."""
    starts = [*np.flatnonzero(sample[2] == 0), sample.shape[1]]
    return [tuple(map(int, sample[0, a:b])) for a, b in pairwise(starts)]


# --- what goes into a block ------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    assert list(windows(10, 4, 4)) == [(0, 4, 1), (4, 8, 5), (8, 10, 9)]
    assert list(windows(10, 4, 3)) == [(0, 4, 1), (3, 7, 4), (6, 10, 7)]
    assert list(windows(6, 4, 1)) == [(0, 4, 1), (1, 5, 4), (2, 6, 5)]
    assert list(windows(3, 4, 1)) == [(0, 3, 1)]


def test_windows_of_any_length_give_each_token_its_context_once() -> None:
    for length in range(1, 40):
        for stride in range(1, 8):
            targets = []
            for start, end, first in windows(length, 8, stride):
                assert end - start <= 8
                targets += range(first, end)
                assert start == 0 or stride == 8 or first - start >= 8 - stride
            left_out = set(range(length)) - set(targets)
            assert len(targets) == len(set(targets))
            assert left_out == ({0} if stride < 8 else set(range(0, length, 8)))


def test_best_fit_is_tight_and_loses_nothing() -> None:
    chance = random.Random(0)
    lengths = np.array([chance.randint(1, BLOCK) for _ in range(300)])
    blocks = best_fit(lengths, BLOCK)
    assert sorted(piece for block in blocks for piece in block) == list(range(300))
    sums = [int(lengths[block].sum()) for block in blocks]
    assert max(sums) <= BLOCK
    assert len(blocks) <= math.ceil(1.05 * lengths.sum() / BLOCK)
    assert best_fit(np.array([5, 3, 4, 1, 3]), 8) == [[0, 1], [2, 4, 3]]


def test_isolated_blocks_hold_every_document_whole_where_it_fits(tmp_path: Path, context: RecipeContext) -> None:
    texts = documents(60)
    args = arguments(tmp_path, texts, packing="isolated")
    assert preview(args, context).samples is None
    prepared = prepare(args, context)
    assert preview(args, context).samples == len(prepared.train)
    tokens = [[*ids(text), 1] for text in texts]
    expected = sorted(tuple(each[start : start + BLOCK]) for each in tokens for start in range(0, len(each), BLOCK))
    blocks = all_samples(prepared.train)
    assert sorted(piece for block in blocks for piece in pieces_of(block)) == expected
    assert len(blocks) < len(expected) / 1.2, "pieces share blocks"
    for block in blocks:
        assert np.array_equal(block[1] == IGNORED, block[2] == 0), "no label crosses the end of a document"
    assert prepared.facts["train_text"] == {
        "tokens": sum(map(len, tokens)),
        "documents": 60,
        "longer_than_a_block": sum(len(each) > BLOCK for each in tokens),
    }


def test_without_packing_a_piece_is_a_sample(tmp_path: Path, context: RecipeContext) -> None:
    prepared = prepare(arguments(tmp_path, ["w1 w2", " ".join(["w3"] * 20)], packing="off"), context)
    short, whole, rest = all_samples(prepared.train)
    assert (short.shape, whole.shape, rest.shape) == ((2, 3), (2, 16), (2, 5))
    batch = prepared.collate([short, rest])
    assert batch["input_ids"].shape == (2, 8), "padded to a multiple"
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert set(prepared.collate([whole])) == {"input_ids", "labels"}


def test_padding_never_goes_beyond_a_block(tmp_path: Path, context: RecipeContext) -> None:
    """A block may be all the positions a model has."""
    args = arguments(tmp_path, [" ".join(["w3"] * 20), "w1"], packing="isolated", block_size=13)
    prepared = prepare(args, context)
    assert {prepared.collate([sample])["input_ids"].shape[1] for sample in all_samples(prepared.train)} == {13}


# --- attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [tiny.gpt2, tiny.llama])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_document_gets_the_logits_it_gets_alone(model: Any, attention: str) -> None:
    live = model().eval()
    live.set_attn_implementation(attention)
    first, second, third = [sample for sample in tiny.sequences(20) if 1 < len(sample) < 16][:3]
    rows = [blocks_of(first, second), blocks_of(third)]
    batch = collate(rows, Width(8))
    assert "attention_mask" in batch, "there is padding"
    with torch.no_grad():
        logits = live(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        packed = [logits[0, : len(first)], logits[0, len(first) :][: len(second)], logits[1, : len(third)]]
        for got, document in zip(packed, (first, second, third), strict=True):
            alone = live(input_ids=torch.from_numpy(document.astype(np.int64))[None]).logits[0]
            torch.testing.assert_close(got, alone, rtol=0, atol=1e-5)
        expected = float(tiny.reference_loss(live, [first, second, third]))
        assert float(loss(live, batch)) / count(batch) == pytest.approx(expected, rel=1e-5)


def blocks_of(*documents: Any) -> Any:
    parts = [np.stack([each, [IGNORED, *each[1:]], np.arange(len(each))]) for each in documents]
    return np.concatenate(parts, axis=1)


def test_a_model_that_would_mix_documents_is_refused() -> None:
    torch.manual_seed(0)
    state_space = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ConfigError, match=r"packing = isolated: m \(mamba\) lets documents .*recipe_args\.packing=off"):
        check_isolation(state_space, "m")
    assert state_space.training
    check_isolation(tiny.llama(), "m")


# --- strided perplexity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["continuous", "isolated", "off"])
def test_strided_perplexity_is_that_of_its_definition(tmp_path: Path, context: RecipeContext, packing: str) -> None:
    """One token at a time: its window is the first, of those that begin every 5 tokens, that reaches it."""
    texts = documents(5)
    prepared = prepare(arguments(tmp_path, texts, packing=packing, stride=5), context)
    torch.manual_seed(0)
    model = prepared.build_model().eval()
    tokens = [[*ids(text), 1] for text in texts]
    whole = [[token for document in tokens for token in document]]
    summed, targets = 0.0, 0
    for document in whole if packing == "continuous" else tokens:
        for position in range(1, len(document)):
            start = 5 * max(0, math.ceil((position + 1 - BLOCK) / 5))
            with torch.no_grad():
                scores = model(torch.tensor([document[start:position]])).logits[0, -1].log_softmax(-1)
            summed -= float(scores[document[position]])
            targets += 1
    samples = all_samples(prepared.validation)
    batches = [prepared.collate(samples[start : start + 3]) for start in range(0, len(samples), 3)]
    assert sum(prepared.count(batch) for batch in batches) == targets
    with torch.no_grad():
        assert sum(float(prepared.loss(model, batch)) for batch in batches) == pytest.approx(summed, rel=1e-5)


def test_a_stride_of_a_block_is_no_stride_and_training_text_has_none(tmp_path: Path, context: RecipeContext) -> None:
    args = arguments(tmp_path, documents(12))
    plain, whole, strided = (
        prepare(args.model_copy(update={"stride": stride}), context) for stride in (None, BLOCK, 5)
    )
    for a, b in zip(all_samples(plain.validation), all_samples(whole.validation), strict=True):
        one, other = collate([a]), collate([b])
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["labels"][:, 1:], other["labels"][:, 1:]), "the first is a target of nothing"
    assert list(map(list, all_samples(plain.train))) == list(map(list, all_samples(strided.train)))


# --- limits and validation files -------------------------------------------------------------------------


def test_limits_count_documents(tmp_path: Path, context: RecipeContext) -> None:
    args = arguments(tmp_path, documents(30), max_train_samples=7, max_validation_samples=2)
    facts = prepare(args, context).facts
    assert (facts["train_text"]["documents"], facts["validation_text"]["documents"]) == (7, 2)
    held_out = prepare(args.model_copy(update={"validation_files": ()}), context).facts
    assert (held_out["train_text"]["documents"], held_out["validation_text"]["documents"]) == (7, 2)


def test_the_end_of_running_text_keeps_its_documents(tmp_path: Path, context: RecipeContext) -> None:
    """Cut off in the middle of a document, which then is two."""
    book = tmp_path / "book.txt"
    book.write_text("\n".join(documents(40)))
    args = arguments(tmp_path, []).model_copy(
        update={"train_files": (str(book),), "validation_files": (), "packing": "isolated"}
    )
    prepared = prepare(args, context)
    whole = [*ids(book.read_text()), 1]
    cut = len(whole) - int(len(whole) * args.validation_fraction)
    for samples, expected in ((prepared.train, whole[:cut]), (prepared.validation, whole[cut:])):
        pieces = [piece for sample in all_samples(samples) for piece in pieces_of(sample)]
        assert sorted(pieces) == sorted(tuple(expected[at : at + BLOCK]) for at in range(0, len(expected), BLOCK))


def test_validation_files_beside_the_embedded_text_replace_what_is_held_out(
    tmp_path: Path, context: RecipeContext
) -> None:
    path = write_documents(tmp_path / "v.jsonl", ["One text.", "Another text, somewhat longer."])
    args = Args(validation_files=(path,))
    preview(args, context)
    facts, plain = prepare(args, context).facts, prepare(Args(), context).facts
    assert facts["validation_text"]["documents"] == 2
    everything = plain["train_text"]["documents"] + plain["validation_text"]["documents"]
    assert facts["train_text"]["documents"] == everything
