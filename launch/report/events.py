"""What happened to a run besides its updates: starts, interruptions, saves and what was odd. By the clock."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.record import read_json
from launch.recorded import number, whole
from launch.root_cause import FAILURE
from launch.stop import STOPPED

KINDS = {
    "start": "was started",
    "resume": "went on",
    "stopped": "was stopped",
    "failure": "failed",
    "save": "saved",
    "save_failed": "could not save",
    "spike": "leapt",
    "skipped": "left an update out",
    "rewound": "went back",
    "straggler": "balance of ranks",
    "nonfinite": "loss not finite",
}
"""Kinds of events, and what they are called."""


@dataclass(frozen=True)
class Event:
    """Something that happened."""

    kind: str
    """One of `KINDS`."""
    time: float
    """Seconds since 1970."""
    update: int
    what: str


def recorded(record: Mapping[str, Any]) -> Event | None:
    """The event that a record tells of, if it tells of one."""
    kind, update, when = record.get("kind"), whole(record.get("update")), number(record.get("time"))
    if update is None or when is None or not math.isfinite(when):
        return None
    if kind == "train":
        loss = number(record.get("loss"))
        odd = loss is not None and not math.isfinite(loss)
        return Event("nonfinite", when, update, f"the loss was {loss}") if odd else None
    if kind not in KINDS:
        return None
    return Event(kind, when, update, _words(kind, record))


def _words(kind: str, record: Mapping[str, Any]) -> str:
    if kind == "resume":
        return f"went on from {record.get('checkpoint')}"
    if kind == "save":
        return f"saved {record.get('folder')}"
    if kind == "save_failed":
        return f"no checkpoint was saved: {record.get('problem')}"
    if kind == "straggler":
        return str(record.get("message", ""))
    done = {"skipped": "it was skipped", "rewound": f"back to the weights of step {record.get('checkpoint')}"}
    return f"{record.get('reason')}; {done.get(kind, 'it was made all the same')}"


def endings(folder: Path) -> Iterable[Event]:
    """How each start of a run has begun and ended, as far as its folder and `attempts/` tell."""
    attempts = sorted((folder / "attempts").glob("*"), key=lambda path: (len(path.name), path.name))
    before = None
    for attempt in (*attempts, folder):
        began = started(attempt)
        if began is not None and began != before:  # workers that were started again share the launcher's plan
            again = "a launcher began" if before is None else "a launcher began once more"
            before = began
            yield Event("start", began, 0, again)
        if (stopped := read_json(attempt / STOPPED)) is not None:
            yield Event("stopped", float(stopped["time"]), int(stopped["update"]), f"stopped by {stopped['signal']}")
        if (failure := read_json(attempt / FAILURE)) is not None:
            told = [read_json(path).get("time") for path in attempt.glob("failure-*.json")]
            when = min((float(each) for each in told if each), default=(attempt / FAILURE).stat().st_mtime)
            yield Event("failure", when, int(failure.get("update") or 0), str(failure["message"]).splitlines()[0])


def started(attempt: Path) -> float | None:
    """When the launcher wrote the plan of a start down."""
    plan = read_json(attempt / "plan.json") or {}
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return datetime.strptime(plan["started"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return None
