"""What several runs differ in: settings, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.recorded import number
from launch.report.facts import Facts, metrics_of, read_facts
from launch.report.settings import ABSENT, settings
from launch.status import status


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same in all runs."""

    what: str
    values: list[Any]
    """Of each run, in their order; None where a run does not have it."""

    @property
    def change(self) -> float | None:
        """From the first run to the second, where there are two with a number each."""
        first, second = (number(value) for value in self.values) if len(self.values) == 2 else (None, None)
        return None if first is None or second is None else second - first


@dataclass(frozen=True)
class Differences:
    """Runs side by side."""

    runs: list[str]
    settings: list[Difference]
    results: list[Difference]

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def differences(folders: Sequence[Path]) -> Differences:
    """What runs differ in; a sweep stands for its runs.

    Raises:
        RunFolderError: a folder is none of a run or of a sweep.
    """
    runs = [read_facts(each) for folder in dict.fromkeys(folders) for each in status(folder)]
    set_otherwise = [
        Difference(each.key, [None if value is ABSENT else value for value in each.values])
        for each in settings([facts.plan for facts in runs])
        if each.differs
    ]
    found = [outcome(facts) for facts in runs]
    names = dict.fromkeys(name for each in found for name in each)
    came_out = [Difference(name, [each.get(name) for each in found]) for name in names]
    return Differences(
        [facts.status.run for facts in runs],
        set_otherwise,
        [each for each in came_out if any(value != each.values[0] for value in each.values)],
    )


def outcome(facts: Facts) -> dict[str, Any]:
    """What came out of a run, or is known by now."""
    run, history, processes = facts.status, facts.history, facts.plan.processes
    found: dict[str, Any] = {"state": run.state, "updates": run.update, "training loss": run.loss}
    if run.best:
        found |= {f"best {run.best.metric}": run.best.value, "at update": run.best.update}
    if history.evaluations:
        found |= {f"last validation {name}": value for name, value in metrics_of(history.evaluations[-1]).items()}
    if speed := history.tokens_per_second():
        found["tokens per second"] = round(speed, 1)
    found |= {f"seconds of {phase}": round(spent, 3) for phase, spent in history.seconds().items()}
    if peaks := [peak for peak in facts.peaks if peak]:
        found["peak memory in bytes"] = max(peaks)
    return found | {"processes": processes.world_size, "strategy": str(processes.strategy), "device": processes.device}
