"""`shoal checkpoints` by its real command, on folders that hold what a run may have left in any state."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoints import FileRecord, aside_folder, checkpoint_folder, listed, publish, shard_name, write_file
from launch.disk import size_in_words
from launch.inventory import inventory, newest, superfluous
from launch.plan import decide
from launch.record import create_run_folder, held
from launch.topology import World
from tests.commands import shoal

OWN = Path(__file__).with_name("own_recipe.py")


def run_folder(tmp_path: Path, *overrides: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(f"recipe: {OWN}\ntrain: {{global_batch_size: 8, max_steps: 100}}\nparallel: {{device: cpu}}\n")
    return create_run_folder(decide(str(file), list(overrides), tmp_path / "run", World()).plan)


def save(run: Path, update: int, losses: Mapping[int, float] | None = None, ranks: int = 1) -> Path:
    """A checkpoint as the engine writes one, but for its tensors."""
    aside = aside_folder(run, update)
    aside.mkdir(parents=True)
    contents = {"state.json": json.dumps({"losses": losses or {}}).encode(), "config.json": b"{}"}
    contents |= {shard_name(rank, ranks): bytes([update % 256]) * (1000 + rank) for rank in range(ranks)}
    files: dict[str, FileRecord] = {name: write_file(aside / name, [content]) for name, content in contents.items()}
    return publish(aside, update, files)


def damage_one_byte(folder: Path) -> None:
    path = next(folder.glob("state-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


def table(stdout: str) -> dict[str, list[str]]:
    rows = [re.split(r"\s{2,}", line.strip()) for line in stdout.splitlines() if line.lstrip().startswith("step-")]
    return {row[0]: row[1:] for row in rows}


def command(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return shoal(run.parent, "checkpoints", str(run), *arguments)


def told(run: Path, *arguments: str) -> dict[str, Any]:
    done = command(run, *arguments, "--json")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Of everything one: good, good and best, damaged as sizes and as hashes tell, cut off, set aside, leftovers."""
    run = run_folder(tmp_path, "save.keep_last=1", "save.keep_best=1")
    losses: dict[int, float] = {}
    for update, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.0), (50, 1.0), (60, 0.5)):
        losses[update] = loss
        # An evaluation that a signal broke off is made when the run goes on: after its checkpoint was saved.
        save(run, update, {at: losses[at] for at in losses if at != 20 or update > 20}, ranks=2 if update < 40 else 1)
    damage_one_byte(checkpoint_folder(run, 50))
    (checkpoint_folder(run, 60) / "COMPLETE").unlink()
    for name in ("step-000005.damaged", "step-000070.writing", "step-000003.removing"):
        folder = run / "checkpoints" / name
        folder.mkdir()
        (folder / "some").write_bytes(bytes(100))
    (run / "checkpoints/notes.txt").write_text("of a person")
    return run


def test_every_folder_is_told_with_its_state_and_what_resume_would_take(mixed: Path) -> None:
    done = command(mixed)
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert list(rows) == [
        *("step-000070.writing", "step-000060", "step-000050", "step-000040", "step-000030", "step-000020"),
        *("step-000010", "step-000005.damaged", "step-000003.removing"),
    ]
    assert rows["step-000070.writing"][-1] == "left half written" and rows["step-000003.removing"][-1] == (
        "left half removed"
    )
    assert rows["step-000060"][-1] == "damaged: its save was cut off (no COMPLETE)"
    assert rows["step-000050"][-1] == "damaged: the content of state-00000-of-00001.safetensors has changed (SHA-256)"
    assert rows["step-000040"][-4:] == ["1", "2.0000", "good", "resume"]
    assert rows["step-000030"][-3:] == ["2", "2.5000", "good"]
    assert rows["step-000020"][-4:] == ["2", "2.0000", "good", "best"], "of equals the first, known from a later one"
    assert rows["step-000005.damaged"][-1] == "set aside as damaged"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", rows["step-000040"][1])
    size = sum(path.stat().st_size for path in checkpoint_folder(mixed, 30).iterdir())
    assert rows["step-000030"][2] == size_in_words(size) == f"{size / 1000:.1f} kB"
    assert "The newest one" in done.stdout and "goes on from step-000040." in done.stdout

    # Sizes alone tell less, and say so.
    report = told(mixed, "--no-verify")
    assert (report["verified"], report["resume"]) == (False, "step-000050")
    report = told(mixed)
    assert (report["verified"], report["resume"], report["best"]) == (True, "step-000040", "step-000020")
    (damaged,) = [each for each in report["checkpoints"] if each["name"] == "step-000050"]
    assert damaged["state"] == "damaged" and damaged["why"].endswith("has changed (SHA-256)")
    assert damaged["validation_loss"] is None and damaged["ranks"] == 1
    assert not (mixed / ".lock").exists(), "looking leaves nothing"


def test_prune_keeps_what_the_run_keeps_and_what_a_person_may_want_to_see(mixed: Path) -> None:
    before = {entry.name: entry.bytes for entry in inventory(mixed, verify=True)}
    done = command(mixed, "--prune")
    assert done.returncode == 0, done.stderr
    left = {path.name for path in (mixed / "checkpoints").iterdir()}
    assert left == {"notes.txt", "step-000060", "step-000050", "step-000040", "step-000020"}
    gone = [name for name in before if name not in left]
    assert re.findall(r"^removed (\S+) \(", done.stdout, re.MULTILINE) == gone
    assert f"{sum(before[name] for name in gone):,} bytes freed" in done.stdout
    assert set(table(done.stdout)) == left - {"notes.txt"}
    again = told(mixed, "--prune")
    assert (again["removed"], again["removed_bytes"]) == ([], 0)


def test_prune_counts_good_checkpoints_only(tmp_path: Path) -> None:
    """The newest two are damaged, one of them with the right sizes: none of the good ones may go for them."""
    run = run_folder(tmp_path, "save.keep_last=2")
    for update in (1, 2, 3, 4):
        save(run, update)
    damage_one_byte(checkpoint_folder(run, 4))
    damage_one_byte(checkpoint_folder(run, 3))
    assert told(run, "--prune")["removed"] == []
    assert told(run, "--prune", "--keep-last", "1")["removed"] == [
        {"name": "step-000001", "bytes": told(run)["checkpoints"][-1]["bytes"]}
    ]
    assert [folder.name for folder in listed(run)] == ["step-000004", "step-000003", "step-000002"]


def test_without_a_good_one_nothing_that_is_set_aside_goes_and_the_code_is_5(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    done = command(run)
    assert (done.returncode, done.stdout) == (0, f"{run}: has no checkpoints (yet)\n")
    damage_one_byte(save(run, 3))
    save(run, 2).rename(run / "checkpoints/step-000002.damaged")
    (run / "checkpoints/step-000004.writing").mkdir()
    done = command(run, "--prune")
    assert done.returncode == 5
    assert done.stderr == f"shoal: {run}: none of its checkpoints is good; `shoal resume` begins the run anew\n"
    assert set(table(done.stdout)) == {"step-000003", "step-000002.damaged"}
    assert "removed step-000004.writing (0 bytes, left half written)" in done.stdout


def test_keep_last_null_keeps_all(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "save.keep_last=null")
    for update in (1, 2, 3):
        save(run, update)
    assert told(run, "--prune")["removed"] == []
    entries = inventory(run, verify=False)
    assert [entry.name for entry in superfluous(entries, 2, 0)] == ["step-000001"]
    assert [entry.name for entry in superfluous(entries, 1, 0, every=2)] == ["step-000001"]
    assert newest(entries) == entries[0]


def test_what_a_run_may_go_back_to_is_kept(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "save.keep_last=1", "save.every_steps=2", "train.on_spike=rewind")
    for update in (1, 2, 3, 4, 5):
        save(run, update)
    assert [each["name"] for each in told(run, "--prune")["removed"]] == ["step-000003", "step-000002", "step-000001"]
    assert [folder.name for folder in listed(run)] == ["step-000005", "step-000004"]


def test_a_run_that_a_launcher_works_on_is_not_pruned(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "save.keep_last=1")
    save(run, 1)
    save(run, 2)
    with held(run):
        done = command(run, "--prune")
        assert done.returncode == 5
        assert done.stderr.startswith(f"shoal: {run}: another launcher works on it")
        assert len(listed(run)) == 2
        assert command(run).returncode == 0, "to look is allowed"
    assert command(run, "--prune").returncode == 0 and len(listed(run)) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--keep-last", "2"], 2, "command line: --keep-last 2: says what --prune keeps; add --prune"),
        (
            ["--prune", "--no-verify"],
            2,
            "command line: --prune --no-verify: what is kept must be seen to be good; drop --no-verify",
        ),
        ([], 5, "{run}: is not a run folder (no plan.json in it)"),
    ],
)
def test_what_cannot_be_asked_is_told_in_one_line(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    run = tmp_path / "nothing"
    done = command(run, *arguments)
    assert (done.returncode, done.stderr) == (code, f"shoal: {message.format(run=run)}\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove anything")
def test_what_cannot_be_removed_is_told(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "save.keep_last=1")
    save(run, 1)
    save(run, 2)
    (run / "checkpoints").chmod(0o500)
    done = command(run, "--prune")
    (run / "checkpoints").chmod(0o700)
    assert done.returncode == 5 and "step-000001: cannot be removed: Permission denied" in done.stderr


def test_one_that_vanishes_while_it_is_read_is_no_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on prunes."""
    run = run_folder(tmp_path)
    save(run, 1)
    save(run, 2)
    monkeypatch.setattr("launch.inventory.damage", lambda folder, *_: shutil.rmtree(checkpoint_folder(run, 1), True))
    assert [entry.name for entry in inventory(run, verify=True)] == ["step-000002"]
