"""The page as a real browser shows it: on a phone and on a desk, light and dark."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.record import write_json
from launch.report.page import write_page
from launch.root_cause import Cause, write_cause
from launch.status import by_folder
from tests.browser import look_at
from tests.commands import ROOT
from tests.run_folders import BEGAN, evaluation, run_folder, update, write_records

HOSTILE = "</script><script>throw 'broken out'</script>"

BUTTONS = {"Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes", "Download plot as a PNG"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of everything that a page can hold, and the same beside others."""
    parent = tmp_path_factory.mktemp("pages")
    all_sorts = run_folder(parent / "a-run-with-a-long-name-that-must-break-on-a-narrow-screen", updates=60)
    write_records(all_sorts, [evaluation(each, 5 - each / 20, best=True, accuracy=each / 60) for each in (10, 30, 60)])
    resumed = {"kind": "resume", "update": 60, "checkpoint": "step-000060", "time": BEGAN + 400}
    write_records(all_sorts, [resumed, *(update(each, time=BEGAN + 400 + 3 * each) for each in range(61, 90))])
    slow = {"kind": "straggler", "update": 70, "rank": 1, "message": f"rank 1 {HOSTILE}", "time": BEGAN + 700}
    write_records(all_sorts, [slow, update(90, float("nan"), time=BEGAN + 900)])
    write_records(all_sorts, [update(each) for each in range(61, 70)], "metrics-discarded.jsonl")
    write_cause(all_sorts, Cause(1, f"rank 0 (here): {HOSTILE}", 0, "here", 90, "/a/log", "Traceback:\n  boom\n" * 9))
    (all_sorts / "eval").mkdir()
    found = {"examples": [{"source": "word " * 90, "prediction": HOSTILE}], "labels": ["a", "b"]}
    write_json(all_sorts / "eval/step-000060.json", {"update": 60, **found, "confusion_matrix": [[1, 2], [3, 4]]})
    done = run_folder(parent / "done", "train.seed=7", updates=30)
    peaks = {"peak_memory": [2 * 10**9, 3 * 10**9], "planned_memory": 4 * 10**9}
    write_json(done / "result.json", {"summary": "validation loss: 5 → 4", **peaks})
    others = [run_folder(parent / f"other-{number}", updates=3 * number) for number in range(3)]
    alone, several = parent / "alone.html", parent / "several.html"
    write_page([by_folder(all_sorts)], alone)
    write_page([by_folder(each) for each in (all_sorts, done, *others)], several)
    return {"alone": alone, "several": several}


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_is_drawn_readable_and_asks_nobody(dark: bool, pages: dict[str, Path], tmp_path: Path) -> None:
    seen, console = look_at(pages, tmp_path, dark=dark)
    assert console == [], "no error, and nothing that the page's policy has kept from running"
    assert set(seen) == {"alone-phone", "alone-desktop", "several-phone", "several-desktop"}
    for name, page in seen.items():
        assert page["overflow"] == 0, f"{name}: nothing is wider than the screen"
        assert page["loaded"] == 0, f"{name}: nothing is loaded"
        assert page["contrast"][0] >= 4.5, f"{name}: {page['contrast']} (WCAG 2.2, 1.4.3)"
        assert page["marks"] >= 3, f"{name}: curves can be seen (1.4.11)"
        drawn = {key: marks for key, marks, _ in page["charts"]}
        assert len(drawn) >= 8 and all(drawn.values()), f"{name}: every chart has something drawn: {drawn}"
        assert all(beyond <= 0 for _, _, beyond in page["charts"]), f"{name}: no chart is cut off"
        assert set(page["buttons"]) == BUTTONS, f"{name}: no other, for one would send the data away"
        _zooms(name, page)
    assert {key: marks for key, marks, _ in seen["several-phone"]["charts"]}["chart-loss"] > 5


def _zooms(name: str, page: dict[str, Any]) -> None:
    """Dragging over a chart zooms on a desk; a finger scrolls the page instead."""
    if name.endswith("desktop"):
        assert page["zoomed"] == pytest.approx(0.4, abs=0.02), name
    else:
        assert page["zoomed"] == 1, name


@pytest.mark.slow
@pytest.mark.parametrize(("wish", "code", "outcome"), [("", 0, "2 skipped"), ("required", 1, "2 errors")])
def test_without_a_browser(wish: str, code: int, outcome: str, tmp_path: Path) -> None:
    arguments = ["-q", f"{__file__}::test_it_is_drawn_readable_and_asks_nobody"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env={**os.environ, "SHOAL_BROWSER": wish, "PATH": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert outcome in done.stdout.splitlines()[-1]
    assert "no browser here: chromium is not installed" in done.stdout
