"""Prepared data: built once by however many processes, whole or not there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from launch.cache import Cache, file_identity
from launch.errors import DataError

KEY = {"tokens": 1, "files": ["a", "b"]}

spawn = multiprocessing.get_context("spawn")


def writes(text: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "data.txt").write_text(text)

    return build


def refuses(folder: Path) -> None:
    raise AssertionError(f"{folder} was built again")


# --- one process -----------------------------------------------------------------------------------------


def test_built_once_and_then_found(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "not/there/yet")
    assert not cache.path("tokens", KEY).exists()
    folder = cache.folder("tokens", KEY, writes("whole"))
    assert folder == cache.path("tokens", KEY)
    assert (folder / "data.txt").read_text() == "whole"
    assert cache.folder("tokens", KEY, refuses) == folder


def test_another_key_or_name_is_another_folder(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    keys: list[Any] = [KEY, {**KEY, "tokens": 2}, {"tokens": 1, "files": ["b", "a"]}, {"tokens": "1"}, [], "text", None]
    paths = {cache.path(name, key) for key in keys for name in ("tokens", "embedded")}
    assert len(paths) == 2 * len(keys)
    assert cache.path("tokens", {"files": ["a", "b"], "tokens": 1}) == cache.path("tokens", KEY), "order is no matter"
    assert {path.parent for path in paths} == {tmp_path}


def test_the_key_of_a_file_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one")
    before = file_identity(path)
    assert file_identity(path) == before
    status = path.stat()
    path.write_text("two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert file_identity(path) != before
    path.write_text("three")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_identity(path) != before
    other = tmp_path / "other.txt"
    other.write_text("one")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_identity(other) != before


def test_a_builder_that_raises_leaves_nothing_and_its_error_is_its_own(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fails(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise DataError("text.txt: is not UTF-8 text")

    with pytest.raises(DataError, match=r"^text\.txt: is not UTF-8 text$"):
        cache.folder("tokens", KEY, fails)
    assert not cache.path("tokens", KEY).exists()
    folder = cache.folder("tokens", KEY, writes("whole"))
    assert [path.name for path in folder.iterdir()] == ["data.txt"]


def test_an_input_that_cannot_be_read_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    def reads(_folder: Path) -> None:
        (tmp_path / "input.txt").read_text()

    with pytest.raises((DataError, OSError)) as caught:
        Cache(tmp_path / "cache").folder("tokens", KEY, reads)
    assert "cannot be written" not in str(caught.value)


def test_a_builder_may_make_folders(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner/data.txt").write_text("whole")

    folder = Cache(tmp_path).folder("tokens", KEY, build)
    assert (folder / "inner/data.txt").read_text() == "whole"


def test_a_root_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")  # no folder can be made under a file, whoever we are
    root = tmp_path / "file/cache"
    with pytest.raises(DataError) as caught:
        Cache(root).folder("tokens", KEY, writes("whole"))
    assert str(caught.value) == (
        f"{root}: the cache for prepared data cannot be written: [Errno 20] Not a directory: '{root}'; "
        "set SHOAL_CACHE to a folder that can"
    )


# --- several processes -----------------------------------------------------------------------------------


def build_slowly(root: Path, builds: Path, start: Barrier) -> None:
    def build(folder: Path) -> None:
        with builds.open("a") as file:
            file.write(f"{os.getpid()}\n")
        (folder / "first.txt").write_text("1")
        time.sleep(0.3)  # long enough for the others to arrive
        (folder / "second.txt").write_text("2")

    start.wait(timeout=60)
    folder = Cache(root).folder("tokens", KEY, build)
    assert sorted(path.name for path in folder.iterdir()) == ["first.txt", "second.txt"]


def die_while_building(root: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    Cache(root).folder("tokens", KEY, build)


def exit_codes(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    return [process.exitcode for process in processes]


def test_of_four_processes_one_builds_and_all_see_it_whole(tmp_path: Path) -> None:
    root, builds, start = tmp_path / "cache", tmp_path / "builds.txt", spawn.Barrier(4)
    processes: list[BaseProcess] = [
        spawn.Process(target=build_slowly, args=(root, builds, start), daemon=True) for _ in range(4)
    ]
    assert exit_codes(processes) == [0, 0, 0, 0]
    assert len(builds.read_text().splitlines()) == 1


def test_a_builder_that_is_killed_leaves_nothing_that_loads_and_the_next_one_builds(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    process = spawn.Process(target=die_while_building, args=(tmp_path,), daemon=True)
    assert exit_codes([process]) == [-signal.SIGKILL]
    assert list(tmp_path.rglob("half.txt")), "it had begun"
    assert not cache.path("tokens", KEY).exists()
    folder = cache.folder("tokens", KEY, writes("whole"))
    assert [path.name for path in folder.iterdir()] == ["data.txt"]
