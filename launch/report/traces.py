"""What torch's profiler and allocator have left beside a run, as links from the page about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from launch.disk import size_in_words
from launch.report.facts import Facts
from launch.report.markup import paragraph, section, text
from launch.report.parts import Story

HOW = {
    ".json.gz": "a trace: load it in ui.perfetto.dev",
    ".txt": "the operators that took most",
    ".pickle": "what held the memory when it ran out: load it in pytorch.org/memory_viz",
}
"""Ends of the names of files in `profile/`, and what to do with them."""


def traces(story: Story, page_folder: Path) -> str:
    """Links to them, which hold as long as the page and the run folders stay where they are to each other."""
    parts = []
    for name, facts in story.named:
        links = list(_links(facts, page_folder))
        if links:
            heading = "" if story.alone else f"<h3>{text(name)}</h3>"
            parts.append(f"{heading}<ul>{''.join(links)}</ul>")
    told = paragraph("Of a few updates after the first ones (--profile).") if parts else ""
    return section("profiles", "Profiles", told, *parts)


def _links(facts: Facts, page_folder: Path) -> Iterator[str]:
    for file in sorted((facts.folder / "profile").glob("*")):
        how = next((words for end, words in HOW.items() if file.name.endswith(end)), None)
        if how is None:
            continue
        target = quote(os.path.relpath(file.absolute(), page_folder.absolute()))
        size = size_in_words(file.stat().st_size)
        yield f'<li><a href="{text(target)}">{text(file.name)}</a> ({size}): {text(how)}</li>'
