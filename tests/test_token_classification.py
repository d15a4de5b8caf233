"""Token classification: labels of tokens by hand, files in CoNLL form, metrics equal to seqeval's over any ranks."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from seqeval import metrics as reference
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from launch.cache import Cache
from launch.engine.batching import Loader
from launch.engine.inference import Inference
from launch.engine.precision import Autocast
from launch.engine.scoring import Evaluation
from launch.errors import ConfigError, DataError, LaunchError
from launch.recipe import RecipeContext
from recipes.token_classification import IGNORED, Args, count, loss, prepare, preview
from tests.gloo import run_ranks

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "##a", "##b", "##c"]
CLS, SEP, A, B, C, AFTER_A, AFTER_B = 2, 3, 4, 5, 6, 7, 8
LABELS = ["B-X", "B-Y", "I-X", "O"]
O = IGNORED  # noqa: E741  (short, so that rows can be read)


def make_model(folder: Path) -> Path:
    """Words of the letters a, b and c: a token for each letter. A word of anything else is unknown."""
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **named).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertConfig(vocab_size=len(PIECES), initializer_range=0.5, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture
def context(tmp_path: Path) -> RecipeContext:
    return RecipeContext(Cache(tmp_path / "cache"), seed=0)


def arguments(folder: Path, train: list[Any], validation: list[Any] | None = None, **more: Any) -> Args:
    for name, rows in (("train", train), ("dev", validation or train)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Args(
        model=str(make_model(folder / "model")),
        from_scratch=True,
        train_files=(str(folder / "train.jsonl"),),
        validation_files=(str(folder / "dev.jsonl"),),
        **more,
    )


def row(words: str, labels: str) -> dict[str, list[str]]:
    return {"tokens": words.split(), "ner_tags": labels.split()}


def some_rows(number: int, labels: tuple[str, ...] = tuple(LABELS)) -> list[dict[str, list[str]]]:
    chance = random.Random(0)
    found = []
    for _ in range(number):
        words = ["".join(chance.choices("abc", k=chance.randint(1, 3))) for _ in range(chance.randint(1, 12))]
        found.append({"tokens": words, "ner_tags": chance.choices(labels, k=len(words))})
    return found


# --- features --------------------------------------------------------------------------------------------

ROWS = [row("ab c", "B-X O"), row("c abb ca a", "O B-Y B-X I-X"), row("", "")]
ROWS_HELD = {
    False: [[O, 0, O, 3, O], [O, 3, 1, O, O, 0, O, O]],
    True: [[O, 0, 2, 3, O], [O, 3, 1, 1, 1, 0, 2, O]],  # I-X goes on from B-X; there is no I-Y
}


@pytest.mark.parametrize("all_subwords", [False, True])
def test_labels_of_tokens_are_as_by_hand(tmp_path: Path, context: RecipeContext, all_subwords: bool) -> None:
    prepared = prepare(arguments(tmp_path, ROWS, max_length=8, label_all_subwords=all_subwords), context)
    samples: Any = list(prepared.train)  # type: ignore[call-overload]
    assert [each["input_ids"] for each in samples] == [
        [CLS, A, AFTER_B, C, SEP],
        [CLS, C, A, AFTER_B, AFTER_B, C, AFTER_A, SEP],  # the last word has no room
    ]
    assert [each["labels"] for each in samples] == ROWS_HELD[all_subwords]
    assert [each["word_labels"] for each in samples] == ROWS_HELD[False]
    facts = prepared.facts["train"]
    assert (facts["rows"], facts["rows without words"], facts["words"], facts["words left out"]) == (3, 1, 6, 1)
    assert facts["words by label"] == {"B-X": 2, "B-Y": 1, "I-X": 0, "O": 2}
    assert prepared.build_model().config.id2label == dict(enumerate(LABELS))
    batch = prepared.collate(samples)
    assert count(batch) == sum(label != IGNORED for each in ROWS_HELD[all_subwords] for label in each)
    assert batch["attention_mask"].sum(1).tolist() == [5, 8]


CONLL = """-DOCSTART- -X- O O

ab NN I-NP B-X
c . O O

abb NN I-NP B-Y
"""


@pytest.mark.parametrize("name", ["train.conll", "train.txt"])
@pytest.mark.parametrize(
    ("column", "labels"), [("ner_tags", [["B-X", "O"], ["B-Y"]]), ("field_2", [["NN", "."], ["NN"]])]
)
def test_conll_files_are_rows(
    tmp_path: Path, context: RecipeContext, name: str, column: str, labels: list[list[str]]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text(CONLL)
    files = {"train_files": (str(tmp_path / "data"),), "validation_files": (str(tmp_path / "data" / name),)}
    args = Args(model=str(make_model(tmp_path / "model")), from_scratch=True, labels_column=column, **files)
    preview(args, context)
    prepared = prepare(args, context)
    names = prepared.build_model().config.id2label
    got = [[names[n] for n in each if n != IGNORED] for each in prepared.train["word_labels"]]  # type: ignore[index]
    assert got == labels


def test_names_stated_by_a_dataset_are_kept(tmp_path: Path, context: RecipeContext) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    kinds = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-Z", "I-Z"]))})
    rows = Dataset.from_dict({"tokens": [["a", "b"], ["c"]], "ner_tags": [[1, 0], [1]]}, features=kinds)
    DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "data")
    model, data = str(make_model(tmp_path / "model")), str(tmp_path / "data")
    args = Args(model=model, from_scratch=True, dataset=data)
    prepared = prepare(args, context)
    assert list(prepared.train["labels"]) == [[O, 1, 0, O], [O, 1, O]]  # type: ignore[index]
    assert prepared.build_model().config.label2id == {"O": 0, "B-Z": 1, "I-Z": 2}
    reordered = prepare(args.model_copy(update={"labels": ("I-Z", "B-Z", "O")}), context)
    assert list(reordered.train["labels"]) == [[O, 1, 2, O], [O, 1, O]]  # type: ignore[index]


# --- loss and metrics --------------------------------------------------------------------------------------


def test_loss_of_a_batch_is_that_of_its_samples_alone(tmp_path: Path, context: RecipeContext) -> None:
    prepared = prepare(arguments(tmp_path, some_rows(7)), context)
    torch.manual_seed(0)
    model = prepared.build_model().eval()
    samples: Any = list(prepared.train)  # type: ignore[call-overload]
    total, targets = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            log_probabilities = model(torch.tensor([sample["input_ids"]])).logits[0].log_softmax(-1)
            for place, label in enumerate(sample["labels"]):
                if label != IGNORED:
                    total -= float(log_probabilities[place, label])
                    targets += 1
        longer = {name: [*values] * 2 for name, values in samples[0].items() if name != "words"}
        for batch in (prepared.collate(samples), prepared.collate([*samples, longer])):
            mine = {name: values[: len(samples)] for name, values in batch.items()}
            assert float(loss(model, mine)) == pytest.approx(total, rel=1e-5)
            assert count(mine) == targets
            assert mine["input_ids"].shape[1] % 8 == 0


def evaluated(args: Args, cache: str, batch_sizes: tuple[int, ...]) -> list[Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    prepared = prepare(args, RecipeContext(Cache(Path(cache)), 0))
    torch.manual_seed(0)
    model = accelerator.prepare(prepared.build_model())
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
        found.append(score.metrics)
    return found


@pytest.mark.dist
def test_metrics_are_those_of_seqeval_for_any_ranks_and_batches(tmp_path: Path, context: RecipeContext) -> None:
    rows = some_rows(20)
    args = arguments(tmp_path, rows, label_all_subwords=True, max_length=64)
    prepared = prepare(args, context)
    torch.manual_seed(0)
    model = prepared.build_model().eval()
    predicted = []
    with torch.no_grad():
        for each in rows:  # a token for each letter, so that a word's first token is known from the words before it
            starts = [1 + sum(map(len, each["tokens"][:index])) for index in range(len(each["tokens"]))]
            ids = prepared.tokenizer(" ".join(each["tokens"]))["input_ids"]
            likely = model(torch.tensor([ids])).logits[0].argmax(-1)
            predicted.append([LABELS[likely[start]] for start in starts])
    truth = [each["ner_tags"] for each in rows]
    scores = {"precision": reference.precision_score, "recall": reference.recall_score, "f1": reference.f1_score}
    expected = {name: score(truth, predicted) for name, score in scores.items()}
    expected["accuracy"] = reference.accuracy_score(truth, predicted)
    assert 0 < expected["f1"] < 1
    for world_size in (1, 2, 3):
        for found in run_ranks(world_size, evaluated, args, str(tmp_path / "cache"), (1, 3, 32)):
            assert found == [pytest.approx(expected)] * 3, world_size


def test_labels_without_entities_are_measured_word_by_word(tmp_path: Path, context: RecipeContext) -> None:
    prepared = prepare(arguments(tmp_path, some_rows(9, ("NOUN", "VERB"))), context)
    assert prepared.scoring is not None
    found = prepared.scoring.measure([([0, 1, 1], [0, 1, 0]), ([1], [1])])
    assert found["accuracy"] == 3 / 4
    assert found["by_label"]["NOUN"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "words": 2}
    assert "f1" not in found


# --- what can be wrong -------------------------------------------------------------------------------------

GOOD = row("a b", "O B-X")


@pytest.mark.parametrize(
    ("train", "validation", "more", "message"),
    [
        ([GOOD], [row("a", "B-Z")], {}, r"validation row 'a': its label 'B-Z' is not among .*: B-X, O; correct it"),
        ([GOOD, row("a b", "O")], None, {}, "training row 'a b': has 2 words but 1 labels"),
        ([row("a b", "O O")], None, {}, "one label only, 'O'"),
        ([{"tokens": "a b", "ner_tags": ["O", "B-X"]}], None, {}, "'a b' where a list of words.*words_column"),
        ([{"tokens": ["a"], "ner_tags": "O"}], None, {}, "'O' where a list of labels.*labels_column"),
        ([{"tokens": [1, 2], "ner_tags": ["O", "X"]}], None, {}, "holds 1 where a word should be"),
        ([GOOD], [row("", "")], {}, "the validation rows hold no words"),
        ([GOOD], None, {"labels_column": "ner_tag"}, "set recipe_args.labels_column, perhaps to 'ner_tags'"),
        ([GOOD], None, {"max_length": 200}, "takes 128 tokens at most"),
        ([GOOD], None, {"streaming": True}, "set recipe_args.labels"),
        ([GOOD], None, {"labels": ("O", "O")}, "names a label twice"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, context: RecipeContext, train: list[Any], validation: Any, more: dict[str, Any], message: str
) -> None:
    args = arguments(tmp_path, train, validation).model_copy(update=more)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        (preview(args, context), prepare(args, context))
    assert isinstance(caught.value, LaunchError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a O\nb\n", r":2: has 1 field; it needs 2, as the line"), ("a\n", ":1: has 1 field; it needs a word and its")],
)
def test_a_line_of_a_conll_file_that_lacks_a_field(
    tmp_path: Path, context: RecipeContext, text: str, message: str
) -> None:
    (tmp_path / "train.conll").write_text(text)
    with pytest.raises(DataError, match=message):
        preview(Args(train_files=(str(tmp_path / "train.conll"),)), context)


def test_a_preview_knows_the_samples_and_needs_no_torch(tmp_path: Path, context: RecipeContext) -> None:
    args = arguments(tmp_path, some_rows(11))
    assert preview(args, context).samples is None
    prepared = prepare(args, context)
    assert preview(args, context).samples == len(prepared.train) == 11  # type: ignore[arg-type]
    script = (
        "import sys\nfrom pathlib import Path\nfrom launch.cache import Cache\n"
        "from launch.recipe import RecipeContext\n"
        "from recipes.token_classification import Args, preview\n"
        f"preview(Args.model_validate_json({args.model_dump_json()!r}), RecipeContext(Cache(Path('{tmp_path}')), 0))\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'evaluate') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"
