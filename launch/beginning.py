"""How a worker begins: what it knows before it touches data or devices, and how it finds the others."""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import ConfigError, TopologyError
from launch.meeting import Meeting, answer
from launch.outside import refuse_another
from launch.plan import Plan, decide
from launch.pulse import start_pulse
from launch.record import changed_settings, is_finished, read_plan
from launch.registry import Recipe, recipe_of
from launch.topology import World, enter_world, is_supervised, roll_call, usable_cores

if TYPE_CHECKING:
    from filelock import FileLock

    from launch.engine.run import Run


@dataclass
class Start:
    """What a worker knows before it touches data or devices."""

    plan: Plan
    recipe: Recipe
    world: World
    folder: Path | None
    """The run folder; None until rank 0 has made it, where no launcher did."""
    trials: bool = False
    """Whether this world only tries micro-batch sizes."""
    weights: Path | None = None
    """A checkpoint or an exported model, where it is only to be evaluated."""
    lock: FileLock | None = None
    """Of the run folder; on rank 0, where no launcher holds it."""
    meeting: Meeting | None = None
    """Where the ranks meet, and the line to the launcher, where it calls the roll."""
    run: Run | None = None
    """The run, once it is built."""
    store: Any = None
    """What ranks find each other by; on rank 0, as long as it lives."""


def begin(arguments: argparse.Namespace, world: World) -> Start | None:
    """Read the plan of a run folder, or decide one from a run file and the processes we find ourselves among.

    None where the run is finished already, as one is that a scheduler has started once more.

    Raises:
        LaunchError: the run cannot be, or this is not the world it was planned for.
    """
    given = Path(arguments.start)
    if not given.is_dir():
        decided = decide(arguments.start, arguments.overrides, arguments.out, world)
        if decided.plan.batch.candidates:
            raise ConfigError(
                f"{decided.loaded.place('train.micro_batch_size')}: train.micro_batch_size = auto: no size is "
                "known yet for this model, length and device; `shoal run` finds it first, or state a number"
            )
        folder = Path(decided.plan.run_folder)
        if is_finished(folder):
            changed_settings(decided.plan)  # lest another run be taken for this one
            _say_finished(folder, world)
            return None
        return Start(decided.plan, decided.recipe, world, None)
    if arguments.overrides or arguments.out:
        raise ConfigError(f"{given}: a run folder is decided; overrides and --out go with a run file")
    plan = read_plan(given)
    if is_finished(given) and not arguments.trials:
        _say_finished(given, world)
        return None
    if is_supervised():
        redirect(given, world.rank, everything=world.rank > 0)
    if world.size != plan.processes.world_size:
        raise TopologyError(
            f"rank {world.rank} finds itself in a world of {world.size}, but {given}/plan.json was made for "
            f"{plan.processes.world_size}; start it with the command recorded there, or plan a new run"
        )
    refuse_another(plan, given, world)
    start = Start(plan, recipe_of(plan.config), world, given, arguments.trials, arguments.weights)
    if announced := roll_call():
        start.meeting = _meet(announced, world)
        start_pulse(start.meeting.tell, lambda: start.run.updates_done if start.run else 0)
    return start


def _meet(announced: str, world: World) -> Meeting:
    """Answer the launcher's roll call, and notice from then on when it is gone.

    Raises:
        TopologyError: it cannot be reached, or not all ranks have come.
    """
    meeting = answer(announced, world.rank, world.size, usable_cores())
    enter_world(world, meeting.address, meeting.port, meeting.interface)

    def cut_off() -> None:
        """Nothing can be saved, since that takes all ranks."""
        host = socket.gethostname()
        print(
            f"shoal: rank {world.rank} ({host}): no answer from the launcher on {meeting.host}: that host is down, or "
            "the network between",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    faulthandler.register(signal.SIGQUIT, all_threads=True)  # works also while something holds Python's lock
    meeting.watch(ended=lambda: os.kill(os.getpid(), signal.SIGTERM), silent=cut_off)
    return meeting


def _say_finished(folder: Path, world: World) -> None:
    if world.rank == 0:
        print(f"shoal: {folder}: this run is finished already", file=sys.stderr, flush=True)


def redirect(folder: Path, rank: int, *, everything: bool) -> None:
    """Send stderr, and stdout too where `everything`, to this rank's log, at the level of file descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(folder / "logs" / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2) if everything else (2,):
        os.dup2(log, descriptor)
    os.close(log)
