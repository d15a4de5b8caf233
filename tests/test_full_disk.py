"""A disk that is too small, or that fills up while a run is going on: a real one, of a few MB in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoints import damage, listed
from tests.commands import ROOT

WEIGHTS = 240_000
"""Bytes of a checkpoint, about: 20,000 weights of 4 bytes, three times."""


def private_mounts() -> list[str]:
    """A command that runs another one with mounts of its own; empty where that is not allowed."""
    for options in (["-m"], ["-rm"]):
        command = ["unshare", *options]
        try:
            if not subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
                return command
        except FileNotFoundError:
            break
    return []


needs_mounts = pytest.mark.skipif(not private_mounts(), reason="unshare cannot make a private mount here")


def on_a_small_disk(folder: Path, megabytes: float, script: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script with `folder` on a disk of its own; `$RUN` starts a run there, `$FOLDER/run`.

    What is in it afterwards is copied to `folder`-after.
    """
    folder.mkdir()
    (folder.parent / "own.py").write_text((ROOT / "tests/own_recipe.py").read_text())
    keys = ["recipe_args.width=40", "train.global_batch_size=4", "save.every_steps=2", "save.keep_last=2"]
    (folder.parent / "own.yaml").write_text("recipe: ./own.py\n")
    run = [sys.executable, "-m", "launch", "run", str(folder.parent / "own.yaml"), *keys, "--out", f"{folder}/run"]
    whole = (
        f"mount -t tmpfs -o size={int(megabytes * 1024)}k none {folder} || exit 99\n"
        f"FOLDER={folder}\nRUN='{' '.join(run)}'\n{script}\n"
        f"code=$?\ncp -r {folder} {folder}-after\nexit $code"
    )
    environment = {
        **{"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONPATH": str(ROOT), "HOME": str(folder.parent)},
        **{"SHOAL_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
    }
    return subprocess.run(
        [*private_mounts(), "sh", "-c", whole],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@needs_mounts
@pytest.mark.slow
def test_a_disk_too_small_for_the_checkpoints_is_told_before_the_first_update(tmp_path: Path) -> None:
    done = on_a_small_disk(tmp_path / "disk", 0.6, "$RUN train.max_steps=20", tmp_path / "cache")
    assert done.returncode == 5, done.stderr
    about_the_report, line = [line for line in done.stderr.splitlines() if line.startswith("shoal: ")]
    assert "no report.html is written: the disk is nearly full; that does the run no harm" in about_the_report
    assert "are free, but checkpoints will take up to" in line
    assert "save.keep_last = 2" in line
    run = tmp_path / "disk-after/run"
    assert (run / "metrics.jsonl").read_text() == ""
    assert not (run / "checkpoints").exists()


@needs_mounts
@pytest.mark.slow
def test_a_disk_that_fills_up_costs_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    """Filled to the last byte after the first checkpoints, for a while; then there is space again."""
    script = """
    $RUN train.max_steps=60 recipe_args.seconds_per_batch=0.1 &
    for i in $(seq 600); do [ -e $FOLDER/run/checkpoints/step-000004/COMPLETE ] && break; sleep 0.05; done
    cat /dev/zero > $FOLDER/filler 2>/dev/null
    cat /dev/zero > $FOLDER/filler2 2>/dev/null
    sleep 1.5
    ls $FOLDER/run/checkpoints > $FOLDER.seen
    rm $FOLDER/filler $FOLDER/filler2
    wait $!
    """
    done = on_a_small_disk(tmp_path / "disk", 8, script, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "disk-after/run"
    failed = json.loads((run / "result.json").read_text())["failed_saves"]
    assert failed, "some saves met a full disk"
    for update in failed:
        assert f"NO CHECKPOINT was saved after update {update}: " in done.stderr
    assert "training goes on, step-00000" in done.stderr
    assert [record["update"] for record in records(run, "train")] == list(range(1, 61)), "no record is lost"
    assert [record["update"] for record in records(run, "save_failed")] == failed
    seen = (tmp_path / "disk.seen").read_text().split()
    assert len([name for name in seen if name.startswith("step-") and "." not in name]) >= 2, "the older ones stayed"
    assert [damage(folder) for folder in listed(run)] == [None, None]
    assert listed(run)[0].name == "step-000060"
