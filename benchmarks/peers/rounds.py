"""Running commands in turn, seeing from outside what they take, and telling it in tables."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.install import ROOT

KEPT = ROOT / "runs" / "benchmarks"
"""Where raw numbers are kept, of all rounds; git ignores it."""

LOOK_SECONDS = 0.5
"""How often processes are looked at. What they have taken at most, the kernel notes itself."""

LIMIT_SECONDS = 900.0
"""A command that takes longer hangs, and is ended."""


@dataclass(frozen=True)
class Measured:
    """What was seen of a command from outside."""

    began: float
    """Seconds since 1970."""
    seconds: float
    all_bytes: int
    """Main memory of all its processes together at most, seen when looked at; shared pages count for each."""
    process_bytes: int
    """The most that one of its processes ever took."""


class CommandError(Exception):
    """A command failed; the message is the end of what it said."""


def run(command: list[str], folder: Path, variables: Mapping[str, str], cores: int | None = None) -> Measured:
    """Run a command in a folder, on so many cores (all that we have by default), and watch it.

    Raises:
        CommandError: it failed, or did not end.
    """
    ours = sorted(os.sched_getaffinity(0))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    together = 0
    each: dict[int, int] = {}
    with (folder / "output.txt").open("w+b") as output:
        began, clock = time.time(), time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, ours[:cores]),  # shoal counts cores, others read variables
        )
        try:
            while process.poll() is None:
                if time.perf_counter() - clock > LIMIT_SECONDS:
                    raise CommandError(f"did not end within {LIMIT_SECONDS:.0f} s\n")
                now = _memory(process.pid)
                together = max(together, sum(resident for resident, _ in now.values()))
                for pid, (resident, peak) in now.items():  # one that has ended has none left, one may set it back
                    each[pid] = max(each.get(pid, 0), resident, peak)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_SECONDS)
        finally:
            if process.poll() is None:  # we are to end ourselves; every launcher sees to its ranks
                process.terminate()
                process.wait()
        seconds = time.perf_counter() - clock
        if process.returncode:
            output.seek(0)
            raise CommandError("".join(output.read().decode(errors="replace").splitlines(True)[-30:]))
    return Measured(began, seconds, together, max(each.values(), default=0))


def _memory(pid: int) -> dict[int, tuple[int, int]]:
    """By process, of one and all below it, bytes now and at most."""
    found = {}
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = re.search(r"VmHWM:\s+(\d+)", status)
                found[process.pid] = (process.memory_info().rss, 1024 * int(peak[1]) if peak else 0)
    return found


def in_turn(
    names: Iterable[str], rounds: int, measure: Callable[[str], dict[str, float]], title: str
) -> dict[str, list[dict[str, float]]]:
    """Numbers of each name in each round: all names once, then all again, so that a busy machine is busy for all.

    Each is told to stderr at once, and kept. Who fails is told, and takes no further part.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started is ended too
    found: dict[str, list[dict[str, float]]] = {}
    left = list(names)
    for number in range(rounds):
        for name in [*left]:
            try:
                numbers = measure(name)
            except CommandError as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                left.remove(name)
                continue
            found.setdefault(name, []).append(numbers)
            shown = "  ".join(f"{key} {value:,.4g}" for key, value in numbers.items())
            print(f"{title}, round {number + 1}, {name}: {shown}", file=sys.stderr, flush=True)
            _keep(title, found)
    return found


def _keep(title: str, found: Any) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", title)
    (KEPT / f"{name}.json").write_text(json.dumps({"machine": machine(), "rounds": found}, indent=1))


@dataclass(frozen=True)
class Column:
    """A number of a table."""

    title: str
    key: str
    form: str = ",.0f"
    unit: float = 1.0
    """What of the number's own unit is one of the table's."""
    against: bool = False
    """Whether a column follows that says how many times the first row's it is."""


def table(found: Mapping[str, list[dict[str, float]]], columns: Iterable[Column]) -> str:
    """A Markdown table of medians, with the least and the most of the first column."""
    columns = list(columns)
    if not found:
        return "nothing was measured"
    titles = ["", *(title for each in columns for title in ([each.title, "ratio"] if each.against else [each.title]))]
    lines = [f"| {' | '.join([*titles, 'least to most'])} |", f"|{'---|' * (len(titles) + 1)}"]
    first = next(iter(found.values()))
    for name, rounds in found.items():
        cells = [name]
        for column in columns:
            value = _median(rounds, column.key)
            cells.append("" if value is None else format(value / column.unit, column.form))
            if column.against:
                beside = _median(first, column.key)
                cells.append(f"{value / beside:.3f}" if value and beside else "")
        values = [each[columns[0].key] / columns[0].unit for each in rounds]
        cells.append(f"{min(values):{columns[0].form}} to {max(values):{columns[0].form}}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _median(rounds: list[dict[str, float]], key: str) -> float | None:
    values = [each[key] for each in rounds if key in each]
    return statistics.median(values) if values else None


def machine() -> str:
    """What was measured on, in one line."""
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    names = ("torch", "transformers", "accelerate", "datasets")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    cores = len(os.sched_getaffinity(0))
    return (
        f"{found[1] if found else platform.processor()}, {cores} cores, Python {platform.python_version()}, {versions}"
    )
