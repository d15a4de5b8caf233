"""`shoal doctor`: what is wrong with this machine, and the fix."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launch.cli_arguments import AsJson
from launch.doctor import Finding, examine
from launch.errors import TopologyError

MARKS = {"good": "ok", "warning": "warning", "bad": "BAD", "skipped": "-"}


def doctor_command(
    json_: AsJson = False,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=2, metavar="N", help="Processes that exchange something [the GPUs, or 2]."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where runs will be.")] = Path("runs"),
) -> None:
    """Look at packages, devices, an exchange between processes, names, disks, SLURM and tracking; say how to mend each.

    Ends with 4 where something is bad.
    """
    findings = []
    for finding in examine(ranks, out):
        findings.append(finding)
        if not json_:
            _print(finding)
    bad = [finding.name for finding in findings if finding.state == "bad"]
    if json_:
        print(json.dumps({"healthy": not bad, "findings": [asdict(finding) for finding in findings]}, indent=2))
    elif not bad:
        print("healthy")
    if bad:
        raise TopologyError(f"not healthy: {', '.join(bad)}")


def _print(finding: Finding) -> None:
    print(f"{MARKS[finding.state]:8s} {finding.name:18s} {finding.found}", flush=True)
    if finding.fix:
        print(f"{'':8s} {'':18s} -> {finding.fix}", flush=True)
