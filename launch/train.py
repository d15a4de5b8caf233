"""The worker: every rank of a run is this module, whoever started it.

python -m launch.train RUN_FOLDER                       (started by `shoal run`, with a plan to keep to)
accelerate launch … -m launch.train FILE [key=value …]  (plans itself from the processes it finds)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launch.checkpoints import newest_complete
from launch.errors import (
    ConfigError,
    ExportError,
    LaunchError,
    MemoryExhaustedError,
    TopologyError,
)
from launch.fitting import TRIALS, advice
from launch.outside import refuse_another
from launch.plan import Plan, decide, python_environment
from launch.prepare import prepare
from launch.pulse import start_pulse
from launch.recipe import Prepared
from launch.record import (
    changed_settings,
    continue_run_folder,
    create_run_folder,
    is_finished,
    is_run_folder,
    lock,
    read_plan,
    summary,
    write_json,
)
from launch.registry import Recipe, recipe_of
from launch.rollcall import Meeting, answer
from launch.stop import STOPPED, StopRequest, StopSignal, exit_code, ignore_signals, spoken, write_stopped
from launch.topology import (
    World,
    enter_step,
    enter_world,
    is_supervised,
    read_world,
    roll_call,
    usable_cores,
    worker_environment,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from filelock import FileLock

    from launch.engine.progress import Display
    from launch.engine.run import Run


def main() -> None:
    """Train, and end with the exit code that `launch.errors` gives to what happened."""
    faulthandler.enable()  # a crash of compiled code leaves Python's stack in the log
    stop = StopRequest()
    stop.install()
    arguments = _read_arguments(sys.argv[1:])
    world, start = World(), None
    try:
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


# --- beginning -------------------------------------------------------------------------------------------


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
        _redirect(given, world.rank, everything=world.rank > 0)
    if world.size != plan.processes.world_size:
        raise TopologyError(
            f"rank {world.rank} finds itself in a world of {world.size}, but {given}/plan.json was made for "
            f"{plan.processes.world_size}; start it with the command recorded there, or plan a new run"
        )
    refuse_another(plan, given, world)
    start = Start(plan, recipe_of(plan.config), world, given, arguments.trials, arguments.weights)
    if announced := roll_call():
        start.meeting = _meet(announced, world)
        start_pulse(start.meeting.launcher, lambda: start.run.updates_done if start.run else 0)
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


def _redirect(folder: Path, rank: int, *, everything: bool) -> None:
    """Send stderr, and stdout too where `everything`, to this rank's log, at the level of file descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(folder / "logs" / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2) if everything else (2,):
        os.dup2(log, descriptor)
    os.close(log)


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
    """Say which rank ran out of memory and what can be done; the launcher then ends the ranks that wait for it."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The CPU's allocator has no exception of its own (c10/core/impl/alloc_cpu.cpp), nor have CUDA's libraries.
        told = any(words in str(error) for words in ("can't allocate memory", "out of memory"))
        if not told and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        where = f"rank {start.world.rank} ({socket.gethostname()})"
        batch = start.plan.batch
        raise MemoryExhaustedError(
            f"{where}: out of memory with micro-batch {batch.micro_batch_size}; {advice(start.plan)}: {error}"
        ) from error


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
    accelerator.wait_for_everyone()
    accelerator.end_training()
    time.sleep(0.1)


def _prepare(start: Start, display: Display) -> tuple[Prepared | None, LaunchError | None]:
    """Prepare the data before any process group exists: no collective can time out while a rank tokenises."""
    try:
        return prepare(start.recipe, start.plan.config, display)[0], None
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
    run.tracker.close()
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
        _redirect(folder, start.world.rank, everything=True)
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


def finish(run: Run) -> None:
    """Check the export in a fresh process and write the result. Rank 0; the others may have left.

    Raises:
        ExportError: the exported model is not the trained one; there is no result then.
    """
    assert run.tracker is not None, "rank 0 has a tracker"
    result = run.result()
    if run.plan.config.save.export:
        run.display.say("checking the export in a fresh process")
        answer = check_export(run)
        run.tracker.write("export", run.updates_done, difference=answer["difference"])
        result |= answer
    result["summary"] = summary(result)
    write_json(run.folder / "result.json", result)
    run.tracker.close()
    if not is_supervised():
        print(result["summary"], flush=True)


def check_export(run: Run) -> dict[str, Any]:
    """Load what was exported in fresh processes, the adapter alone too where there is one; what to tell of it."""
    from launch.engine.export import has_adapters

    export, adapter, probe = run.folder / "export", run.folder / "adapter", run.folder / "probe.safetensors"
    prompt, found = run.prepared.sample_prompt or "", {"export": str(export)}
    if has_adapters(run.model):
        _check(run, adapter, probe, "")
        found["adapter"] = str(adapter)
        answer = _check(run, export, probe, prompt, str(adapter))
    else:
        answer = _check(run, export, probe, prompt)
    probe.unlink()
    return {**found, **answer}


def _check(run: Run, folder: Path, probe: Path, *more: str) -> dict[str, Any]:
    """Have a folder checked against the probe; `more` is what else the process takes."""
    from launch.engine.exported import BF16_TOLERANCE, TOLERANCE

    plan = run.plan
    # A sharded model cannot leave bf16 for its last forward pass; any other compares in fp32.
    in_bf16 = plan.config.train.precision == "bf16" and plan.processes.strategy.shards
    tolerance = BF16_TOLERANCE if in_bf16 else TOLERANCE
    command = [sys.executable, "-m", "launch.engine.exported", "check", str(folder), str(probe)]
    command += [run.accelerator.device.type, *more]
    environment = worker_environment(python_environment())
    checked = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, preexec_fn=ignore_signals
    )
    if checked.returncode:
        raise ExportError(f"{folder}: does not load again:\n{checked.stderr.strip()}")
    answer: dict[str, Any] = json.loads(checked.stdout.splitlines()[-1])
    if unlike := answer.pop("unlike"):
        shown = ", ".join(unlike[:3]) + (f" and {len(unlike) - 3} more" if len(unlike) > 3 else "")
        raise ExportError(
            f"{folder}: weights of the trained model are missing in it, or are others: {shown}; both are kept for "
            f"inspection, see {probe.name}"
        )
    if untied := answer.pop("untied"):
        raise ExportError(f"{folder}: weights tied in the trained model no longer are: {', '.join(untied)}")
    # `not <=`: a difference that is not a number is a failure too.
    if not answer["difference"] <= tolerance:
        raise ExportError(
            f"{folder}: the reloaded model's logits differ from the trained model's by {answer['difference']:.2e} "
            f"(allowed {tolerance:.0e}); both are kept for inspection, see {probe.name}"
        )
    return answer


if __name__ == "__main__":
    main()
