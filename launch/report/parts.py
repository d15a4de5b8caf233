"""The sections of the page: what each tells of the runs, in words and tables. `launch.report.charts` draws."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.disk import size_in_words
from launch.dotted import leaves
from launch.recorded import number
from launch.report import charts
from launch.report.charts import COLOURS, Chart
from launch.report.clock import on_the_clock
from launch.report.events import KINDS
from launch.report.facts import Facts, metrics_of
from launch.report.markup import facts as pairs
from launch.report.markup import folded, listing, paragraph, section, table, text
from launch.report.settings import ABSENT, settings, usual_settings
from launch.words import NOTHING, count, date, duration, figure, share

MOST_ROWS = 200
"""Rows of a table; of more, the first and the newest."""


@dataclass(frozen=True)
class Story:
    """The runs of a page, with the names by which it calls them."""

    runs: tuple[Facts, ...]
    names: tuple[str, ...]

    @property
    def named(self) -> list[tuple[str, Facts]]:
        """Names and runs."""
        return list(zip(self.names, self.runs, strict=True))

    @property
    def alone(self) -> bool:
        """Whether there is one run only."""
        return len(self.runs) == 1


def failures(story: Story) -> str:
    """Why runs have failed, before anything else."""
    parts = []
    for name, facts in story.named:
        cause = facts.failure
        if cause is None or facts.status.state in ("finished", "running", "queued"):
            continue
        told = [
            ("rank", NOTHING if cause.rank is None else str(cause.rank)),
            ("host", cause.host or NOTHING),
            ("after update", NOTHING if cause.update is None else count(cause.update)),
            ("log", cause.log or str(facts.folder / "logs")),
            ("exit code", str(cause.exit_code)),
        ]
        trace = folded("What it wrote", listing(cause.traceback, f"Traceback of {name}")) if cause.traceback else ""
        parts.append(
            f'<div class="failure"><h3>{text(name)}</h3>{listing(cause.message, "Cause")}{pairs(told)}{trace}</div>'
        )
    return section("failure", "Why it failed" if len(parts) == 1 else "Why they failed", *parts)


def overview(story: Story) -> str:
    """What became of a run; of several, in a line for each what differs, and then what does not."""
    if story.alone:
        return section("overview", "What came out", pairs(_outcome(story.runs[0])), _unreadable(story))
    outcomes = [_outcome(facts, brief=True) for facts in story.runs]
    state, *others = zip(*outcomes, strict=True)  # by what is told
    odd = [state, *(told for told in others if len(set(told)) > 1)]
    same = [told[0] for told in others if len(set(told)) == 1 and told[0][1] != NOTHING]
    rows = [[name, *(told[run][1] for told in odd)] for run, name in enumerate(story.names)]
    return section(
        "overview",
        "What came out",
        table("The runs of this page", ["run", *(told[0][0] for told in odd)], rows),
        paragraph("The same for all:") + pairs(same) if same else "",
        _unreadable(story),
    )


def _outcome(facts: Facts, *, brief: bool = False) -> list[tuple[str, str]]:
    status, processes, batch = facts.status, facts.plan.processes, facts.plan.batch
    best, history = status.best, facts.history
    parameters = (facts.result or {}).get("parameters", {})
    peaks = [peak for peak in facts.peaks if peak]
    where = f"{processes.replicas} × {processes.device_name or processes.device}, {processes.strategy}"
    return [
        ("state", status.state if brief or not status.because else f"{status.state}: {status.because}"),
        ("updates", f"{count(status.update)} of {count(status.updates)}"),
        ("best", f"{best.metric} {figure(best.value)} at update {best.update:,}" if best else NOTHING),
        ("last training loss", figure(status.loss) if isinstance(status.loss, (int, float)) else NOTHING),
        ("time of updates", duration(sum(history.seconds().values())) if history.split.updates else NOTHING),
        ("tokens per second", count(history.tokens_per_second())),
        ("peak memory", size_in_words(max(peaks)) if peaks else NOTHING),
        ("parameters", _parameters(parameters)),
        ("recipe", Path(facts.plan.config.recipe).stem),
        ("processes", where),
        ("batch", f"{batch.global_batch_size} = {_batch(facts)}"),
        ("numbers", facts.plan.dtypes.forward),
        ("began", date(facts.began) if facts.began else NOTHING),
    ]


def _parameters(parameters: dict[str, Any]) -> str:
    whole, trained = parameters.get("all"), parameters.get("trainable")
    if not whole:
        return NOTHING
    return count(whole) if whole == trained else f"{count(whole)}, {count(trained)} trained"


def _batch(facts: Facts) -> str:
    batch, processes = facts.plan.batch, facts.plan.processes
    return f"{batch.micro_batch_size} × {batch.accumulation} × {processes.replicas} {processes.noun}"


def _unreadable(story: Story) -> str:
    lines = [f"{name}: cannot be read: {problem}" for name, facts in story.named for problem in facts.unreadable]
    return "".join(paragraph(line) for line in lines)


# --- settings --------------------------------------------------------------------------------------------


def configuration(story: Story) -> str:
    """What was set otherwise than usual, and all of it."""
    found = settings([facts.plan for facts in story.runs])
    known = {usual_settings(facts.plan.config.recipe)[0] for facts in story.runs}
    usual = known.pop() if len(known) == 1 else "usual"
    odd = [each for each in found if each.key != "recipe" and (each.unusual or each.differs)]
    told = (
        f"Settings that are not those of {usual}" if usual.endswith(".yaml") else "Settings that are not the defaults"
    )
    shown = [[each.key, *map(_value, each.values), _usual(each.usual)] for each in odd]
    marked = [row for row, each in enumerate(odd) if each.differs]
    whole = [[each.key, *map(_value, each.values)] for each in found]
    names = ["value"] if story.alone else list(story.names)
    return section(
        "settings",
        "Settings",
        table(told, ["key", *names, usual], shown, marked=marked)
        if odd
        else paragraph("All settings are the usual ones."),
        folded("All settings", table("All settings", ["key", *names], whole)),
    )


def _value(value: Any) -> str:
    return (
        NOTHING
        if value is ABSENT
        else value
        if isinstance(value, str) and value
        else json.dumps(value, ensure_ascii=False)
    )


def _usual(values: tuple[Any, ...]) -> str:
    known = list(dict.fromkeys(_value(value) for value in values if value is not ABSENT))
    return " or ".join(known) if known else NOTHING


# --- numbers ---------------------------------------------------------------------------------------------


def id_of(drawn: Chart) -> str:
    """The id of the place of a chart."""
    return f"chart-{drawn.key}"


def chart(drawn: Chart) -> str:
    """The place of a chart, what it shows, and its numbers."""
    key, described = id_of(drawn), f"{id_of(drawn)}-says"
    switch = (
        f'<label><input type="checkbox" data-logarithmic="{key}"> logarithmic</label>'
        if drawn.can_be_logarithmic
        else ""
    )
    return (
        f'<figure><h3>{text(drawn.title)}</h3><p id="{described}">{text(drawn.says)}</p>{switch}'
        f'<div class="chart" id="{key}" role="group" aria-label="Chart: {text(drawn.title)}" '
        f'aria-describedby="{described}" style="min-height:{drawn.layout["height"]}px"></div>'
        f"{folded('Numbers', table(f'{drawn.title}: the numbers', drawn.titles, drawn.rows))}</figure>"
    )


def evaluations(story: Story) -> str:
    """Each evaluation with its metrics."""
    every = [(name, each) for name, facts in story.named for each in facts.history.evaluations]
    metrics = list(dict.fromkeys(metric for _, each in every for metric in metrics_of(each)))
    if not every:
        return section("evaluations", "Evaluations", paragraph("There was no evaluation (yet)."))
    bests = {(name, facts.status.best.update) for name, facts in story.named if facts.status.best}
    kept = every if len(every) <= MOST_ROWS else [*every[: MOST_ROWS // 2], *every[-MOST_ROWS // 2 :]]
    rows, marked = [], []
    for row, (name, each) in enumerate(kept):
        is_best = (name, each["update"]) in bests
        marked += [row] if is_best else []
        values = metrics_of(each)
        update = f"{each['update']:,}" + (" (best)" if is_best else "")
        first = [update] if story.alone else [name, update]
        rows.append([*first, *(figure(values.get(metric)) for metric in metrics), count(number(each.get("samples")))])
    left_out = paragraph(f"{len(every) - len(kept):,} of {len(every):,} are left out here; metrics.jsonl has all.")
    titles = ["update"] if story.alone else ["run", "update"]
    whole = table("Evaluations on the validation data", [*titles, *metrics, "samples"], rows, marked=marked)
    return section("evaluations", "Evaluations", whole, left_out if len(kept) < len(every) else "")


def balance(story: Story) -> str:
    """Whether a rank has kept the others waiting."""
    several = [(name, facts) for name, facts in story.named if facts.plan.processes.world_size > 1]
    if not several:
        return section("balance", "Balance of the ranks", paragraph("One process: no rank waits for another."))
    parts, rows = [], []
    for name, facts in several:
        seconds = facts.history.seconds()
        whole = sum(seconds.values())
        if whole:
            part = share(seconds.get("sync", 0.0) / whole)
            parts.append(
                paragraph(f"{name}: {part} of the time went into waiting for other ranks, and exchanging with them.")
            )
        told = [event for event in facts.history.events if event.kind == "straggler"]
        rows += [[name, count(event.update), date(event.time), event.what] for event in told]
    if rows:
        parts.append(table("Ranks that kept the others waiting", ["run", "update", "time", "what"], rows[-MOST_ROWS:]))
    else:
        parts.append(paragraph("No rank kept the others waiting for more than a tenth of the time."))
    return section("balance", "Balance of the ranks", *parts)


def happenings(story: Story, drawn: Chart | None) -> str:
    """Starts, interruptions and what else happened, by the clock."""
    told = [(name, facts, event) for name, facts in story.named for event in facts.history.events]
    most = [each for each in told if each[2].kind != "save"]
    rows = [
        [name, KINDS[event.kind], date(event.time), count(event.update), event.what]
        for name, _, event in most[-MOST_ROWS:]
    ]
    saves = [[name, count(sum(e.kind == "save" for e in facts.history.events))] for name, facts in story.named]
    titles = ["run", "event", "time", "after update", "what"]
    return section(
        "happenings",
        "What happened when",
        chart(drawn) if drawn else "",
        table("Starts, interruptions and what was odd", titles, rows) if rows else "",
        table("Checkpoints that were saved", ["run", "saves"], saves) if any(row[1] != "0" for row in saves) else "",
    )


# --- where and how ---------------------------------------------------------------------------------------


def environment(story: Story) -> str:
    """Hosts, versions and variables."""
    columns = [_environment(facts) for facts in story.runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [[key, *(column.get(key, NOTHING) for column in columns)] for key in keys]
    marked = [place for place, row in enumerate(rows) if len(set(row[1:])) > 1]
    names = ["value"] if story.alone else list(story.names)
    return section(
        "environment", "Environment", table("Where it ran, and with what", ["what", *names], rows, marked=marked)
    )


def _environment(facts: Facts) -> dict[str, str]:
    known = {key: value for key, value in facts.surroundings.items() if key not in ("arguments", "started")}
    known["git"] = _git(known.get("git"))
    return {key: _value(value) for key, value in leaves(known | (facts.environment or {}))}


def _git(git: Any) -> Any:
    if not isinstance(git, dict):
        return "no checkout"
    return f"{git.get('commit')}{', with changes' if git.get('modified') else ''}"


def again(story: Story) -> str:
    """Commands that make these runs once more."""
    parts = []
    for name, facts in story.named:
        lines = [
            *(["# as it was begun", began] if (began := command(facts.first_arguments)) else []),
            "# with every setting as it was recorded",
            f"shoal run {shlex.quote(str(facts.folder.absolute() / 'run.yaml'))} --out runs/again",
        ]
        heading = "" if story.alone else f"<h3>{text(name)}</h3>"
        parts.append(heading + listing("\n".join(lines), f"Commands for {name}"))
    return section("again", "Once more", *parts)


def command(arguments: Sequence[str]) -> str:
    """A command line as a user types it."""
    if not arguments:
        return ""
    program = Path(arguments[0])
    if program.stem in ("shoal", "__main__", "-c"):
        return shlex.join(["shoal", *arguments[1:]])
    return shlex.join(["python", "-m", f"launch.{program.stem}", *arguments[1:]])


def legend(story: Story) -> str:
    """Which colour is which run, where there are several."""
    if story.alone:
        return ""
    entries = [
        f'<li><span class="swatch" style="background:{COLOURS[place % len(COLOURS)]}"></span>{text(name)}</li>'
        for place, name in enumerate(story.names)
    ]
    return f'<ul class="legend" aria-label="Runs">{"".join(entries)}</ul>'


def drawn_of(story: Story) -> dict[str, list[Chart]]:
    """All charts, by the section they stand in."""
    runs, names = story.runs, story.names
    remembered, clock = charts.memory(runs, names), on_the_clock(runs, names)
    return {
        "curves": charts.over_updates(runs, names),
        "metrics": charts.metrics(runs, names),
        "time": charts.time_split(runs, names),
        "memory": [remembered] if remembered else [],
        "clock": [clock] if clock else [],
    }
