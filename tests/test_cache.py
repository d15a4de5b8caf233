"""Prepared data: built once by however many processes, whole or not there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from launch import cache as cache_module
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


def test_ctrl_c_leaves_nothing_and_is_no_failure_for_others(tmp_path: Path) -> None:
    def is_stopped(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).folder("tokens", KEY, is_stopped)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_it_knows_what_it_was_asked_for_and_what_it_has_filled(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    one, two = cache.folder("one", KEY, writes("1")), cache.folder("two", KEY, writes("2"))
    assert cache.folder("one", KEY, refuses) == one
    assert cache.folders == {one: True, two: True}
    other = Cache(tmp_path)
    other.folder("two", KEY, refuses)
    assert other.folders == {two: False}


def test_everything_is_on_the_disk_names_too_before_and_after_the_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What power loss would undo cannot be seen; that the kernel is asked for it, and when, can."""
    flushed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    def build(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner/data.txt").write_text("whole")
        (folder / "data.txt").write_text("whole")

    monkeypatch.setattr(os, "fsync", fsync)
    final = Cache(tmp_path).folder("tokens", KEY, build)
    *before, last = flushed
    aside = f"{final}.building"
    assert sorted(before) == [aside, f"{aside}/data.txt", f"{aside}/inner", f"{aside}/inner/data.txt"]
    assert last == str(tmp_path)


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


def build_and_die(root: Path, event: str, suffix: str) -> None:
    """Build, and be killed just before a call to the system that is about a path with this end."""

    def die(name: str, arguments: tuple[Any, ...]) -> None:
        if name == event and str(arguments[0]).endswith(suffix):
            os.kill(os.getpid(), signal.SIGKILL)

    def build(folder: Path) -> None:
        (folder / "first.txt").write_text("1")
        (folder / "second.txt").write_text("2")

    sys.addaudithook(die)
    Cache(root).folder("tokens", KEY, build)


def build_until_killed(root: Path, forks: bool) -> None:
    def build(folder: Path) -> None:
        if forks and os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        (folder / "half.txt").write_text(str(os.getpid()))
        time.sleep(30)

    Cache(root).folder("tokens", KEY, build)


def fail_slowly(root: Path, kind: type[Exception]) -> None:
    def build(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        time.sleep(1)
        raise kind("sample 9: is odd")

    Cache(root).folder("tokens", KEY, build)


@contextmanager
def running(target: Callable[..., None], root: Path, *arguments: Any) -> Iterator[BaseProcess]:
    """A process that has begun to build."""
    process = spawn.Process(target=target, args=(root, *arguments), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not list(root.rglob("half.txt")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


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


@pytest.mark.parametrize(
    ("event", "suffix", "whole"),
    [
        ("os.mkdir", ".building", False),
        ("open", ".building/second.txt", False),
        ("open", ".building", False),  # to flush it
        ("os.rename", ".building", False),
        ("open", "/cache", True),  # to flush the new name
        ("os.remove", ".builder", True),
    ],
)
def test_a_builder_that_is_killed_leaves_nothing_that_loads_and_the_next_one_builds(
    tmp_path: Path, event: str, suffix: str, whole: bool
) -> None:
    cache = Cache(tmp_path / "cache")
    process = spawn.Process(target=build_and_die, args=(cache.root, event, suffix), daemon=True)
    assert exit_codes([process]) == [-signal.SIGKILL]
    assert (cache.root / f"{cache.path('tokens', KEY).name}.builder").exists(), "it had begun"
    assert cache.path("tokens", KEY).exists() == whole
    folder = cache.folder("tokens", KEY, refuses if whole else writes("whole"))
    assert sorted(path.name for path in folder.iterdir()) == (["first.txt", "second.txt"] if whole else ["data.txt"])
    assert [path for path in cache.root.iterdir() if path.is_dir()] == [folder]


@pytest.mark.parametrize("forks", [False, True])
def test_who_waited_for_a_builder_that_is_killed_says_so_and_takes_over(
    tmp_path: Path, forks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where processes live on that the builder has forked, as `datasets` does: the lock is not theirs."""
    monkeypatch.setattr(cache_module, "PATIENCE_SECONDS", 0.5)
    said: list[str] = []
    with running(build_until_killed, tmp_path, forks) as builder:

        def note_and_kill(text: str) -> None:
            said.append(text)
            builder.kill()

        cache = Cache(tmp_path, note_and_kill)
        began = time.monotonic()
        folder = cache.folder("tokens", KEY, writes("whole"))
        assert time.monotonic() - began < 5
    assert [path.name for path in folder.iterdir()] == ["data.txt"]
    assert cache.folders == {folder: True}
    assert said == [f"waiting for another process (pid {builder.pid}, {socket.gethostname()}) to prepare {folder}"]


@pytest.mark.parametrize("kind", [DataError, ValueError])
def test_who_waited_for_a_builder_that_fails_fails_alike_and_a_later_one_tries_again(
    tmp_path: Path, kind: type[Exception]
) -> None:
    cache = Cache(tmp_path)
    with running(fail_slowly, tmp_path, kind) as builder, pytest.raises((DataError, RuntimeError)) as caught:
        cache.folder("tokens", KEY, refuses)
    if kind is DataError:
        assert type(caught.value) is DataError
        assert str(caught.value) == "sample 9: is odd"
    else:
        final, host = cache.path("tokens", KEY), socket.gethostname()
        assert str(caught.value) == (
            f"pid {builder.pid} on {host} failed to prepare {final}: ValueError: sample 9: is odd"
        )
        assert 'raise kind("sample 9: is odd")' in caught.value.__notes__[0], "the builder's own traceback"
    assert (cache.folder("tokens", KEY, writes("whole")) / "data.txt").read_text() == "whole"
