"""Runs by the clock: how far each was at what time, and what interrupted it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from launch.report.charts import COLOURS, Chart, layout_of, line_of, points_per_curve
from launch.report.curves import thin
from launch.report.facts import Facts
from launch.words import count, duration

MARKS = {
    "resume": "triangle-right",
    "stopped": "square",
    "failure": "x",
    "spike": "diamond",
    "rewound": "triangle-left",
}
"""Symbols of the events that are marked on the clock, besides saves."""

MOST_MARKS = 150


def on_the_clock(runs: Sequence[Facts], names: Sequence[str]) -> Chart | None:
    """How far each run was at what time, with its interruptions."""
    most = points_per_curve(4 * len(runs))
    spans = [_span(facts) for facts in runs]
    size, unit = _unit(max((last - began for began, last in spans), default=0.0))
    data: list[dict[str, Any]] = []
    rows = []
    for place, (name, facts, (began, last)) in enumerate(zip(names, runs, spans, strict=True)):
        history = facts.history
        times = history.times.finite
        if not times:
            continue
        since = _since(began, size)
        breaks = [event.time for event in history.events if event.kind == "resume"]
        pairs = _with_gaps(times, breaks)
        kept = thin([math.nan if pair is None else pair[1] for pair in pairs], most)
        gaps = [number for number, pair in enumerate(pairs) if pair is None]
        shown = [pairs[number] for number in sorted({*kept, *gaps})]
        xs = [None if pair is None else since(pair[1]) for pair in shown]
        ys = [None if pair is None else pair[0] for pair in shown]
        about = {"type": "scatter", "legendgroup": f"run-{place}"}
        data.append({**about, "mode": "lines", "x": xs, "y": ys, "name": name, "line": line_of(place)})
        if lost := history.discarded.finite:
            few = [lost[number] for number in thin([when for _, when in lost], most)]
            grey = {"color": "#757d87", "size": 4, "symbol": "circle-open"}
            told = {"name": f"{name}: made again", "marker": grey, "mode": "markers"}
            data.append({**about, **told, "x": [since(when) for _, when in few], "y": [update for update, _ in few]})
        data += _marks(facts, place, since, about)
        resumed = sum(event.kind == "resume" for event in history.events)
        rows.append([name, duration(last - began), count(resumed), count(len(lost)), count(times[-1][0])])
    if not data:
        return None
    says = "How far a run was, by the clock: a gap is an interruption, open circles are updates that were made again."
    layout = layout_of(f"{unit} since it began", "update", data)
    layout["xaxis"] |= {"rangemode": "tozero"}
    titles = ("run", "from begin to end", "went on", "updates made again", "last update")
    return Chart("clock", "Over the clock", says, data, layout, titles, rows)


def _span(facts: Facts) -> tuple[float, float]:
    """When the first and the last thing happened that is known of a run; seconds since 1970."""
    history = facts.history
    known = [when for _, when in history.times.finite] + [event.time for event in history.events]
    return (min(known), max(known)) if known else (0.0, 0.0)


def _since(began: float, size: float) -> Callable[[float], float]:
    return lambda when: round((when - began) / size, 5)


def _unit(seconds: float) -> tuple[float, str]:
    """What a span of time is best counted in: seconds in one, and their name."""
    for size, name in ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return size, name
    return 1.0, "seconds"


def _with_gaps(times: Sequence[tuple[int, float]], breaks: Sequence[float]) -> list[tuple[int, float] | None]:
    """Pairs of update and time, with None where a run went on after an interruption."""
    pairs: list[tuple[int, float] | None] = []
    left = sorted(breaks)
    for pair in times:
        if left and pair[1] >= left[0]:
            pairs.append(None)
            left = [when for when in left if when > pair[1]]
        pairs.append(pair)
    return pairs


def _marks(facts: Facts, place: int, since: Callable[[float], float], about: dict[str, Any]) -> list[dict[str, Any]]:
    marks = []
    for kind, symbol in (*MARKS.items(), ("save", "line-ns-open")):
        events = [event for event in facts.history.events if event.kind == kind][-MOST_MARKS:]
        if events:
            marker = {"symbol": symbol, "size": 9, "color": COLOURS[place % len(COLOURS)], "line": {"width": 1}}
            points = {"x": [since(each.time) for each in events], "y": [each.update for each in events]}
            told = {"mode": "markers", "marker": marker, "hovertext": [each.what[:200] for each in events]}
            marks.append({**about, **told, **points, "showlegend": False, "hoverinfo": "text"})
    return marks
