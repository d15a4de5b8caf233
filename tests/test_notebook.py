"""Runs from a notebook: real kernels, real runs in processes below them, and the stop button."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.checkpoints import damage, listed
from launch.notebook import Result, RunError, run
from launch.notebook_facts import facts_of
from launch.topology import Machine, notebook_variables
from tests.kernels import Cell, Kernel, kernel

RECIPE = str(Path(__file__).with_name("own_recipe.py"))

GPU = Machine("host", 4, 2, gpu_name="Tesla T4", gpu_memory_bytes=16 * 10**9)
TPU = Machine("host", 4, 0, tpus=8, tpu_name="TPU v5e")
CPU = Machine("host", 4, 0)


@pytest.mark.parametrize(
    ("variables", "colab", "machine", "where", "device"),
    [
        ({}, False, CPU, "plain CPU", "4 cores"),
        ({}, True, TPU, "Colab TPU", "8 × TPU v5e"),
        ({"COLAB_RELEASE_TAG": "x"}, False, CPU, "Colab CPU", "4 cores"),
        ({"COLAB_RELEASE_TAG": "x"}, True, GPU, "Colab GPU", "2 × Tesla T4 with 16.0 GB"),
        ({"KAGGLE_KERNEL_RUN_TYPE": "x"}, True, GPU, "Kaggle GPU", "2 × Tesla T4 with 16.0 GB"),
        ({"KAGGLE_URL_BASE": "x"}, False, TPU, "Kaggle TPU", "8 × TPU v5e"),
    ],
)
def test_where_a_kernel_is(variables: dict[str, str], colab: bool, machine: Machine, where: str, device: str) -> None:
    found = facts_of(variables, machine, {"torch": "2.9.0+cpu"}, colab)
    assert (found.where, found.device) == (where, device), found
    assert "2.9.0+cpu" in str(found) and "2.9.0+cpu" in found._repr_html_()


def test_of_the_variables_none_is_a_secret() -> None:
    environment = {"KAGGLE_USER_SECRETS_TOKEN": "x", "KAGGLE_URL_BASE": "y", "HOME": "/", "TPU_NAME": "local"}
    assert notebook_variables(environment) == {"KAGGLE_URL_BASE": "y", "TPU_NAME": "local"}


# --- runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Kernel, Path]]:
    """A kernel, and the folder that it is in."""
    folder = tmp_path_factory.mktemp("notebook")
    with kernel(folder, OMP_NUM_THREADS="1") as started:
        yield started, folder


def cell_of(out: str, *, steps: int = 4, seconds: float = 0.0) -> str:
    """A cell that trains."""
    recipe = {"recipe": RECIPE, "recipe_args": {"seconds_per_batch": seconds}, "train": {"global_batch_size": 8}}
    settings = {"train.max_steps": steps}
    return f"from launch.notebook import run\nrun({recipe!r}, {settings!r}, out={out!r})"


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def shown_error(cell: Cell) -> str:
    """What a cell shows of its error, which is the message and nothing else."""
    assert cell.error
    assert cell.error["ename"] == "RunError"
    assert cell.error["traceback"] == [cell.error["evalue"]]
    message: str = cell.error["evalue"]
    return message


@pytest.mark.slow
def test_a_cell_shows_the_lines_of_a_run_and_then_its_table_and_shows_it_again(shared: tuple[Kernel, Path]) -> None:
    started, folder = shared
    at_once: list[str] = []

    def before_its_end(cell: Cell) -> bool:
        if "preparing" in cell.printed and not (folder / "whole/result.json").exists():
            at_once.append(cell.printed)
        return bool(at_once)

    cell = started.run(cell_of("whole"), before_its_end)
    assert cell.error is None, cell.error
    assert at_once, "lines appear as they are said"
    result = json.loads((folder / "whole/result.json").read_text())
    assert f"{result['validation']['after']['loss']:.4f}" in cell.value["text/html"]
    assert str(folder / "whole/report.html") in cell.value["text/html"]
    assert cell.value["text/plain"] == result["summary"]
    again = started.run(cell_of("whole"))
    assert again.value == cell.value
    assert "finished already" in again.printed
    assert started.run("import sys; sorted({'torch', 'torch_xla', 'transformers'} & {*sys.modules})").value == {
        "text/plain": "[]"
    }


@pytest.mark.slow
def test_the_stop_button_saves_and_the_cell_run_again_goes_on(shared: tuple[Kernel, Path]) -> None:
    started, folder = shared

    def stop(_: Cell) -> bool:
        if len(records(folder / "stopped", "train")) < 2:
            return False
        here = os.getsid(started.manager.provisioner.pid)
        assert {os.getsid(child.pid) for child in children(started)}.isdisjoint({here}), "told by us alone, and once"
        started.manager.interrupt_kernel()
        return True

    cell = started.run(cell_of("stopped", steps=40, seconds=0.1), stop)
    told = json.loads((folder / "stopped/stopped.json").read_text())
    assert 2 <= told["update"] < 40
    assert shown_error(cell) == (
        f"stopped by Ctrl-C after update {told['update']}; checkpoint {told['checkpoint']}; "
        f"go on with: shoal resume {folder / 'stopped'}; or run this cell again"
    )
    assert damage(listed(folder / "stopped")[0]) is None
    assert children(started) == []
    again = started.run(cell_of("stopped", steps=40, seconds=0.1))
    assert again.error is None, again.error
    updates = [record["update"] for record in records(folder / "stopped", "train")]
    assert updates == [*range(1, 41)], "each update once: it has gone on, not begun anew"


@pytest.mark.slow
def test_what_is_wrong_is_told_in_one_line(shared: tuple[Kernel, Path]) -> None:
    started, folder = shared
    wrong = "from launch.notebook import run\nrun('causal_lm', {'train.max_stepz': 3}, out='none')"
    assert shown_error(started.run(wrong)) == (
        "command line: train.max_stepz = 3: unknown key; did you mean train.max_steps?"
    )
    assert not (folder / "none").exists()


@pytest.mark.slow
def test_the_run_of_a_kernel_that_is_gone_saves_and_leaves(tmp_path: Path) -> None:
    with kernel(tmp_path, OMP_NUM_THREADS="1") as started:
        below: list[psutil.Process] = []

        def kill(_: Cell) -> bool:
            if len(records(tmp_path / "run", "train")) < 2:
                return False
            below.extend(children(started))
            raise KeyboardInterrupt  # out of waiting for a cell that will never end

        with pytest.raises(KeyboardInterrupt):
            started.run(cell_of("run", steps=400, seconds=0.1), kill)
        assert len(below) >= 2, "the launcher and a rank"
        started.kill()
        _, left = psutil.wait_procs(below, timeout=30)
    assert not left
    newest, *_ = listed(tmp_path / "run")
    assert damage(newest) is None
    assert json.loads((tmp_path / "run/stopped.json").read_text())["signal"] == "SIGTERM"


def children(started: Kernel) -> list[psutil.Process]:
    """Below the kernel, without what is only waited for."""
    found = psutil.Process(started.manager.provisioner.pid).children(recursive=True)
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


# --- settings --------------------------------------------------------------------------------------------


def test_settings_that_a_run_file_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        run("causal_lm", {"train.max_steps": {1}}, out=tmp_path / "run")
    assert str(caught.value).startswith("train.max_steps = {1}: a set cannot be written to a run file; settings are ")
    assert caught.value.exit_code == 2
    with pytest.raises(RunError, match=r"^train = \{'learning_rate': nan\}: "):
        run({"recipe": "causal_lm", "train": {"learning_rate": float("nan")}}, out=tmp_path / "run")


def test_a_result_says_what_it_holds(tmp_path: Path) -> None:
    values = {
        "validation": {"after": {"loss": 1.5, "<b>": 0.25}},
        "best": {"update": 3, "loss": 1.25},
        "summary": "validation loss: 1.5000",
    }
    result = Result(tmp_path, values)
    assert (result.metrics, result.metrics_before, result.model) == ({"loss": 1.5, "<b>": 0.25}, {}, None)
    shown = result._repr_html_()
    assert "best after update 3: loss 1.25" in shown and "1.5" in shown
    assert "<b>" not in shown and "&lt;b&gt;" in shown
    assert "report" not in shown, "there is none"
    assert repr(result) == "validation loss: 1.5000"
