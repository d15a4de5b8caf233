"""What torch's profiler and allocator have left beside a run, as links from the page about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from launch.disk import size_in_words
from launch.report.facts import Facts
from launch.report.markup import section, text
from launch.report.parts import Story

HOW = {
    ".json.gz": "a trace of a few updates (--profile): load it in ui.perfetto.dev",
    ".txt": "the operators that took most of their time",
    ".json": "what held the memory when it ran out: sums by kind, and the largest tensors",
    ".pickle": "who took the GPU's memory, and when, until it ran out: load it in pytorch.org/memory_viz",
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
    return section("profiles", "Profiles", *parts)


def _links(facts: Facts, page_folder: Path) -> Iterator[str]:
    for file in sorted((facts.folder / "profile").glob("*")):
        how = next((words for end, words in HOW.items() if file.name.endswith(end)), None)
        if how is None:
            continue
        target = quote(os.path.relpath(file.absolute(), page_folder.absolute()))
        size = size_in_words(file.stat().st_size)
        yield f'<li><a href="{text(target)}">{text(file.name)}</a> ({size}): {text(how)}</li>'
