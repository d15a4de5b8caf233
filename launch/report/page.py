"""The page: one HTML file with its style, its charts and the library that draws them. It asks no network."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from launch.errors import RunFolderError
from launch.record import write_text
from launch.report import parts
from launch.report.charts import Chart
from launch.report.facts import Facts, read_facts
from launch.report.markup import paragraph, script_json, section, text
from launch.report.parts import Story
from launch.report.predictions import samples
from launch.report.traces import traces
from launch.status import Status
from launch.words import date

REPORT = "report.html"
"""The page about a run, in its folder."""

SPARE_BYTES = 100_000_000
"""What must be free on a disk for a page to be written there unasked: checkpoints need it more."""


def write_page(statuses: Sequence[Status], path: Path) -> None:
    """Write the page about the runs that these are the states of; whole, or not at all.

    Raises:
        RunFolderError: a run has no plan, or the page cannot be written.
    """
    content = page([read_facts(status) for status in statuses], path.parent)
    try:
        write_text(path, content)
    except OSError as error:
        for aside in path.parent.glob(f"{path.name}.*.tmp"):
            aside.unlink(missing_ok=True)
        raise RunFolderError(f"{path}: the report cannot be written: {error.strerror or error}") from None


def has_room(folder: Path) -> bool:
    """Whether a page takes nothing away that a run may need."""
    return shutil.disk_usage(folder).free >= SPARE_BYTES


def page(runs: Sequence[Facts], folder: Path = Path()) -> str:
    """The whole page, as it will stand in `folder`."""
    story = Story(tuple(runs), names_of([facts.folder for facts in runs]))
    drawn = parts.drawn_of(story)
    sections = [
        parts.failures(story),
        parts.overview(story),
        section("curves", "Curves", *_nothing_yet(drawn["curves"]), _grid(drawn["curves"])),
        parts.evaluations(story),
        section("metrics", "Metrics", _grid(drawn["metrics"])),
        section("time", "Where the time went", _grid(drawn["time"])),
        section("memory", "Memory", _grid(drawn["memory"])),
        parts.balance(story),
        parts.happenings(story, drawn["clock"][0] if drawn["clock"] else None),
        samples(story),
        traces(story, folder),
        parts.configuration(story),
        parts.environment(story),
        parts.again(story),
    ]
    every = [chart for charts in drawn.values() for chart in charts]
    figures = [{"key": parts.id_of(chart), "data": chart.data, "layout": chart.layout} for chart in every]
    return _document(story, [each for each in sections if each], script_json(figures))


def names_of(folders: Sequence[Path]) -> tuple[str, ...]:
    """Short names that tell folders apart: the last part of each path, or as many parts as that takes."""
    resolved = [folder.absolute() for folder in folders]
    for length in range(1, max((len(folder.parts) for folder in resolved), default=1) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in resolved]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(map(str, resolved))


def _nothing_yet(charts: Sequence[object]) -> list[str]:
    return [] if charts else [paragraph("No update was recorded (yet).")]


def _grid(charts: Sequence[Chart]) -> str:
    return f'<div class="grid">{"".join(map(parts.chart, charts))}</div>' if charts else ""


def _document(story: Story, sections: list[str], figures: str) -> str:
    from plotly.offline import get_plotlyjs

    here = Path(__file__).parent
    style, program = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    scripts = [_safe(get_plotlyjs()), _safe(program)]
    allowed = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    title = story.names[0] if story.alone else f"{len(story.runs)} runs"
    found = [re.search(r'^<section id="([\w-]+)".*\n<h2[^>]*>(.*?)</h2>', each) for each in sections]
    contents = "".join(f'<li><a href="#{match[1]}">{match[2]}</a></li>' for match in found if match)
    states = sorted({facts.status.state for facts in story.runs}, key=lambda state: (state != "failed", state))
    body, goes_on = "\n".join(sections), "running" in states
    whole = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)} – shoal report</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header>
<h1>{text(title)} <span class="state state-{text(states[0])}">{text(", ".join(states))}</span></h1>
<p>{text(_where(story))} · as of {date(time.time())}{"; load it anew to see more" if goes_on else ""}</p>
{parts.legend(story)}
<nav aria-label="Contents"><ul>{contents}</ul></nav>
</header>
<main id="content">
{body}
</main>
<footer><p>Written by shoal. Charts are drawn by plotly.js, which is part of this file; nothing is loaded.</p></footer>
<script type="application/json" id="figures">{figures}</script>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""
    return whole.encode("utf-8", "replace").decode("utf-8")  # half a surrogate, which JSON may hold, is no text


def _where(story: Story) -> str:
    return str(story.runs[0].folder.absolute()) if story.alone else f"{len(story.runs)} runs side by side"


def _safe(script: str) -> str:
    """A script that no text in it can end."""
    return script.replace("</script", "<\\/script").replace("\r\n", "\n")


def _hash(script: str) -> str:
    """By which a browser knows the scripts that are ours: it runs no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
