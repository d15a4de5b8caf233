"""Why a run has failed: the rank that failed first, where, and what it said; not what the others say of losing it."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.errors import INTERRUPTED, PREEMPTED
from launch.hangs import Hang, Heard, who_works
from launch.mismatch import MISMATCH, describe_mismatch
from launch.record import read_json, write_json
from launch.recorded import METRICS
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

TIMED_OUT = re.compile(r"timed out waiting (\d+)ms|collective operation timeout.*?timeout\(ms\)=(\d+)", re.IGNORECASE)
"""What gloo and NCCL say on a rank that has waited for another one for too long (torch 2.13); milliseconds."""


@dataclass(frozen=True)
class End:
    """How a rank has ended."""

    code: int
    """Its exit code; of a signal, the negative number."""
    rank: int | None = None
    host: str = ""
    out_of_memory_kills: int | None = None
    """How many processes the kernel had killed around it since it began; None: not known."""

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
    """How many processes the kernel has killed around that rank meanwhile; None: not known."""


def find_cause(
    folder: Path, ends: Sequence[End], gone: Iterable[Gone], heard: Mapping[int, Heard] | None = None
) -> Cause:
    """The cause of a failure, from how the ranks have ended, in the order that was seen, and what they wrote down.

    `heard` are the last beats of all ranks.
    """
    failures = [read_json(path) for path in sorted(folder.glob("failure-*.json"))]
    # Who was killed or has crashed could write nothing; all that others say then is that they have lost it.
    spoke = {failure["rank"] for failure in failures}
    silent_ends = [end for end in ends if not end.was_asked and end.rank not in spoke]
    killed = next((end for end in ends if end.code == -signal.SIGKILL), None)
    crashed = next((end for end in silent_ends if end.code < 0), None) or next(iter(silent_ends), None)
    update = max((failure.get("update") or 0 for failure in failures), default=0) or _last_recorded(folder)
    if killed:
        return _killed(folder, killed, update)
    if silent := [each for each in gone if each.silent]:
        return _unreachable(folder, silent)
    if mismatch := _mismatch(folder, crashed, failures, update):
        return mismatch
    if crashed and (crashed.rank is not None or not failures):
        return _crashed(folder, crashed, update)
    if failures:
        failure = min(failures, key=lambda failure: (_noise(failure["message"]), failure["time"]))
        if waited := TIMED_OUT.search(failure["message"]):
            others = {rank: each for rank, each in (heard or {}).items() if rank != failure["rank"]}
            failure |= {"message": _waited(failure, _gave_up(waited), others)}
        return _told(folder, failure, next((end for end in ends if end.rank == failure["rank"]), None))
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


def _noise(message: str) -> int:
    """How little it says: who only lost another rank knows less than who has waited for one for too long."""
    return 1 if TIMED_OUT.search(message) else 2 * is_noise(message)


def write_cause(folder: Path, cause: Cause) -> None:
    """Keep it in the run folder."""
    write_json(folder / FAILURE, asdict(cause))


def read_cause(folder: Path) -> Cause | None:
    """Why the last attempt of a run has failed; None where it has not."""
    content = read_json(folder / FAILURE)
    return Cause(**content) if content else None


# --- the causes ------------------------------------------------------------------------------------------


def _killed(folder: Path, end: End, update: int) -> Cause:
    kills = end.out_of_memory_kills
    if kills:
        why = f": {_by_the_kernel(kills)}"
    elif kills is None:
        why = ", as the kernel does when the machine's memory runs out"
    else:
        why = ", but not by the kernel for lack of memory: a person or a scheduler did it"
    message = f"{end} was killed by SIGKILL{why}"
    return _of(folder, end, message, update, killed=True, out_of_memory_kills=kills)


def _by_the_kernel(kills: int) -> str:
    return f"the kernel has killed {kills} process{'es' if kills > 1 else ''} for lack of memory"


def _unreachable(folder: Path, silent: list[Gone]) -> Cause:
    hosts: dict[str, list[int]] = {}
    for each in silent:
        hosts.setdefault(each.host, []).append(each.rank)
    shown = "; ".join(f"{host} (rank {', '.join(map(str, sorted(ranks)))})" for host, ranks in hosts.items())
    message = f"no answer from {shown}: the host is down, or the network between; logs: {folder / 'logs'}"
    return Cause(1, message, silent[0].rank, silent[0].host, unreachable=True)


def _crashed(folder: Path, end: End, update: int) -> Cause:
    log = _log_of(folder, end.rank)
    text = log.read_text(encoding="utf-8", errors="replace") if log and end.code == -signal.SIGABRT else ""
    if waited := TIMED_OUT.search(text):  # NCCL ends the process from a thread of its own
        how = _gave_up(waited)
    elif end.code < 0:
        how = f"was ended by {signal.Signals(-end.code).name}, a crash of compiled code"
    else:
        how = f"ended without a word (exit code {end.code})"
    who = "the workers" if end.rank is None and end.code > 0 else str(end)
    return _of(folder, end, f"{who} {how}", update, traceback=_tail_of(folder, end))


def _mismatch(folder: Path, crashed: End | None, failures: list[dict[str, Any]], update: int) -> Cause | None:
    """The cause where gloo has seen that ranks were in different exchanges, in a rank that crashed or said so."""
    log = _log_of(folder, crashed.rank) if crashed and crashed.code == -signal.SIGABRT else None
    said = [log.read_text(encoding="utf-8", errors="replace")] if log else []
    if not any(MISMATCH.search(text) for text in [*said, *(failure["message"] for failure in failures)]):
        return None
    if (found := describe_mismatch(folder / "logs")) is None:
        return None
    odd, told = found
    hosts = {failure["rank"]: failure["host"] for failure in failures}
    end = End(1, odd, crashed.host if crashed and crashed.rank == odd else hosts.get(odd, ""))
    return _of(folder, end, f"{end} {told}", update, traceback=_tail_of(folder, end))


def _of(folder: Path, end: End, message: str, update: int, **more: Any) -> Cause:
    """A cause that only its end tells of; `update`: the last that others know of."""
    log = _log_of(folder, end.rank)
    shown = f"log: {log}" if log else f"logs: {folder / 'logs'}"
    path = str(log) if log else None
    return Cause(1, f"{message}; {_when(update)}; {shown}", end.rank, end.host, update, path, **more)


def _when(update: int | None) -> str:
    return f"after update {update}" if update else "before the first update"


def _gave_up(waited: re.Match[str]) -> str:
    return f"waited {int(waited[1] or waited[2]) / 1000:g} s for the others in an exchange, and gave up"


def _waited(failure: dict[str, Any], gave_up: str, others: Mapping[int, Heard]) -> str:
    """What to say of a time-out that has struck, and of the rank that was waited for, as far as is known."""
    told = f"rank {failure['rank']} ({failure['host']}) {gave_up}"
    late = who_works(others)
    if late is None:
        return told
    heard = others[late]
    return f"{told}; rank {late} ({heard.host}) was last seen {heard.beat.phase}, {heard.beat.where}"


def _told(folder: Path, failure: dict[str, Any], end: End | None) -> Cause:
    """A cause that a rank has written down."""
    log, update = _log_of(folder, failure["rank"]), failure.get("update")
    message = failure["message"]
    if failure["traceback"]:  # nothing that a user can have got wrong: whoever looks into it needs the log
        message += f"\n{_when(update)}; log: {log or folder / 'logs'}"
    kills = end.out_of_memory_kills if end else None
    if kills:  # it may have been a data worker
        message += f"\n{_by_the_kernel(kills)} meanwhile"
    return Cause(
        failure["exit_code"],
        message,
        failure["rank"],
        failure["host"],
        update,
        str(log) if log else None,
        failure["traceback"],
        out_of_memory_kills=kills,
    )


def _last_recorded(folder: Path) -> int:
    """The last update in metrics.jsonl; 0 where there is none."""
    path = folder / METRICS
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.findall(r'^{"kind": "train", "update": (\d+)', text, re.MULTILINE)
    return int(found[-1]) if found else 0


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
