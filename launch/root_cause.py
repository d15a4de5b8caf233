"""Why a run has failed: the rank that failed first, where, and what it said; not what the others say of losing it."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.errors import INTERRUPTED, PREEMPTED
from launch.hangs import Hang
from launch.record import read_json, write_json
from launch.rollcall import Gone
from launch.stop import SIGNALS

FAILURE = "failure.json"
"""Why the last attempt of a run has failed, in its folder."""

LOST_ANOTHER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket timeout|timed out waiting|recvvalue failed"
    r"|remote process exited|nccl (communicator|error)|heartbeat",
    re.IGNORECASE,
)
"""What the libraries say on ranks that have lost another one (gloo, NCCL and the store of torch 2.13)."""


@dataclass(frozen=True)
class End:
    """How a rank has ended."""

    code: int
    """Its exit code; of a signal, the negative number."""
    rank: int | None = None
    host: str = ""

    def __str__(self) -> str:
        return "a worker" if self.rank is None else f"rank {self.rank} ({self.host})"

    @property
    def was_asked(self) -> bool:
        """Whether it ended well, or as those do that are asked to stop."""
        return self.code in (0, INTERRUPTED, PREEMPTED) or -self.code in SIGNALS


@dataclass(frozen=True)
class Cause:
    """Why a run has failed."""

    exit_code: int
    message: str
    """Who, where and what, in a line; the next one says after which update, and where the log is."""
    rank: int | None = None
    host: str = ""
    update: int | None = None
    """How many updates were done."""
    log: str | None = None
    traceback: str = ""
    killed: bool = False
    """Whether a rank was ended by SIGKILL, as the kernel does when memory runs out."""
    unreachable: bool = False
    """Whether ranks were lost because their host, or the network, no longer answers."""
    out_of_memory_kills: int | None = None
    """How many processes the kernel has killed on the launcher's host meanwhile; None: not known."""


def find_cause(folder: Path, ends: Sequence[End], gone: Iterable[Gone], out_of_memory_kills: int | None) -> Cause:
    """The cause of a failure, from how the ranks have ended, in the order that was seen, and what they wrote down."""
    failures = [read_json(path) for path in sorted(folder.glob("failure-*.json"))]
    # Who was killed or has crashed could write nothing; all that others say then is that they have lost it.
    spoke = {failure["rank"] for failure in failures}
    silent_ends = [end for end in ends if not end.was_asked and end.rank not in spoke]
    killed = next((end for end in ends if end.code == -signal.SIGKILL), None)
    crashed = next((end for end in silent_ends if end.code < 0), None) or next(iter(silent_ends), None)
    if killed:
        return _killed(folder, killed, out_of_memory_kills)
    if silent := [each for each in gone if each.silent]:
        return _unreachable(folder, silent)
    if crashed and (crashed.rank is not None or not failures):
        return _crashed(folder, crashed)
    if failures:
        return _told(folder, min(failures, key=lambda failure: (is_noise(failure["message"]), failure["time"])))
    return Cause(1, f"the workers ended without a word; logs: {folder / 'logs'}", traceback=_tails(folder))


def hang_cause(folder: Path, hang: Hang, log: str) -> Cause:
    """The cause where a rank has kept the others waiting for too long; `log`: its stack, where it had to be asked."""
    path = _log_of(folder, hang.rank)
    stack = log or "\n".join(f"  {line}" for line in hang.beat.stack)
    shown = f"; log: {path}" if path else ""
    return Cause(1, f"{hang}{shown}", hang.rank, hang.host, hang.beat.update, str(path) if path else None, stack)


def is_noise(message: str) -> bool:
    """Whether a rank only says that it has lost another one."""
    return bool(LOST_ANOTHER.search(message))


def write_cause(folder: Path, cause: Cause) -> None:
    """Keep it in the run folder."""
    write_json(folder / FAILURE, asdict(cause))


def read_cause(folder: Path) -> Cause | None:
    """Why the last attempt of a run has failed; None where it has not."""
    content = read_json(folder / FAILURE)
    return Cause(**content) if content else None


# --- the causes ------------------------------------------------------------------------------------------


def _killed(folder: Path, end: End, out_of_memory_kills: int | None) -> Cause:
    if out_of_memory_kills:
        plural = "es" if out_of_memory_kills > 1 else ""
        why = f": the kernel has killed {out_of_memory_kills} process{plural} for lack of memory"
    elif out_of_memory_kills is None:
        why = ", as the kernel does when the machine's memory runs out"
    else:
        why = ", but not by the kernel for lack of memory: a person or a scheduler did it"
    return _of(folder, end, f"{end} was killed by SIGKILL{why}", killed=True, out_of_memory_kills=out_of_memory_kills)


def _unreachable(folder: Path, silent: list[Gone]) -> Cause:
    hosts: dict[str, list[int]] = {}
    for each in silent:
        hosts.setdefault(each.host, []).append(each.rank)
    shown = "; ".join(f"{host} (rank {', '.join(map(str, sorted(ranks)))})" for host, ranks in hosts.items())
    message = f"no answer from {shown}: the host is down, or the network between; logs: {folder / 'logs'}"
    return Cause(1, message, silent[0].rank, silent[0].host, unreachable=True)


def _crashed(folder: Path, end: End) -> Cause:
    if end.code < 0:
        how = f"was ended by {signal.Signals(-end.code).name}, a crash of compiled code"
    else:
        how = f"ended without a word (exit code {end.code})"
    who = "the workers" if end.rank is None and end.code > 0 else str(end)
    return _of(folder, end, f"{who} {how}", traceback=_tail_of(folder, end))


def _of(folder: Path, end: End, message: str, **more: Any) -> Cause:
    """A cause that only its end tells of."""
    log = _log_of(folder, end.rank)
    shown = f"log: {log}" if log else f"logs: {folder / 'logs'}"
    return Cause(1, f"{message}; {shown}", end.rank, end.host, log=str(log) if log else None, **more)


def _told(folder: Path, failure: dict[str, Any]) -> Cause:
    """A cause that a rank has written down."""
    log, update = _log_of(folder, failure["rank"]), failure.get("update")
    message = failure["message"]
    if failure["traceback"]:  # nothing that a user can have got wrong: whoever looks into it needs the log
        when = f"after update {update}" if update else "before the first update"
        message += f"\n{when}; log: {log or folder / 'logs'}"
    return Cause(
        failure["exit_code"],
        message,
        failure["rank"],
        failure["host"],
        update,
        str(log) if log else None,
        failure["traceback"],
    )


# --- logs ------------------------------------------------------------------------------------------------


def _log_of(folder: Path, rank: int | None) -> Path | None:
    path = folder / "logs" / f"rank-{rank}.log"
    return path if path.is_file() else None


def _tail_of(folder: Path, end: End) -> str:
    log = _log_of(folder, end.rank)
    return _tail(log) if log and log.stat().st_size else _tails(folder)


def _tails(folder: Path) -> str:
    return "\n".join(_tail(path) for path in sorted((folder / "logs").glob("*.log")) if path.stat().st_size)


def _tail(path: Path, count: int = 10) -> str:
    """The last lines of a log; of a crash, the first that `faulthandler` wrote, since it ends with lists of modules."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    fatal = [number for number, line in enumerate(lines) if line.startswith("Fatal Python error")]
    lines = lines[fatal[-1] :][:count] if fatal else lines[-count:]
    return "\n".join(f"  {line}" for line in lines)


def count_out_of_memory_kills(path: Path = Path("/proc/vmstat")) -> int | None:
    """How many processes the kernel of this host has killed for lack of memory, limits of containers included.

    Source: `oom_kill` in /proc/vmstat, Linux 4.13 and later; None elsewhere.
    """
    try:
        found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
