"""`shoal doctor`: what is wrong with this machine, and the fix."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli_arguments import AsJson, Rdzv
from launch.config import load
from launch.errors import ConfigError, TopologyError
from launch.nodes import is_here, read_address
from launch.registry import find_run_file
from launch.sections import ParallelSection

if TYPE_CHECKING:
    from launch.doctor import Finding

MARKS = {"good": "ok", "warning": "warning", "bad": "BAD", "skipped": "-"}


def doctor_command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE] [key=value …]", help="With --rdzv: what says parallel.nodes and .devices."),
    ] = None,
    json_: AsJson = False,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=2, metavar="N", help="Processes that exchange something [the GPUs, or 2]."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where runs will be.")] = Path("runs"),
    rdzv: Rdzv = None,
) -> None:
    """Look at packages, devices, an exchange between processes, names, disks, SLURM and tracking; say how to mend each.

    With parallel.nodes and --rdzv, run on each machine: also at what is between them. Ends with 4 where something is
    bad.
    """
    from launch.doctor import examine  # which no other verb needs
    from launch.doctor_nodes import attend, examine_together, name_of

    show = (lambda finding: None) if json_ else _print
    if rdzv is None:
        if arguments:
            raise ConfigError("command line: a run file and keys are for several machines: give --rdzv host:port too")
        checks = examine(ranks, out)
    else:
        address, parallel = read_address(rdzv), _parallel(arguments or [])
        if not is_here(address):
            return _conclude(attend(address, show))
        per_node = parallel.devices if isinstance(parallel.devices, int) else None
        checks = examine_together(address, parallel.nodes, per_node, out.absolute())
    findings = []
    for finding in checks:
        findings.append(finding)
        show(finding)
    bad = [name_of(finding) for finding in findings if finding.state == "bad"]
    if json_:
        print(json.dumps({"healthy": not bad, "findings": [asdict(finding) for finding in findings]}, indent=2))
    elif not bad:
        print("healthy")
    return _conclude(bad)


def _conclude(bad: list[str]) -> None:
    if bad:
        raise TopologyError(f"not healthy: {', '.join(bad)}")


def _parallel(arguments: list[str]) -> ParallelSection:
    """What a run file and keys say of machines and processes."""
    file = find_run_file(arguments[0]) if arguments and "=" not in arguments[0] else None
    overrides = arguments[1:] if file else ["recipe=causal_lm", *arguments]  # nothing depends on which
    parallel = load(file, overrides).config.parallel
    if parallel.nodes < 2:
        raise ConfigError("command line: --rdzv is for several machines: say how many by parallel.nodes=2")
    return parallel


def _print(finding: Finding) -> None:
    from launch.doctor_nodes import name_of

    print(f"{MARKS[finding.state]:8s} {name_of(finding):18s} {finding.found}", flush=True)
    if finding.fix:
        print(f"{'':8s} {'':18s} -> {finding.fix}", flush=True)
