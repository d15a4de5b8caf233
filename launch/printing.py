"""How the `shoal` command prints: tables and lines on stdout, complaints on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def complain(message: str) -> None:
    """Print an error on stderr, each line with our name in front."""
    for line in message.splitlines():
        print(f"shoal: {line}", file=sys.stderr)


WIDE = 200
"""Columns of what is not a terminal: a file or a pipe wraps nothing."""


def console_on(*, stderr: bool = False) -> Console:
    """What tables are printed on; as wide as the terminal, where it is one."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=None if terminal else WIDE)


def print_table(titles: Iterable[str], lines: list[list[str]]) -> None:
    """Print a table on stdout."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    console_on().print(table)


def first_line(text: str | None) -> str:
    """The first line of a docstring, if there is one."""
    return (text or "").strip().partition("\n")[0]
