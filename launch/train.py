"""The worker: every rank of a run is this module, whoever started it.

python -m launch.train RUN_FOLDER                       (started by `shoal run`, with a plan to keep to)
accelerate launch … -m launch.train FILE [key=value …]  (plans itself from the processes it finds)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launch.beginning import Start, begin, redirect
from launch.checkpoints import newest_complete
from launch.errors import LaunchError, MemoryExhaustedError, TopologyError
from launch.finishing import finish
from launch.fitting import TRIALS, advice
from launch.follower import STOP_SECONDS
from launch.imports import importing
from launch.plan import Plan, xla_environment
from launch.prepare import prepare
from launch.recipe import Prepared
from launch.record import continue_run_folder, create_run_folder, is_run_folder, lock, write_json
from launch.stop import STOPPED, StopRequest, StopSignal, exit_code, spoken, uncovered, write_stopped
from launch.topology import World, enter_device, enter_step, is_first, is_supervised, read_world

if TYPE_CHECKING:
    from accelerate import Accelerator
    from filelock import FileLock

    from launch.engine.progress import Display
    from launch.engine.run import Run


def main() -> None:
    """Train, and end with the exit code that `launch.errors` gives to what happened."""
    if threading.current_thread() is not threading.main_thread():
        _refuse_thread()
    faulthandler.enable()  # a crash of compiled code leaves Python's stack in the log
    stop = StopRequest()
    stop.install()
    arguments = _read_arguments(sys.argv[1:])
    world, start = World(), None
    try:
        with uncovered():
            world = read_world()  # once: Accelerate changes the environment later on
            enter_step(world)
            start = begin(arguments, world)
            if start is None:
                return
            work(start, stop)
            if stop.honoured:
                _leave_stopped(world, stop)
    except LaunchError as error:
        stop.immediate = False  # how it ended is decided
        _report_failure(world, start, str(error), error.exit_code)
        _end(world, error.exit_code)
    except (StopSignal, KeyboardInterrupt) as stopped:  # the latter where a library has taken SIGINT over
        stop.immediate = False
        number = stopped.number if isinstance(stopped, StopSignal) else int(signal.SIGINT)
        _report_stop(world, start, number)
        _end(world, exit_code(number))
    except Exception as error:
        stop.immediate = False
        _report_failure(world, start, f"{type(error).__name__}: {error}", 1, traceback.format_exc())
        traceback.print_exc()
        _end(world, 1)


def _refuse_thread() -> NoReturn:
    """Accelerate's launcher for TPUs runs a function in a thread for each device, which no signal would reach."""
    if is_first():
        print(
            "shoal: `accelerate launch` was configured for distributed_type: XLA, which starts a thread for each "
            "device; use accelerate_configs/tpu.yaml, or `shoal run`: one process has all devices of a host",
            file=sys.stderr,
            flush=True,
        )
    os._exit(TopologyError.exit_code)


def _end(world: World, exit_code: int) -> NoReturn:
    """Leave after a failure, without taking anything down where there are other ranks.

    A process group that is taken down while others wait in it may wait for them, and they are ended only once this
    process has.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if world.size > 1:
        os._exit(exit_code)
    sys.exit(exit_code)


def _leave_stopped(world: World, stop: StopRequest) -> None:
    """Leave after all ranks have stopped at the same update.

    A code other than 0 makes torchrun end the ranks that still have a moment to go; what happened is written down for
    the launcher. Only a process on its own has nobody else to say it for it.
    """
    assert stop.number is not None, "a signal has stopped it"
    if world.size == 1 and not is_supervised():
        sys.exit(exit_code(stop.number))


def _read_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.train", description="One rank of a run.")
    parser.add_argument("start", metavar="FILE|RUN_FOLDER", help="a run file, or a folder that `shoal run` made")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides of the run file")
    parser.add_argument("--out", type=Path, metavar="RUN_FOLDER", help="where to keep the run")
    parser.add_argument("--trials", action="store_true", help="only find out which micro-batch sizes fit")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="only evaluate, with these weights")
    return parser.parse_args(arguments)


# --- how it ended ----------------------------------------------------------------------------------------


def _report_failure(world: World, start: Start | None, message: str, exit_code: int, trace: str = "") -> None:
    """Write the failure down for the launcher; where there is none, rank 0 tells the user itself."""
    rank = world.rank
    folder = _known_folder(start)
    if folder is not None:
        failure = {
            "rank": rank,
            "host": socket.gethostname(),
            "exit_code": exit_code,
            "message": f"rank {rank} ({socket.gethostname()}): {message}" if trace else message,
            "traceback": trace,
            "update": start.run.updates_done if start and start.run else None,
            "time": time.time(),
        }
        write_json(folder / f"failure-{rank}.json", failure)
    if not is_supervised() and rank == 0 and not trace:
        for line in message.splitlines():
            print(f"shoal: {line}", file=sys.stderr, flush=True)


def _report_stop(world: World, start: Start | None, number: int) -> None:
    """Write down that the run was stopped before there was anything to save; without a launcher, rank 0 says so."""
    folder = _known_folder(start)
    if folder is not None and not (folder / STOPPED).exists():
        write_stopped(folder, number, 0, None)
    if not is_supervised() and world.rank == 0:
        print(f"shoal: stopped by {spoken(number)} before the first update", file=sys.stderr, flush=True)


def _known_folder(start: Start | None) -> Path | None:
    """The run folder, if there is one yet."""
    folder = start.folder if start else Path(sys.argv[1]) if is_supervised() else None
    return folder if folder is not None and folder.is_dir() else None


# --- working ---------------------------------------------------------------------------------------------


def work(start: Start, stop: StopRequest) -> None:
    """Prepare, train, evaluate, export. Every rank must call this."""
    enter_device(xla_environment(start.plan.processes))
    with importing():
        import transformers.modeling_layers  # noqa: F401  # that of any model, without which none is built

        from launch.engine.agree import raise_together
        from launch.engine.data import open_data
        from launch.engine.progress import Display
        from launch.engine.run import Run
        from launch.engine.sharding import make_accelerator, serve_store

    display, data = Display(start.world.rank == 0), None
    try:
        prepared, problem = _prepare(start, display)
        # From here on ranks wait for each other, and there will be something to save.
        stop.immediate = start.trials or start.weights is not None
        data = open_data(start.plan, prepared, start.world.rank) if prepared else None
        if start.meeting and start.meeting.listener:
            start.store = serve_store(start.meeting.listener)
        accelerator = make_accelerator(start.plan)
        raise_together(accelerator, problem)
        assert prepared is not None and data is not None, "no rank had a problem"
        folder = start.folder = start.folder or _make_folder(start, accelerator, display)
        with _memory_may_run_out(start):
            if start.weights:
                prepared = _with_weights(prepared, start.weights)
            run = start.run = Run(start.plan, folder, prepared, data, accelerator, display, lambda: stop.number)
            if start.trials:
                return _try_sizes(run)
            if start.weights:
                return _evaluate(run, start.weights)
            if accelerator.is_main_process:
                _look_at_data(prepared, folder, display)
            run.train()
        _leave(accelerator)
        if run.stopped is not None:
            stop.number, stop.honoured = run.stopped, True
        if accelerator.is_main_process:
            _say_stopped(run) if stop.honoured else finish(run)
    finally:
        if data:
            data.close()
        display.close()


@contextlib.contextmanager
def _memory_may_run_out(start: Start) -> Iterator[None]:
    """Say which rank ran out of memory, what held it and what can be done; the launcher then ends those who wait."""
    from launch.engine.exhaustion import is_exhaustion, write_holders

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_exhaustion(error):
            raise
        world, plan, run = start.world, start.plan, start.run
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        told = (
            f"rank {world.rank} ({socket.gethostname()}): out of memory with micro-batch "
            f"{plan.batch.micro_batch_size}; {advice(plan)}: {error}{notes}"
        )
        if start.folder and not start.trials:  # which are to run out of it
            parts = (run.model, run.optimizer, run.updates_done) if run else ()
            told += f"\n{write_holders(start.folder, world.rank, error, plan.processes.device, *parts)}"
        raise MemoryExhaustedError(told) from error


def _try_sizes(run: Run) -> None:
    """Measure the candidates; rank 0 writes down what all ranks managed."""
    from launch.engine.trials import memory_limit, try_sizes

    def managed(peaks: dict[int, int]) -> None:
        if run.accelerator.is_main_process:
            write_json(run.folder / TRIALS, peaks)
            run.display.say(f"micro-batch {max(peaks)} fits")

    limit = memory_limit(run.accelerator, run.plan.processes.memory_bytes)
    peaks = try_sizes(run.step, run.prepared, run.plan.batch.candidates, limit, managed)
    if run.accelerator.is_main_process:
        write_json(run.folder / "result.json", {"peaks": peaks, "limit": limit})
    _leave(run.accelerator)


def _with_weights(prepared: Prepared, folder: Path) -> Prepared:
    def build_model() -> Any:
        from launch.engine.weights import load_weights

        model = prepared.build_model()
        load_weights(model, folder)
        return model

    return dataclasses.replace(prepared, build_model=build_model)


def _evaluate(run: Run, weights: Path) -> None:
    """Evaluate once; rank 0 writes down what came out."""
    score = run.score()
    metrics = run.judge.metrics(score)
    if run.accelerator.is_main_process:
        write_json(run.folder / "evaluation.json", {"weights": str(weights), **metrics, **score.details})
        result = {
            "weights": str(weights),
            "metrics": metrics,
            "samples": score.counts.samples,
            "targets": score.counts.targets,
            "run_folder": str(run.folder),
        }
        write_json(run.folder / "result.json", result)
    _leave(run.accelerator)


def _leave(accelerator: Accelerator) -> None:
    """Leave the process group. Every rank must call this.

    A thread of gloo (torch 2.13) frees the tensors of its last broadcast, for which it needs Python's lock. If the
    model is freed just then, its destructor holds that lock and waits for the thread, for ever: seen in 2 of 6 runs
    that ended with an evaluation. So the last collective is one without tensors, and the lock is let go once more.
    """
    from launch.engine.leaving import leave

    accelerator.wait_for_everyone()
    leave()
    time.sleep(0.1)


def _prepare(start: Start, display: Display) -> tuple[Prepared | None, LaunchError | None]:
    """Prepare the data before any process group exists: no collective can time out while a rank tokenises."""
    plan = start.plan
    try:
        return prepare(start.recipe, plan.config, display, plan.buckets, plan.multiple)[0], None
    except LaunchError as error:
        return None, error


def _look_at_data(prepared: Prepared, folder: Path, display: Display) -> None:
    """Say what the data look like, and keep it. Rank 0."""
    from launch.engine.preflight import QUICK, look

    found = look(prepared, QUICK)
    for line in found.lines():
        display.say(line)
    write_json(folder / "data.json", found.as_json())


def _say_stopped(run: Run) -> None:
    """Write down where the run was stopped. Rank 0."""
    assert run.stopped is not None and run.tracker is not None, "rank 0 of a run that was stopped"
    checkpoint = newest_complete(run.folder)
    write_stopped(run.folder, run.stopped, run.updates_done, checkpoint)
    run.tracker.close(STOP_SECONDS)
    if not is_supervised():
        saved = f"; it goes on from {checkpoint.name} when it is started again" if checkpoint else ""
        print(
            f"shoal: stopped by {spoken(run.stopped)} after update {run.updates_done}{saved}",
            file=sys.stderr,
            flush=True,
        )


def _make_folder(start: Start, accelerator: Accelerator, display: Display) -> Path:
    """Where no launcher opened the run folder, rank 0 does and tells the others."""
    from launch.engine.agree import from_main, raise_together

    problem, made = None, None
    if accelerator.is_main_process:
        try:
            made, start.lock = _open_folder(start.plan, display)
        except LaunchError as error:
            problem = error
    raise_together(accelerator, problem)
    folder = Path(from_main(accelerator, str(made) if made else None))
    if not accelerator.is_main_process:
        redirect(folder, start.world.rank, everything=True)
    processes = start.plan.processes
    found = "as the launcher says" if start.world.launched else "no launcher in the environment"
    display.say(f"world of {processes.world_size} on {processes.device} ({found}), strategy {processes.strategy}")
    return folder


def _open_folder(plan: Plan, display: Display) -> tuple[Path, FileLock]:
    """Make the run folder, or continue the run in it; nobody else may work on it while the lock lives."""
    folder = Path(plan.run_folder)
    if not is_run_folder(folder):
        create_run_folder(plan)
        return folder, lock(folder)
    mine = lock(folder)
    for line in continue_run_folder(plan):
        display.say(f"changed since the last start: {line}")
    return folder, mine


if __name__ == "__main__":
    main()
