"""One rank's share of a run: model, optimizer and data put together, trained, evaluated and saved as planned."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from launch.engine.agree import from_main
from launch.engine.batching import Order, Window, Work, load
from launch.engine.blocks import checkpoint_activations, compile_blocks
from launch.engine.checkpoint import checkpoint_folder, prune, write_model, write_probe
from launch.engine.loop import Step, StepResult, fit
from launch.engine.meters import Throughput
from launch.engine.optim import make_optimizer
from launch.engine.precision import Autocast, LossScale, check, forward_dtypes
from launch.engine.progress import Display
from launch.engine.scoring import Evaluation, Score
from launch.engine.sharding import seen_dtypes, tied_names, unwrapped, updates
from launch.engine.stopping import EarlyStopping
from launch.engine.streams import Reader, is_stream
from launch.engine.tracking import Tracker
from launch.plan import Plan
from launch.recipe import Batch, Prepared, Samples, Stream
from launch.strategy import Dtypes


class Run:
    """Built, trained and asked for its scores. Every rank must build one and call each method."""

    def __init__(
        self, plan: Plan, folder: Path, prepared: Prepared, accelerator: Accelerator, display: Display
    ) -> None:
        config = plan.config
        self.plan, self.folder, self.prepared = plan, folder, prepared
        self.accelerator, self.display = accelerator, display
        self.schedule = plan.schedule(_size(prepared.train))
        self.scores: dict[str, Score] = {}
        """Validation scores `before` and `after` training."""
        self.best: dict[str, float] = {}
        """The update with the lowest validation loss, and its metrics."""
        self.dtypes: Dtypes | None = None
        """The number formats in use, once an update has shown them."""
        self.updates_done = 0
        set_seed(config.train.seed)  # the same weights from scratch on every rank
        model = prepared.build_model()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        """Of the whole model, each tied weight once."""
        if config.train.activation_checkpointing:
            checkpoint_activations(model)
        if config.train.compile:
            compile_blocks(model)
        if not plan.processes.strategy.shards:
            model = model.to(accelerator.device)
        set_seed((config.train.seed + 1 + accelerator.process_index) % 2**32)  # dropout differs between ranks
        optimizer = make_optimizer(model, config.train, fused=accelerator.device.type == "cuda")
        tied = tied_names(model)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if tied != tied_names(unwrapped(self.model)):
            raise RuntimeError(f"{plan.processes.strategy} has untied weights that were one: {tied}")
        self.loss = _in_autocast(prepared.loss, self._autocast())
        """The recipe's loss, computed in the planned number format."""
        self.evaluation = Evaluation(
            accelerator,
            prepared.validation,
            prepared.collate,
            self.loss,
            prepared.count,
            plan.batch.eval_batch_size,
            config.eval.max_samples,
            config.parallel.data_workers,
        )
        scale = LossScale() if config.train.precision == "fp16" else None
        self.step = Step(
            accelerator,
            self.model,
            updates(accelerator, self.model, self.optimizer, config.train.max_grad_norm, scale),
            self.loss,
            prepared.count,
        )
        self._stopping = EarlyStopping(config.train.early_stopping_patience, config.train.early_stopping_min_delta)
        self._meter = Throughput()
        self._speed = 0.0
        self.tracker: Tracker | None = None
        """On rank 0 only."""
        if accelerator.is_main_process:
            settings = config.model_dump(mode="json")
            self.tracker = Tracker(folder, config.track.wandb, config.track.project, settings)

    def _autocast(self) -> Autocast:
        """DeepSpeed computes in its low-precision image of the weights instead."""
        name = "float32" if self.plan.processes.strategy.kind == "zero" else self.plan.dtypes.forward
        return Autocast(self.accelerator.device.type, getattr(torch, name))

    def train(self) -> None:
        """Evaluate, train, evaluate, export; numbers go to metrics.jsonl."""
        config, prepared, total = self.plan.config, self.prepared, self.schedule.total
        self.display.say(
            f"{self.parameters:,} parameters, {_amount(prepared.train)} training and {_amount(prepared.validation)} "
            f"validation samples, {total:,} updates"
        )
        if config.eval.at_start:
            self.scores["before"], _ = self._evaluate(0)
        work = self._work()
        self.display.start("training", total)
        self._meter.read()
        with forward_dtypes(unwrapped(self.model)) as self._forward_dtypes:
            fit(self.step, work, self.schedule.learning_rate, self._after_update)
        self.display.finish()
        if "after" not in self.scores:
            self.scores["after"], _ = self._evaluate(self.updates_done)
        if config.save.export:
            write_model(self.accelerator, self.model, prepared.tokenizer, self.folder / "export")
            write_probe(self.accelerator, self.model, prepared, self.folder / "probe.safetensors")

    def _work(self) -> Work:
        """The windows of the run with this rank's batches."""
        train, collate, batch, total = self.prepared.train, self.prepared.collate, self.plan.batch, self.schedule.total
        seed, workers = self.plan.config.train.seed, self.plan.config.parallel.data_workers
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        window, micro = batch.global_batch_size, batch.micro_batch_size
        pin_memory = self.accelerator.device.type == "cuda"
        if is_stream(train):
            reader = Reader("training", train, window, micro, rank, world_size, collate, workers, pin_memory)
            return reader.windows(total)
        order = Order(len(train), window, micro, seed, rank, world_size)
        return load(train, lambda: order.windows(1, total), collate, workers, pin_memory)

    def _after_update(self, window: Window, result: StepResult) -> bool:
        """Record, evaluate and save as configured; True to stop, on every rank alike."""
        config, update = self.plan.config, window.update
        self.updates_done = update
        if self.dtypes is None:
            self._check_dtypes()
        self._meter.add(result.counts.tokens)
        if update % config.track.every_steps == 0 or update == self.schedule.total:
            self._record(window, result)
        rate = self.schedule.learning_rate(update)
        self.display.advance(1, f"loss {result.loss:.4f}  lr {rate:.2e}  {self._speed:,.0f} tokens/s")
        stop = False
        with self._meter.paused():
            if config.eval.every_steps and update % config.eval.every_steps == 0:
                stop = self._evaluate_and_judge(update)
            if config.save.every_steps and update % config.save.every_steps == 0:
                self._save(update)
        return stop

    def _check_dtypes(self) -> None:
        """See, after the first update, that the number formats are the planned ones."""
        self.dtypes = seen_dtypes(self.step.updates, self.model, self._forward_dtypes)
        check(self.plan.dtypes, self.dtypes)
        formats = "  ".join(f"{name} {value or 'nothing'}" for name, value in asdict(self.dtypes).items())
        self.display.say(f"number formats in use: {formats}")

    def _record(self, window: Window, result: StepResult) -> None:
        self._speed = self._meter.read()
        if self.tracker:
            self.tracker.write(
                "train",
                window.update,
                epoch=window.epoch,
                consumed=window.consumed,
                loss=result.loss,
                learning_rate=self.schedule.learning_rate(window.update),
                gradient_norm=result.gradient_norm,
                samples=result.counts.samples,
                targets=result.counts.targets,
                tokens=self._meter.tokens,
                tokens_per_second=round(self._speed, 1),
                **({"overflows": result.overflows} if result.overflows else {}),
            )

    def _evaluate_and_judge(self, update: int) -> bool:
        """Evaluate; True when early stopping has seen enough."""
        score, stop = self._evaluate(update)
        if stop or update == self.schedule.total:
            self.scores["after"] = score
        if stop and update < self.schedule.total:
            patience = self.plan.config.train.early_stopping_patience
            self.display.say(
                f"stopped early at update {update}: {patience} evaluations in a row without a better validation loss "
                f"than {self._stopping.best:.4f}"
            )
        return stop

    def _evaluate(self, update: int) -> tuple[Score, bool]:
        """The score, and whether early stopping has seen enough; rank 0 judges, lest a last bit split the ranks."""
        self.display.start("evaluating", self.evaluation.size)
        score = self.evaluation(self.model, self.display.advance)
        self.display.finish()
        metrics = self.metrics(score)
        judgement = from_main(self.accelerator, self._stopping.judge(score.loss))
        if judgement.best:
            self.best = {"update": update, **metrics}
        if self.tracker:
            self.tracker.write(
                "eval",
                update,
                **metrics,
                samples=score.counts.samples,
                targets=score.counts.targets,
                best=judgement.best,
            )
        shown = "  ".join(f"{name} {value:,.4f}" for name, value in metrics.items())
        self.display.say(f"update {update:>5}: validation {shown}")
        return score, judgement.stop

    def metrics(self, score: Score) -> dict[str, float]:
        """The validation loss, and what the recipe makes of it."""
        return {"loss": score.loss, **self.prepared.loss_metrics(score.loss)}

    def _save(self, update: int) -> None:
        began = time.perf_counter()
        folder = checkpoint_folder(self.folder, update)
        write_model(self.accelerator, self.model, self.prepared.tokenizer, folder)
        if self.tracker:
            prune(self.folder, self.plan.config.save.keep_last)
            seconds = round(time.perf_counter() - began, 3)
            self.tracker.write("save", update, folder=str(folder.relative_to(self.folder)), seconds=seconds)

    def result(self) -> dict[str, Any]:
        """What came out, as plain data."""
        return {
            "updates": self.updates_done,
            "validation": {when: self.metrics(score) for when, score in self.scores.items()},
            "best": self.best,
            "dtypes": asdict(self.dtypes) if self.dtypes else None,
            "run_folder": str(self.folder),
        }


def _size(data: Samples | Stream) -> int | None:
    return None if is_stream(data) else len(data)


def _amount(data: Samples | Stream) -> str:
    size = _size(data)
    return "streamed" if size is None else f"{size:,}"


Loss = Callable[[torch.nn.Module, Batch], torch.Tensor]


def _in_autocast(loss: Loss, autocast: Autocast) -> Loss:
    def inside(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        with autocast():
            return loss(model, batch)

    return inside
