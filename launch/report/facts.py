"""What there is to tell of a run, read from its folder alone: plain data, no HTML."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.plan import Plan
from launch.record import read_json, read_plan
from launch.recorded import DISCARDED, METRICS, number, records, whole
from launch.report.curves import Curve, Split
from launch.report.events import Event, endings, recorded
from launch.root_cause import Cause
from launch.status import Status, cause_of

CURVES = ("loss", "learning_rate", "gradient_norm", "tokens_per_second")
"""What is drawn of each update."""

MOST_EVENTS = 400
"""Events that are kept of each kind, the newest."""

MOST_RECORDS = 2_000
"""Evaluations that are kept, the newest."""

LARGEST_FILE = 8_000_000
"""Bytes of the largest JSON file of an evaluation that is read."""


@dataclass(frozen=True)
class Facts:
    """A run at this moment."""

    status: Status
    plan: Plan
    surroundings: dict[str, Any]
    """Where it was started last: host, versions, git commit, arguments, environment."""
    first_arguments: list[str]
    """The command line that began it."""
    result: dict[str, Any] | None
    failure: Cause | None
    history: History
    samples: dict[str, Any] | None
    """All that the newest evaluation has found, with its `update`."""
    environment: dict[str, Any] | None
    """What environment.json says, where there is one."""
    unreadable: tuple[str, ...] = ()
    """Files that are there and cannot be read, and why."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.status.run)

    @property
    def began(self) -> float | None:
        """Seconds since 1970 at the first thing that is known of it."""
        return min((event.time for event in self.history.events), default=None)

    @property
    def peaks(self) -> list[int | None]:
        """Bytes that each rank took at the peak of training; empty while that is not known."""
        return list((self.result or {}).get("peak_memory") or ())

    @property
    def planned_memory(self) -> int | None:
        """Bytes that a rank was to take."""
        planned: int | None = (self.result or {}).get("planned_memory")
        return planned


@dataclass
class History:
    """What a run has recorded."""

    curves: dict[str, Curve] = field(default_factory=lambda: {name: Curve() for name in CURVES})
    times: Curve = field(default_factory=Curve)
    """Seconds since 1970 at which each update was recorded."""
    evaluations: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_RECORDS))
    split: Split = field(default_factory=Split)
    """Where the time between two recorded updates went."""
    events: list[Event] = field(default_factory=list)
    """By time."""
    discarded: Curve = field(default_factory=Curve)
    """Times of updates that were made again after an interruption."""
    tokens: int = 0

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, all together."""
        return {phase: sum(spent) for phase, spent in self.split.seconds.items()}

    def tokens_per_second(self) -> float | None:
        """Over all updates, without saves and evaluations."""
        seconds = self.seconds()
        training = sum(seconds.values()) - seconds.get("save", 0.0) - seconds.get("evaluate", 0.0)
        return self.tokens / training if training > 0 and self.tokens else None


def read_facts(status: Status) -> Facts:
    """What there is to tell of the run that this is the state of.

    Raises:
        RunFolderError: it has no plan that could be read.
    """
    folder = Path(status.run)
    problems: list[str] = []

    def read(name: str) -> Any:
        try:
            return read_json(folder / name)
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {error}")
            return None

    plan = read_plan(folder)
    surroundings = {name: value for name, value in read("plan.json").items() if name != "plan"}
    first = read("attempts/1/plan.json")
    arguments = (first if isinstance(first, dict) else surroundings).get("arguments", ())
    try:
        failure = cause_of(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        failure = None
        problems.append(f"failure.json: {error}")
    result, environment = read("result.json"), read("environment.json")
    return Facts(
        status,
        plan,
        surroundings,
        [str(each) for each in arguments],
        result if isinstance(result, dict) else None,
        failure,
        read_history(folder),
        _newest_evaluation(folder),
        environment if isinstance(environment, dict) else None,
        tuple(problems),
    )


def read_history(folder: Path) -> History:
    """What a run has recorded, and how each of its starts ended."""
    history = History()
    events: dict[str, deque[Event]] = {}
    for record in records(folder / METRICS):
        _take(history, record)
        if event := recorded(record):
            events.setdefault(event.kind, deque(maxlen=MOST_EVENTS)).append(event)
    for record in records(folder / DISCARDED):
        update, when = whole(record.get("update")), number(record.get("time"))
        if record.get("kind") == "train" and update is not None and when is not None:
            history.discarded.add(update, when)
    try:
        ended = list(endings(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Written by hand, or by another version.
        ended = []
    history.events = sorted([*(each for kept in events.values() for each in kept), *ended], key=lambda each: each.time)
    return history


def _take(history: History, record: dict[str, Any]) -> None:
    """Add a record of an update, or of an evaluation."""
    update = whole(record.get("update"))
    if update is None:
        return
    if record.get("kind") == "eval":
        history.evaluations.append(record)
    if record.get("kind") != "train":
        return
    for name, curve in history.curves.items():
        if (value := number(record.get(name))) is not None:
            curve.add(update, value)
    if (when := number(record.get("time"))) is not None:
        history.times.add(update, when)
    if isinstance(phases := record.get("seconds"), dict):
        counted = {phase: number(value) for phase, value in phases.items()}
        history.split.add(update, {phase: each for phase, each in counted.items() if each and math.isfinite(each)})
    history.tokens = whole(record.get("tokens")) or history.tokens


def metrics_of(evaluation: dict[str, Any]) -> dict[str, float]:
    """The metrics of a record of an evaluation; what else is in it are counts."""
    about = ("kind", "update", "time", "samples", "targets", "best")
    named = ((name, number(value)) for name, value in evaluation.items() if name not in about)
    return {name: value for name, value in named if value is not None}


def _newest_evaluation(folder: Path) -> dict[str, Any] | None:
    """The newest of eval/step-*.json that holds more than numbers and can be read; None where there is none."""
    numbered = [
        (int(match[1]), path) for path in (folder / "eval").glob("step-*.json") if (match := _STEP.search(path.name))
    ]
    for _, path in sorted(numbered, reverse=True)[:3]:
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= LARGEST_FILE else None
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and any(isinstance(value, (list, dict)) for value in found.values()):
            return found
    return None


_STEP = re.compile(r"^step-(\d+)\.json$")
