"""What the kernel says of memory: how many processes it has killed for lack of it, and what a control group may use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def kills_around(root: Path = Path("/")) -> int | None:
    """In the control group whose limit this process shares, such as a container's; else on its host; None: not known.

    Source: `oom_kill` in the memory.events of cgroup v2, groups beneath included, or the memory.oom_control of v1.
    """
    group = next(_files(root, "memory.oom_control", "memory.events"), None)
    found = None if group is None else _count(group)
    return kills_on_host(root) if found is None else found


def kills_on_host(root: Path = Path("/")) -> int | None:
    """On this host, limits of any control group included; None: not known.

    Source: `oom_kill` in /proc/vmstat, Linux 4.13 and later.
    """
    return _count(root / "proc/vmstat")


@dataclass(frozen=True)
class Limit:
    """What a control group may use of memory."""

    limit: int
    """Bytes."""
    used: int
    """Bytes, with the files that are read and can be let go."""


def limit_around(root: Path = Path("/")) -> Limit | None:
    """The limit that this process shares which leaves the least; None: there is none.

    Source: memory.max and memory.current of cgroup v2, or the files of v1 that end in _in_bytes.
    """
    return min(limits_around(root), key=lambda each: each.limit - each.used, default=None)


def limits_around(root: Path = Path("/")) -> list[Limit]:
    """All limits that this process shares, the nearest first: of its control group and of those above it."""
    limits = []
    for path in _files(root, "memory.limit_in_bytes", "memory.max"):
        using = path.with_name("memory.current" if path.name == "memory.max" else "memory.usage_in_bytes")
        limit, used = _number(path), _number(using)
        if limit is not None and limit < UNLIMITED and used is not None:
            limits.append(Limit(limit, used))
    return limits


UNLIMITED = 2**62
"""What v1 says where there is no limit is more than that: all the pages that it can count."""


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max": no limit


def _count(path: Path) -> int | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _files(root: Path, of_v1: str, of_v2: str) -> Iterator[Path]:
    """The files of this name of the groups that count memory: ours, if it does, and those above it, the nearest first.

    A container may know its group by a name of the host's, and find it where all groups begin.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        name = of_v1 if controllers else of_v2
        ours = top / path.lstrip("/")
        yield from (
            folder / name
            for folder in (ours, *ours.parents)
            if folder.is_relative_to(top) and (folder / name).is_file()
        )
