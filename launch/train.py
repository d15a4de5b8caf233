"""The worker: every rank of a run is this module, whoever started it.

    python -m launch.train RUN_FOLDER                       (started by `shoal run`, with a plan to keep to)
    accelerate launch … -m launch.train FILE [key=value …]  (plans itself from the processes it finds)
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cache import Cache
from launch.config import load
from launch.errors import INTERRUPTED, ConfigError, ExportError, LaunchError, TopologyError
from launch.plan import Plan, make_plan, python_environment
from launch.recipe import Prepared, Progress, RecipeContext
from launch.record import create_run_folder, default_run_folder, read_plan, write_json
from launch.registry import Recipe, find_run_file, load_recipe
from launch.schedule import Schedule
from launch.topology import World, cache_folder, is_supervised, read_machine, read_world, worker_environment

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from launch.engine.batching import Window
    from launch.engine.loop import StepResult
    from launch.engine.progress import Display
    from launch.engine.scoring import Evaluation, Score


def main() -> None:
    """Train, and end with the exit code that `launch.errors` gives to what happened."""
    arguments = _read_arguments(sys.argv[1:])
    start: Start | None = None
    try:
        start = begin(arguments, read_world())
        work(start)
    except LaunchError as error:
        _report_failure(start, str(error), error.exit_code)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _report_failure(start, "stopped by Ctrl-C", INTERRUPTED)
        sys.exit(INTERRUPTED)
    except Exception as error:
        _report_failure(start, f"{type(error).__name__}: {error}", 1, traceback.format_exc())
        raise


def _read_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.train", description="One rank of a run.")
    parser.add_argument("start", metavar="FILE|RUN_FOLDER", help="a run file, or a folder that `shoal run` made")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides of the run file")
    parser.add_argument("--out", type=Path, metavar="RUN_FOLDER", help="where to keep the run")
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


def begin(arguments: argparse.Namespace, world: World) -> Start:
    """Read the plan of a run folder, or decide one from a run file and the processes we find ourselves among.

    Raises:
        LaunchError: the run cannot be, or this is not the world it was planned for.
    """
    given = Path(arguments.start)
    if given.is_dir():
        if arguments.overrides or arguments.out:
            raise ConfigError(f"{given}: a run folder is decided; overrides and --out go with a run file")
        plan = read_plan(given)
        if world.size != plan.processes.world_size:
            raise TopologyError(
                f"rank {world.rank} finds itself in a world of {world.size}, but {given}/plan.json was made for "
                f"{plan.processes.world_size}; start it with the command recorded there, or plan a new run"
            )
        if is_supervised():
            _redirect(given, everything=world.rank > 0)
        return Start(plan, load_recipe(load(given / "run.yaml", [])), world, given)
    loaded = load(find_run_file(arguments.start), arguments.overrides)
    recipe = load_recipe(loaded)
    loaded = loaded.with_recipe_args(recipe.args.model_dump(mode="json"))
    preview = recipe.preview(RecipeContext(Cache(cache_folder()), loaded.config.train.seed))
    folder = arguments.out.absolute() if arguments.out else default_run_folder(loaded.config.recipe)
    return Start(make_plan(loaded, read_machine(), world, preview, folder), recipe, world, None)


def _redirect(folder: Path, *, everything: bool) -> None:
    """Send stderr, and stdout too where `everything`, to this rank's log, at the level of file descriptors."""
    rank = read_world().rank
    log = os.open(folder / "logs" / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 2)
    if everything:
        os.dup2(log, 1)
    os.close(log)


def _report_failure(start: Start | None, message: str, exit_code: int, trace: str = "") -> None:
    """Write the failure down for the launcher; where there is none, rank 0 tells the user itself."""
    folder, rank = (start.folder, start.world.rank) if start else (None, read_world().rank)
    if folder is None and is_supervised():
        folder = Path(sys.argv[1])
    if folder is not None and folder.is_dir():
        failure = {
            "rank": rank,
            "host": socket.gethostname(),
            "exit_code": exit_code,
            "message": message if not trace else f"rank {rank} ({socket.gethostname()}): {message}",
            "traceback": trace,
            "time": time.time(),
        }
        write_json(folder / f"failure-{rank}.json", failure)
    if not is_supervised() and rank == 0 and not trace:
        for line in message.splitlines():
            print(f"shoal: {line}", file=sys.stderr, flush=True)


# --- working ---------------------------------------------------------------------------------------------


def work(start: Start) -> None:
    """Prepare, train, evaluate, export. Every rank must call this."""
    from launch.engine.agree import raise_together
    from launch.engine.progress import Display

    speaks = start.world.rank == 0
    display = Display(speaks)
    try:
        prepared, problem = _prepare(start, display)
        accelerator = _accelerator(start.plan)
        raise_together(accelerator, problem)
        assert prepared is not None, "no rank had a problem"
        _agree_on_folder(start, accelerator, display)
        run = Run.assemble(start, prepared, accelerator, display)
        run.train()
        accelerator.end_training()
        if speaks:
            run.finish()
    finally:
        display.close()


def _prepare(start: Start, display: Display) -> tuple[Prepared | None, LaunchError | None]:
    """Prepare the data before any process group exists: no collective can time out while a rank tokenises."""
    progress = Progress(display.start, display.advance, display.finish)
    if not start.world.launched or start.world.local_rank == 0:
        display.say(f"preparing {start.plan.config.recipe}")
    context = RecipeContext(Cache(cache_folder()), start.plan.config.train.seed, progress)
    try:
        return start.recipe.prepare(context), None
    except LaunchError as error:
        return None, error


def _accelerator(plan: Plan) -> Accelerator:
    """The planned process group, and nothing else.

    Raises:
        TopologyError: Accelerate understood its environment differently.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, GradientAccumulationPlugin

    if plan.config.train.precision == "bf16" and plan.processes.device == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name()
            raise TopologyError(f"train.precision = bf16: {name} has no bf16 arithmetic; use train.precision=fp32")
    accelerator = Accelerator(
        cpu=plan.processes.device == "cpu",
        mixed_precision="bf16" if plan.config.train.precision == "bf16" else "no",
        # Accumulation is ours (engine.loop); a plugin, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the
        # environment silently replaces the plain argument (accelerate 1.15, Accelerator.__init__).
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    got = (accelerator.num_processes, accelerator.distributed_type, accelerator.device.type)
    kinds = {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    expected_kinds = kinds if plan.processes.world_size > 1 else {DistributedType.NO}
    if got[0] != plan.processes.world_size or got[1] not in expected_kinds or got[2] != plan.processes.device:
        raise TopologyError(
            f"the plan says {plan.processes.world_size} processes on {plan.processes.device}, strategy "
            f"{plan.processes.strategy}; Accelerate found {got[0]} on {got[2]}, {got[1].value}; check the "
            "configuration given to `accelerate launch` and ACCELERATE_* in the environment"
        )
    return accelerator


def _agree_on_folder(start: Start, accelerator: Accelerator, display: Display) -> None:
    """Where no launcher made the run folder, rank 0 makes it and tells the others."""
    from launch.engine.agree import from_main, raise_together

    if start.folder is not None:
        return
    problem, made = None, None
    if accelerator.is_main_process:
        try:
            made = create_run_folder(start.plan)
        except LaunchError as error:
            problem = error
    raise_together(accelerator, problem)
    start.folder = Path(from_main(accelerator, str(made) if made else None))
    if not accelerator.is_main_process:
        _redirect(start.folder, everything=True)
    processes = start.plan.processes
    found = "RANK and WORLD_SIZE in the environment" if start.world.launched else "no launcher in the environment"
    display.say(
        f"{processes.world_size} process{'es' if processes.world_size > 1 else ''} on {processes.device} ({found}), "
        f"strategy {processes.strategy}"
    )


@dataclass
class Run:
    """One rank's share of a run, assembled and ready to train."""

    plan: Plan
    folder: Path
    prepared: Prepared
    accelerator: Accelerator
    display: Display
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    evaluation: Evaluation
    scores: dict[str, Score] = field(default_factory=dict)
    """The validation scores "before" and "after" training."""
    updates_done: int = 0

    @staticmethod
    def assemble(start: Start, prepared: Prepared, accelerator: Accelerator, display: Display) -> Run:
        """Build model and optimizer and spread them over the ranks. Every rank must call this."""
        from accelerate.utils import set_seed

        from launch.engine.optim import adamw
        from launch.engine.scoring import Evaluation

        config = start.plan.config
        set_seed(config.train.seed)  # the same weights from scratch on every rank
        model = prepared.build_model()
        set_seed((config.train.seed + 1 + accelerator.process_index) % 2**32)  # dropout differs between ranks
        optimizer = adamw(
            model.to(accelerator.device),
            weight_decay=config.train.weight_decay,
            betas=(config.train.adam_beta1, config.train.adam_beta2),
            epsilon=config.train.adam_epsilon,
            fused=accelerator.device.type == "cuda",
        )
        model, optimizer = accelerator.prepare(model, optimizer)
        assert start.folder is not None, "the run folder is made before the run is assembled"
        evaluation = Evaluation(
            accelerator,
            prepared.validation,
            prepared.collate,
            prepared.loss,
            prepared.count,
            start.plan.batch.eval_batch_size,
            config.eval.max_samples,
            config.parallel.data_workers,
        )
        schedule = start.plan.schedule(len(prepared.train))
        return Run(
            start.plan, start.folder, prepared, accelerator, display, model, optimizer, schedule, evaluation
        )

    def train(self) -> None:
        """Evaluate, train, evaluate, export; numbers go to metrics.jsonl. Every rank must call this."""
        from launch.engine.batching import Order, load
        from launch.engine.checkpoint import write_model, write_probe
        from launch.engine.loop import Step, fit
        from launch.engine.meters import Throughput
        from launch.engine.stopping import EarlyStopping
        from launch.engine.tracking import Tracker

        config, accelerator, prepared = self.plan.config, self.accelerator, self.prepared
        self._meter = Throughput()
        self._stopping = EarlyStopping(config.train.early_stopping_patience, config.train.early_stopping_min_delta)
        self._tracker = None
        if accelerator.is_main_process:
            track = config.track
            settings = config.model_dump(mode="json")
            self._tracker = Tracker(self.folder, track.wandb, track.project, settings)
        self._introduce()
        if config.eval.at_start:
            self.scores["before"] = self.evaluate(0)
            self._stopping.enough(self.scores["before"].loss)
        order = Order(
            len(prepared.train),
            config.train.global_batch_size,
            self.plan.batch.micro_batch_size,
            config.train.seed,
            accelerator.process_index,
            accelerator.num_processes,
        )
        batches = load(
            prepared.train,
            lambda: (micro for window in order.windows(1, self.schedule.total) for micro in window.micro_batches),
            prepared.collate,
            config.parallel.data_workers,
            accelerator.device.type == "cuda",
        )
        step = Step(accelerator, self.model, self.optimizer, prepared.loss, prepared.count, config.train.max_grad_norm)
        self.display.start("training", self.schedule.total)
        self._meter.read()
        fit(
            step,
            order.windows(1, self.schedule.total),
            batches,
            self.schedule.learning_rate,
            self._after_update,
        )
        self.display.finish()
        if "after" not in self.scores:
            self.scores["after"] = self.evaluate(self.updates_done)
        if config.save.export:
            write_model(accelerator, self.model, prepared.tokenizer, self.folder / "export")
            if accelerator.is_main_process:
                write_probe(accelerator, self.model, prepared, self.folder / "probe.safetensors")

    def _introduce(self) -> None:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.display.say(
            f"{parameters:,} parameters, {len(self.prepared.train):,} training and "
            f"{len(self.prepared.validation):,} validation samples, {self.schedule.total:,} updates"
        )

    def _after_update(self, window: Window, result: StepResult) -> bool:
        """Record, evaluate and save as configured; True to stop. The same on every rank."""
        config, update = self.plan.config, window.update
        last = update == self.schedule.total
        self.updates_done = update
        self._meter.add(result.counts.tokens)
        rate = self.schedule.learning_rate(update)
        if self._tracker and (update % config.track.every_steps == 0 or last):
            speed = self._meter.read()
            self._tracker.write(
                "train",
                update,
                epoch=window.epoch,
                consumed=window.consumed,
                loss=result.loss,
                learning_rate=rate,
                gradient_norm=result.gradient_norm,
                samples=result.counts.samples,
                targets=result.counts.targets,
                tokens=self._meter.tokens,
                tokens_per_second=round(speed, 1),
            )
            self._speed = speed
        facts = f"loss {result.loss:.4f}  lr {rate:.2e}  {getattr(self, '_speed', 0):,.0f} tokens/s"
        self.display.advance(1, facts)
        stop = False
        every = config.eval.every_steps
        if every and update % every == 0:
            with self._meter.paused():
                score = self.evaluate(update)
            stop = self._stopping.enough(score.loss)
            if stop and not last:
                self.display.say(f"stopped early at update {update}: no better validation loss than "
                                 f"{self._stopping.best:.4f} in {config.train.early_stopping_patience} evaluations")
            if stop or last:
                self.scores["after"] = score
        if config.save.every_steps and update % config.save.every_steps == 0:
            with self._meter.paused():
                self._save(update)
        return stop

    def evaluate(self, update: int) -> Score:
        """Score the validation data and record it. Every rank must call this."""
        size = min(len(self.prepared.validation), self.plan.config.eval.max_samples or len(self.prepared.validation))
        self.display.start("evaluating", size)
        score = self.evaluation(self.model, self.display.advance)
        self.display.finish()
        metrics = self.prepared.loss_metrics(score.loss)
        if self._tracker:
            counts = score.counts
            self._tracker.write(
                "eval", update, loss=score.loss, **metrics, samples=counts.samples, targets=counts.targets
            )
        shown = "  ".join(f"{name} {value:,.4g}" for name, value in metrics.items())
        self.display.say(f"update {update:>5}: validation loss {score.loss:.4f}  {shown}")
        return score

    def _save(self, update: int) -> None:
        from launch.engine.checkpoint import checkpoint_folder, prune, write_model

        began = time.perf_counter()
        folder = checkpoint_folder(self.folder, update)
        write_model(self.accelerator, self.model, self.prepared.tokenizer, folder)
        if self._tracker:
            prune(self.folder, self.plan.config.save.keep_last)
            seconds = round(time.perf_counter() - began, 3)
            self._tracker.write("save", update, folder=str(folder.relative_to(self.folder)), seconds=seconds)

    def finish(self) -> None:
        """Check the export in a fresh process and write the result; rank 0, after the others may have left.

        Raises:
            ExportError: the exported model is not the trained one; there is no result then.
        """
        assert self._tracker is not None, "rank 0 has a tracker"
        result: dict[str, Any] = {
            "updates": self.updates_done,
            "validation": {
                when: {"loss": score.loss, **self.prepared.loss_metrics(score.loss)}
                for when, score in self.scores.items()
            },
            "run_folder": str(self.folder),
        }
        if self.plan.config.save.export:
            answer = self._check_export()
            result |= {"export": str(self.folder / "export"), "export_difference": answer["difference"]}
            result["sample"] = answer.get("sample")
            self._tracker.write("export", self.updates_done, difference=answer["difference"])
        result["summary"] = summary(result)
        write_json(self.folder / "result.json", result)
        self._tracker.close()
        if not is_supervised():
            print(result["summary"], flush=True)

    def _check_export(self) -> dict[str, Any]:
        import json
        import subprocess

        from launch.engine.exported import TOLERANCE

        self.display.say("checking the export in a fresh process")
        probe = self.folder / "probe.safetensors"
        command = [sys.executable, "-m", "launch.engine.exported", "check", str(self.folder / "export"), str(probe)]
        command += [self.accelerator.device.type, self.prepared.sample_prompt or ""]
        checked = subprocess.run(
            command, env=worker_environment(python_environment()), capture_output=True, text=True, check=False
        )
        if checked.returncode:
            raise ExportError(f"{self.folder / 'export'}: does not load again:\n{checked.stderr.strip()}")
        answer: dict[str, Any] = json.loads(checked.stdout.splitlines()[-1])
        # `not <=`: a difference that is not a number is a failure too.
        if not answer["difference"] <= TOLERANCE:
            raise ExportError(
                f"{self.folder / 'export'}: the reloaded model's logits differ from the trained model's by "
                f"{answer['difference']:.2e} (allowed {TOLERANCE:.0e}); the export is kept for inspection"
            )
        probe.unlink()
        return answer


def summary(result: dict[str, Any]) -> str:
    """The last words of a run, for people."""
    lines = []
    validation = result["validation"]
    for name in validation["after"]:
        values = [f"{validation[when][name]:,.4f}" for when in ("before", "after") if when in validation]
        lines.append(f"validation {name}: {' → '.join(values)}")
    if result.get("sample"):
        lines.append(f"sample: {result['sample']!r}")
    if "export" in result:
        lines.append(f"model: {result['export']} (reloaded and checked)")
    lines.append(f"run folder: {result['run_folder']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
