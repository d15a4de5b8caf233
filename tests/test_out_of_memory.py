"""What the kernel says of the processes it has killed, in each place where it may say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.out_of_memory import kills_around, kills_on_host

V1 = "5:devices:/job/7\n4:memory:/job/7\n0::/\n"


def write(root: Path, **files: str) -> None:
    """Files by name, of which `__` is a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_of_the_whole_host(tmp_path: Path) -> None:
    assert kills_on_host(tmp_path) is None and kills_around(tmp_path) is None
    write(tmp_path, proc__vmstat="pgfault 12\noom_kill 3\noom_kill_other 9\n")
    assert kills_on_host(tmp_path) == 3
    assert kills_around(tmp_path) == 3, "no control groups"
    write(tmp_path, proc__vmstat="pgfault 12\n")
    assert kills_on_host(tmp_path) is None


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/job/7\n", "sys__fs__cgroup__job__7__memory.events"),
        ("0::/job/7\n", "sys__fs__cgroup__job__memory.events"),  # it alone counts memory
        ("0::/job/7\n", "sys__fs__cgroup__memory.events"),  # a container, which sees no more
        (V1, "sys__fs__cgroup__memory__job__7__memory.oom_control"),
        (V1, "sys__fs__cgroup__memory__memory.oom_control"),
    ],
)
def test_of_our_control_group(groups: str, file: str, tmp_path: Path) -> None:
    content = "low 0\noom 5\noom_kill 2\noom_group_kill 1\n"
    write(tmp_path, proc__self__cgroup=groups, proc__vmstat="oom_kill 30\n", **{file: content})
    assert kills_around(tmp_path) == 2
    assert kills_on_host(tmp_path) == 30
    write(tmp_path, **{file: "under_oom 0\n"})
    assert kills_around(tmp_path) == 30, "a kernel that does not count them for groups"


def test_this_kernel_counts() -> None:
    assert kills_around() is not None and kills_on_host() is not None
