"""Draws what `shoal parity` found: the loss of every run, and how far each is from the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.parity import Outcome
from launch.strategy import Strategy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; those that lie on the CPU are the lighter ones of a pair.
COLOURS = {
    Strategy.SINGLE: "#000000",
    Strategy.DDP: "#009E73",
    Strategy.FSDP2: "#0072B2",
    Strategy.FSDP2_OFFLOAD: "#56B4E9",
    Strategy.ZERO1: "#7F7F7F",
    Strategy.ZERO2: "#D55E00",
    Strategy.ZERO2_OFFLOAD: "#E69F00",
    Strategy.ZERO3: "#882255",
    Strategy.ZERO3_OFFLOAD: "#CC79A7",
    Strategy.XLA: "#F0E442",
}
MARKERS = {"single": "", "ddp": "o", "fsdp2": "s", "zero1": "v", "zero2": "^", "zero3": "D", "xla": "P"}
"""Of a strategy without `_offload`; with it the same, larger and hollow, so that it shows around the other."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)), (0, (9, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
"""Line styles by the position of a number of processes among those that were run; they repeat after the sixth."""
BAND: dict[str, Any] = {"color": "0.8", "linewidth": 8.0, "solid_capstyle": "round", "marker": "o", "markersize": 8.0}
"""How the reference is drawn."""
WIDTH = 0.7
"""Share of an update's room, in the lower panel, over which the runs stand side by side."""
MARKED = 12
"""Markers on one curve, about."""


def draw(path: Path, title: str, subtitle: str, outcomes: list[Outcome]) -> None:
    """Write a PNG with two panels over the same updates; the first outcome is the reference."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it would look for a window system and keep the figure.
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
    drawn = [outcome for outcome in outcomes if outcome.losses]
    sizes = sorted({outcome.world_size for outcome in drawn})
    _draw_losses(above, drawn, sizes)
    _draw_differences(below, drawn, sizes)
    above.set_title(title, loc="left", fontsize=11, pad=20)
    above.text(0, 1.03, subtitle, transform=above.transAxes, fontsize=8.5, color="0.3")
    _explain(figure, drawn, sizes, len(outcomes) - len(drawn))
    figure.savefig(path, dpi=200)


def _draw_losses(axes: Axes, outcomes: list[Outcome], sizes: list[int]) -> None:
    """All curves over the reference, which is a broad band, so that it stays visible under those that are equal."""
    reference, *others = outcomes
    axes.plot(list(reference.losses), list(reference.losses.values()), **BAND, zorder=1)
    for position, outcome in enumerate(others):
        axes.plot(list(outcome.losses), list(outcome.losses.values()), **_style(outcome, sizes, position))
    axes.set_ylabel("training loss, mean per target")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)


def _draw_differences(axes: Axes, outcomes: list[Outcome], sizes: list[int]) -> None:
    reference, *others = outcomes
    values = [value for outcome in others for value in outcome.differences.values()]
    allowed = reference.tolerances.loss
    floor = floor_of([allowed, *values])
    _set_scale(axes, [allowed, *values], floor)
    axes.set_xlim(min(reference.losses) - 0.6, max(reference.losses) + 0.6)
    axes.axhline(allowed, color="black", linewidth=1.2, linestyle=(0, (6, 3)))
    _note(axes, allowed, 3, f"tolerance {_power(allowed)}")
    if 0.0 in values:
        axes.axhline(floor, color="0.6", linewidth=0.8, zorder=1)
        _note(axes, floor, -13, "exactly 0, drawn on this line")
    for position, outcome in enumerate(others):
        # Rounding leaves few different values: beside one another they show, over one another they would not.
        shift = WIDTH * ((position + 0.5) / len(others) - 0.5)
        updates = [update + shift for update in outcome.differences]
        differences = [value or floor for value in outcome.differences.values()]
        axes.plot(updates, differences, **{**_style(outcome, sizes, position), "linewidth": 0.7})
    axes.set_ylabel("|loss − reference|, mean per target")
    axes.set_xlabel("update (runs are drawn side by side in the lower panel)")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)


def _set_scale(axes: Axes, values: list[float], floor: float) -> None:
    """Powers of ten that hold every value and the tolerance; where there are zeros, the floor is called 0."""
    top = max(values) * 4
    decades = [10.0**power for power in range(round(math.log10(floor)) + 1, math.floor(math.log10(top)) + 1)]
    lowest = [(floor, "0")] if 0.0 in values else []
    axes.set_yscale("log")
    axes.set_ylim(floor / 4, top)
    axes.set_yticks(*zip(*lowest, *((decade, _power(decade)) for decade in decades), strict=True))
    axes.minorticks_off()
    axes.locator_params(axis="x", integer=True)


def floor_of(values: list[float]) -> float:
    """Where an exact 0 is drawn on the log scale: a power of ten that lies clearly below every other value."""
    smallest = min(value for value in values if value)
    return float(10.0 ** math.floor(math.log10(smallest / 3)))


def _power(value: float) -> str:
    """`10⁻⁵`; a value that is no power of ten as it is."""
    exponent = round(math.log10(value))
    return f"$10^{{{exponent}}}$" if math.isclose(value, 10.0**exponent) else f"{value:g}"


def _note(axes: Axes, height: float, above: float, text: str) -> None:
    """Text at the right end of a horizontal line, so many points above it."""
    axes.annotate(
        text,
        (1.0, height),
        xytext=(-4, above),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="0.2",
    )


def _style(outcome: Outcome, sizes: list[int], position: int = 0) -> dict[str, Any]:
    """Colour and marker by strategy, line style by the number of processes."""
    colour, offload = COLOURS[outcome.strategy], outcome.strategy.offload
    apart = max(1, len(outcome.losses) // MARKED)
    return {
        "color": colour,
        "linewidth": 1.1,
        "linestyle": DASHES[sizes.index(outcome.world_size) % len(DASHES)],
        "marker": MARKERS[outcome.strategy.removesuffix("_offload")],
        "markersize": 6.5 if offload else 3.5,
        "markerfacecolor": "none" if offload else colour,
        "markevery": (position % apart, apart),
    }


def _explain(figure: Figure, outcomes: list[Outcome], sizes: list[int], missing: int) -> None:
    """The legend, outside: what a colour is, what a line style is; not one entry for every curve."""
    from matplotlib.lines import Line2D

    reference, *others = outcomes
    entries = [Line2D([], [], **BAND, label=f"reference: {reference.strategy} on {reference.world_size}")]
    for strategy in (strategy for strategy in Strategy if any(strategy is other.strategy for other in others)):
        style = _style(replace(reference, strategy=strategy), sizes)
        entries.append(Line2D([], [], **{**style, "linestyle": "-", "markevery": 1}, label=str(strategy)))
    for size in (size for size in sizes if any(size == other.world_size for other in others)):
        dashes = DASHES[sizes.index(size) % len(DASHES)]
        entries.append(Line2D([], [], color="0.2", linewidth=1.1, linestyle=dashes, label=f"{size} processes"))
    if missing:
        entries.append(Line2D([], [], linestyle="none", label=f"({missing} failed: not drawn)"))
    figure.legend(handles=entries, loc="outside right upper", frameon=False, fontsize=8.5, handlelength=3.4)
