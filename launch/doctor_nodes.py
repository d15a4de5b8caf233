"""What is wrong between machines: the same command on each; they meet as launchers do, and one asks and tells of all.

Each question is answered by the same function on every machine, also on the one that asks.
"""

from __future__ import annotations

import platform
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from launch.disk import size_in_words
from launch.doctor import EXCHANGED_BYTES, PATIENCE_SECONDS, Finding, examine, probe
from launch.errors import TopologyError
from launch.nodes import REACH_SECONDS, Address, Line, reach, serve
from launch.rollcall import RollCall, hosts_of_this_machine
from launch.supervise import POLL_SECONDS, Signals, say
from launch.topology import read_machine
from launch.versions import versions

SKEW_SECONDS = 1.0
"""Of clocks; more is told."""

LATE_SECONDS = 30.0
"""How much longer than a probe an answer may take."""

SEEN_SECONDS = 10.0
"""How long a file may take to be seen by others: network file systems remember what was there."""


def name_of(finding: Finding) -> str:
    """What it is about, and on which machine."""
    return f"{finding.host} {finding.name}".strip()


def examine_together(address: Address, nodes: int, per_node: int | None, folder: Path) -> Iterator[Finding]:
    """All checks of all machines, and those between them; `per_node` processes on each, by default one per GPU.

    Raises:
        TopologyError: the port is taken, or not all have come.
    """
    with serve(address) as listener:
        lines = _gather(listener, address, nodes - 1)
    findings = []
    try:
        for finding in _checks(lines, address, per_node or max(1, read_machine().gpus), folder):
            findings.append(finding)
            yield finding
        for line in lines:
            line.send(bad=[name_of(finding) for finding in findings if finding.state == "bad"])
    finally:
        for line in lines:
            line.connection.close()


def _checks(lines: list[Line], address: Address, per_node: int, folder: Path) -> Iterator[Finding]:
    for line in lines:
        line.send(ask="examine", folder=str(folder))
    yield from examine(0, folder)
    for line in lines:
        for found in _answer(line) or []:
            yield Finding(**{**found, "host": line.host})
    yield _versions(_ask(lines, "versions"))
    yield _shared_folder(lines, folder)
    yield _clocks(lines)
    yield _names(lines)
    yield _exchange(lines, address, per_node)
    if lost := [line.host for line in lines if line.lost]:
        yield Finding("machines", "bad", f"{', '.join(lost)} answered no more", "see what `shoal doctor` says there")


def attend(address: Address, show: Callable[[Finding], None]) -> list[str]:
    """Answer the machine that asks; what is bad in the end. `show` is given what is found here.

    Raises:
        TopologyError: it cannot be reached, or has gone.
    """
    with Signals() as signals:
        line = reach(address, signals, "shoal doctor")
        line.send(doctor=socket.gethostname())
        while signals.first is None:
            for message in line.read(POLL_SECONDS):
                if "bad" in message:
                    return list(message["bad"])
                line.send(answer=_reply(message, show))
            if line.lost:
                raise TopologyError(f"{socket.gethostname()}: lost `shoal doctor` on {address.host}")
    raise TopologyError("stopped before the end")


# --- questions -------------------------------------------------------------------------------------------


def _gather(listener: socket.socket, address: Address, count: int) -> list[Line]:
    lines: list[Line] = []
    until = time.monotonic() + REACH_SECONDS
    told = -1
    with Signals() as signals:
        while (missing := count - len(lines)) and signals.first is None and time.monotonic() < until:
            if missing != told:
                told = missing
                say(f"waiting for {missing} more at {address}: run the same command on each machine")
            if select.select([listener], [], [], POLL_SECONDS)[0]:
                line = Line(listener.accept()[0])
                for message in line.read(5.0)[:1]:
                    if "doctor" in message:
                        line.host = str(message["doctor"])
                        lines.append(line)
                    else:
                        line.send(refused="`shoal doctor` waits at this address, and no run")
    if missing:
        raise TopologyError(f"{missing} of {count + 1} machines have not come to {address}")
    return lines


def _ask(lines: list[Line], question: str, **content: Any) -> dict[str, Any]:
    """What each machine answers, by host, this one first; None where it does not."""
    for line in lines:
        line.send(ask=question, **content)
    own = _reply({"ask": question, **content}, lambda finding: None)
    return {socket.gethostname(): own, **{line.host: _answer(line) for line in lines}}


def _answer(line: Line) -> Any:
    until = time.monotonic() + PATIENCE_SECONDS + LATE_SECONDS
    while line.lost is None and time.monotonic() < until:
        for message in line.read(POLL_SECONDS):
            return message.get("answer")
    return None


def _reply(message: dict[str, Any], show: Callable[[Finding], None]) -> Any:
    content = {name: value for name, value in message.items() if name != "ask"}
    answers: dict[str, Callable[..., Any]] = {
        "examine": partial(_examine_here, show=show),
        "versions": lambda: {"python": platform.python_version(), **versions()},
        "write": _write,
        "look": _look,
        "remove": _remove,
        "time": time.time,
        "names": _resolve,
        "probe": probe,
    }
    return answers[message["ask"]](**content)


# --- answers ---------------------------------------------------------------------------------------------


def _examine_here(folder: str, show: Callable[[Finding], None]) -> list[dict[str, Any]]:
    findings = []
    for finding in examine(0, Path(folder)):
        show(finding)
        findings.append(asdict(finding))
    return findings


def _write(folder: str, token: str) -> str | None:
    """Leave a file that the others are to find; what went wrong."""
    try:
        _token(folder, token, socket.gethostname()).write_text(token)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _look(folder: str, token: str, hosts: list[str]) -> list[str]:
    """Of which hosts no file is to be seen."""
    until = time.monotonic() + SEEN_SECONDS
    while True:
        missing = [host for host in hosts if not _token(folder, token, host).is_file()]
        if not missing or time.monotonic() > until:
            return missing
        time.sleep(POLL_SECONDS)


def _remove(folder: str, token: str) -> None:
    with suppress(OSError):
        _token(folder, token, socket.gethostname()).unlink()


def _token(folder: str, token: str, host: str) -> Path:
    return Path(folder, f".shoal-doctor-{token}-{host}")


def _resolve(hosts: list[str]) -> dict[str, str]:
    """What does not lead to a host; the loopback is right for ourselves alone."""
    problems = {}
    for host in hosts:
        if host == socket.gethostname():
            continue
        try:
            address = socket.gethostbyname(host)
        except OSError as error:
            problems[host] = error.strerror or str(error)
        else:
            if address.startswith("127."):
                problems[host] = address
    return problems


# --- findings --------------------------------------------------------------------------------------------


def _versions(found: dict[str, Any]) -> Finding:
    here = next(iter(found))
    own = found[here]
    odd = [
        f"{host}: {name} {theirs.get(name, 'not installed')}, but {own.get(name, 'not installed')} on {here}"
        for host, theirs in found.items()
        if theirs is not None
        for name in sorted({*own, *theirs})
        if theirs.get(name) != own.get(name)
    ]
    if odd:
        return Finding("versions", "bad", "; ".join(odd), "install the same on all machines, or share an environment")
    return Finding("versions", "good", f"the same on {', '.join(found)}")


def _shared_folder(lines: list[Line], folder: Path) -> Finding:
    there = str(next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists()))
    token = secrets.token_hex(4)
    fix = "choose an --out on a file system that all machines share, and see that it is mounted on each"
    try:
        refused = {
            host: problem for host, problem in _ask(lines, "write", folder=there, token=token).items() if problem
        }
        if refused:
            shown = "; ".join(f"{host}: {problem}" for host, problem in refused.items())
            return Finding("folder of runs", "bad", f"{there}: {shown}", fix)
        hosts = [socket.gethostname(), *(line.host for line in lines)]
        unseen = _ask(lines, "look", folder=there, token=token, hosts=hosts)
        problems = [
            f"{host} does not see what {', '.join(missing)} wrote" for host, missing in unseen.items() if missing
        ]
        if problems:
            return Finding("folder of runs", "bad", f"{there}: {'; '.join(problems)}", fix)
        return Finding("folder of runs", "good", f"{there}: each of {len(hosts)} machines sees what all wrote")
    finally:
        _ask(lines, "remove", folder=there, token=token)


def _clocks(lines: list[Line]) -> Finding:
    skews = {line.host: skew for line in lines if (skew := _skew(line)) is not None}
    far = {host: skew for host, skew in skews.items() if abs(skew) > SKEW_SECONDS}
    if far:
        shown = ", ".join(
            f"{host} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}" for host, skew in far.items()
        )
        fix = "synchronise them (chrony, or `timedatectl set-ntp true`): times in logs and checkpoints are compared"
        return Finding("clocks", "warning", f"{shown} of {socket.gethostname()}", fix)
    most = max(map(abs, skews.values()), default=0.0)
    return Finding("clocks", "good", f"at most {most:.3f} s from that of {socket.gethostname()}")


def _skew(line: Line, times: int = 5) -> float | None:
    """How far its clock is ahead of ours, in seconds, by the quickest of several answers."""
    best: tuple[float, float] | None = None
    for _ in range(times):
        before = time.time()
        line.send(ask="time")
        theirs = _answer(line)
        after = time.time()
        if theirs is None:
            return None
        taken = (after - before, theirs - (before + after) / 2)
        best = min(best or taken, taken)
    return best[1] if best else None


def _names(lines: list[Line]) -> Finding:
    hosts = [socket.gethostname(), *(line.host for line in lines)]
    found = _ask(lines, "names", hosts=hosts)
    problems = [
        f"on {host} {other} is {problem}" for host, answer in found.items() for other, problem in (answer or {}).items()
    ]
    if problems:
        fix = "no harm to shoal's own launcher; torchrun and MPI need each name in DNS, or in each /etc/hosts"
        return Finding("names of hosts", "warning", "; ".join(problems), fix)
    return Finding("names of hosts", "good", f"each of {', '.join(hosts)} finds the others by name")


def _exchange(lines: list[Line], address: Address, per_node: int) -> Finding:
    size = per_node * (len(lines) + 1)
    roll = RollCall(size, [address.host, *hosts_of_this_machine()])
    content: dict[str, Any] = {"size": size, "announcement": roll.announcement, "per_node": per_node}
    try:
        for number, line in enumerate(lines, start=1):
            line.send(ask="probe", first_rank=number * per_node, **content)
        own = probe(first_rank=0, look=roll.look, **content)
        found = {socket.gethostname(): own, **{line.host: _answer(line) for line in lines}}
    finally:
        roll.close()
    fix = "may hosts connect to each other on any port? set cluster.network_interface where one network does alone"
    problems = [f"{host}: {answer or 'no answer'}" for host, answer in found.items() if not isinstance(answer, list)]
    if problems:
        return Finding("exchange", "bad", roll.problem or "; ".join(problems), fix)
    answers = [each for answer in found.values() for each in answer]
    slowest = min(answer["gigabytes_per_second"] for answer in answers)
    where = f"{size} processes on {len(found)} machines ({answers[0]['backend']})"
    what = f"{where} add up {size_in_words(EXCHANGED_BYTES)} each"
    if not all(answer["right"] for answer in answers):
        return Finding("exchange", "bad", f"{what}: the sum is wrong", "a device or link is broken: do not train on it")
    return Finding("exchange", "good", f"{what}, {slowest:.2f} GB/s, the sum is right")
