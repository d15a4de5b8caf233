"""One rank's share of a run: model, optimizer and data put together, trained, evaluated and saved as planned."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from launch.engine.batching import Order, Window, load
from launch.engine.checkpoint import checkpoint_folder, prune, write_model, write_probe
from launch.engine.loop import Step, StepResult, fit
from launch.engine.meters import Throughput
from launch.engine.optim import adamw
from launch.engine.progress import Display
from launch.engine.scoring import Evaluation, Score
from launch.engine.sharding import updates
from launch.engine.stopping import EarlyStopping
from launch.engine.tracking import Tracker
from launch.plan import Plan
from launch.recipe import Prepared


class Run:
    """Built, trained and asked for its scores. Every rank must build one and call each method."""

    def __init__(
        self, plan: Plan, folder: Path, prepared: Prepared, accelerator: Accelerator, display: Display
    ) -> None:
        config = plan.config
        self.plan, self.folder, self.prepared = plan, folder, prepared
        self.accelerator, self.display = accelerator, display
        self.schedule = plan.schedule(len(prepared.train))
        self.scores: dict[str, Score] = {}
        """Validation scores `before` and `after` training."""
        self.updates_done = 0
        set_seed(config.train.seed)  # the same weights from scratch on every rank
        model = prepared.build_model()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        """Of the whole model, each tied weight once."""
        if not plan.processes.strategy.shards:
            model = model.to(accelerator.device)
        set_seed((config.train.seed + 1 + accelerator.process_index) % 2**32)  # dropout differs between ranks
        optimizer = adamw(
            model,
            weight_decay=config.train.weight_decay,
            betas=(config.train.adam_beta1, config.train.adam_beta2),
            epsilon=config.train.adam_epsilon,
            fused=accelerator.device.type == "cuda",
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.order = Order(
            len(prepared.train),
            config.train.global_batch_size,
            plan.batch.micro_batch_size,
            config.train.seed,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.evaluation = Evaluation(
            accelerator,
            prepared.validation,
            prepared.collate,
            prepared.loss,
            prepared.count,
            plan.batch.eval_batch_size,
            config.eval.max_samples,
            config.parallel.data_workers,
        )
        self._stopping = EarlyStopping(config.train.early_stopping_patience, config.train.early_stopping_min_delta)
        self._meter = Throughput()
        self._speed = 0.0
        self.tracker: Tracker | None = None
        """On rank 0 only."""
        if accelerator.is_main_process:
            settings = config.model_dump(mode="json")
            self.tracker = Tracker(folder, config.track.wandb, config.track.project, settings)

    def train(self) -> None:
        """Evaluate, train, evaluate, export; numbers go to metrics.jsonl."""
        config, prepared, total = self.plan.config, self.prepared, self.schedule.total
        self.display.say(
            f"{self.parameters:,} parameters, {len(prepared.train):,} training and {len(prepared.validation):,} "
            f"validation samples, {total:,} updates"
        )
        if config.eval.at_start:
            self.scores["before"] = self._evaluate(0)
            self._stopping.enough(self.scores["before"].loss)
        batches = load(
            prepared.train,
            lambda: (micro for window in self.order.windows(1, total) for micro in window.micro_batches),
            prepared.collate,
            config.parallel.data_workers,
            self.accelerator.device.type == "cuda",
        )
        step = Step(
            self.accelerator,
            self.model,
            updates(self.accelerator, self.model, self.optimizer, config.train.max_grad_norm),
            prepared.loss,
            prepared.count,
        )
        self.display.start("training", total)
        self._meter.read()
        fit(step, self.order.windows(1, total), batches, self.schedule.learning_rate, self._after_update)
        self.display.finish()
        if "after" not in self.scores:
            self.scores["after"] = self._evaluate(self.updates_done)
        if config.save.export:
            write_model(self.accelerator, self.model, prepared.tokenizer, self.folder / "export")
            write_probe(self.accelerator, self.model, prepared, self.folder / "probe.safetensors")

    def _after_update(self, window: Window, result: StepResult) -> bool:
        """Record, evaluate and save as configured; True to stop, on every rank alike."""
        config, update = self.plan.config, window.update
        self.updates_done = update
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
            )

    def _evaluate_and_judge(self, update: int) -> bool:
        """Evaluate; True when early stopping has seen enough."""
        score = self._evaluate(update)
        stop = self._stopping.enough(score.loss)
        if stop or update == self.schedule.total:
            self.scores["after"] = score
        if stop and update < self.schedule.total:
            patience = self.plan.config.train.early_stopping_patience
            self.display.say(
                f"stopped early at update {update}: {patience} evaluations in a row without a better validation loss "
                f"than {self._stopping.best:.4f}"
            )
        return stop

    def _evaluate(self, update: int) -> Score:
        self.display.start("evaluating", self.evaluation.size)
        score = self.evaluation(self.model, self.display.advance)
        self.display.finish()
        metrics = self.metrics(score)
        if self.tracker:
            self.tracker.write("eval", update, **metrics, samples=score.counts.samples, targets=score.counts.targets)
        shown = "  ".join(f"{name} {value:,.4f}" for name, value in metrics.items())
        self.display.say(f"update {update:>5}: validation {shown}")
        return score

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
            "run_folder": str(self.folder),
        }
