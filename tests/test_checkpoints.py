"""Checkpoints as files: whole or not there whenever a process dies, damage found, and never fewer good ones."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.checkpoints import (
    DamagedError,
    FileRecord,
    aside_folder,
    checkpoint_folder,
    clean,
    damage,
    disown,
    listed,
    newest_complete,
    outer_damage,
    prune,
    publish,
    read_manifest,
    remove,
    update_of,
    write_file,
)

FILES = {"state-00000-of-00001.safetensors": b"weights" * 999, "state.json": b"{}", "config.json": b'{"a": 1}'}


def save(run: Path, update: int, before_each_write: Callable[[], None] = lambda: None) -> Path:
    aside = aside_folder(run, update)
    aside.mkdir(parents=True)

    def parts(content: bytes) -> Iterator[bytes]:
        for start in range(0, len(content), 500):
            before_each_write()
            yield content[start : start + 500]

    return publish(aside, update, {name: write_file(aside / name, parts(content)) for name, content in FILES.items()})


def updates(run: Path) -> list[int]:
    return [update_of(folder) for folder in listed(run)]


def test_what_was_written_is_what_is_there(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    assert folder == checkpoint_folder(tmp_path, 7)
    assert {path.name for path in folder.iterdir()} == {*FILES, "manifest.json", "COMPLETE"}
    assert damage(folder) is None
    manifest = read_manifest(folder)
    assert (manifest.update, set(manifest.files)) == (7, set(FILES))
    assert not aside_folder(tmp_path, 7).exists()


def test_a_file_is_hashed_as_it_leaves_memory(tmp_path: Path) -> None:
    record = write_file(tmp_path / "file", [b"ab", memoryview(b"c"), b""])
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1: SHA-256 of "abc"
    assert record == FileRecord(bytes=3, sha256=known)
    assert (tmp_path / "file").read_bytes() == b"abc"


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "COMPLETE"])
def test_a_flipped_byte_is_found_in_every_file(name: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = damage(path.parent)
    assert found is not None
    if name in FILES:
        assert found == f"the content of {name} has changed (SHA-256)"
        assert outer_damage(path.parent) is None, "its size is right: only the hash tells"


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "COMPLETE"])
def test_a_missing_or_shortened_file_is_found_without_reading_the_others(name: str, tmp_path: Path) -> None:
    for update, spoil in enumerate((os.unlink, lambda path: os.truncate(path, 1)), start=1):
        path = save(tmp_path, update) / name
        spoil(path)
        assert outer_damage(path.parent)
        assert newest_complete(tmp_path) is None


def test_ranks_that_share_the_reading_find_what_one_would(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "state.json").write_bytes(b"[]")
    assert [bool(damage(folder, share, 3)) for share in range(3)].count(True) == 1


def test_a_format_of_the_future_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": 99}
    record = write_file(folder / "manifest.json", [json.dumps(manifest).encode()])
    write_file(folder / "COMPLETE", [record.sha256.encode()])
    with pytest.raises(DamagedError, match="format 99 is of a newer release; this one knows 1"):
        read_manifest(folder)


def test_of_good_checkpoints_there_are_never_fewer_than_are_to_be_kept(tmp_path: Path) -> None:
    for update in (1, 2, 3, 4):
        save(tmp_path, update)
    (checkpoint_folder(tmp_path, 4) / "state.json").unlink()
    (checkpoint_folder(tmp_path, 3) / "COMPLETE").unlink()
    prune(tmp_path, 2, [])
    assert updates(tmp_path) == [4, 3, 2, 1], "two good ones are left, and damaged ones do not count"
    save(tmp_path, 5)
    prune(tmp_path, 2, [])
    assert updates(tmp_path) == [5, 4, 3, 2]


def test_the_best_stay_besides_the_newest(tmp_path: Path) -> None:
    for update in (1, 2, 3, 1_000_000):
        save(tmp_path, update)
    prune(tmp_path, None, [])
    assert updates(tmp_path) == [1_000_000, 3, 2, 1]
    prune(tmp_path, 1, [2])
    assert updates(tmp_path) == [1_000_000, 2]


def test_a_damaged_one_is_put_out_of_the_way_and_kept(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        folder = save(tmp_path, 1)
        (folder / "state.json").write_bytes(content)
        disown(folder)
    assert updates(tmp_path) == []
    assert (folder.with_name("step-000001.damaged") / "state.json").read_bytes() == b"second"


def test_a_checkpoint_replaces_a_damaged_one_of_its_name(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "COMPLETE").unlink()
    assert damage(save(tmp_path, 1)) is None


# --- killed at any moment --------------------------------------------------------------------------------


def test_a_process_may_be_killed_at_any_moment_of_a_save(tmp_path: Path) -> None:
    """SIGKILL before each of 50 random calls that change the disk: no good checkpoint is lost, no half one made."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    draw = random.Random(3)
    moments = [str(draw.randrange(44)) for _ in range(50)]
    moments += ["0", "100000"]
    shown = subprocess.run(
        [sys.executable, "-m", "tests.killed_saver", str(tmp_path), *moments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    outcomes = [line.split() for line in shown.splitlines()]
    assert [outcome[0] for outcome in outcomes] == moments
    assert sum(outcome[1] == "True" for outcome in outcomes) >= 40, "most were killed"
    assert outcomes[-1][1] == "False", "and the last one was not"
    newest = 2
    for _, killed, *good in outcomes:
        assert len(good) >= 2, "two were good before, and two are good after"
        assert int(good[0]) >= newest, "the newest good one never goes"
        assert killed == "True" or int(good[0]) > newest
        newest = int(good[0])
    assert newest > 5
    clean(tmp_path)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert all(re.fullmatch(r"step-\d{6}", name) for name in left), "what was half written is gone"


def test_removing_takes_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 1)
    seen: list[list[int]] = []
    removal: Callable[..., None] = remove.__globals__["shutil"].rmtree

    def look(path: Path, **options: bool) -> None:
        seen.append(updates(tmp_path))
        removal(path, **options)

    monkeypatch.setattr("launch.checkpoints.shutil.rmtree", look)
    remove(folder)
    assert seen[-1] == []
