"""`shoal eval` by its real command: the numbers of the run itself, alone and on two ranks, and on other data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.commands import shoal

OWN = Path(__file__).with_name("predicting_recipe.py")


def evaluations(run: Path) -> dict[int, dict[str, Any]]:
    """By update."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["update"]: record for record in records if record["kind"] == "eval"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "run.yaml").write_text(
        f"recipe: {OWN}\n"
        "train: {global_batch_size: 8, max_steps: 6, learning_rate: 0.02, micro_batch_size: 4}\n"
        "eval: {every_epochs: 1, best_metric: right}\n"
        "save: {every_steps: 2, keep_last: null, keep_best: 1}\n"
        "parallel: {device: cpu}\n"
    )
    done = shoal(folder, "run", "run.yaml", "--out", "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
def test_an_evaluation_while_training_is_by_epochs_and_kept_whole(run: Path) -> None:
    found = evaluations(run)
    assert sorted(found) == [0, 2, 4, 6], "16 samples are two updates of 8"
    kept = {update: json.loads((run / f"eval/step-{update:06d}.json").read_text()) for update in found}
    assert kept[6]["right"] == found[6]["right"]
    assert len(kept[6]["rows"]) == 4 and "rows" not in found[6], "what is no number is kept beside the records"
    best = max(found, key=lambda update: (found[update]["right"], -update))
    assert json.loads((run / "result.json").read_text())["best"]["update"] == best
    assert found[best]["right"] > found[0]["right"], "it learns"


@pytest.mark.dist
@pytest.mark.slow
def test_a_checkpoint_and_the_final_model_give_the_numbers_of_the_run_again(run: Path) -> None:
    found = evaluations(run)
    for arguments, update in (
        (["run"], 6),
        (["run", "--checkpoint", "step-000002", "parallel.devices=2", "eval.batch_size=3"], 2),
        (["run/checkpoints/step-000004", "parallel.devices=2", "parallel.strategy=fsdp2"], 4),
    ):
        done = shoal(run.parent, "eval", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["metrics"]["loss"] == pytest.approx(found[update]["loss"], rel=1e-6)
        assert result["metrics"]["right"] == found[update]["right"]
        assert result["samples"] == 4
        whole = json.loads((Path(result["run_folder"]) / "evaluation.json").read_text())
        assert len(whole["rows"]) == 4
    assert evaluations(run) == found, "the run itself is as it was"


@pytest.mark.slow
def test_weights_of_another_model_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    done = shoal(tmp_path, "eval", "run", "recipe_args.width=32")
    assert done.returncode == 5, done.stderr
    assert "of another model than the recipe builds with these settings" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_not_there_is_told_in_a_line(tmp_path: Path) -> None:
    done = shoal(tmp_path, "eval", "nowhere")
    assert (done.returncode, len(done.stderr.splitlines())) == (5, 1), done.stderr
