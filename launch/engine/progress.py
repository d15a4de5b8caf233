"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere. Rank 0 speaks."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 5.0
"""Without a terminal, a line at most this often."""


class Display:
    """Shows messages and nested bars on stdout; a silent one shows nothing."""

    def __init__(self, speaks: bool) -> None:
        self._console = Console(file=sys.stdout, quiet=not speaks, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal and speaks
        self._bars: list[_Bar] = []
        self._notes: dict[str, str] = {}
        self._progress = _View(
            self._notes,
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )

    def say(self, text: str) -> None:
        """Print a line; a running bar stays below it."""
        self._console.print(text, markup=False)

    def note(self, name: str, fact: str | None) -> None:
        """Show a fact below the bars on a terminal, until another of its name takes its place; None: no longer."""
        if fact is None:
            self._notes.pop(name, None)
        else:
            self._notes[name] = fact

    def start(self, description: str, total: int | None, done: int = 0) -> None:
        """Begin a bar inside the one that is running, if any."""
        if not self._bars:
            self._progress.start()
        task = self._progress.add_task(description, total=total, completed=done, facts="")
        self._bars.append(_Bar(task, description, total, done))

    def advance(self, amount: int = 1, facts: str = "") -> None:
        """Move the innermost bar."""
        bar = self._bars[-1]
        bar.done += amount
        bar.facts = facts
        if self._live:
            self._progress.update(bar.task, advance=amount, facts=facts)
        elif time.monotonic() - bar.spoke >= PLAIN_SECONDS or (bar.done == bar.total and len(self._bars) == 1):
            bar.spoke = time.monotonic()
            self.say(bar.line())

    def finish(self) -> None:
        """End the innermost bar."""
        bar = self._bars.pop()
        self._progress.remove_task(bar.task)
        if not self._bars:
            self._progress.stop()
            if self._live:
                self.say(bar.line())

    def close(self) -> None:
        """End all bars, also after an error, so that the terminal is left in order."""
        self._bars.clear()
        self._notes.clear()
        self._progress.stop()


class _View(Progress):
    """Bars, and below them what is known beside."""

    def __init__(self, notes: dict[str, str], *columns: ProgressColumn | str, console: Console, disable: bool) -> None:
        self._notes = notes
        super().__init__(*columns, console=console, disable=disable)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn, again and again."""
        yield from super().get_renderables()
        if self._notes:
            table = Table.grid(padding=(0, 2))
            for name, fact in self._notes.items():
                table.add_row(Text(name, style="dim"), Text(fact))
            yield table


class _Bar:
    def __init__(self, task: TaskID, description: str, total: int | None, done: int) -> None:
        self.task, self.description, self.total = task, description, total
        self.done = self._began_at = done
        self.facts = ""
        self.started = time.monotonic()
        self.spoke = self.started

    def line(self) -> str:
        of_total = f"/{self.total:,}" if self.total else ""
        parts = [f"{self.description} {self.done:,}{of_total}", self.facts]
        if self.total and self._began_at < self.done < self.total:
            seconds = (time.monotonic() - self.started) / (self.done - self._began_at) * (self.total - self.done)
            parts.append(f"eta {int(seconds // 60)}:{int(seconds % 60):02d}")
        return "  ".join(part for part in parts if part)
