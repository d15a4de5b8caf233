"""Facts of runs as charts: each a figure for plotly.js, and the table of its numbers. Text takes the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.disk import size_in_words
from launch.report.curves import Curve
from launch.report.facts import Facts, metrics_of
from launch.words import NOTHING, count, duration, figure, share

COLOURS = ("#0a78b8", "#d55e00", "#0a8f6a", "#b4589d", "#8a7000", "#757d87", "#cc3d5c", "#6b6bd6")
"""Of runs, in their order; each at least 3 : 1 against the page, light or dark (WCAG 2.2, 1.4.11)."""

DASHES = ("solid", "dash", "dot", "dashdot")
"""Of runs, once the colours are through: no two of 32 runs look alike."""

PHASES = {
    "compute": ("#0a78b8", "computing"),
    "sync": ("#d55e00", "waiting for ranks"),
    "data": ("#8a7000", "waiting for data"),
    "save": ("#0a8f6a", "saving"),
    "evaluate": ("#b4589d", "evaluating"),
    "other": ("#757d87", "the rest"),
}

POINTS = 60_000
"""Of all curves on a page together, about: a browser draws them at once, and the page stays small."""

MOST_PER_CURVE, LEAST_PER_CURVE = 1_500, 60

FEW_POINTS = 4
"""A curve of fewer has its points marked: one alone makes no line."""

STRIPES = 60
"""Parts of a run over which the time of an update is split."""

MOST_METRICS = 6
"""Metrics of evaluations that are drawn, besides the loss."""


@dataclass(frozen=True)
class Chart:
    """A figure, and what it shows in words and numbers."""

    key: str
    """What it is called in ids on the page."""
    title: str
    says: str
    """What is drawn, and how it is to be read."""
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    titles: tuple[str, ...] = ()
    """Of the table of its numbers."""
    rows: list[list[str]] = field(default_factory=list)
    can_be_logarithmic: bool = False


def line_of(place: int) -> dict[str, Any]:
    """How the curves of a run look."""
    return {"color": COLOURS[place % len(COLOURS)], "dash": DASHES[place // len(COLOURS) % len(DASHES)], "width": 1.8}


def points_per_curve(curves: int) -> int:
    """How many points each of so many curves may have."""
    return max(LEAST_PER_CURVE, min(MOST_PER_CURVE, POINTS // max(curves, 1)))


# --- over the updates ------------------------------------------------------------------------------------

OVER_UPDATES = {
    "loss": ("Loss", "loss", "Training loss of each recorded update, a mean over its targets; dots are validation."),
    "learning_rate": ("Learning rate", "learning rate", "Of each recorded update."),
    "gradient_norm": ("Gradient norm", "gradient norm", "Global L2 norm of the gradient, before clipping."),
    "tokens_per_second": ("Speed", "tokens per second", "Over all ranks, without saves and evaluations."),
}
"""Titles, names of the axis, and what is drawn."""


def over_updates(runs: Sequence[Facts], names: Sequence[str]) -> list[Chart]:
    """Loss, learning rate, gradient norm and speed; what no run has recorded is left out."""
    most = points_per_curve(2 * len(runs) * len(OVER_UPDATES))
    charts = []
    for key, (title, axis, says) in OVER_UPDATES.items():
        curves = [facts.history.curves[key] for facts in runs]
        dots = [_validation(facts, "loss") if key == "loss" else Curve() for facts in runs]
        if not any(curve.finite for curve in (*curves, *dots)):
            continue
        data, rows = [], []
        for place, (name, curve, dot) in enumerate(zip(names, curves, dots, strict=True)):
            for each, what in ((curve, "lines"), (dot, "markers")):
                if each.updates:
                    data.append(_trace(each, name, place, most, what, alone=len(runs) == 1))
                    label = "validation" if what == "markers" else "training"
                    rows.append([name, label, *_extremes(each)] if key == "loss" else [name, *_extremes(each)])
        titles = ("run", "of", *EXTREMES) if key == "loss" else ("run", *EXTREMES)
        logarithmic = key in ("loss", "gradient_norm")
        charts.append(Chart(key, title, says, data, layout_of("update", axis, data), titles, rows, logarithmic))
    return charts


def metrics(runs: Sequence[Facts], names: Sequence[str]) -> list[Chart]:
    """What evaluations measured besides the loss, where there were several to draw a line through."""
    found = dict.fromkeys(name for facts in runs for each in facts.history.evaluations for name in metrics_of(each))
    judged = [facts.plan.config.eval.best_metric for facts in runs]
    ranked = sorted((name for name in found if name != "loss"), key=lambda name: name not in judged)
    charts: list[Chart] = []
    for metric in ranked:
        curves = [_validation(facts, metric) for facts in runs]
        if max(len(curve.finite) for curve in curves) < 2:
            continue
        most = points_per_curve(MOST_METRICS * len(runs))
        data = [
            _trace(curve, name, place, most, "lines+markers", alone=False)
            for place, (name, curve) in enumerate(zip(names, curves, strict=True))
            if curve.updates
        ]
        rows = [[name, *_extremes(curve)] for name, curve in zip(names, curves, strict=True) if curve.updates]
        says = f"{metric} of each evaluation."
        key = f"metric-{len(charts)}"
        charts.append(Chart(key, metric, says, data, layout_of("update", metric, data), ("run", *EXTREMES), rows))
    return charts[:MOST_METRICS]


def _validation(facts: Facts, metric: str) -> Curve:
    curve = Curve()
    for evaluation in facts.history.evaluations:
        if (value := metrics_of(evaluation).get(metric)) is not None:
            curve.add(int(evaluation["update"]), value)
    return curve


def _trace(curve: Curve, name: str, place: int, most: int, mode: str, *, alone: bool) -> dict[str, Any]:
    updates, values = curve.thinned(most)
    shown = {"markers": "validation", "lines": "training"}[mode] if alone else name
    drawn = "lines+markers" if mode == "lines" and len(updates) < FEW_POINTS else mode
    trace = {
        **{"type": "scatter", "mode": drawn, "x": updates, "y": rounded(values), "name": shown, "line": line_of(place)},
        **{"legendgroup": f"run-{place}", "showlegend": mode != "markers" or alone, "connectgaps": mode != "lines"},
    }
    dots = (place + (alone and mode == "markers")) % len(COLOURS)
    return trace | {"marker": {"color": COLOURS[dots], "size": 7}}


EXTREMES = ("first", "last", "lowest", "highest", "points", "not finite")


def _extremes(curve: Curve) -> list[str]:
    """A curve in words: where it begins and ends, and how far it goes."""
    finite = curve.finite
    if not finite:
        return [NOTHING] * 4 + [count(len(curve.values)), count(len(curve.values))]

    def at(pair: tuple[int, float]) -> str:
        return f"{figure(pair[1])} at {pair[0]:,}"

    ends = [at(finite[0]), at(finite[-1])]
    lowest = min(finite, key=lambda pair: pair[1])
    highest = max(finite, key=lambda pair: pair[1])
    return [*ends, at(lowest), at(highest), count(len(curve.values)), count(len(curve.values) - len(finite))]


# --- time and memory -------------------------------------------------------------------------------------


def time_split(runs: Sequence[Facts], names: Sequence[str]) -> list[Chart]:
    """Where the time of each run went; of a single one also over its updates."""
    spent = [facts.history.seconds() for facts in runs]
    if not any(sum(each.values()) > 0 for each in spent):
        return []
    phases = [*PHASES, *dict.fromkeys(phase for each in spent for phase in each if phase not in PHASES)]
    totals = [sum(each.values()) or 1.0 for each in spent]
    data = []
    for phase in phases:
        colour, label = PHASES.get(phase, PHASES["other"])
        shares = [round(100 * each.get(phase, 0.0) / total, 3) for each, total in zip(spent, totals, strict=True)]
        data.append(_bar(label if phase in PHASES else phase, colour, x=shares, y=list(names), orientation="h"))
    layout = layout_of("share of the time in %", "", data)
    layout |= {"barmode": "stack", "height": 250 + 34 * len(runs), "bargap": 0.5}
    layout["yaxis"] |= {"autorange": "reversed", "type": "category"}
    layout["xaxis"] |= {"range": [0, 100]}
    rows = [
        [name, *(f"{duration(each.get(phase, 0.0))} ({share(each.get(phase, 0.0) / total)})" for phase in phases)]
        for name, each, total in zip(names, spent, totals, strict=True)
    ]
    titles = ("run", *(PHASES[phase][1] if phase in PHASES else phase for phase in phases))
    says = "Where the time up to the last record went; waiting for ranks holds exchanges with them too."
    charts = [Chart("time", "Time by phase", says, data, layout, titles, rows)]
    if len(runs) == 1 and len(runs[0].history.split.updates) >= 4:
        charts.append(_time_over_updates(runs[0], [phase for phase in phases if spent[0].get(phase)]))
    return charts


def _time_over_updates(facts: Facts, phases: Sequence[str]) -> Chart:
    """Seconds per update by phase, over stripes of the run."""
    split = facts.history.split
    size = len(split.updates)
    stripes = min(STRIPES, size)
    cuts = [(size * number // stripes, size * (number + 1) // stripes) for number in range(stripes)]
    middles = [(split.updates[begin] + split.updates[end - 1]) / 2 for begin, end in cuts]
    data, rows = [], []
    for phase in phases:
        colour, label = PHASES.get(phase, PHASES["other"])
        means = [sum(split.seconds[phase][begin:end]) / (end - begin) for begin, end in cuts]
        data.append(_bar(label if phase in PHASES else phase, colour, x=middles, y=rounded(means)))
        rows.append(
            [label if phase in PHASES else phase, *map(duration, (means[0], means[-1], min(means), max(means)))]
        )
    layout = layout_of("update", "seconds per record", data) | {"barmode": "stack", "bargap": 0.05}
    says = f"Seconds between two records by phase, means over {stripes} parts of the run."
    titles = ("phase", "at the beginning", "at the end", "least", "most")
    return Chart("time-over-updates", "Time over the run", says, data, layout, titles, rows)


def memory(runs: Sequence[Facts], names: Sequence[str]) -> Chart | None:
    """What each rank took at its peak, beside what was planned."""
    known = [(name, facts) for name, facts in zip(names, runs, strict=True) if any(facts.peaks)]
    if not known:
        return None
    data, rows = [], []
    for name, facts in known:
        place, planned = list(names).index(name), facts.planned_memory
        ranks = [f"rank {rank}" for rank in range(len(facts.peaks))]
        peaks = [peak and round(peak / 1e9, 4) for peak in facts.peaks]
        data.append(_bar(name, COLOURS[place % len(COLOURS)], x=ranks, y=peaks))
        if planned:
            stroke = {"width": 3, "color": "#757d87"}
            mark = {"symbol": "line-ew-open", "size": 28, "color": stroke["color"], "line": stroke}
            told = {"type": "scatter", "mode": "markers", "name": f"{name}: planned", "marker": mark}
            data.append({**told, "x": ranks, "y": [round(planned / 1e9, 4)] * len(ranks)})
        for rank, peak in enumerate(facts.peaks):
            sizes = [size_in_words(peak) if peak else NOTHING, size_in_words(planned) if planned else NOTHING]
            rows.append([name, str(rank), *sizes, share(peak / planned) if peak and planned else NOTHING])
    layout = layout_of("", "GB", data) | {"barmode": "group", "bargap": 0.8 if len(rows) <= 4 else 0.3}
    layout["xaxis"] |= {"type": "category"}
    layout["yaxis"] |= {"rangemode": "tozero"}
    titles = ("run", "rank", "peak", "planned", "share")
    return Chart(
        "memory", "Peak of each rank", "Memory of each rank at the peak of training.", data, layout, titles, rows
    )


# --- figures ---------------------------------------------------------------------------------------------


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """To six digits: more cannot be seen, and a page of curves is half as large."""
    return [None if value is None or not math.isfinite(value) else float(f"{value:.6g}") for value in values]


def _bar(name: str, colour: str, **values: Any) -> dict[str, Any]:
    return {"type": "bar", "name": name, "marker": {"color": colour}, **values}


def layout_of(x: str, y: str, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Axes and margins alike for all; one curve needs no legend."""
    return {
        "showlegend": sum(trace.get("showlegend", True) for trace in data) > 1,
        "margin": {"l": 64, "r": 16, "t": 24, "b": 48},
        "height": 340,
        "hovermode": "closest",
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "traceorder": "normal"},
        "xaxis": {"title": {"text": x}, "automargin": True, "zeroline": False},
        "yaxis": {"title": {"text": y}, "automargin": True, "zeroline": False},
    }
