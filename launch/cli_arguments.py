"""Arguments that verbs of the `shoal` command have in common, and how keys are documented."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from launch.keys import Key, describe
from launch.sections import RunConfig


class CommandWithKeys(TyperCommand):
    """A command whose `--help` ends with every key of a run file."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        super().format_help(ctx, formatter)
        formatter.write("\nKeys of a run file, set on the command line as section.key=value:\n\n")
        for key in describe(RunConfig):
            formatter.write(documented(key, formatter.width))


def documented(key: Key, width: int) -> str:
    """Name, kind, default and meaning of a key, in lines of at most `width` columns."""
    head = f"  {key.name}  ({key.kind}; default {key.default})\n".replace("; default required", "; required")
    return head + textwrap.fill(key.description, width, initial_indent=" " * 6, subsequent_indent=" " * 6) + "\n"


RunFile = Annotated[str, typer.Argument(metavar="FILE", help="A run file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value …]", help="Overrides, such as train.max_steps=20.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="RUN_FOLDER", help="Where to keep the run [runs/<recipe>-<time>]."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on stdout and nothing else.")]


Rdzv = Annotated[
    str | None,
    typer.Option(
        "--rdzv",
        metavar="HOST:PORT",
        help="With parallel.nodes: where all launchers meet, on one of the machines.",
    ),
]
Profile = Annotated[
    int | None,
    typer.Option("--profile", min=1, metavar="N", help="Trace N updates with torch's profiler: track.profile=N."),
]
DebugCpu = Annotated[
    int | None,
    typer.Option("--debug-cpu", min=1, metavar="N", help="Do it with N processes on this machine's CPU (gloo)."),
]
