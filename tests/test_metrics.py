"""Metrics equal the libraries that compute them, whatever is asked; what cannot be computed is said in one line."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from launch.assets import recipes_folder
from launch.errors import ConfigError, DataError, LaunchError
from launch.plan import python_environment
from recipes import metrics
from recipes.metrics import SHIPPED, check, compute

WORDS = ["the", "a", "cat", "cats", "sat", "on", "mat", "Matten", "zwei,", "dogs", "ran;", "running"]
OWN = """
import datasets
import evaluate
import numpy

class Largest(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int64")
        features = datasets.Features(predictions=number, references=number)
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references, factor=1):
        return {"accuracy": numpy.float32(factor * max(predictions)), "all": numpy.array(references)}
"""
NO_ATTEMPT = """
assert evaluate.config.HF_EVALUATE_OFFLINE, "the Hub was tried first"
"""


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the code that `evaluate` copies, in place of the user's."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        import evaluate

        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder)
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "rows")
        patch.setattr(sys, "path", list(sys.path))
        yield folder


def texts(seed: int, rows: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(rows)]


# --- labels ----------------------------------------------------------------------------------------------

one_label = some.integers(2, 5).flatmap(
    lambda classes: some.lists(some.tuples(*[some.integers(0, classes - 1)] * 2), min_size=1, max_size=40)
)
label_row = some.lists(some.integers(0, 1), min_size=3, max_size=3)
many_labels = some.lists(some.tuples(label_row, label_row), min_size=1, max_size=20)


@settings(max_examples=25, deadline=None)
@given(one_label | many_labels)
def test_metrics_of_labels_are_those_of_scikit_learn(rows: list[tuple[Any, Any]]) -> None:
    import sklearn.metrics

    guess, truth = (np.array(side) for side in zip(*rows, strict=True))
    names = ["accuracy", "precision", "recall", "f1"]
    expected: dict[str, Any] = {"accuracy": sklearn.metrics.accuracy_score(truth, guess)}
    for name in names[1:]:
        score = getattr(sklearn.metrics, f"{name}_score")
        for average in ("macro", "micro", "weighted"):
            expected[f"{name}_{average}"] = score(truth, guess, average=average, zero_division=0)
        if truth.ndim == 1 and max(truth.max(), guess.max()) <= 1:
            expected[name] = score(truth, guess, average="binary", zero_division=0)
    if truth.ndim == 1:
        names += ["matthews_correlation"]
        expected["matthews_correlation"] = sklearn.metrics.matthews_corrcoef(truth, guess)
    found = compute(names, guess, truth.tolist())
    assert found == pytest.approx(expected)
    assert json.loads(json.dumps(found)) == found


def test_a_confusion_matrix_has_a_row_for_each_class_of_the_task() -> None:
    assert compute(["confusion_matrix"], [0, 2, 2, 0], [0, 1, 2, 1]) == {
        "confusion_matrix": [[1, 0, 0], [1, 0, 1], [0, 0, 1]]
    }
    wide = compute(["confusion_matrix"], [0], [1], {"confusion_matrix": {"classes": 4}})["confusion_matrix"]
    assert wide == [[0] * 4, [1, 0, 0, 0], [0] * 4, [0] * 4]
    per_label = compute(["confusion_matrix"], [[1, 0], [1, 1]], [[1, 1], [0, 1]])
    assert per_label == {"confusion_matrix": [[[0, 1], [0, 1]], [[0, 0], [1, 1]]]}


def test_the_number_of_classes_says_whether_a_task_has_a_positive_one() -> None:
    assert "f1" in compute(["f1"], [0, 0], [0, 0])
    assert "f1" not in compute(["f1"], [0, 1], [0, 1], {"f1": {"classes": 3}})


# --- texts -----------------------------------------------------------------------------------------------


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    from sacrebleu.metrics import BLEU, CHRF

    guess, first, second = texts(0, 30), texts(1, 30), texts(2, 30)
    single = compute(["bleu", "chrf"], guess, first)
    assert single["bleu"] == BLEU().corpus_score(guess, [first]).score > 0
    assert single["chrf"] == CHRF().corpus_score(guess, [first]).score > 0
    uneven = [[one, two] if row % 2 else [one] for row, (one, two) in enumerate(zip(first, second, strict=True))]
    some_second = [two if row % 2 else None for row, two in enumerate(second)]
    options = {"bleu": {"tokenize": "char"}, "chrf": {"word_order": 2}}
    several = compute(["bleu", "chrf"], guess, uneven, options)
    bleu, chrf = BLEU(tokenize="char"), CHRF(word_order=2)
    assert several["bleu"] == bleu.corpus_score(guess, [first, some_second]).score > 0  # type: ignore[list-item]
    assert several["chrf"] == chrf.corpus_score(guess, [first, some_second]).score > 0  # type: ignore[list-item]
    assert several["bleu_signature"] == str(bleu.get_signature())
    assert several["chrf_signature"] == str(chrf.get_signature())
    assert several["bleu"] != single["bleu"]


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_rouge_is_the_mean_of_rouge_score_over_rows(use_stemmer: bool) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    guess, first, second = texts(3, 20), texts(4, 20), texts(5, 20)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=use_stemmer)
    options = {"rouge": {"use_stemmer": use_stemmer}}
    single = compute(["rouge"], guess, first, options)
    several = compute(["rouge"], guess, list(zip(first, second, strict=True)), options)
    assert len(single) == 4
    for kind in single:

        def by_row(references: list[str], kind: str = kind) -> list[float]:
            pairs = zip(references, guess, strict=True)
            return [scorer.score(truth, text)[kind].fmeasure for truth, text in pairs]

        assert single[kind] == pytest.approx(np.mean(by_row(first)))
        assert several[kind] == pytest.approx(np.mean(np.maximum(by_row(first), by_row(second))))


def test_exact_match_looks_past_white_space_at_the_ends_only() -> None:
    found = compute(["exact_match"], [" 2024-01-02\n", "a  b", "A", "x"], ["2024-01-02", "a b", "a", "x"])
    assert found == {"exact_match": 0.5}
    assert compute(["exact_match"], ["b", "c"], [["a", "b "], ["a"]]) == {"exact_match": 0.5}


SQUAD = [
    # prediction, right answers, exact match and F1 by 1.1, the same by 2.0; worked out by hand from the definition
    ("The Broncos!", ["Denver Broncos", "broncos"], 1, 1, 1, 1),  # case, article, punctuation; the best of two
    ("a U.S. team", ["US  team"], 1, 1, 1, 1),
    ("theatre-goers", ["theatre goers"], 0, 0, 0, 0),  # a hyphen that is removed joins
    ("in the big red house", ["red house now"], 0, 4 / 7, 0, 4 / 7),  # 4 words and 3, 2 shared: P 1/2, R 2/3
    ("theatre", ["atre"], 0, 0, 0, 0),  # "the" is part of a word
    ("red red dog", ["red red red cat"], 0, 4 / 7, 0, 4 / 7),  # each word as often as in both
    ("", ["dog"], 0, 0, 0, 0),
    ("the", ["A"], 1, 0, 1, 1),  # nothing is left of either: 1.1 shares no word
    ("", ["the", "dog"], 1, 0, 0, 0),  # 2.0 passes over "the"
]


@pytest.mark.parametrize(("text", "answers", *("exact_1", "f1_1", "exact_2", "f1_2")), SQUAD)
def test_squad_follows_the_official_definition(
    text: str, answers: list[str], exact_1: float, f1_1: float, exact_2: float, f1_2: float
) -> None:
    first = compute(["squad"], [text], [answers])
    assert first == pytest.approx({"exact_match": 100 * exact_1, "f1": 100 * f1_1})
    second = compute(["squad"], [text], [answers], {"squad": {"version": "2.0"}})
    assert (second["exact_match"], second["f1"]) == pytest.approx((100 * exact_2, 100 * f1_2))


def test_squad_counts_questions_without_an_answer_apart() -> None:
    found = compute(["squad"], ["", "dog", "big dog", "cat"], [[], [], ["dog"], ["the cat"]])
    assert found == pytest.approx(
        {
            **{"exact_match": 50, "f1": 100 * (1 + 0 + 2 / 3 + 1) / 4},
            **{"HasAns_exact": 50, "HasAns_f1": 100 * (2 / 3 + 1) / 2, "HasAns_total": 2},
            **{"NoAns_exact": 50, "NoAns_f1": 50, "NoAns_total": 2},
        }
    )


def test_entities_are_those_of_seqeval() -> None:
    import seqeval.metrics

    draw = random.Random(0)
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    truth = [draw.choices(tags, k=draw.randint(1, 12)) for _ in range(40)]
    guess = [[draw.choice([tag, tag, *tags]) for tag in row] for row in truth]
    expected = {
        name: getattr(seqeval.metrics, f"{name}_score")(truth, guess)
        for name in ("precision", "recall", "f1", "accuracy")
    }
    assert compute(["seqeval"], guess, truth) == pytest.approx(expected)
    assert 0 < expected["f1"] < 1


def test_perplexity_weighs_each_target_alike() -> None:
    assert compute(["perplexity"], [3.0, 9.0], [1, 5]) == {"perplexity": pytest.approx(math.exp(2))}
    assert compute(["perplexity"], np.array([1e6]), np.array([1])) == {"perplexity": math.inf}


# --- whose metric ----------------------------------------------------------------------------------------


def write(file: Path, text: str = OWN) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def test_a_metric_of_ones_own_is_named_by_its_file_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "largest/largest.py")
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "largest"), "./largest", "largest/largest.py"):
        check([name])
        found = compute(["accuracy", name], [3, 5], [3, 4], {name: {"factor": 2}})
        assert found == {"accuracy": 0.5, "largest_accuracy": 10, "all": [3, 4]}
        assert json.loads(json.dumps(found)) == found


def test_a_folder_here_is_not_run_in_place_of_another_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("accuracy", "glue"):
        write(tmp_path / name / f"{name}.py", "raise SystemExit('was run')")
    monkeypatch.chdir(tmp_path)
    assert compute(["accuracy"], [1], [1]) == {"accuracy": 1.0}
    with pytest.raises(ConfigError, match=r"glue: is a folder here too.* write \./glue"):
        compute(["glue"], [1], [1])


@pytest.mark.parametrize(("name", "folder"), [("mine", "evaluate-metric--mine"), ("me/mine", "me--mine")])
def test_a_metric_of_the_hub_is_used_offline_once_it_is_cached(name: str, folder: str, modules_cache: Path) -> None:
    with pytest.raises(ConfigError, match="not in the cache"):
        check([name])
    write(modules_cache / "evaluate_modules/metrics" / folder / ("0" * 64) / "mine.py", OWN + NO_ATTEMPT)
    check([name])
    assert compute([name], [7], [1]) == {"accuracy": 7, "all": [1]}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_evaluate_itself_loads_each_file(name: str, modules_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    monkeypatch.chdir(modules_cache)
    metric = evaluate.load(str(recipes_folder() / "metrics" / f"{SHIPPED[name].module}.py"))
    rows: dict[str, Any] = {"squad": (["x"], [["x"]]), "seqeval": ([["B-X"]], [["B-X"]])}
    guess, truth = rows.get(
        name, (["x y"], ["x y"]) if name in ("bleu", "chrf", "rouge", "exact_match") else ([1], [1])
    )
    assert metric.compute(predictions=guess, references=truth) == compute([name], guess, truth)


# --- what is refused -------------------------------------------------------------------------------------


def test_an_unknown_name_is_told_all_ways_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for offline in ("1", "0"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        start = time.perf_counter()
        with pytest.raises(ConfigError) as caught:
            check(["f1", "acuracy"], "recipe_args.metrics")
        assert time.perf_counter() - start < 3
        message = str(caught.value)
        assert message.startswith(
            "recipe_args.metrics: acuracy: no such metric; did you mean accuracy? ours: accuracy,"
        )
        assert "the path of its file or folder" in message
        assert ("HF_HUB_OFFLINE" if offline == "1" else "cannot be reached") in message
        assert "\n" not in message


BAD: list[tuple[type[LaunchError], str, str, Any, Any, dict[str, Any]]] = [
    (DataError, "2 predictions but 1 references", "accuracy", [1, 0], [1], {}),
    (DataError, "no rows", "accuracy", [], [], {}),
    (DataError, r"predictions, row 1: 0.7 is no label", "f1", [1, 0.7], [1, 0], {}),
    (DataError, r"references, row 1: -1 is no label", "accuracy", [1, 0], [1, -1], {}),
    (DataError, r"predictions, row 0: 3 is no label; allowed is 0 to 2", "f1", [3], [0], {"classes": 3}),
    (DataError, r"predictions, row 0: 2 is no label; allowed is 0 or 1", "f1", [[2, 0]], [[1, 0]], {}),
    (DataError, r"references, row 1: has 1 labels, row 0 has 2", "f1", [[1, 0], [1, 0]], [[1, 0], [1]], {}),
    (DataError, r"references have 1 labels per row, predictions 2", "f1", [[1, 0]], [[1]], {}),
    (DataError, "one label per row", "matthews_correlation", [[1, 0]], [[1, 0]], {}),
    (DataError, r"accuracy: does not take such rows.*predictions like 'cat'", "accuracy", ["cat"], ["dog"], {}),
    (DataError, r"squad: does not take such rows.*references like 'dog'", "squad", ["dog"], ["dog"], {}),
    (DataError, r"row 1: has no reference", "bleu", ["a", "b"], [["a"], []], {}),
    (ConfigError, r"tokenize = 14a: no such tokenizer; allowed: none", "bleu", ["a"], ["a"], {"tokenize": "14a"}),
    (ConfigError, r"bleu: no option tokenise; allowed: tokenize", "bleu", ["a"], ["a"], {"tokenise": "zh"}),
    (ConfigError, r"version = 2.0: allowed", "squad", ["a"], [["a"]], {"version": 2.0}),
    (DataError, r"row 1: has no answer.*1\.1", "squad", ["a", ""], [["a"], []], {"version": "1.1"}),
    (DataError, "row 0: 1 predicted tags but 2", "seqeval", [["O"]], [["O", "O"]], {}),
    (DataError, "no targets", "perplexity", [1.0], [0], {}),
    (ConfigError, r"./no.py: no such .py file or folder; ours", "./no.py", [1], [1], {}),
    (ConfigError, "no file tests.py in that folder", str(Path(__file__).parent), [1], [1], {}),
]


@pytest.mark.parametrize(("error", "message", "name", "predictions", "references", "options"), BAD)
def test_what_cannot_be_computed_is_said_in_one_line(
    error: type[LaunchError], message: str, name: str, predictions: Any, references: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message) as caught:
        compute([name], predictions, references, {name: options} if options else None)
    assert "\n" not in str(caught.value)


def test_options_go_with_a_metric_that_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="options for chrf, which is not among the metrics: bleu"):
        compute(["bleu"], ["a"], ["a"], {"chrf": {"word_order": 2}})


def test_a_missing_library_is_named_as_pip_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    there = metrics.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "sklearn" else there(name, *rest)
    )
    check(["bleu"])
    with pytest.raises(ConfigError, match="accuracy: needs sklearn, which is missing: pip install scikit-learn"):
        check(["bleu", "accuracy"])


def test_checking_names_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import json, sys, recipes.metrics; recipes.metrics.check(sorted(recipes.metrics.SHIPPED)); "
        "print(json.dumps(list(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **python_environment()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(json.loads(done.stdout))
    assert "recipes.metrics" in loaded
    assert (
        loaded & {"torch", "evaluate", "datasets", "transformers", "sklearn", "sacrebleu", "numpy", "seqeval"} == set()
    )
