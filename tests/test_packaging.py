"""What is shipped works without this checkout: as a wheel in a fresh environment, and as a bare copy of the files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from launch import __version__

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command that must succeed, in an environment that knows nothing of this checkout; its stdout."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing a build leaves behind lies in the checkout."""
    copy = bare_copy(tmp_path_factory.mktemp("source"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", copy / "dist", copy, cwd=copy)
    (built,) = (copy / "dist").iterdir()
    return built


def bare_copy(folder: Path) -> Path:
    """The files of the project, without what git ignores and without git."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert "launch/cli.py" in names
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_wheel_holds_all_that_is_needed_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    needed = {
        "launch/py.typed",
        "launch/engine/loop.py",
        *(f"launch/report/page.{kind}" for kind in ("py", "css", "js")),
        "recipes/causal_lm.py",
        "recipes/causal_lm.yaml",
        *(f"launch/_assets/{path.relative_to(ROOT)}" for path in ROOT.glob("accelerate_configs/*.yaml")),
        *(f"launch/_assets/{path.relative_to(ROOT)}" for path in ROOT.glob("ds_configs/*.json")),
        f"shoal-{__version__}.dist-info/licenses/LICENSE",
        f"shoal-{__version__}.dist-info/entry_points.txt",
    }
    assert needed <= set(names), needed - set(names)
    assert {name.partition("/")[0] for name in names} == {"launch", "recipes", f"shoal-{__version__}.dist-info"}


@pytest.mark.dist
@pytest.mark.slow
def test_the_wheel_trains_the_demo_recipe_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """In a fresh environment; only the dependencies are borrowed from the one the tests run in."""
    fresh, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", fresh, cwd=tmp_path)
    python = fresh / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=elsewhere)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=elsewhere).strip())
    # A folder named in a .pth file is searched last, and its own .pth files (an editable shoal) are not read.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    cache = {"SHOAL_CACHE": str(tmp_path / "cache")}
    shoal = fresh / "bin" / "shoal"
    assert run(shoal, "--version", cwd=elsewhere) == run(python, "-m", "launch", "--version", cwd=elsewhere)
    short = ("train.max_steps=2", "parallel.devices=2", "--json", "--out", elsewhere / "run")
    result = json.loads(run(shoal, "run", "causal_lm", *short, cwd=elsewhere, **cache))
    assert result["updates"] == 2
    assert (elsewhere / "run/export/model.safetensors").is_file()
    plan = json.loads((elsewhere / "run/plan.json").read_text())["plan"]
    assert plan["environment"]["PYTHONPATH"] == str(packages), "the code that ran is the installed one"
    configs = run(
        python, "-c", "from launch.assets import *; print(shipped_folder('accelerate_configs'))", cwd=elsewhere
    )
    assert (Path(configs.strip()) / "ddp.yaml").is_file()
    assert Path(configs.strip()).is_relative_to(packages)


def test_a_bare_copy_of_the_files_runs_where_it_lies(tmp_path: Path) -> None:
    copy = bare_copy(tmp_path / "copy")
    cache = {"SHOAL_CACHE": str(tmp_path / "cache")}
    out = tmp_path / "run"
    shown = run(
        sys.executable, "-m", "launch", "run", "causal_lm", "train.max_steps=2", "--out", out, cwd=copy, **cache
    )
    assert "validation perplexity: " in shown
    recorded = json.loads((out / "plan.json").read_text())
    assert recorded["plan"]["environment"]["PYTHONPATH"] == str(copy)
    assert recorded["git"] is None
