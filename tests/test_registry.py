"""From names to recipes and run files, and a user's own recipe outside the package."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.assets import recipes_folder
from launch.config import load
from launch.errors import ConfigError
from launch.recipe import RecipeArgs, RecipeContext
from launch.registry import find_run_file, load_module, load_recipe, shipped_recipes
from tests.commands import shoal

ROOT = Path(__file__).parents[1]
OWN = Path(__file__).with_name("own_recipe.py")


# --- shipped ---------------------------------------------------------------------------------------------


RECIPES = [
    *("causal_lm", "masked_lm", "question_answering", "summarization"),
    *("text_classification", "token_classification", "translation"),
]
RUN_FILES = sorted(
    [
        *RECIPES,
        *("causal_lm_chat", "causal_lm_smollm", "question_answering_squad", "summarization_cnn"),
        *("text_classification_minilm", "translation_opus"),
    ]
)


def test_the_shipped_recipes() -> None:
    assert shipped_recipes() == RECIPES


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_keeps_the_contract_and_its_run_file_says_what_to_expect(name: str) -> None:
    module = load_module(name, "here")
    assert issubclass(module.Args, RecipeArgs) and callable(module.prepare) and module.__doc__
    run_file = recipes_folder() / f"{name}.yaml"
    recipe = load_recipe(load(run_file, []))
    assert recipe.module is module
    header = run_file.read_text(encoding="utf-8").partition("\n\n")[0]
    for what in ("command", "time", "expected"):
        assert re.search(rf"^#   {what} +\S", header, re.MULTILINE), f"the header of {run_file.name} states no {what}"


@pytest.mark.parametrize("text", ["causal_lm", "causal_lm.yaml", "recipes/causal_lm.yaml", "recipes/causal_lm"])
def test_a_shipped_run_file_is_found_from_anywhere(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_run_file(text) == recipes_folder() / "causal_lm.yaml"


def test_a_file_of_the_user_wins_over_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("causal_lm.yaml").write_text("recipe: causal_lm\n")
    assert find_run_file("causal_lm.yaml") == Path("causal_lm.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("causal_ml", "causal_ml: no such run file; did you mean causal_lm?"),
        ("mine/causal_lm.yaml", "mine/causal_lm.yaml: no such run file; did you mean causal_lm?"),
        ("zzz.yaml", "zzz.yaml: no such run file;"),
        ("causal_lm.yml", "causal_lm.yml: no such run file; did you mean causal_lm?"),
    ],
)
def test_a_run_file_that_is_not_there(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_run_file(text)
    assert str(caught.value) == f"{message} shipped: {', '.join(RUN_FILES)}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "causal_ml",
            "run.yaml:1: recipe = causal_ml: no such recipe; did you mean causal_lm? shipped: "
            f"{', '.join(RECIPES)}; your own is named by its path, ./my_recipe.py",
        ),
        ("./none.py", "run.yaml:1: recipe = none.py: no such file"),
    ],
)
def test_a_recipe_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_module(name, "run.yaml:1")
    assert str(caught.value) == message


def test_a_foreign_package_of_the_same_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/__init__.py").write_text("")
    for module in [name for name in sys.modules if name.partition(".")[0] == "recipes"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        load_module("causal_lm", "run.yaml:1")
    assert str(caught.value) == (
        f"run.yaml:1: recipe = causal_lm: another package named `recipes` hides shoal's ({tmp_path}/recipes instead of "
        f"{recipes_folder()}); uninstall it, or run from a folder without one (torchtune installs one)"
    )


# --- a user's own ----------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(OWN, folder / "mine.py")
    (folder / "mine.yaml").write_text("recipe: ./mine.py\ntrain: {global_batch_size: 8, max_steps: 4}\n")
    return folder


def test_arguments_are_validated_by_the_recipe(project: Path) -> None:
    def refusal(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_recipe(load(project / "mine.yaml", list(overrides)))
        return str(caught.value)

    assert load_recipe(load(project / "mine.yaml", ["recipe_args.width=4"])).args.model_dump()["width"] == 4
    assert refusal("recipe_args.width=0") == ("command line: recipe_args.width = 0: must be greater than or equal to 1")
    assert refusal("recipe_args.widht=4") == (
        "command line: recipe_args.widht = 4: unknown key; did you mean recipe_args.width?"
    )


def test_what_an_own_recipe_defines_can_be_sent_to_another_process(project: Path) -> None:
    args = load_recipe(load(project / "mine.yaml", ["recipe_args.width=4"])).args
    assert pickle.loads(pickle.dumps(args)) == args


ARGS = "from launch.recipe import RecipeArgs\nclass Args(RecipeArgs): pass\n"
NO_ARGS = "{path}: a recipe needs `class Args(launch.recipe.RecipeArgs)`; "
UNUSABLE = "the recipe cannot be imported: "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", NO_ARGS + "it has none"),
        ("class Args(dict): pass\n", NO_ARGS + "its Args derives from dict"),
        ("Args = 3\n", NO_ARGS + "its Args is 3"),
        (ARGS, "{path}: a recipe needs a function `prepare(args, context)`; it has none"),
        (ARGS + "prepare = 3\n", "{path}: a recipe needs a function `prepare(args, context)`; its prepare is a int"),
        (
            ARGS + "def prepare(args): pass\n",
            "{path}:3: prepare(args) is called with two arguments; write `def prepare(args, context)`",
        ),
        (
            ARGS + "def prepare(args, context, *, x): pass\n",
            "{path}:3: prepare(args, context, *, x) is called with two arguments; write `def prepare(args, context)`",
        ),
        (
            ARGS + "def prepare(args, context): pass\ndef tokenizer(): pass\n",
            "{path}:4: tokenizer() is called with two arguments; write `def tokenizer(args, context)`",
        ),
        ("x = (\n", "{path}:1: " + UNUSABLE + "SyntaxError: '(' was never closed (bad.py, line 1)"),
        ("\nimport no_such\n", "{path}:2: " + UNUSABLE + "ModuleNotFoundError: No module named 'no_such'"),
        ("import sys\nsys.exit()\n", "{path}:2: " + UNUSABLE + "SystemExit"),
    ],
)
def test_a_module_that_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_module(str(path), "here")
    assert str(caught.value) == message.format(path=path)


def test_what_goes_wrong_beside_the_recipe_is_told_with_its_line_and_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside_a_recipe.py").write_text("def rows():\n    return {}['none']\n")
    (tmp_path / "bad.py").write_text("import beside_a_recipe\nbeside_a_recipe.rows()\n")
    with pytest.raises(ConfigError) as caught:
        load_module(str(tmp_path / "bad.py"), "here")
    assert str(caught.value) == f"{tmp_path}/beside_a_recipe.py:2: {UNUSABLE}KeyError: 'none'"
    shown = capsys.readouterr().err.splitlines()
    assert shown[:2] == ["Traceback (most recent call last):", f'  File "{tmp_path}/bad.py", line 2, in <module>']
    assert shown[-1] == "KeyError: 'none'"


@pytest.mark.parametrize("name", ["datasets.py", "calendar.py", "datasets/__init__.py"])
def test_a_file_that_has_the_name_of_a_package_is_not_taken_for_it(name: str, tmp_path: Path) -> None:
    module = name.partition("/")[0].removesuffix(".py")
    mine = tmp_path / name.partition("/")[0]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    (tmp_path / "mine.py").write_text(f"{ARGS}def prepare(args, context):\n    from {module} import anything\n")
    with pytest.raises(ConfigError) as caught:
        load_module(str(tmp_path / "mine.py"), "here")
    assert re.fullmatch(
        rf"{tmp_path}/mine.py:4: `import {module}` gives \S+{module}\S* and not {mine}, which has the same name; "
        "rename yours",
        str(caught.value),
    )


def test_a_recipe_that_imports_torch_at_its_top_is_told_what_that_costs(tmp_path: Path) -> None:
    shutil.copy(OWN, tmp_path / "quick.py")
    (tmp_path / "slow.py").write_text(f"import torch\n{ARGS}def prepare(args, context): pass\n")
    quick, slow = (shoal(tmp_path, "recipes", "show", f"./{name}.py") for name in ("quick", "slow"))
    assert (quick.returncode, quick.stderr, slow.returncode) == (0, "", 0)
    assert re.fullmatch(
        rf"shoal: {tmp_path}/slow.py: to import it takes \d+\.\d s each time, because torch is imported at the top; "
        "import it inside the functions that use it\n",
        slow.stderr,
    )


def test_a_recipe_that_hands_over_something_else(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "from launch.recipe import RecipeArgs\nclass Args(RecipeArgs): pass\ndef prepare(args, context): return 3\n"
    )
    recipe = load_recipe(load(None, [f"recipe={path}"]))
    with pytest.raises(ConfigError, match=r"prepare\(\) returned int; it must return launch\.recipe\.Prepared"):
        recipe.prepare(RecipeContext(cache=None, seed=0))  # type: ignore[arg-type]


@pytest.mark.dist
@pytest.mark.slow
def test_an_own_recipe_trains_from_any_folder_with_workers_that_load_its_samples(project: Path, tmp_path: Path) -> None:
    """It imports a file beside it, of which its data are made in each worker."""
    (project / "my_rows.py").write_text(
        "class Rows(list):\n    def __getitem__(self, index):\n        import my_numbers\n"
        "        return my_numbers.same(list(self)[index])\n"
    )
    (project / "my_numbers.py").write_text("def same(row):\n    return row\n")
    recipe = (project / "mine.py").read_text()
    assert "else rows," in recipe
    changed = recipe.replace("else rows,", "else my_rows.Rows(rows),").replace(
        "import os\n", "import os\nimport my_rows\n"
    )
    (project / "mine.py").write_text(changed)
    arguments = ["parallel.devices=2", "parallel.data_workers=1", "recipe_args.width=8", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "launch", "run", str(project / "mine.yaml"), *arguments, "--out", str(tmp_path / "run")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SHOAL_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["updates"] == 4
    assert result["validation"]["after"]["loss"] < result["validation"]["before"]["loss"]
