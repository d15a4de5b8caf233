"""Sees a run through: has its ranks started, waits, stops them, starts them again, says how they ended.

Where the ranks are is not its business: `launch.local` starts them on this machine, `launch.job` by SLURM.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from launch.checkpoints import newest_complete, update_of
from launch.errors import INTERRUPTED, PREEMPTED, TopologyError
from launch.hangs import Hang, find_hang
from launch.plan import Plan
from launch.record import put_aside, read_json
from launch.rollcall import RollCall
from launch.root_cause import Cause, End, find_cause, hang_cause, write_cause
from launch.stop import STOPPED, exit_code, receivable, spoken

ALONE_SECONDS = 20.0
"""How long ranks may stay where others have failed or left: they wait for the dead."""

AGAIN_SECONDS = 0.5
"""A Ctrl-C this soon after a signal is the same one: a terminal, and a launcher around us, may both send it."""

STEADY_SECONDS = 10.0
"""How long we must have listened without a break before what was not heard counts."""

STACK_SECONDS = 1.0
"""How long a rank may take to write its stack."""

STACK_LINES = 30

LONGEST_PAUSE_SECONDS = 30.0

POLL_SECONDS = 0.1


class Ranks(Protocol):
    """The ranks of one attempt."""

    ends: list[End]
    """How those have ended that did not end with 0, and were not ended by us; in the order that was seen."""

    def look(self) -> None:
        """Notice who has come and who has gone."""

    @property
    def left(self) -> int:
        """How many ranks are there still."""

    def tell(self, number: int) -> None:
        """Send a signal to every rank, once to each."""

    def ask_for_stack(self, rank: int) -> None:
        """Have a rank that tells nothing write its stack to its log, if that can be."""

    def end(self) -> None:
        """See that nothing is left."""


@dataclass(frozen=True)
class Ending:
    """How the workers ended: an exit code and, unless that is 0, what to tell the user."""

    exit_code: int
    message: str = ""
    traceback: str = ""
    cause: Cause | None = None
    """Why, where it has failed."""

    @property
    def stopped(self) -> bool:
        """Whether the user or the system asked for it."""
        return self.exit_code in (INTERRUPTED, PREEMPTED)


Start = Callable[[Plan, Path, RollCall | None], Ranks]
"""Starts all ranks of a plan, which answer the roll call where there are several."""


@dataclass(frozen=True)
class Place:
    """Where the ranks are, for the roll call."""

    hosts: list[str]
    """Names and addresses by which they reach us."""
    nodes: list[str] | None = None
    """The nodes that they are on; None: not known, or only this one."""
    command: str = "shoal resume {run}"
    """What a user types to go on with a run there."""

    def go_on(self, folder: Path) -> str:
        """That command for the run of a folder."""
        return self.command.replace("{run}", shlex.quote(str(folder)))


def supervise(
    plan: Plan, folder: Path, start: Start, place: Place, *, restarts: bool = True, signals: Signals | None = None
) -> Ending:
    """Start the workers of `plan` and wait for their end; none of them outlives this call.

    `signals` are those that the launcher has received since before; else they are received from now on. After a crash
    they start again, `parallel.max_restarts` times without a newer checkpoint in between, unless `restarts` is False.
    """
    allowed = plan.config.parallel.max_restarts if restarts else 0
    fruitless = 0  # restarts in a row that have brought no newer checkpoint
    with contextlib.ExitStack() as stack:
        signals = signals or stack.enter_context(Signals())
        while True:
            before = saved_updates(folder)
            ending = _attempt(plan, folder, start, place, signals)
            if ending.exit_code != 1 or signals.first is not None:
                return ending
            saved = saved_updates(folder)
            if saved > before:
                fruitless = 0
            if fruitless == allowed:
                return _crashed(folder, place, ending, fruitless + 1, saved)
            fruitless += 1
            pause = min(2.0 ** (fruitless - 1), LONGEST_PAUSE_SECONDS)
            say(f"{_first_line(ending)}; restart {fruitless} of {allowed} from update {saved} in {pause:g} s")
            if not signals.quiet_for(pause):
                assert signals.first is not None
                return _stopped(folder, place, signals.first)


def saved_updates(folder: Path) -> int:
    """How many updates the newest complete checkpoint holds."""
    checkpoint = newest_complete(folder)
    return update_of(checkpoint) if checkpoint else 0


def _crashed(folder: Path, place: Place, ending: Ending, times: int, saved: int) -> Ending:
    """A crash after which the workers are not started again, and what the user can do then."""
    lines = [ending.message]
    if times > 1:
        lines.append(f"crashed {times} times after update {saved} without a newer checkpoint")
    if saved:
        lines.append(way_on(folder, place))
    return replace(ending, message="\n".join(lines))


def say(text: str) -> None:
    """Tell the user something while the run goes on."""
    print(f"shoal: {text}", file=sys.stderr, flush=True)


def _first_line(ending: Ending) -> str:
    return ending.message.partition("\n")[0]


# --- signals to us ---------------------------------------------------------------------------------------


class Signals:
    """Remembers the signals that ask us to stop, while it is entered."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.again = False
        """Whether Ctrl-C was pressed after that: nobody wants to wait."""
        self._since = 0.0

    def __enter__(self) -> Signals:
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
            time.sleep(min(left, POLL_SECONDS))
        return self.first is None


# --- one attempt -----------------------------------------------------------------------------------------


def _attempt(plan: Plan, folder: Path, start: Start, place: Place, signals: Signals) -> Ending:
    """Start the workers once."""
    put_aside(folder)
    size = plan.processes.world_size
    roll = RollCall(size, place.hosts, place.nodes) if size > 1 else None
    try:
        ranks = start(plan, folder, roll)
        try:
            hang = _watch(ranks, roll, folder, plan, signals)
            stack = _stack_of(hang, ranks, folder) if hang else ""
        finally:
            ranks.end()
    finally:
        if roll:
            roll.close()
    if hang and signals.first is None:
        cause = hang_cause(folder, hang, stack)
        write_cause(folder, cause)
        return Ending(cause.exit_code, cause.message, cause.traceback, cause)
    return _ending(folder, place, ranks.ends, roll, signals)


def _stack_of(hang: Hang, ranks: Ranks, folder: Path) -> str:
    """The stack of a rank that hangs, as it writes it to its log when it is asked."""
    if hang.silent:
        log = folder / "logs" / f"rank-{hang.rank}.log"
        size = log.stat().st_size if log.is_file() else 0
        ranks.ask_for_stack(hang.rank)
        time.sleep(STACK_SECONDS)
        if log.is_file():
            with log.open("rb") as file:
                file.seek(size)
                written = file.read().decode(errors="replace").splitlines()
            return "\n".join(f"  {line}" for line in written[:STACK_LINES])
    return ""


def _watch(ranks: Ranks, roll: RollCall | None, folder: Path, plan: Plan, signals: Signals) -> Hang | None:
    """Wait until the workers have left, or must be ended; the rank that hangs, if that is why.

    Signals are passed on, and ranks may take as long as they need to save; but not where there is nothing to save, or
    where others have left them behind.
    """
    announced = compared = False
    steady_since = looked_at = time.monotonic()
    alone_since: float | None = None
    while True:
        if roll:
            roll.look()
        ranks.look()
        if not ranks.left:
            return None
        if signals.first is not None and not announced:
            announced = True
            say(
                f"stopping: {signal.Signals(signals.first).name} received; the ranks save a checkpoint and leave "
                "(Ctrl-C again: leave at once, without saving)"
            )
        if roll and roll.met and not compared:
            compared = True
            _compare_cpus(roll, plan.processes.threads)
        alone = ranks.ends or _nothing_to_save(folder) or (roll and (roll.problem or _silent(roll)))
        if signals.first is not None:
            ranks.tell(signals.first)
        elif alone:
            ranks.tell(signal.SIGTERM)
        if signals.again:
            return None
        now, limit = time.monotonic(), plan.config.parallel.hang_seconds
        if now - looked_at > STEADY_SECONDS:  # it was us who stood still, stopped by Ctrl-Z say
            steady_since = now
        looked_at = now
        listened = now - steady_since > STEADY_SECONDS
        hang = find_hang(roll.heard, roll.there, now, limit) if roll and limit and listened else None
        if hang:
            return hang
        if alone:
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > ALONE_SECONDS:
                return None
        time.sleep(POLL_SECONDS)


def _compare_cpus(roll: RollCall, threads: int) -> None:
    """Say where ranks may use fewer CPUs than they were planned to compute with."""
    few = [answer for answer in roll.met if answer.cpus < threads]
    if few:
        shown = ", ".join(f"rank {answer.rank} ({answer.host}) {answer.cpus}" for answer in few[:4])
        more = f" and {len(few) - 4} more" if len(few) > 4 else ""
        say(f"fewer CPUs than the {threads} threads that were planned for each rank: {shown}{more}; this will be slow")


def _silent(roll: RollCall) -> bool:
    return any(gone.silent for gone in roll.gone)


def _nothing_to_save(folder: Path) -> bool:
    """Whether a rank has left before the first update, so that there will be none."""
    stopped = read_json(folder / STOPPED)
    return stopped is not None and not stopped["update"] and not stopped["checkpoint"]


# --- endings ---------------------------------------------------------------------------------------------


def _ending(folder: Path, place: Place, ends: list[End], roll: RollCall | None, signals: Signals) -> Ending:
    """How it ended: done, stopped or failed."""
    if signals.again:
        return Ending(INTERRUPTED, f"stopped by Ctrl-C without saving; {way_on(folder, place)}")
    first = ends[0].code if ends else None
    asked = not ends or ends[0].was_asked
    if asked and (folder / "result.json").is_file():
        return Ending(0)
    stopped: dict[str, Any] | None = read_json(folder / STOPPED)
    saved = stopped is not None and bool(stopped["update"] or stopped["checkpoint"])
    failed = any(folder.glob("failure-*.json"))
    if roll and roll.problem:
        return Ending(TopologyError.exit_code, roll.problem)
    # Where nobody asked us, a worker's death is the cause and the stop its consequence: `_watch` has told the others.
    # Only ranks that have saved together were all there.
    lost = any(end.code == -signal.SIGKILL for end in ends) and not saved
    if not (lost and (signals.first is None or failed)):
        if stopped and (saved or asked or signals.first is not None):
            return _stopped(folder, place, signals.first or signal.Signals[stopped["signal"]], stopped)
        if first and asked:
            return _stopped(folder, place, signals.first or (-first if first < 0 else signal.SIGTERM))
        if signals.first is not None and not failed and not lost:
            return _stopped(folder, place, signals.first)
    cause = find_cause(folder, ends, roll.gone if roll else (), roll.last if roll else {})
    write_cause(folder, cause)
    return Ending(cause.exit_code, cause.message, cause.traceback, cause)


def _stopped(folder: Path, place: Place, number: int, stopped: dict[str, Any] | None = None) -> Ending:
    """The ending of a run that a signal has stopped."""
    update = stopped["update"] if stopped else 0
    when = f"after update {update}" if update else "before the first update"
    checkpoint = stopped and stopped["checkpoint"]
    if checkpoint:
        then = f"checkpoint {checkpoint}; go on with: {place.go_on(folder)}"
    else:
        then = way_on(folder, place)
    return Ending(exit_code(number), f"stopped by {spoken(number)} {when}; {then}")


def way_on(folder: Path, place: Place) -> str:
    """What can be done with a run that has told of no new checkpoint."""
    if saved := saved_updates(folder):
        return f"go on from update {saved} with: {place.go_on(folder)}"
    return f"nothing was saved, the record is in {folder}"
