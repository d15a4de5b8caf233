"""HTML from data: nothing of a run gets into the page but through here, escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 4_000
"""Characters of one text that are shown."""


def text(value: Any, most: int = LONGEST) -> str:
    """Something as text on the page, cut to a readable length."""
    whole = value if isinstance(value, str) else str(value)
    cut = whole if len(whole) <= most else f"{whole[:most]} … ({len(whole) - most:,} more characters)"
    return html.escape(cut, quote=True)


def script_json(value: Any) -> str:
    """JSON to stand inside a script element: nothing in it can end that, or begin a comment."""
    dense = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return dense.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def section(key: str, title: str, *parts: str) -> str:
    """A part of the page that has a heading, for the list of contents; empty where all its parts are."""
    inside = "\n".join(part for part in parts if part)
    if not inside:
        return ""
    heading = f'<h2 id="{key}-title">{text(title)}</h2>'
    return f'<section id="{key}" aria-labelledby="{key}-title">\n{heading}\n{inside}\n</section>'


def table(caption: str, titles: Sequence[str], rows: Iterable[Sequence[str]], *, marked: Iterable[int] = ()) -> str:
    """A table whose first column heads its rows; `marked` rows stand out. Keys scroll a wide one."""
    marks = set(marked)
    head = "".join(f'<th scope="col">{text(title)}</th>' for title in titles)
    lines = []
    for number, (first, *rest) in enumerate(rows):
        cells = "".join(_cell(value) for value in rest)
        mark = ' class="marked"' if number in marks else ""
        lines.append(f'<tr{mark}><th scope="row">{text(first)}</th>{cells}</tr>')
    return (
        f'<div class="scroll" role="region" aria-label="{text(caption)}" tabindex="0"><table>'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(value: str) -> str:
    """Numbers stand right, one below the other."""
    kind = ' class="number"' if value[:1].isdigit() or (value[:1] in "-–" and len(value) < 30) else ""
    return f"<td{kind}>{text(value)}</td>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    every = (f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{"".join(every)}</dl>'


def paragraph(value: str) -> str:
    """Words."""
    return f"<p>{text(value)}</p>"


def listing(value: str, label: str) -> str:
    """What a program wrote, or a command, as it is."""
    return f'<pre tabindex="0" role="region" aria-label="{text(label)}"><code>{text(value, 20_000)}</code></pre>'


def folded(summary: str, inside: str) -> str:
    """Something that is shown when it is asked for."""
    return f"<details><summary>{text(summary)}</summary>\n{inside}\n</details>"
