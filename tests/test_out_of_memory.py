"""What the kernel says of the processes it has killed, in each place where it may say it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from launch.out_of_memory import Limit, kills_around, kills_on_host, limit_around
from launch.topology import _memory_bytes

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


def test_the_limit_that_leaves_the_least(tmp_path: Path) -> None:
    assert limit_around(tmp_path) is None
    job, above = "sys__fs__cgroup__job__7__memory", "sys__fs__cgroup__job__memory"
    write(tmp_path, proc__self__cgroup="0::/job/7\n", **{f"{job}.max": "max\n", f"{job}.current": "600\n"})
    assert limit_around(tmp_path) is None
    write(tmp_path, **{f"{above}.max": "1000\n", f"{above}.current": "900\n"})
    assert limit_around(tmp_path) == Limit(1000, 900), "a group above ours"
    write(tmp_path, **{f"{job}.max": "800\n"})
    assert limit_around(tmp_path) == Limit(1000, 900), "smaller, but there is more room in it"
    write(tmp_path, **{f"{above}.current": "700\n"})
    assert limit_around(tmp_path) == Limit(800, 600)


def test_the_memory_of_a_machine_is_what_the_closest_limit_leaves(tmp_path: Path) -> None:
    """As in a job of SLURM, whose limit is below that of the groups above it."""
    everything = psutil.virtual_memory().total
    assert _memory_bytes(tmp_path) == everything
    job, above = "sys__fs__cgroup__job__7__memory", "sys__fs__cgroup__job__memory"
    write(tmp_path, proc__self__cgroup="0::/job/7\n", **{f"{job}.max": "3000\n", f"{job}.current": "600\n"})
    write(tmp_path, **{f"{above}.max": f"{2 * everything}\n", f"{above}.current": "900\n"})
    assert _memory_bytes(tmp_path) == 3000
    write(tmp_path, **{f"{above}.max": "2000\n"})
    assert _memory_bytes(tmp_path) == 2000
    write(tmp_path, **{f"{above}.max": "max\n", f"{job}.max": "max\n"})
    assert _memory_bytes(tmp_path) == everything


def test_the_limit_as_version_1_tells_it(tmp_path: Path) -> None:
    ours, top = "sys__fs__cgroup__memory__job__7__memory", "sys__fs__cgroup__memory__memory"
    write(tmp_path, proc__self__cgroup=V1, **{f"{ours}.limit_in_bytes": "500\n", f"{ours}.usage_in_bytes": "400\n"})
    write(tmp_path, **{f"{top}.limit_in_bytes": "9223372036854771712\n", f"{top}.usage_in_bytes": "900\n"})
    assert limit_around(tmp_path) == Limit(500, 400)
    write(tmp_path, **{f"{ours}.limit_in_bytes": "9223372036854771712\n"})
    assert limit_around(tmp_path) is None


def test_this_kernel_counts() -> None:
    assert kills_around() is not None and kills_on_host() is not None
