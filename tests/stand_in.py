"""Workers that only count updates, started by the real launcher: quick, and their saves take as long as a test wants.

python -m tests.stand_in FOLDER RANKS MAX_RESTARTS     the launcher
python -m tests.stand_in FOLDER                        a worker

SAVE_SECONDS            how long a save takes
DYING_AFTER=N           rank 0 saves every update; the last rank kills itself after N, and not before there is a new one
CHILD=1                 each worker has a child that ignores all signals, as data workers do
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from launch import local, supervise
from launch.checkpoints import aside_folder, newest_complete, publish, update_of, write_file
from launch.config import load
from launch.errors import LaunchError
from launch.plan import make_plan
from launch.recipe import Preview
from launch.record import create_run_folder, held, read_json, write_json
from launch.stop import STOPPED, StopRequest, ignore_signals, write_stopped
from launch.topology import Machine, World


def lead(folder: Path, ranks: int, max_restarts: int) -> None:
    """The launcher with other workers than ours."""
    loaded = load(None, ["recipe=causal_lm", f"parallel.devices={ranks}", f"parallel.max_restarts={max_restarts}"])
    plan = make_plan(loaded, Machine("here", 2, 0), World(), Preview(), folder)
    ours = {"launch.train": "tests.stand_in"}
    plan = plan.model_copy(update={"command": tuple(ours.get(part, part) for part in plan.command)})
    try:
        with held(folder if folder.is_dir() else create_run_folder(plan)):
            ending = local.run(plan, folder)
    except LaunchError as error:
        ending = supervise.Ending(error.exit_code, str(error))
    print(ending.traceback, ending.message, sep="\n", file=sys.stderr)
    sys.exit(ending.exit_code)


def save(folder: Path, update: int) -> Path:
    """A checkpoint that takes its time."""
    time.sleep(float(os.environ.get("SAVE_SECONDS", "0")))
    aside = aside_folder(folder, update)
    aside.mkdir(parents=True)
    return publish(aside, update, {"state.json": write_file(aside / "state.json", [b"{}"])})


def work(folder: Path) -> None:
    """Count, stop when one of the ranks is asked to, at the same update as the others."""
    stop = StopRequest()
    stop.install()
    stop.immediate = False
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dying_after = int(os.environ.get("DYING_AFTER", "0"))
    if "CHILD" in os.environ:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], preexec_fn=ignore_signals)
    checkpoint = newest_complete(folder)
    start = update = update_of(checkpoint) if checkpoint else 0
    asked = folder / "asked"
    while not asked.exists():
        time.sleep(0.1)
        update += 1
        write_json(folder / f"working-{rank}", os.getpid())
        if dying_after:
            if rank == 0:
                save(folder, update)
            if update - start == dying_after and rank == ranks - 1:
                while rank and ((newest := newest_complete(folder)) is None or update_of(newest) <= start):
                    time.sleep(0.1)  # rank 0 has not begun yet
                os.kill(os.getpid(), signal.SIGKILL)
        if stop.number is not None:
            write_json(asked, stop.number)
    if rank == 0:
        others = [read_json(folder / f"working-{other}") for other in range(ranks)]
        if not all(psutil.pid_exists(process) for process in others):
            asked.unlink()
            sys.exit("a save needs all ranks: as in a collective, one that has died ends the others")
        checkpoint = save(folder, update)
        write_stopped(folder, read_json(asked), update, checkpoint)
    while not (folder / STOPPED).exists():
        time.sleep(0.05)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        lead(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    else:
        work(Path(sys.argv[1]))
