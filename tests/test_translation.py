"""Where pairs of texts come from in translation, and the dates it learns by default."""

from __future__ import annotations

import datetime
import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, Translation

from launch.cache import Cache
from launch.errors import ConfigError, DataError
from launch.recipe import Prepared, RecipeContext
from recipes.translation import FIRST, LAST, STYLES, Args, dates, prepare, preview, written

PAIRS = [("one", "eins"), ("two", "zwei"), ("three", "drei")]


@pytest.fixture
def context(tmp_path: Path) -> RecipeContext:
    return RecipeContext(Cache(tmp_path / "cache"), seed=0)


def texts(prepared: Prepared) -> list[tuple[str, str]]:
    """Pairs of texts, training first, read back from token ids."""

    def read(ids: list[int]) -> str:
        return str(prepared.tokenizer.decode(ids, skip_special_tokens=True))

    both: Any = itertools.chain(prepared.train, prepared.validation)
    return [(read(sample["input_ids"]), read(sample["labels"])) for sample in both]


def line_files(folder: Path, sources: list[str], targets: list[str]) -> dict[str, Any]:
    paths = [folder / "lines.en.gz", folder / "lines.de"]
    paths[0].write_bytes(gzip.compress("".join(f"{line}\n" for line in sources).encode()))
    paths[1].write_text("".join(f"{line}\n" for line in targets))
    return {"source_files": str(paths[0]), "target_files": str(paths[1])}


def test_lines_of_two_files_are_pairs(context: RecipeContext, tmp_path: Path) -> None:
    args = Args(**line_files(tmp_path, *map(list, zip(*PAIRS, strict=True))))
    preview(args, context)
    assert sorted(texts(prepare(args, context))) == sorted(PAIRS)


def test_a_line_without_its_partner_is_named(context: RecipeContext, tmp_path: Path) -> None:
    args = Args(**line_files(tmp_path, ["a", "b", "c"], ["d", "e"]))
    with pytest.raises(DataError, match=r"lines\.de: ends after line 2, but .*lines\.en\.gz goes on"):
        prepare(args, context)


def test_rows_of_texts_by_language(context: RecipeContext, tmp_path: Path) -> None:
    rows = [{"translation": {"en": source, "de": target}} for source, target in PAIRS]
    split = Dataset.from_list(rows, features=Features(translation=Translation(["en", "de"])))
    DatasetDict(train=split, validation=split).save_to_disk(tmp_path / "hub")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for data in ({"dataset": str(tmp_path / "hub")}, {"train_files": str(tmp_path / "rows.jsonl")}):
        settings = {"translation_column": "translation", "source_language": "en", "target_language": "de", **data}
        preview(Args(**settings), context)
        assert set(texts(prepare(Args(**settings), context))) == set(PAIRS)
    wrong = Args(**{**settings, "target_language": "fr"})
    with pytest.raises(DataError, match="a row has the languages en, de, not 'fr'"):
        prepare(wrong, context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source_language": "en"}, "choose texts of recipe_args.translation_column"),
        ({"translation_column": "translation", "source_language": "en"}, "needs recipe_args.source_language and"),
        ({"validation_source_files": "{en}", "validation_target_files": "{de}"}, "needs recipe_args.source_files"),
        ({"source_files": "{en}"}, "names 1 files and recipe_args.target_files 0"),
        ({"source_files": "{en}", "target_files": "{de}", "train_files": "{de}"}, "excludes recipe_args.dataset"),
        ({"source_files": "{en}", "target_files": "nowhere.de"}, "nowhere.de: no such file"),
    ],
)
def test_wrong_arguments_get_one_clear_line(
    context: RecipeContext, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    files = line_files(tmp_path, ["a"], ["b"])
    names = {"en": files["source_files"], "de": files["target_files"]}
    with pytest.raises((ConfigError, DataError)) as caught:
        preview(Args(**{key: value.format(**names) for key, value in settings.items()}), context)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dates_say_what_they_mean() -> None:
    assert written(datetime.date(1998, 3, 3), STYLES[0]) == "3rd of March 1998"
    assert written(datetime.date(2007, 5, 1), STYLES[4]) == "the 1st of May, '07"
    assert written(datetime.date(1951, 12, 12), STYLES[5]) == "Dec 12th '51"
    assert written(datetime.date(2024, 2, 11), STYLES[3]) == "Sunday, 11 February 2024"
    assert (LAST.year + 1 - FIRST.year) == 100  # two digits of a year tell it
    assert list(itertools.islice(dates(), 20)) == list(itertools.islice(dates(), 20))


def test_a_plan_needs_no_torch(tmp_path: Path) -> None:
    names = [f"recipes.{name}" for name in ("translation", "summarization")]
    code = (
        "import importlib, sys, pathlib\n"
        "from launch.cache import Cache\nfrom launch.recipe import RecipeContext\n"
        f"for name in {names}:\n"
        "    recipe = importlib.import_module(name)\n"
        f"    found = recipe.preview(recipe.Args(), RecipeContext(Cache(pathlib.Path({str(tmp_path)!r})), 0))\n"
        "    print(*found.metrics)\n"
        "assert not {'torch', 'transformers', 'datasets', 'evaluate', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [
        *("bleu", "chrf", "exact_match", "generated_length"),
        *("rouge1", "rouge2", "rougeL", "rougeLsum", "generated_length"),
    ]
