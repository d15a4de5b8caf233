"""How the `shoal` command prints: tables and lines on stdout, complaints on stderr."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import IO, Any, cast

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def complain(message: str) -> None:
    """Print an error on stderr, each line with our name in front."""
    for line in message.splitlines():
        print(f"shoal: {line}", file=sys.stderr)


WIDE = 10_000
"""Columns of what is not a terminal: a file or a pipe wraps nothing."""


def console_on(*, stderr: bool = False) -> Console:
    """What tables are printed on; as wide as the terminal, where it is one."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=cast(IO[str], _Unpadded(stream)), highlight=False, width=WIDE)


class _Unpadded:
    """A stream whose lines end where their text does: tables fill theirs up to the width of the longest."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write it; rich writes whole lines."""
        return self._stream.write(re.sub(" +$", "", text, flags=re.MULTILINE))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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
