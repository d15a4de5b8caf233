"""Masked language modelling: which tokens are hidden, when and where; loss and metrics against the definition."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from launch.cache import Cache
from launch.engine.batching import Loader, Order
from launch.engine.inference import Inference
from launch.engine.precision import Autocast
from launch.engine.scoring import Evaluation
from launch.errors import ConfigError, DataError, LaunchError
from launch.recipe import Prepared, RecipeContext
from recipes.masked_lm import Args, count, loss, prepare, preview
from recipes.masking import IGNORED, Masking
from tests.gloo import run_ranks
from tests.test_engine_sharding import plan_for

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP, MASK = 2, 3, 4
WORDS = [f"w{index}" for index in range(40)]
FIRST = len(SPECIAL)


def make_model(folder: Path, mask: bool = True) -> Path:
    """Token ids of words are their numbers + 5."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if mask:
        named["mask_token"] = "[MASK]"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **named).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertConfig(vocab_size=len(vocabulary), initializer_range=0.5, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture
def context(tmp_path: Path) -> RecipeContext:
    return RecipeContext(Cache(tmp_path / "cache"), seed=0)


def some_texts(number: int) -> list[Any]:
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 40))) for _ in range(number)]


def arguments(folder: Path, texts: list[Any], **more: Any) -> Args:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = {name: (str(folder / "texts.jsonl"),) for name in ("train_files", "validation_files")}
    return Args(**{"model": str(make_model(folder / "model")), "from_scratch": True, **files, **more})


# --- samples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("join", "expected"),
    [
        (True, [[CLS, 5, 6, SEP, 7, 8, 9, SEP], [CLS, 10, 11, 12, 13, SEP]]),
        (False, [[CLS, 5, 6, SEP], [CLS, 7, 8, 9, 10, 11, 12, SEP]]),
    ],
)
def test_samples_are_as_by_hand(tmp_path: Path, context: RecipeContext, join: bool, expected: list[Any]) -> None:
    args = arguments(tmp_path, ["w0 w1", "", None, "w2 w3 w4 w5 w6 w7 w8"], join_texts=join, max_length=8)
    prepared = prepare(args, context)
    samples: Any = prepared.train
    assert list(samples.samples["input_ids"]) == expected
    facts = prepared.facts["train"]
    assert (facts["rows"], facts["rows without text"], facts["cut short"]) == (4, 2, int(not join))
    whole = [np.where(each["labels"] != IGNORED, each["labels"], each["input_ids"]).tolist() for each in samples]
    assert whole == expected


def test_a_share_of_the_tokens_is_hidden_in_three_ways() -> None:
    masking, vocabulary = Masking(MASK, (0, 1, 2, 3, 4), 5000, 0.15, None), 5000
    ids = np.random.RandomState(0).randint(5, vocabulary, 100_000)
    ids[::10] = SEP
    found = masking(ids.tolist(), 0)
    targets = found["labels"] != IGNORED
    assert targets.sum() == round(0.15 * 90_000)
    assert (found["labels"][targets] == ids[targets]).all()
    assert (found["input_ids"][~targets] == ids[~targets]).all()
    assert not targets[::10].any(), "special tokens are no targets"
    hidden = found["input_ids"][targets]
    assert (hidden == MASK).mean() == pytest.approx(0.8, abs=0.02)
    assert (hidden == ids[targets]).mean() == pytest.approx(0.1, abs=0.02)
    assert not np.isin(hidden, (0, 1, 2, 3)).any()
    assert len({int(each) for each in masking([CLS, 7, SEP], 0)["labels"]}) == 2, "a short text has a target too"


def test_masks_change_with_epoch_and_seed_in_training_alone() -> None:
    ids = list(range(5, 105))

    def targets(seed: int | None, epoch: int) -> tuple[int, ...]:
        labels = Masking(MASK, (0, 1, 2, 3, 4), 200, 0.15, seed)(ids, epoch)["labels"]
        return tuple(np.flatnonzero(labels != IGNORED).tolist())

    assert len({targets(seed, epoch) for seed in (0, 1) for epoch in range(3)}) == 6
    assert targets(0, 1) == targets(0, 1)
    assert targets(None, 0) == targets(None, 7)


Hidden = dict[tuple[int, int, int], list[int]]
"""Token ids by update, epoch and sample."""


def trained_on(args: Args, cache: str, first_update: int, world_size: int, workers: int) -> Hidden:
    """What all ranks are given in three epochs, from an update on."""
    prepared = prepare(args, RecipeContext(Cache(Path(cache)), 0))
    samples: Any = prepared.train
    found: Hidden = {}
    for rank in range(world_size):
        order = Order(len(samples), 6, 2, 0, rank, world_size)
        windows = list(order.windows(first_update, 3 * order.per_epoch))
        loader = Loader(samples, prepared.collate, workers)
        for window, batches in loader.load(windows.copy):
            for cell, batch in zip(window.micro_batches, batches, strict=True):
                for sample, ids in zip(cell.samples, batch["input_ids"].tolist(), strict=True):
                    if not cell.filler:
                        found[window.update, window.epoch, sample] = [each for each in ids if each]
        loader.feed.close()
    return found


def test_training_masks_are_the_same_for_any_ranks_workers_and_after_a_resume(tmp_path: Path) -> None:
    args, cache = arguments(tmp_path, some_texts(20), join_texts=False, max_length=32), str(tmp_path / "cache")
    whole = trained_on(args, cache, 1, 1, 0)
    assert whole == trained_on(args, cache, 1, 3, 0)
    assert whole == trained_on(args, cache, 1, 2, 2)
    assert trained_on(args, cache, 6, 1, 2) == {key: ids for key, ids in whole.items() if key[0] >= 6}
    by_epoch = [{sample: ids for (_, at, sample), ids in whole.items() if at == epoch} for epoch in range(3)]
    assert all(sorted(each) == list(range(20)) for each in by_epoch)
    assert sum(by_epoch[0][sample] != by_epoch[1][sample] for sample in range(20)) > 10


def test_a_stream_is_hidden_anew_in_each_epoch(tmp_path: Path, context: RecipeContext) -> None:
    args = arguments(tmp_path, some_texts(9), streaming=True, join_texts=False)
    stream: Any = prepare(args, context).train
    held: Any = prepare(args.model_copy(update={"streaming": False}), context).train

    def read(samples: Any, epoch: int) -> list[list[int]]:
        samples.set_epoch(epoch)
        return [each["input_ids"].tolist() for each in samples]

    assert read(stream, 0) == read(stream, 0) == read(held, 0) != read(stream, 1)


# --- loss and metrics --------------------------------------------------------------------------------------


def by_definition(prepared: Prepared, model: Any) -> tuple[float, int, int]:
    """Summed loss, targets and right ones of the validation samples, one at a time, without padding."""
    total, targets, right = 0.0, 0, 0
    with torch.no_grad():
        for index in range(len(prepared.validation)):  # type: ignore[arg-type]
            sample = prepared.validation[index]  # type: ignore[index]
            log_probabilities = model(torch.tensor(sample["input_ids"])[None]).logits[0].log_softmax(-1)
            for place in np.flatnonzero(sample["labels"] != IGNORED).tolist():
                total -= float(log_probabilities[place, sample["labels"][place]])
                right += int(log_probabilities[place].argmax()) == sample["labels"][place]
                targets += 1
    return total, targets, right


def evaluated(
    args: Args, folder: str, strategy: str, world_size: int, batch_sizes: tuple[int, ...]
) -> list[dict[str, float]]:
    from launch.engine.optim import make_optimizer
    from launch.engine.sharding import make_accelerator, spread

    plan = plan_for(strategy, world_size, Path(folder), "train.global_batch_size=12")
    accelerator = make_accelerator(plan)
    prepared = prepare(args, RecipeContext(Cache(Path(folder) / "cache"), 0))
    torch.manual_seed(0)
    plain = prepared.build_model()
    model, _ = spread(accelerator, plain, make_optimizer(plain, plan.config.train, fused=False))
    found = []
    for batch_size in batch_sizes:
        evaluation = Evaluation(
            accelerator,
            Loader(prepared.validation, prepared.collate),  # type: ignore[arg-type]
            prepared.loss,
            prepared.count,
            batch_size,
            scoring=prepared.scoring,
            inference=lambda model: Inference(accelerator, model, Autocast("cpu", torch.float32)),
        )
        score = evaluation(model)
        assert score is not None
        found.append({"loss": score.loss, **score.metrics, **prepared.loss_metrics(score.loss)})
    return found


@pytest.mark.dist
@pytest.mark.parametrize(
    ("strategy", "world_size"), [("single", 1), ("ddp", 2), ("ddp", 3), ("fsdp2", 2), ("zero3", 2)]
)
def test_metrics_are_those_of_the_definition_however_it_is_run(
    tmp_path: Path, context: RecipeContext, strategy: str, world_size: int
) -> None:
    """BERT's head shares a weight with its embeddings, which are part of a block: FSDP2 must not part them."""
    args = arguments(tmp_path, some_texts(30), join_texts=False, masked_share=0.4)
    prepared = prepare(args, context)
    torch.manual_seed(0)
    total, targets, right = by_definition(prepared, prepared.build_model().eval())
    assert 0 < right < targets
    mean = total / targets
    expected = {"loss": mean, "masked_accuracy": right / targets, "pseudo_perplexity": math.exp(mean)}
    promised = preview(args, context).metrics
    assert promised and {"loss", *promised} == {*expected}
    for found in run_ranks(world_size, evaluated, args, str(tmp_path), strategy, world_size, (1, 3, 32)):
        assert found == [pytest.approx(expected, rel=1e-5)] * 3


def test_loss_does_not_depend_on_padding(tmp_path: Path, context: RecipeContext) -> None:
    prepared = prepare(arguments(tmp_path, some_texts(7), join_texts=False), context)
    torch.manual_seed(0)
    model = prepared.build_model().eval()
    total, targets, _ = by_definition(prepared, model)
    samples = [prepared.validation[index] for index in range(7)]  # type: ignore[index]
    longest = max(samples, key=lambda sample: len(sample["labels"]))
    longer = {name: np.concatenate([values] * 2) for name, values in longest.items()}
    for batch in (prepared.collate(samples), prepared.collate([*samples, longer])):
        mine = {name: values[:7] for name, values in batch.items()}
        assert mine["input_ids"].shape[1] % 8 == 0
        with torch.no_grad():
            assert float(loss(model, mine)) == pytest.approx(total, rel=1e-5)
        assert count(mine) == targets


# --- what can be wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "more", "message"),
    [
        (["", " "], {}, "the train rows hold no text"),
        ([5, 6], {}, "hold 5 where a text should be; set recipe_args.text_column"),
        (["w1"], {"text_column": "txt"}, "set recipe_args.text_column, perhaps to 'text'"),
        (["w1"], {"max_length": 200}, "takes 128 tokens at most"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, context: RecipeContext, texts: list[Any], more: dict[str, Any], message: str
) -> None:
    args = arguments(tmp_path, texts, **more)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        (preview(args, context), prepare(args, context))
    assert isinstance(caught.value, LaunchError)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path, context: RecipeContext) -> None:
    args = arguments(tmp_path, ["w1"], model=str(make_model(tmp_path / "decoder", mask=False)))
    with pytest.raises(DataError, match="its tokenizer has no mask_token"):
        prepare(args, context)


def test_a_preview_knows_the_samples_and_needs_no_torch(tmp_path: Path, context: RecipeContext) -> None:
    args = arguments(tmp_path, some_texts(11))
    assert preview(args, context).samples is None
    prepared = prepare(args, context)
    assert preview(args, context).samples == len(prepared.train)  # type: ignore[arg-type]
    script = (
        "import sys\nfrom pathlib import Path\nfrom launch.cache import Cache\n"
        "from launch.recipe import RecipeContext\n"
        "from recipes.masked_lm import Args, preview\n"
        f"preview(Args.model_validate_json({args.model_dump_json()!r}), RecipeContext(Cache(Path('{tmp_path}')), 0))\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"
