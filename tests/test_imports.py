"""How heavy packages are imported."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from launch.imports import importing


def test_no_garbage_is_collected_inside_and_what_is_there_is_not_walked_over_again() -> None:
    before = gc.get_freeze_count()
    try:
        with importing():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > before + 1000
    finally:
        gc.unfreeze()


def test_it_is_collected_again_after_an_import_that_fails_and_not_where_nobody_wants_it() -> None:
    try:
        with pytest.raises(ImportError), importing():
            import launch.nothing  # type: ignore[import-not-found]  # noqa: F401
        assert gc.isenabled()
        gc.disable()
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


def test_scipy_is_not_imported_for_one_function_of_losses_that_nobody_asked_for() -> None:
    program = """
import sys
from launch.imports import importing
with importing():
    import transformers.modeling_layers
    from transformers.loss import loss_for_object_detection as loss
assert not [name for name in sys.modules if name.startswith("scipy")], "it takes a third of a second"
rows, columns = loss.linear_sum_assignment([[4.0, 1.0], [2.0, 3.0]])
assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0])
import scipy.optimize
assert type(scipy.optimize).__name__ == "module" and scipy.optimize.minimize
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_who_wants_more_of_scipy_gets_it() -> None:
    program = """
import sys
from launch.imports import importing
with importing():
    from scipy.optimize import minimize
    import scipy.optimize
assert minimize is scipy.optimize.minimize is sys.modules["scipy.optimize"].minimize
before = sys.modules["scipy.optimize"]
with importing():
    assert sys.modules["scipy.optimize"] is before
assert sys.modules["scipy.optimize"] is before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_rows_that_are_prepared_are_read_without_datasets(tmp_path: Path) -> None:
    """Each rank would import it and pandas: 60 MB, and a third of a second."""
    program = """
import sys
from pathlib import Path
from launch.cache import Cache
from launch.recipe import RecipeContext
from recipes import causal_lm, masked_lm, question_answering, text_classification, token_classification, translation
context = RecipeContext(Cache(Path(sys.argv[1])), seed=0)
recipes = causal_lm, masked_lm, question_answering, text_classification, token_classification, translation
for recipe in recipes:
    prepared = recipe.prepare(recipe.Args(), context)
    assert prepared.collate([prepared.train[0], prepared.train[1]])
prepared = causal_lm.prepare(causal_lm.Args(format="chat"), context)
assert prepared.train[0].shape[0] == 2
print(*{"datasets", "pandas"} & set(sys.modules))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, check=True)
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == ""
