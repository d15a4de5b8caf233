"""Carries a plan out on this machine: starts the workers, waits, stops them, says how they ended."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from launch.checkpoints import newest_complete, update_of
from launch.errors import INTERRUPTED, PREEMPTED
from launch.plan import Plan
from launch.processes import alive, die_with_parent, session_of
from launch.record import put_aside, read_json
from launch.stop import SIGNALS, STOPPED, exit_code, receivable, spoken
from launch.topology import worker_environment

GRACE_SECONDS = 10.0
"""How long stopped workers may take to leave before they are killed."""

ALONE_SECONDS = 40.0
"""How long ranks may stay where others have left: they wait for the dead. torchrun gives them 30 s (torch 2.13)."""

AGAIN_SECONDS = 0.5
"""A Ctrl-C this soon after a signal is the same one: a terminal, and a launcher around us, may both send it."""

LONGEST_PAUSE_SECONDS = 30.0

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Ending:
    """How the workers ended: an exit code and, unless that is 0, what to tell the user."""

    exit_code: int
    message: str = ""
    traceback: str = ""
    killed: bool = False
    """Whether a worker was ended by SIGKILL, as the kernel does when memory runs out."""

    @property
    def stopped(self) -> bool:
        """Whether the user or the system asked for it."""
        return self.exit_code in (INTERRUPTED, PREEMPTED)


def run(plan: Plan, folder: Path, *, restarts: bool = True) -> Ending:
    """Start the workers of `plan` and wait for their end; none of them outlives this call.

    After a crash they start again, `parallel.max_restarts` times without a newer checkpoint in between, unless
    `restarts` is False. Their progress appears on our stderr. Library noise and tracebacks go to logs/, complete.
    """
    allowed = plan.config.parallel.max_restarts if restarts else 0
    fruitless = 0  # restarts in a row that have brought no newer checkpoint
    with _Signals() as signals:
        while True:
            before = _saved_updates(folder)
            ending = _attempt(plan, folder, signals)
            if ending.exit_code != 1 or signals.first is not None:
                return ending
            saved = _saved_updates(folder)
            if saved > before:
                fruitless = 0
            if fruitless == allowed:
                return _crashed(folder, ending, fruitless + 1, saved)
            fruitless += 1
            pause = min(2.0 ** (fruitless - 1), LONGEST_PAUSE_SECONDS)
            _say(f"{_first_line(ending)}; restart {fruitless} of {allowed} from update {saved} in {pause:g} s")
            if not signals.quiet_for(pause):
                assert signals.first is not None
                return _stopped(folder, signals.first)


def _saved_updates(folder: Path) -> int:
    """How many updates the newest complete checkpoint holds."""
    checkpoint = newest_complete(folder)
    return update_of(checkpoint) if checkpoint else 0


def _crashed(folder: Path, ending: Ending, times: int, saved: int) -> Ending:
    """A crash after which the workers are not started again, and what the user can do then."""
    lines = [ending.message]
    if times > 1:
        lines.append(f"crashed {times} times after update {saved} without a newer checkpoint")
    if saved:
        lines.append(f"go on from update {saved} with: shoal resume {folder}")
    return Ending(ending.exit_code, "\n".join(lines), ending.traceback, ending.killed)


def _say(text: str) -> None:
    print(f"shoal: {text}", file=sys.stderr, flush=True)


def _first_line(ending: Ending) -> str:
    return ending.message.partition("\n")[0]


# --- signals to us ---------------------------------------------------------------------------------------


class _Signals:
    """Remembers the signals that ask us to stop, while it is entered."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.again = False
        """Whether Ctrl-C was pressed after that: nobody wants to wait."""
        self._since = 0.0

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._receive) for number in receivable()}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.first is None:
            self.first, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since >= AGAIN_SECONDS:
            self.again = True

    def quiet_for(self, seconds: float) -> bool:
        """Wait; False as soon as a signal arrives."""
        until = time.monotonic() + seconds
        while self.first is None and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))
        return self.first is None


# --- workers ---------------------------------------------------------------------------------------------


class _Workers:
    """The process that we have started, and the ranks: itself, or the children of torchrun."""

    def __init__(self, process: subprocess.Popen[bytes], plan: Plan) -> None:
        self._process = process
        self._count = plan.processes.per_node
        self._told: set[psutil.Process] = set()
        self.ranks: set[psutil.Process] = set()
        self._agent: psutil.Process | None = None
        with contextlib.suppress(psutil.NoSuchProcess):
            itself = psutil.Process(process.pid)
            if plan.processes.world_size == 1:
                self.ranks.add(itself)
            else:
                self._agent = itself

    def poll(self) -> int | None:
        """The exit code, or None while there is none."""
        return self._process.poll()

    def look(self) -> None:
        """Find ranks that have come; between fork and exec a child still has torchrun's name, and loses signals."""
        if self._agent is not None and len(self.ranks) < self._count:
            with contextlib.suppress(psutil.Error):
                for child in self._agent.children():
                    if child not in self.ranks and _command_of(child) not in ([], _command_of(self._agent)):
                        self.ranks.add(child)

    def tell(self, number: int) -> None:
        """Send a signal to the ranks, once to each.

        Not to torchrun, which would stop to look after them: it ends with an error whatever they do.
        """
        for rank in self.ranks - self._told:
            self._told.add(rank)
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    @property
    def left(self) -> int:
        """How many ranks are there still."""
        return len(alive(self.ranks))

    @property
    def some_have_gone(self) -> bool:
        """Whether a rank has left the others."""
        return self.left < len(self.ranks)

    def end(self) -> None:
        """See that nothing is left: what is, is asked to leave, and killed after the grace.

        torchrun puts each rank into a session of its own, which its data workers and other children share, also when
        they have lost it.
        """
        sessions = {self._process.pid, *(rank.pid for rank in self.ranks)}
        family = {process for process in psutil.process_iter() if session_of(process.pid) in sessions}
        if self._process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family |= {*psutil.Process(self._process.pid).children(recursive=True)}
            self._process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        while alive(family) and time.monotonic() < until:
            self._process.poll()
            time.sleep(_POLL_SECONDS / 2)
        for process in alive(family):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()


def _command_of(process: psutil.Process) -> list[str]:
    return list(process.cmdline())


def _attempt(plan: Plan, folder: Path, signals: _Signals) -> Ending:
    """Start the workers once."""
    put_aside(folder)
    with (folder / "logs" / "launcher.log").open("wb") as log:
        process = subprocess.Popen(
            plan.command,
            env=worker_environment({**plan.environment, "SHOAL_SUPERVISED": "1"}),
            stdin=subprocess.DEVNULL,
            stdout=_stderr(),
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the workers through us alone
            preexec_fn=die_with_parent,
        )
    workers = _Workers(process, plan)
    try:
        code = _watch(workers, folder, signals)
    finally:
        workers.end()
    return _ending(folder, code, signals)


def _stderr() -> IO[str] | int:
    """Our stderr as the workers' stdout, also where a test has replaced it by something without a descriptor."""
    try:
        sys.stderr.fileno()
    except (OSError, ValueError):
        return subprocess.DEVNULL
    return sys.stderr


def _watch(workers: _Workers, folder: Path, signals: _Signals) -> int | None:
    """Wait until the workers have left; their exit code, or None where they must be ended.

    Signals are passed on, and ranks may take as long as they need to save; but not where there is nothing to save, or
    where others have left them behind. Ranks outlive a torchrun that was killed: they are asked to save then.
    """
    announced = False
    alone_since: float | None = None
    while True:
        code = workers.poll()
        workers.look()
        if code is not None and not workers.left:
            return code
        if signals.first is not None and not announced:
            announced = True
            _say(
                f"stopping: {signal.Signals(signals.first).name} received; the ranks save a checkpoint and leave "
                "(Ctrl-C again: leave at once, without saving)"
            )
        if signals.first is not None:
            workers.tell(signals.first)
        elif code is not None:
            workers.tell(signal.SIGTERM)
        if signals.again:
            return None
        if _nothing_to_save(folder) or (code is not None and workers.some_have_gone):
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > ALONE_SECONDS:
                return code
        time.sleep(_POLL_SECONDS)


def _nothing_to_save(folder: Path) -> bool:
    """Whether a rank has left before the first update, so that there will be none."""
    stopped = read_json(folder / STOPPED)
    return stopped is not None and not stopped["update"] and not stopped["checkpoint"]


# --- endings ---------------------------------------------------------------------------------------------


def _ending(folder: Path, code: int | None, signals: _Signals) -> Ending:
    """How it ended: done, stopped or failed."""
    if signals.again:
        return Ending(INTERRUPTED, f"stopped by Ctrl-C without saving; {_way_on(folder)}")
    first = _first_to_end(folder, code)
    asked = first is None or first in (0, INTERRUPTED, PREEMPTED) or -first in SIGNALS
    if asked and (folder / "result.json").is_file():
        return Ending(0)
    stopped: dict[str, Any] | None = read_json(folder / STOPPED)
    saved = stopped is not None and bool(stopped["update"] or stopped["checkpoint"])
    failures = [read_json(path) for path in folder.glob("failure-*.json")]
    # Where nobody asked us, a worker's death is the cause and the stop its consequence: torchrun, or `_watch`, has
    # told the others. Only ranks that have saved together were all there.
    lost = code == -signal.SIGKILL if saved else _was_killed(folder, code)
    if lost and (signals.first is None or failures):
        return _failure(folder, failures, code)
    if stopped and (saved or asked or signals.first is not None):
        return _stopped(folder, signals.first or signal.Signals[stopped["signal"]], stopped)
    if first and asked:
        return _stopped(folder, signals.first or (-first if first < 0 else signal.SIGTERM))
    if signals.first is not None and not failures and not lost:
        return _stopped(folder, signals.first)
    return _failure(folder, failures, code)


def _first_to_end(folder: Path, code: int | None) -> int | None:
    """Exit code of the worker, or of the first rank to fail as torchrun reports it; of a signal, its negative number.

    None: we have ended them.
    """
    log = _launcher_log(folder)
    if found := re.search(r"failed \(exitcode: (-?\d+)\)", log):
        return int(found[1])
    if found := re.search(r"SignalException: Process \d+ got signal: (\d+)", log):
        return -int(found[1])
    return code


def _was_killed(folder: Path, code: int | None) -> bool:
    """Whether the worker, torchrun, or a rank that it did not kill itself was ended by SIGKILL.

    That rank need not be the first one: those that lose it may be seen to fail in the same moment.
    """
    log = _launcher_log(folder)
    return code == -signal.SIGKILL or ("(SIGKILL)" in log and "forcefully exiting" not in log)


def _launcher_log(folder: Path) -> str:
    return (folder / "logs" / "launcher.log").read_text(encoding="utf-8", errors="replace")


def _stopped(folder: Path, number: int, stopped: dict[str, Any] | None = None) -> Ending:
    """The ending of a run that a signal has stopped."""
    update = stopped["update"] if stopped else 0
    when = f"after update {update}" if update else "before the first update"
    if checkpoint := stopped and stopped["checkpoint"]:
        way_on = f"checkpoint {checkpoint}; go on with: shoal resume {folder}"
    else:
        way_on = _way_on(folder)
    return Ending(exit_code(number), f"stopped by {spoken(number)} {when}; {way_on}")


def _way_on(folder: Path) -> str:
    """What can be done with a run that has left no new checkpoint."""
    if saved := _saved_updates(folder):
        return f"go on from update {saved} with: shoal resume {folder}"
    return f"nothing was saved, the record is in {folder}"


def _failure(folder: Path, failures: list[Any], code: int | None) -> Ending:
    """What went wrong: the failure that a rank wrote down first, else the end of the logs."""
    if _was_killed(folder, code):  # what the other ranks say then is only that they have lost it
        return Ending(
            1,
            "a worker was killed by SIGKILL, as the kernel does when the machine's memory runs out; "
            f"logs: {folder / 'logs'}",
            killed=True,
        )
    if failures:
        earliest = min(failures, key=lambda failure: failure["time"])
        return Ending(earliest["exit_code"], earliest["message"], earliest["traceback"])
    how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    tail = "\n".join(f"  {line}" for path in _logs(folder) for line in _last_lines(path))
    return Ending(1, f"the workers ended without a word ({how}); logs: {folder / 'logs'}", tail)


def _logs(folder: Path) -> list[Path]:
    return sorted((folder / "logs").glob("*.log"))


def _last_lines(path: Path, count: int = 10) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
