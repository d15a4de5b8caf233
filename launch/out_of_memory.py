"""How many processes the kernel has killed for lack of memory: in our control group, or on the whole host."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def kills_around(root: Path = Path("/")) -> int | None:
    """In the control group whose limit this process shares, such as a container's; else on its host; None: not known.

    Source: `oom_kill` in the memory.events of cgroup v2, groups beneath included, or the memory.oom_control of v1.
    """
    group = next(_files(root), None)
    found = None if group is None else _count(group)
    return kills_on_host(root) if found is None else found


def kills_on_host(root: Path = Path("/")) -> int | None:
    """On this host, limits of any control group included; None: not known.

    Source: `oom_kill` in /proc/vmstat, Linux 4.13 and later.
    """
    return _count(root / "proc/vmstat")


def _count(path: Path) -> int | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _files(root: Path) -> Iterator[Path]:
    """The file of the nearest group that counts memory, which is ours or above it.

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
        name = "memory.oom_control" if controllers else "memory.events"
        ours = top / path.lstrip("/")
        yield from (
            folder / name
            for folder in (ours, *ours.parents)
            if folder.is_relative_to(top) and (folder / name).is_file()
        )
