"""Follows the records of a run and shows them in one tracker. A process beside rank 0, which never waits for it.

python -m launch.follow RUN_FOLDER TRACKER --process PID     (started by rank 0; ends when its standard input does)
python -m launch.follow RUN_FOLDER wandb --sync              (what `shoal sync` becomes)

All it knows is in the run folder, and how far it came is known where it sends rows to. So it may be killed at any
moment, and whoever starts it again goes on without a gap and without a row twice.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol

import psutil

from launch.errors import ConfigError, LaunchError, TopologyError
from launch.history import History, Row
from launch.processes import below
from launch.record import is_finished, read_json, write_json
from launch.recorded import METRICS
from launch.stop import ignore_signals
from launch.topology import leave_world
from launch.trackers import SPOKEN
from launch.weights_and_biases import UnreachableError, WeightsAndBiases, mark_sent, user_settings

POLL_SECONDS = 1.0

ORPHAN_SECONDS = 5
"""How long it may take to finish where rank 0 was killed: less than the launcher waits for what ranks have left."""

MOST_RESTARTS = 3
"""After so many failures it gives up."""

PAUSE_SECONDS = 10.0
"""How much longer it waits after each before it starts again, unless the run has ended."""


class Sink(Protocol):
    """Where rows are sent."""

    starts_over: bool
    """Whether all rows are sent again at each start; else more may come to the newest one."""
    first: int
    """The first update that is not there yet."""

    def send(self, row: Row) -> None:
        """Add a row; a later one must be of a later update."""

    def finish(self, newest: Row | None, complete: bool) -> None:
        """Close it."""


def main() -> None:
    """Follow until rank 0 has closed our standard input, or send what is missing."""
    arguments = _read_arguments(sys.argv[1:])
    leave_world()
    if arguments.sync:
        try:
            print(sync(arguments.run))
        except LaunchError as error:
            print(f"shoal: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        return
    ignore_signals()  # those meant for ranks
    sys.stdout = sys.stderr  # what libraries print is for the log
    threading.Thread(target=_leave_with, args=(arguments.process,), daemon=True).start()
    told = _Told(arguments.tracker, arguments.told)
    try:
        _follow(_open(arguments), arguments.run, _over)
    except UnreachableError as error:
        told.warn(f"{error}; the run goes on offline, and `shoal sync RUN` sends it later")
        _again("--offline", "--told")
    except LaunchError as error:
        told.warn(f"{error}; {_way_on(arguments.tracker)}")
    except Exception as error:
        with contextlib.suppress(OSError):  # the disk is full
            traceback.print_exc()
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        if arguments.restarts < MOST_RESTARTS:
            told.warn(f"{what}; it is started again, and {_way_on(arguments.tracker)}")
            select.select([0], [], [], PAUSE_SECONDS * arguments.restarts)
            _again("--restarts", str(arguments.restarts + 1), "--told")
        told.warn(f"{what}; {_way_on(arguments.tracker)}")
    _leave()


def _again(*more: str) -> NoReturn:
    """Become a fresh process with nothing left of what has failed; the last of two equal options counts."""
    _end_children()
    os.execv(sys.executable, [sys.executable, "-m", "launch.follow", *sys.argv[1:], *more])


def _end_children() -> None:
    """Services of a tracker: wandb's would end a second after this process."""
    for child in below(psutil.Process()):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _leave() -> NoReturn:
    """End without waiting for threads and services, which may hang."""
    _end_children()
    os._exit(0)


def _read_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.follow", description="Shows the records of a run in a tracker.")
    parser.add_argument("run", type=Path)
    parser.add_argument("tracker", choices=SPOKEN)
    parser.add_argument("--process", type=int, help="rank 0, whose memory and CPU are shown")
    parser.add_argument("--restarts", type=int, default=0, help="how often it has failed before")
    parser.add_argument("--offline", action="store_true", help="where the server was tried already")
    parser.add_argument("--told", action="store_true", help="the user was told of a failure already")
    parser.add_argument("--sync", action="store_true", help="send what is missing, and end")
    return parser.parse_args(arguments)


class _Told:
    """The one line that a user may see of this tracker; all else is in its log."""

    def __init__(self, tracker: str, told: bool) -> None:
        self._name, self._told = SPOKEN[tracker], told

    def warn(self, text: str) -> None:
        """Tell rank 0, which shows it, unless something was told before."""
        with contextlib.suppress(OSError):  # the disk is full
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)
        if not self._told:
            self._told = True
            os.write(1, f"{self._name}: {text}\n".encode())


def _way_on(tracker: str) -> str:
    return "`shoal sync RUN` sends what is missing" if tracker == "wandb" else "metrics.jsonl has all"


def _open(arguments: argparse.Namespace) -> Sink:
    """The tracker, as the run file asks for it; of Weights & Biases, no more than its own settings allow.

    Raises:
        UnreachableError: it is to stay offline.
        TopologyError: it is switched off.
    """
    run, name = arguments.run, arguments.tracker
    config = read_json(run / "plan.json")["plan"]["config"]
    if name != "wandb":
        from launch.engine.other_trackers import OtherTracker

        noted = run / f"{name}.json"
        return OtherTracker(name, run, config, read_json(noted) or {}, lambda state: write_json(noted, state))
    user = user_settings()
    if user.limit == "disabled":
        raise TopologyError(user.limited)
    online = config["track"]["wandb"] == "online" and not arguments.offline
    if online and user.limit:
        raise UnreachableError(user.limited)
    return WeightsAndBiases(run, "online" if online else "offline", arguments.process)


def _over() -> bool:
    """Waits a moment; True once rank 0 has said so, or is gone: its end of the pipe is closed then."""
    return bool(select.select([0], [], [], POLL_SECONDS)[0])


def _leave_with(process: int) -> None:
    """A thread's work: end this process soon after its rank, also where it hangs."""
    while os.getppid() == process:
        time.sleep(POLL_SECONDS)
    time.sleep(ORPHAN_SECONDS)
    _leave()


def _follow(sink: Sink, run: Path, is_over: Callable[[], bool]) -> int:
    """Send rows until the end; how many."""
    history, sent, over = History(run / METRICS, sink.first), 0, False
    while not over:
        over = is_over()
        for row in history.rows():
            sink.send(row)
            sent += 1
    newest, complete = history.newest(), is_finished(run)
    if newest is not None and (sink.starts_over or complete):
        sink.send(newest)
        newest, sent = None, sent + 1
    sink.finish(newest, complete)
    return sent


def sync(run: Path) -> str:
    """Send what Weights & Biases does not have of a run; what to say of it.

    Raises:
        ConfigError: the package is missing.
        UnreachableError: the server cannot be reached, or there is no key for it, or a wrong one.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("the package wandb is not installed; pip install 'shoal[wandb]'")
    sink = WeightsAndBiases(run, "online")
    url, first = sink.url, sink.first
    sent = _follow(sink, run, lambda: True)
    mark_sent(run)
    whole = f"{sent} updates sent" if sent else "nothing was missing"
    return f"{whole}{f', from update {first} on' if sent and first else ''}: {url}"


if __name__ == "__main__":
    main()
