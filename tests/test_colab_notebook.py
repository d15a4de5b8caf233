"""The notebook for Colab: clean as it is shipped, and run from top to bottom in a real kernel, twice."""

from __future__ import annotations

import json
import time
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement

from launch.checkpoints import listed
from tests.commands import ROOT
from tests.kernels import Cell, kernel

NOTEBOOK = ROOT / "notebooks/colab_tpu.ipynb"

STEPS = 60


def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def with_parameters(folder: Path) -> Any:
    """The notebook with settings of ours behind its own: the model that needs no download, and a text from here."""
    text = (ROOT / "docs/why.md").read_text(encoding="utf-8")
    (folder / "train.txt").write_text(text * 3, encoding="utf-8")
    (folder / "validation.txt").write_text(text[:3000], encoding="utf-8")
    data = {"train_files": "train.txt", "validation_files": "validation.txt"}
    content = notebook()
    position = next(at for at, cell in enumerate(content.cells) if "parameters" in cell.metadata.get("tags", ()))
    ours = f"MODEL, DATA, BLOCK, STEPS, FOLDER = 'embedded', {data!r}, 32, {STEPS}, 'runs/first'"
    content.cells.insert(position + 1, nbformat.v4.new_code_cell(ours))
    return content


def updates(folder: Path) -> list[int]:
    path = folder / "runs/first/metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    return [row["update"] for row in rows if row["kind"] == "train"]


def test_it_is_shipped_without_outputs() -> None:
    content = notebook()
    nbformat.validate(content)
    cells = [cell for cell in content.cells if cell.cell_type == "code"]
    assert len(cells) >= 7
    assert [(cell.outputs, cell.execution_count) for cell in cells] == [([], None)] * len(cells)


def test_it_installs_beside_torch_and_not_over_it() -> None:
    """The cell's own check sees a torch that was replaced."""
    (cell,) = [cell for cell in notebook().cells if cell.id == "install"]
    names = {"SHOAL": ""}
    exec(cell.source, names)
    replaced = cell.source.replace("if SHOAL:", 'before["torch"] = "0.1"\nif SHOAL:')
    assert replaced != cell.source
    with pytest.raises(AssertionError, match=r"'torch': '0\.1'.* was replaced by .*'torch': '2"):
        exec(replaced, names)


COLAB = {
    "torch": "2.9.0+cpu",
    "transformers": "5.15.0",
    "datasets": "4.8.5",
    "numpy": "2.1.3",
    "huggingface_hub": "1.27.0",
    "safetensors": "0.8.0",
    "tokenizers": "0.22.2",
    "pyarrow": "25.0.1",
}
"""What the TPU runtime has. Source: github.com/googlecolab/backend-info, pip-freeze.tpu.txt of 2026-08-19.

Replaced by pip are accelerate 1.14.0, which knows fewer keys of its own files, filelock 3.32.3 and plotly 5.24.1.
"""


def test_shoal_is_content_with_the_packages_that_colab_has() -> None:
    """Those that others there are built on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    assert bounds.keys() >= COLAB.keys()
    assert [name for name, version in COLAB.items() if not bounds[name].contains(version)] == []


@pytest.mark.slow
def test_a_kernel_that_goes_away_and_the_notebook_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = with_parameters(tmp_path)
    cells = [cell.source for cell in content.cells if cell.cell_type == "code"]

    def disconnect(_: Cell) -> bool:
        if len(updates(tmp_path)) >= 3:
            raise ConnectionAbortedError
        return False

    def follow() -> None:
        for cell in cells:
            done = first.run(cell, disconnect)
            assert done.error is None, done.error

    with kernel(tmp_path, OMP_NUM_THREADS="1") as first:
        with pytest.raises(ConnectionAbortedError):
            follow()
        first.kill()
    before = settled(tmp_path)
    assert 3 <= before[-1] < STEPS

    here = {"PYTHONPATH": str(ROOT), "SHOAL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    NotebookClient(content, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert updates(tmp_path) == [*range(1, STEPS + 1)], "it has gone on, not begun anew"
    shown = {cell.id: cell.outputs for cell in content.cells if cell.cell_type == "code"}
    result = json.loads((tmp_path / "runs/first/result.json").read_text())
    loss = result["validation"]["after"]["loss"]
    assert loss < result["validation"]["before"]["loss"]
    assert f"{loss:.4f}" in shown["train"][-1].data["text/html"]
    assert str(loss) in shown["again"][-1].data["text/plain"]
    assert "torch" in shown["install"][-1].data["text/plain"]
    assert "plain" in shown["facts"][-1].data["text/html"]
    assert "model.safetensors" in shown["model"][0].text


def settled(folder: Path) -> list[int]:
    """What was done when the run has left, which it does with a checkpoint."""
    until = time.monotonic() + 60
    while not (folder / "runs/first/stopped.json").exists():
        assert time.monotonic() < until
        time.sleep(0.1)
    assert listed(folder / "runs/first")
    return updates(folder)
