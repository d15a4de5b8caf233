"""The page of a run is kept up to date while it goes on, and no trouble with it is one of the run's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.report import refresh
from launch.report.refresh import kept_reported
from tests.commands import shoal
from tests.run_folders import run_folder, update, write_records

OWN = Path(__file__).with_name("own_recipe.py")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh, "EVERY_SECONDS", 0.05)
    monkeypatch.setattr(refresh, "SHARE", 1.0)


def wait(ready: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < until, "waited for a minute"
        time.sleep(0.02)


def test_it_is_written_when_there_is_news_and_at_the_end(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", updates=3)
    report = folder / "report.html"
    with kept_reported(folder):
        time.sleep(0.5)
        assert not report.exists(), "there is no news"
        write_records(folder, [update(4)])
        wait(report.exists)
        assert "4 of 100" in report.read_text(encoding="utf-8")
        report.unlink()
        time.sleep(0.5)
        assert not report.exists(), "nothing has changed since"
    assert report.exists(), "the last time"
    assert not list(folder.glob("*.tmp"))


def test_it_is_not_written_for_a_run_that_is_not_ours(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", updates=3)
    with pytest.raises(ValueError, match="another one has it"), kept_reported(folder):
        raise ValueError("another one has it")
    time.sleep(0.3)
    assert not (folder / "report.html").exists()


def test_trouble_is_told_once_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run", updates=3)
    (folder / "report.html").mkdir()
    with kept_reported(folder):
        for number in range(4, 8):
            write_records(folder, [update(number)])
            time.sleep(0.3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"shoal: {folder}/report.html: the report cannot be written: Is a directory")
    assert line.endswith(f"; that does the run no harm, and `shoal report {folder}` writes it")
    assert not list(folder.glob("*.tmp")), "nothing is left of it"


def test_a_disk_that_is_nearly_full_is_left_to_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", updates=3)
    monkeypatch.setattr("launch.report.page.SPARE_BYTES", 10**18)
    with kept_reported(folder):
        pass
    assert "no report.html is written: the disk is nearly full" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_a_file_that_cannot_be_read_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run", updates=3)
    with kept_reported(folder):
        (folder / "plan.json").write_text("{")
    assert re.fullmatch(r"shoal: .*plan\.json: cannot be read: .*\n", capsys.readouterr().err)


def test_writing_that_hangs_keeps_nobody(tmp_path: Path) -> None:
    """A process that leaves while its page is being written, for ever, leaves at once."""
    folder = run_folder(tmp_path / "run", updates=3)
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom launch.report import refresh\n"
        "refresh.LAST_SECONDS = 0.2\nrefresh.write_page = lambda *_: time.sleep(600)\n"
        "with refresh.kept_reported(Path(sys.argv[1])):\n    pass\nprint('left')"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


@pytest.mark.slow
def test_a_run_that_fails_leaves_a_page_with_the_cause_on_top(tmp_path: Path) -> None:
    shutil.copy(OWN, tmp_path / "own.py")
    (tmp_path / "own.yaml").write_text("recipe: ./own.py\n")
    keys = ["train.max_steps=12", "train.global_batch_size=4", "recipe_args.failing_rank=0"]
    done = shoal(tmp_path, "run", "own.yaml", *keys, "--out", "run")
    assert done.returncode == 1
    text = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    sections = re.findall(r'<section id="([\w-]+)"', text)
    assert sections[0] == "failure"
    told = text.partition('<section id="failure"')[2].partition("</section>")[0]
    assert "ValueError: the fifth batch is odd" in told and "logs/rank-0.log" in told and "Traceback" in told
    assert '<span class="state state-failed">failed</span>' in text
